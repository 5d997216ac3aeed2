"""What is cheap on the accelerator: float conversion, normalization, flips; and their inverse."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """`(images / range - mean) / std` in float32, where range is 255 (uint8) or 65535 (uint16).

    Args:
        images: uint8 or uint16 `[batch, height, width, channels]`.
        mean: of each channel, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
    """
    shares = images.astype(jnp.float32) / jnp.iinfo(images.dtype).max
    return (shares - jnp.asarray(mean)) / jnp.asarray(std)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """The inverse of `normalize`: clipped to the valid range and rounded, always uint8."""
    pixels = (images.astype(jnp.float32) * jnp.asarray(std) + jnp.asarray(mean)) * 255
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def random_flip(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image `[batch, height, width, channels]` with probability one half."""
    flipped = jax.random.bernoulli(rng, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)
