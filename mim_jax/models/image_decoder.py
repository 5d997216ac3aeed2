"""Convolutional decoder from a grid of tokens to an image (VQGAN, Esser et al., CVPR 2021)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6
"""Of every GroupNorm."""

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's start of convolutions, uniform in +-1 / sqrt(inputs)."""


def convolution(width: int, side: int, dtype: Any, name: str, bias: bool = True) -> nn.Conv:
    """A convolution of stride 1 that keeps the size."""
    return nn.Conv(
        width, (side, side), use_bias=bias, kernel_init=torch_uniform, dtype=dtype, name=name
    )


def group_norm(groups: int, epsilon: float, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm with float32 statistics, computed in two passes as PyTorch does."""
    return nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """Two normalized 3 x 3 convolutions h(x) and a skip.

    Where the width stays, the result is `x + h(x)`. Where it changes, that of VQGAN is
    `N x + h(x)` with a 1 x 1 convolution N; the official code of Vec2Face applies N to h instead,
    `N h(x) + h(x)`, so that the block has no skip at all, and its released weights depend on it.

    Attributes:
        width: of the result.
        groups: of the norms.
        official_shortcut: take the latter.
        dtype: compute type.
    """

    width: int
    groups: int
    official_shortcut: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to the block's own number of channels."""
        h = x
        for i in (1, 2):
            h = nn.silu(group_norm(self.groups, EPSILON, self.dtype, f"norm{i}")(h))
            h = convolution(self.width, 3, self.dtype, f"conv{i}", bias=False)(h)
        if x.shape[-1] != self.width:
            shortcut = convolution(self.width, 1, self.dtype, "shortcut", bias=False)
            x = shortcut(h if self.official_shortcut else x)
        return x + h


class ImageDecoder(nn.Module):
    """Residual blocks at every resolution, doubled from level to level by its nearest neighbours.

    Attributes:
        channels: of the image.
        widths: channels of each level, that of the full resolution first; there are as many
            doublings as levels but one.
        blocks: residual blocks at each level.
        groups: of the norms; divides every width.
        official_shortcut: see `ResidualBlock`.
        dtype: compute type.
    """

    channels: int
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    groups: int = 32
    official_shortcut: bool = True
    dtype: Any = jnp.float32

    @property
    def upscale(self) -> int:
        """Pixels along a side of the square that a token becomes."""
        return int(2 ** (len(self.widths) - 1))

    def setup(self) -> None:
        """Layers from the deepest level to the image."""
        deepest, levels = self.widths[-1], range(len(self.widths))

        def block(width: int, name: str) -> ResidualBlock:
            return ResidualBlock(width, self.groups, self.official_shortcut, self.dtype, name=name)

        self.conv_in = convolution(deepest, 3, self.dtype, "conv_in")
        self.middle = [block(deepest, f"middle_{i}") for i in (1, 2)]
        self.levels = [
            [block(self.widths[level], f"level{level}_{i}") for i in range(self.blocks)]
            for level in levels
        ]
        self.upsample = [
            convolution(self.widths[level], 3, self.dtype, f"level{level}_upsample")
            for level in levels[1:]
        ]
        self.norm_out = group_norm(self.groups, EPSILON, self.dtype, "norm_out")
        self.conv_out = convolution(self.channels, 3, self.dtype, "conv_out")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The images, float32 `[batch, rows * upscale, columns * upscale, channels]`, unbounded.

        Args:
            tokens: `[batch, rows, columns, inputs]`.
        """
        return self.image(self.before_image(tokens))

    def before_image(self, tokens: jax.Array) -> jax.Array:
        """What the last convolution sees."""
        x = self.conv_in(tokens.astype(self.dtype))
        for block in self.middle:
            x = block(x)
        for level in reversed(range(len(self.widths))):
            for block in self.levels[level]:
                x = block(x)
            if level:
                x = self.upsample[level - 1](jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return nn.silu(self.norm_out(x))

    def image(self, x: jax.Array) -> jax.Array:
        """The last convolution; float32 whatever the compute type."""
        x = self.conv_out(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
