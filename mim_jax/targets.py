"""What a model predicts: pure functions from images to targets, and back to pictures."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mim_jax.masking import token_grid


def patchify(images: jax.Array, patch_size: Sequence[int]) -> jax.Array:
    """Cuts images `[batch, height, width, channels]` into patches `[batch, tokens, values]`.

    Patches are in row-major order; the values of a patch are in the order (row, column, channel)
    (MAE, official code), so `values = patch_height * patch_width * channels`. Volumes
    `[batch, height, width, depth, channels]` are cut by three numbers in the same way.
    """
    grid = token_grid(images.shape[1:-1], patch_size)
    axes = len(grid)
    sides = [side for pair in zip(grid, patch_size, strict=True) for side in pair]
    blocks = images.reshape(images.shape[0], *sides, images.shape[-1])
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return blocks.transpose(order).reshape(images.shape[0], math.prod(grid), -1)


def unpatchify(
    patches: jax.Array, image_size: Sequence[int], patch_size: Sequence[int]
) -> jax.Array:
    """Inverse of `patchify`: `[batch, tokens, values]` -> `[batch, *image_size, channels]`."""
    grid = token_grid(image_size, patch_size)
    axes = len(grid)
    blocks = patches.reshape(patches.shape[0], *grid, *patch_size, -1)
    pairs = [axis for i in range(1, axes + 1) for axis in (i, axes + i)]
    return blocks.transpose(0, *pairs, 2 * axes + 1).reshape(patches.shape[0], *image_size, -1)


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


def hog(images: jax.Array, cell_size: int = 8, bins: int = 9) -> jax.Array:
    """Histograms of oriented gradients, as DMJD takes them (official code).

    Gradients are differences of the two neighbours along an axis, zero at its ends. The magnitude
    of every pixel goes into the bin of its angle modulo 180 degrees; a cell's histogram is the sum
    over its pixels, divided by their number. There is no interpolation between bins and no
    normalization of blocks.

    Args:
        images: `[batch, height, width, channels]` in 0..255.
        cell_size: side of a cell in pixels.
        bins: number of orientations in [0, 180) degrees.

    Returns:
        float32 `[batch, cell_rows, cell_columns, bins, channels]`.

    Raises:
        ValueError: if the cells do not tile the images.
    """
    batch, height, width, channels = images.shape
    rows, columns = token_grid((height, width), (cell_size, cell_size))
    values = images.astype(jnp.float32)
    inner = ((0, 0), (1, 1), (0, 0), (0, 0))
    down = jnp.pad(values[:, 2:] - values[:, :-2], inner)
    inner = ((0, 0), (0, 0), (1, 1), (0, 0))
    right = jnp.pad(values[:, :, 2:] - values[:, :, :-2], inner)
    magnitude = jnp.sqrt(down**2 + right**2)
    # Where nothing changes along the height the angle is 0 or 180, which is the same orientation;
    # computed, the latter may come out just below 180, in the last bin.
    degrees = jnp.where(down == 0, 0, jnp.rad2deg(jnp.arctan2(down, right)) % 180)
    place = jnp.minimum(jnp.floor(degrees / (180 / bins)), bins - 1)

    def cell_mean(pixels: jax.Array) -> jax.Array:
        cells = pixels.reshape(batch, rows, cell_size, columns, cell_size, channels)
        return cells.mean(axis=(2, 4))

    return jnp.stack([cell_mean(jnp.where(place == k, magnitude, 0)) for k in range(bins)], axis=-2)


def hog_tokens(histograms: jax.Array, cells: int = 2) -> jax.Array:
    """Standardized histograms of every token (DMJD, official code).

    Args:
        histograms: `[batch, cell_rows, cell_columns, bins, channels]` of `hog`.
        cells: cells along each side of a token.

    Returns:
        `[batch, tokens, cells * cells * bins * channels]`, tokens in row-major order, values in
        the order (cell row, cell column, orientation, channel). Every histogram has mean 0 and
        variance 1 over its bins; one without any gradient is 0.
    """
    whitened = whiten(histograms, axis=-2)
    return patchify(whitened.reshape(*whitened.shape[:3], -1), (cells, cells))


def whiten(features: jax.Array, epsilon: float = 1e-5, axis: int = -1) -> jax.Array:
    """Zero mean and unit (biased) variance along one axis: LayerNorm without scale and bias."""
    features = features.astype(jnp.float32)
    mean = features.mean(axis=axis, keepdims=True)
    variance = features.var(axis=axis, keepdims=True)
    return (features - mean) / jnp.sqrt(variance + epsilon)


def unit_length(features: jax.Array) -> jax.Array:
    """Vectors along the last axis divided by their length, in float32; zero stays zero."""
    features = features.astype(jnp.float32)
    squares = jnp.sum(features**2, axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def batch_normalized(features: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Features minus their mean, by their deviation, both over the whole array (MaskAlign, `bn`).

    The variance is unbiased. Array axes that are sharded over devices count as a whole.
    """
    features = features.astype(jnp.float32)
    return (features - features.mean()) / jnp.sqrt(features.var(ddof=1) + epsilon)
