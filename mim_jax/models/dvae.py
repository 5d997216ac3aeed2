"""The encoder of DALL-E's discrete VAE (Ramesh et al., 2021): images as a grid of token ids."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

GROUPS = 4
"""Groups of residual blocks; a 2 x 2 max pool follows all but the last."""

STRIDE = 2 ** (GROUPS - 1)
"""Pixels along a side of the square that becomes a token."""

LAPLACE_EPSILON = 0.1


def logit_laplace_map(images: jax.Array) -> jax.Array:
    """Values in [0, 1] moved into [0.1, 0.9], where the VAE's likelihood is defined.

    `(1 - 2 * epsilon) * x + epsilon` (official `map_pixels`; Ramesh et al., appendix A.3).
    """
    return (1 - 2 * LAPLACE_EPSILON) * images + LAPLACE_EPSILON


def convolution(features: int, side: int, dtype: Any, name: str) -> nn.Conv:
    """A convolution with zero padding; it starts as the official one, of variance 1 / inputs."""
    return nn.Conv(
        features,
        (side, side),
        kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
        dtype=dtype,
        name=name,
    )


class ResidualBlock(nn.Module):
    """`id(x) + scale * res(x)`: four convolutions, each after a ReLU, at a quarter of the width.

    Attributes:
        features: channels of the result.
        scale: factor on the residual branch.
        dtype: compute type.
    """

    features: int
    scale: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height, width, features]`."""
        identity = x
        if x.shape[-1] != self.features:
            identity = convolution(self.features, 1, self.dtype, "identity")(x)
        for i in (1, 2, 3):
            x = convolution(self.features // 4, 3, self.dtype, f"conv_{i}")(nn.relu(x))
        x = convolution(self.features, 1, self.dtype, "conv_4")(nn.relu(x))
        return identity + self.scale * x


class Group(nn.Module):
    """Residual blocks of one width, and a 2 x 2 max pool where `pool` is set."""

    features: int
    blocks: int
    scale: float
    pool: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `features` channels, pooled or not."""
        for i in range(1, self.blocks + 1):
            x = ResidualBlock(self.features, self.scale, self.dtype, name=f"block_{i}")(x)
        return nn.max_pool(x, (2, 2), strides=(2, 2)) if self.pool else x


class DVAEEncoder(nn.Module):
    """Logits over a vocabulary for every 8 x 8 pixels (official `dall_e/encoder.py`).

    Attributes:
        hidden: channels of the first group; they double from one group to the next.
        blocks_per_group: residual blocks in each of the four groups.
        vocabulary: number of tokens.
        channels: channels of the images.
        dtype: compute type of all but the last convolution, which is float32.
    """

    hidden: int = 256
    blocks_per_group: int = 2
    vocabulary: int = 8192
    channels: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes images that `logit_laplace_map` has mapped.

        Args:
            images: `[batch, height, width, channels]`.

        Returns:
            float32 `[batch, height / 8, width / 8, vocabulary]`.

        Raises:
            ValueError: for another number of channels, or a side that is no multiple of 8.
        """
        height, width, channels = images.shape[1:]
        if channels != self.channels or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"the tokenizer expects images of {self.channels} channels whose sides are "
                f"multiples of {STRIDE}, got {height} x {width} x {channels}."
            )
        scale = 1 / (GROUPS * self.blocks_per_group) ** 2
        x = convolution(self.hidden, 7, self.dtype, "input")(images)
        for i in range(GROUPS):
            x = Group(
                self.hidden * 2**i,
                self.blocks_per_group,
                scale,
                i < GROUPS - 1,
                self.dtype,
                name=f"group_{i + 1}",
            )(x)
        return convolution(self.vocabulary, 1, jnp.float32, "output")(nn.relu(x))


def token_ids(encoder: DVAEEncoder, params: Any, images: jax.Array) -> jax.Array:
    """The most probable token of every 8 x 8 pixels, int32 `[batch, tokens]` in row-major order.

    Args:
        encoder: the tokenizer.
        params: its parameters.
        images: `[batch, height, width, channels]` in [0, 1]; a grey image is repeated for a
            tokenizer of colours.
    """
    images = jnp.broadcast_to(images, (*images.shape[:-1], encoder.channels))
    logits: Any = encoder.apply({"params": params}, logit_laplace_map(images))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32).reshape(len(images), -1)
