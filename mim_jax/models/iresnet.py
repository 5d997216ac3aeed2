"""IResNet, the usual network for face recognition (Duta et al., 2021; InsightFace's code)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.resnet import BatchNorm, convolution

IRESNET_SIZES: dict[str, tuple[int, ...]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
"""Blocks in each of the four stages."""


class PReLU(nn.Module):
    """Leaky ReLU with a learned slope for every channel (He et al., 2015)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., channels]` to the same shape."""
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


class IResNetBlock(nn.Module):
    """Norm, 3 x 3 convolution, norm, PReLU, 3 x 3 convolution with the stride, norm; a shortcut.

    Nothing follows the sum. Where stride or channels change, the shortcut is a 1 x 1 convolution
    with a norm.

    Attributes:
        width: channels.
        stride: of the block.
        dtype: compute type.
    """

    width: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, ...]`."""
        branch = BatchNorm(dtype=self.dtype, name="norm1")(x, train)
        branch = convolution(self.width, 3, 1, self.dtype, "conv1")(branch)
        branch = BatchNorm(dtype=self.dtype, name="norm2")(branch, train)
        branch = PReLU(name="prelu")(branch)
        branch = convolution(self.width, 3, self.stride, self.dtype, "conv2")(branch)
        branch = BatchNorm(dtype=self.dtype, name="norm3")(branch, train)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = convolution(self.width, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = BatchNorm(dtype=self.dtype, name="shortcut_norm")(x, train)
        return branch + x


class IResNet(nn.Module):
    """One vector for a face; its direction tells the identity.

    ArcFace freezes the scale of the last norm at one, which is for the trainer to do.

    Attributes:
        image_size: `(height, width)` in pixels.
        channels: channels of the image.
        blocks: in each stage; the first of a stage halves the resolution.
        widths: channels of each stage; the stem has those of the first.
        outputs: size of the vector.
        dtype: compute type of convolutions; statistics are float32.
    """

    image_size: tuple[int, int] = (112, 112)
    channels: int = 3
    blocks: tuple[int, ...] = (3, 13, 30, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    outputs: int = 512
    dtype: Any = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last map."""
        shrink = 2 ** len(self.blocks)
        rows, columns = (-(-side // shrink) for side in self.image_size)
        return rows, columns

    @property
    def flat(self) -> int:
        """Numbers in the last map, which the linear layer takes."""
        return math.prod(self.grid) * self.widths[-1]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Vectors float32 `[batch, outputs]`, not normalized.

        Args:
            images: `[batch, height, width, channels]`, values in [-1, 1].
            train: normalize by the batch and update the collection `batch_stats`.

        Raises:
            ValueError: if the images do not have the size and channels of the model.
        """
        return self.read_out(self.maps(images, train)[-1], train)

    @nn.nowrap
    def maps(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Output of the stem and of every stage."""
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"the face model expects images [batch, {', '.join(map(str, expected))}], got "
                f"{images.shape}; set data.image_size and data.channels to those it was trained "
                "on."
            )
        x = convolution(self.widths[0], 3, 1, self.dtype, "stem_conv")(images.astype(self.dtype))
        x = PReLU(name="stem_prelu")(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train))
        maps = [x]
        for stage, (depth, width) in enumerate(zip(self.blocks, self.widths, strict=True), 1):
            for i in range(depth):
                stride = 1 if i else 2
                block = IResNetBlock(width, stride, self.dtype, name=f"stage{stage}_blocks_{i}")
                x = block(x, train)
            maps.append(x)
        return maps

    @nn.nowrap
    def read_out(self, x: jax.Array, train: bool) -> jax.Array:
        """The vector of the last map."""
        x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # in the order of PyTorch's flattening
        x = nn.Dense(self.outputs, dtype=self.dtype, name="linear")(x)
        return BatchNorm(name="vector_norm")(x, train)


def iresnet_blocks(name: str) -> tuple[int, ...]:
    """Blocks in each stage of a named size.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in IRESNET_SIZES:
        raise ValueError(f"unknown face model {name!r}; known are {', '.join(IRESNET_SIZES)}.")
    return IRESNET_SIZES[name]
