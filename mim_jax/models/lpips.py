"""LPIPS, a perceptual distance in the features of VGG16 (Zhang et al., CVPR 2018)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""From values in [-1, 1] to those that VGG was trained on."""

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each slice; a 2 x 2 max pool lies between slices."""

SMALLEST_NORM = 1e-4
"""Lower bound of the norm that a feature vector is divided by."""


class LPIPS(nn.Module):
    """Distance between two images, one number for each pair.

    Attributes:
        slices: channels of VGG's convolutions.
        dtype: compute type of convolutions.
    """

    slices: tuple[tuple[int, ...], ...] = VGG16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """float32 `[batch]`: weighted squared differences of normalized features, added up.

        Args:
            first: `[batch, height, width, 3]`, values in [-1, 1].
            second: of the same shape.
        """
        total = jnp.zeros(len(first), jnp.float32)
        both = jnp.concatenate([first, second])
        for i, features in enumerate(self.features(both)):
            features = features.astype(jnp.float32)
            # sqrt has no gradient at zero, where the bound applies anyway.
            square = jnp.sum(features**2, axis=-1, keepdims=True)
            unit = features / jnp.sqrt(jnp.maximum(square, SMALLEST_NORM**2))
            one, other = jnp.split(unit, 2)
            # All weights of a trained head are positive; as many as channels add up to about 1.
            weights = self.param(
                f"head_{i}", nn.initializers.constant(1 / unit.shape[-1]), (unit.shape[-1],)
            )
            total += jnp.mean((one - other) ** 2 @ weights, axis=(1, 2))
        return total

    @nn.nowrap
    def features(self, images: jax.Array) -> list[jax.Array]:
        """Maps after the last ReLU of each slice."""
        x = ((images - jnp.array(SHIFT)) / jnp.array(SCALE)).astype(self.dtype)
        found = []
        for i, widths in enumerate(self.slices):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j, width in enumerate(widths):
                x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv{i}_{j}")(x))
            found.append(x)
        return found
