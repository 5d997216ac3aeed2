"""Which tokens a model sees: pure functions on arrays with static output shapes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Masking(NamedTuple):
    """One random choice of visible tokens for every sample of a batch.

    Attributes:
        keep_ids: int32 `[batch, kept]`, positions of the visible tokens in drawn order.
        restore_ids: int32 `[batch, tokens]`, for each position its place in the drawn order.
        mask: float32 `[batch, tokens]`, 1 where a token is removed and 0 where it is visible.
    """

    keep_ids: jax.Array
    restore_ids: jax.Array
    mask: jax.Array


def num_kept(tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens, `int(tokens * (1 - mask_ratio))`, truncated as in the MAE code.

    The product is taken in floating point before it is truncated: 10 tokens at ratio 0.9 leave
    `int(0.9999...) = 0`.

    Raises:
        ValueError: if the ratio is not strictly between 0 and 1, leaves no token, or removes none.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must lie strictly between 0 and 1.")
    kept = int(tokens * (1 - mask_ratio))
    if kept == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves none of {tokens} tokens visible; lower the ratio, "
            "enlarge the image or use smaller patches."
        )
    if kept == tokens:
        raise ValueError(
            f"mask_ratio {mask_ratio} removes none of {tokens} tokens; raise the ratio, "
            "enlarge the image or use smaller patches."
        )
    return kept


def random_masking(noise: jax.Array, kept: int) -> Masking:
    """Keeps the tokens with the smallest noise in every sample (MAE, section 3).

    Args:
        noise: `[batch, tokens]`, uniform in [0, 1).
        kept: number of visible tokens.
    """
    order = jnp.argsort(noise, axis=1)  # [B, L], ascending and stable
    restore_ids = jnp.argsort(order, axis=1)
    mask = (restore_ids >= kept).astype(jnp.float32)
    return Masking(order[:, :kept], restore_ids, mask)


def gather_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Picks tokens `[batch, tokens, width]` by ids `[batch, kept]` -> `[batch, kept, width]`."""
    # `batch` dimensions in the gather keep it local to a device when the batch is sharded.
    return jnp.take_along_axis(tokens, ids[..., None], axis=1, mode="clip")


def restore_tokens(visible: jax.Array, mask_token: jax.Array, restore_ids: jax.Array) -> jax.Array:
    """Puts visible tokens back in their places and a mask token everywhere else.

    Args:
        visible: `[batch, kept, width]` in drawn order.
        mask_token: broadcastable to `[batch, tokens - kept, width]`.
        restore_ids: `[batch, tokens]`.

    Returns:
        `[batch, tokens, width]`.
    """
    batch, kept, width = visible.shape
    filler = jnp.broadcast_to(mask_token, (batch, restore_ids.shape[1] - kept, width))
    drawn_order = jnp.concatenate([visible, filler.astype(visible.dtype)], axis=1)
    return gather_tokens(drawn_order, restore_ids)


def token_grid(image_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis of an image, for example `(14, 14)` for 224 pixels and patch 16.

    Raises:
        ValueError: if a side of the image is no multiple of the patch, or a side of the patch is
            not positive.
    """
    if len(image_size) != len(patch_size):
        raise ValueError(
            f"image_size {tuple(image_size)} and patch_size {tuple(patch_size)} must have the "
            "same number of axes."
        )
    if min(patch_size) < 1:
        raise ValueError(f"patch_size is {tuple(patch_size)}; every side must be at least 1 pixel.")
    if any(size % patch or size < patch for size, patch in zip(image_size, patch_size)):
        nearest = tuple(
            max(1, round(size / patch)) * patch for size, patch in zip(image_size, patch_size)
        )
        raise ValueError(
            f"image_size {tuple(image_size)} is not divisible by patch_size {tuple(patch_size)}; "
            f"the nearest size that fits is {nearest}."
        )
    return tuple(size // patch for size, patch in zip(image_size, patch_size))


def num_tokens(image_size: Sequence[int], patch_size: Sequence[int]) -> int:
    """Number of patches in an image."""
    return math.prod(token_grid(image_size, patch_size))
