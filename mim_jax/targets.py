"""What a model predicts: pure functions from images to targets, and back to pictures."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mim_jax.masking import token_grid


def patchify(images: jax.Array, patch_size: Sequence[int]) -> jax.Array:
    """Cuts images `[batch, height, width, channels]` into patches `[batch, tokens, values]`.

    Patches are in row-major order; the values of a patch are in the order (row, column, channel)
    (MAE, official code), so `values = patch_height * patch_width * channels`.
    """
    batch, height, width, channels = images.shape
    rows, columns = token_grid((height, width), patch_size)
    patch_height, patch_width = patch_size
    blocks = images.reshape(batch, rows, patch_height, columns, patch_width, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(
    patches: jax.Array, image_size: Sequence[int], patch_size: Sequence[int]
) -> jax.Array:
    """Inverse of `patchify`: `[batch, tokens, values]` -> `[batch, height, width, channels]`."""
    rows, columns = token_grid(image_size, patch_size)
    patch_height, patch_width = patch_size
    blocks = patches.reshape(patches.shape[0], rows, columns, patch_height, patch_width, -1)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(patches.shape[0], *image_size, -1)


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of every patch, each `[batch, tokens, 1]`.

    The variance is unbiased (divided by `values - 1`) and 1e-6 is added to it before the root,
    as in the official MAE code.
    """
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + 1e-6)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """Patches `[batch, tokens, values]` with zero mean and unit variance each (MAE, section 3)."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def denormalize_patches(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Gives predicted normalized patches the statistics of the true patches, for pictures.

    Args:
        prediction: `[batch, tokens, values]`, in units of the patch's own deviation.
        target: `[batch, tokens, values]`, the true patches before normalization.
    """
    mean, deviation = patch_statistics(target)
    return prediction * deviation + mean
