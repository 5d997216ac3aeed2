"""Discriminator whose every logit judges a patch of the image (Isola et al., CVPR 2017).

The variant of Vec2Face (Wu et al., ICLR 2025), from parti-pytorch: a stem with kernels of several
sizes, and stages with a residual unit.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.image_decoder import group_norm, torch_uniform

SLOPE = 0.1
"""Of every leaky ReLU below zero."""

STEM_KERNELS = (3, 7, 15)

HEAD_KERNEL = 4
"""Side of the last convolution, which is not padded."""

EPSILON = 1e-5
"""Of every GroupNorm."""


def stem_widths(width: int) -> tuple[int, ...]:
    """Channels of the stem's convolutions: a half, a quarter, and the rest."""
    return width // 2, width // 4, width - width // 2 - width // 4


class PatchDiscriminator(nn.Module):
    """Logits of patches, high where they look real.

    Attributes:
        widths: channels of the stem, and of every stage, each of which halves the resolution.
        groups: of the norms.
        dtype: compute type.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float32 `[batch, rows, columns, 1]`.

        Args:
            images: `[batch, height, width, channels]`, values in [-1, 1].

        Raises:
            ValueError: if the images are too small for the stages.
        """
        shrink = 2 ** (len(self.widths) - 1)
        if min(side // shrink for side in images.shape[1:3]) < HEAD_KERNEL:
            raise ValueError(
                f"{len(self.widths) - 1} stages of the discriminator leave fewer than "
                f"{HEAD_KERNEL} x {HEAD_KERNEL} positions of images of {images.shape[1]} x "
                f"{images.shape[2]} pixels; give model.discriminator_widths fewer of them."
            )

        def conv(width: int, side: int, name: str, stride: int = 1, pad: int = 0) -> nn.Conv:
            return nn.Conv(
                width,
                (side, side),
                (stride, stride),
                padding=pad,
                kernel_init=torch_uniform,
                dtype=self.dtype,
                name=name,
            )

        def activated(x: jax.Array) -> jax.Array:
            return nn.leaky_relu(x, SLOPE)

        x = images.astype(self.dtype)
        stem = zip(STEM_KERNELS, stem_widths(self.widths[0]))
        parts = [conv(w, side, f"stem_{side}", pad=side // 2)(x) for side, w in stem]
        x = activated(jnp.concatenate(parts, axis=-1))
        for i, width in enumerate(self.widths[1:], 1):
            x = activated(conv(width, 4, f"stage{i}_conv", stride=2, pad=1)(x))
            x = group_norm(self.groups, EPSILON, self.dtype, f"stage{i}_norm")(x)
            unit = group_norm(self.groups, EPSILON, self.dtype, f"stage{i}_unit_norm")(x)
            x = x + conv(width, 3, f"stage{i}_unit_conv", pad=1)(activated(unit))
        x = activated(conv(self.widths[-1], 1, "head_conv")(x))
        x = conv(1, HEAD_KERNEL, "logits")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
