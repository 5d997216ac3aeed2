"""Which tokens a model sees: pure functions on arrays with static output shapes."""

import math
from collections.abc import Callable, Sequence
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
    return masking_of_order(jnp.argsort(noise, axis=1), kept)  # ascending and stable


def masking_of_order(order: jax.Array, kept: int) -> Masking:
    """The masking that keeps the first `kept` tokens of an order, int32 `[batch, tokens]`."""
    restore_ids = jnp.argsort(order, axis=1)
    mask = (restore_ids >= kept).astype(jnp.float32)
    return Masking(order[:, :kept], restore_ids, mask)


def weighted_masking(exponential: jax.Array, weights: jax.Array, kept: int) -> Masking:
    """Keeps tokens drawn one after another without replacement, each in proportion to its weight.

    The order by `exponential / weights` has that law; it is the Gumbel top-k order of the log
    weights (Efraimidis and Spirakis, 2006; used by MaskAlign and by point-cloud MAEs).

    Args:
        exponential: `[batch, tokens]`, draws of Exp(1).
        weights: `[batch, tokens]`, not negative; need not add up to 1. Tokens of weight zero
            come last.
        kept: number of visible tokens.
    """
    weights = weights.astype(jnp.float32)
    time = jnp.where(weights > 0, exponential / jnp.where(weights > 0, weights, 1), jnp.inf)
    return masking_of_order(jnp.argsort(time, axis=1), kept)


def complementary_views(noise: jax.Array, views: int) -> Masking:
    """Masks that show every token in exactly one of several views (FastConvMAE).

    The random order is cut into equal parts; view k shows the k-th.

    Args:
        noise: `[batch, tokens]`, uniform in [0, 1).
        views: number of parts.

    Returns:
        A masking of `batch * views` samples: all views of the first image, then all of the
        second, and so on, so that a batch can be sharded over devices.

    Raises:
        ValueError: if the parts cannot be equal.
    """
    tokens = noise.shape[1]
    if views < 1 or tokens % views:
        raise ValueError(f"{tokens} tokens cannot be cut into {views} equal views.")
    kept = tokens // views
    order = jnp.argsort(noise, axis=1)
    orders = [jnp.roll(order, -view * kept, axis=1) for view in range(views)]
    return masking_of_order(jnp.stack(orders, axis=1).reshape(-1, tokens), kept)


def disjoint_counts(units: int, mask_ratio: float, prediction_ratio: float) -> tuple[int, int]:
    """How many of `units` tokens or blocks a view of `disjoint_masking` shows, and swaps.

    Returns:
        The number of visible units in each view, and how many of those visible in the first view
        are masked in the second, `floor(min(prediction_ratio - mask_ratio, mask_ratio) * units)`.

    Raises:
        ValueError: as `num_kept`, or if the prediction ratio does not lie in [mask_ratio, 1].
    """
    kept = num_kept(units, mask_ratio)
    if not mask_ratio <= prediction_ratio <= 1:
        raise ValueError(
            f"prediction_ratio is {prediction_ratio}; it must lie between mask_ratio {mask_ratio} "
            "and 1."
        )
    return kept, int(min(prediction_ratio - mask_ratio, mask_ratio) * units)


def disjoint_masking(
    noise: jax.Array,
    visible_order: jax.Array,
    masked_order: jax.Array,
    swapped: int,
    block_grid: tuple[int, int] | None = None,
) -> Masking:
    """Two views of each image whose masks together cover more than one of them (DMJD).

    The second view masks `swapped` of the units that the first one shows, and shows as many that
    the first one masks. With `swapped` equal to the number of visible units, the views show
    nothing in common and every unit is masked at least once. A unit is a token, or a block of
    2 x 2 tokens.

    Args:
        noise: `[batch, units]`, uniform in [0, 1).
        visible_order: a permutation of as many units as a view shows, one for the whole batch.
        masked_order: a permutation of the other units, one for the whole batch.
        swapped: see `disjoint_counts`.
        block_grid: blocks along height and width, if units are blocks; see `block_tokens`.

    Returns:
        A masking of `batch * 2` samples: both views of the first image, then both of the second,
        and so on, so that a batch can be sharded over devices. Tokens of blocks are in the order
        of the official code: top left ones of all visible blocks, top right, bottom left, bottom
        right; then those of the masked blocks.
    """
    kept = visible_order.shape[0]
    first = jnp.argsort(noise, axis=1)
    shown, hidden = first[:, :kept][:, visible_order], first[:, kept:][:, masked_order]
    masked = hidden.shape[1] - swapped
    second = jnp.concatenate(
        [shown[:, swapped:], hidden[:, masked:], shown[:, :swapped], hidden[:, :masked]], axis=1
    )
    order = jnp.stack([first, second], axis=1).reshape(-1, noise.shape[1])  # [B * 2, units]
    if block_grid is None:
        return masking_of_order(order, kept)
    parts = [block_tokens(part, block_grid) for part in (order[:, :kept], order[:, kept:])]
    return masking_of_order(jnp.concatenate(parts, axis=1), 4 * kept)


def block_grid(grid: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of 2 x 2 tokens along height and width of a token grid.

    Raises:
        ValueError: if a side of the grid is odd.
    """
    rows, columns = grid
    if rows % 2 or columns % 2:
        raise ValueError(
            f"a grid of {rows} x {columns} tokens cannot be cut into blocks of 2 x 2; choose image "
            "and patch size so that both sides are even, or mask single tokens."
        )
    return rows // 2, columns // 2


def block_tokens(blocks: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Ids of the tokens of 2 x 2 blocks: `[batch, blocks]` -> `[batch, 4 * blocks]`.

    Top left tokens of all blocks come first, then top right, bottom left and bottom right ones.

    Args:
        blocks: ids of blocks.
        grid: blocks along height and width; the token grid has twice as many.
    """
    columns = grid[1]
    corner = 4 * columns * (blocks // columns) + 2 * (blocks % columns)
    return jnp.concatenate([corner + 2 * columns * i + j for i in (0, 1) for j in (0, 1)], axis=1)


Draw = Callable[[jax.Array], jax.Array]
"""From the number of an attempt (0, 1, ...) to its four random numbers, uniform in [0, 1)."""


def uniform_draws(rng: jax.Array) -> Draw:
    """Attempts of one image, from one key."""
    return lambda attempt: jax.random.uniform(jax.random.fold_in(rng, attempt), (4,))


MAX_ATTEMPTS = 10_000
"""Attempts of `block_mask`; the published settings take some dozens."""


def block_mask(
    draw: Draw,
    grid: tuple[int, ...],
    masked: int,
    *,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
) -> jax.Array:
    """Masks rectangles of one image until an exact number of tokens is masked (CAE).

    An attempt draws area, aspect and place of a rectangle. It counts if the rectangle is smaller
    than the grid on both sides, and masks something new but not too much. If `MAX_ATTEMPTS` do
    not suffice, because grid and blocks hardly fit together, the first tokens that are not yet
    masked make up the rest.

    Args:
        draw: random numbers of every attempt: for area, aspect, top and left.
        grid: tokens along height and width.
        masked: number of tokens to mask.
        min_block: smallest area that is drawn; a rest that is smaller is drawn as well.
        max_block: largest area; None for `masked`.
        min_aspect: smallest ratio of height to width; its inverse is the largest.

    Returns:
        float32 `[tokens]`, 1 where a token is masked.

    Raises:
        ValueError: if the number is not between 1 and all but one token, or the grid has one row
            or column only.
    """
    rows, columns = grid
    if min(grid) < 2 or not 0 < masked < rows * columns:
        raise ValueError(
            f"blocks of {masked} tokens cannot be masked on a grid of {rows} x {columns}; it must "
            f"have at least 2 rows and columns, and the number lie between 1 and "
            f"{rows * columns - 1}."
        )
    row, column = jnp.arange(rows)[:, None], jnp.arange(columns)[None, :]
    log_aspect = math.log(min_aspect)

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        attempt, mask = state
        return (mask.sum() < masked) & (attempt < MAX_ATTEMPTS)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        attempt, mask = state
        uniform = draw(attempt)
        # The official code caps a try of ten attempts at what is left; as a failed try changes
        # nothing, the cap of every attempt is what is left at that moment.
        cap = jnp.minimum(masked - mask.sum(), masked if max_block is None else max_block)
        area = min_block + uniform[0] * (cap - min_block)
        aspect = jnp.exp(log_aspect - 2 * log_aspect * uniform[1])
        height = jnp.round(jnp.sqrt(area * aspect))  # half to even, as in Python
        width = jnp.round(jnp.sqrt(area / aspect))
        top = jnp.floor(uniform[2] * (rows - height + 1))
        left = jnp.floor(uniform[3] * (columns - width + 1))
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        new = (inside & ~mask).sum()
        counts = (height < rows) & (width < columns) & (new > 0) & (new <= cap)
        return attempt + 1, mask | (inside & counts)

    start = (jnp.int32(0), jnp.zeros(grid, bool))
    mask = jax.lax.while_loop(unfinished, step, start)[1].reshape(-1)
    rest = ~mask & (jnp.cumsum(~mask) <= masked - mask.sum())
    return (mask | rest).astype(jnp.float32)


def block_masking(
    rng: jax.Array,
    batch: int,
    grid: tuple[int, ...],
    masked: int,
    *,
    min_block: int = 16,
    max_block: int | None = None,
) -> jax.Array:
    """A `block_mask` for every image: float32 `[batch, tokens]`, 1 where a token is masked."""

    def one(key: jax.Array) -> jax.Array:
        draw = uniform_draws(key)
        return block_mask(draw, grid, masked, min_block=min_block, max_block=max_block)

    return jax.vmap(one)(jax.random.split(rng, batch))


def split_by_mask(mask: jax.Array, masked: int) -> tuple[jax.Array, jax.Array]:
    """Ids of visible and of masked tokens, both in raster order.

    Args:
        mask: `[batch, tokens]`, 1 at exactly `masked` tokens of every sample, else 0.
        masked: that number.

    Returns:
        int32 `[batch, tokens - masked]` and `[batch, masked]`.
    """
    order = jnp.argsort(mask, axis=1, stable=True)
    visible = mask.shape[1] - masked
    return order[:, :visible], order[:, visible:]


class NestedMasking(NamedTuple):
    """Masked tokens, some of which are dropped as well, for every sample of a batch (MAGE).

    Attributes:
        keep_ids: int32 `[batch, kept]`, positions of the tokens that are not dropped, ascending.
        restore_ids: int32 `[batch, tokens]`, for each position its place among the kept ones
            followed by the dropped ones.
        mask: float32 `[batch, tokens]`, 1 where a token is masked; every dropped one is.
    """

    keep_ids: jax.Array
    restore_ids: jax.Array
    mask: jax.Array


def nested_masking(noise: jax.Array, dropped: int, masked: jax.Array | int) -> NestedMasking:
    """Masks the tokens with the smallest noise, and drops the first of them.

    Args:
        noise: `[batch, tokens]`, uniform in [0, 1).
        dropped: number of dropped tokens, static.
        masked: number of masked tokens, at least `dropped`; may depend on the step.
    """
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    keep_ids, drop_ids = split_by_mask((rank < dropped).astype(jnp.float32), dropped)
    restore_ids = jnp.argsort(jnp.concatenate([keep_ids, drop_ids], axis=1), axis=1)
    return NestedMasking(keep_ids, restore_ids, (rank < masked).astype(jnp.float32))


class MaskRate(NamedTuple):
    """A normal distribution truncated to an interval, from which a share of tokens is drawn.

    Attributes:
        low: smallest share, in [0, 1].
        high: largest share, in (low, 1].
        mean: of the normal distribution before truncation.
        deviation: its standard deviation.
    """

    low: float
    high: float
    mean: float
    deviation: float = 0.25

    def draw(self, uniform: jax.Array) -> jax.Array:
        """The shares of given quantiles, by the inverse distribution function.

        Args:
            uniform: in [0, 1), of any shape.
        """
        below, above = (
            jax.scipy.special.ndtr((bound - self.mean) / self.deviation)
            for bound in (self.low, self.high)
        )
        normal = jax.scipy.special.ndtri(below + uniform * (above - below))
        return jnp.clip(self.mean + self.deviation * normal, self.low, self.high)

    def smallest(self, tokens: int) -> int:
        """The smallest number of tokens that a drawn share stands for, rounded up."""
        return math.ceil(tokens * self.low)


def rounded_up(share: jax.Array, tokens: int) -> jax.Array:
    """Number of tokens of a share, rounded up: int32 of the same shape."""
    return jnp.ceil(tokens * share).astype(jnp.int32)


def enlarge_mask(mask: jax.Array, grid: tuple[int, int], factor: int) -> jax.Array:
    """A token mask `[batch, tokens]` on a finer grid, `[batch, rows * factor, columns * factor]`.

    Every value is repeated `factor` times along both sides (ConvMAE's stages, pixels).
    """
    cells = mask.reshape(-1, *grid)
    return jnp.repeat(jnp.repeat(cells, factor, axis=1), factor, axis=2)


def uniform_kept(noise: jax.Array) -> jax.Array:
    """Which tokens are kept, when the share of kept tokens is uniform in [0, 1] (MaskEmbed).

    Args:
        noise: `[rows, 1 + tokens]`, uniform in [0, 1). A token is kept if its noise is above the
            first of its row.

    Returns:
        float32 `[rows, tokens]`, 1 where a token is KEPT.
    """
    return (noise[:, 1:] > noise[:, :1]).astype(jnp.float32)


def bernoulli_kept(noise: jax.Array, share: float) -> jax.Array:
    """Keeps every token independently with probability `share` (MaskEmbed, ablation).

    Args:
        noise: `[rows, tokens]`, uniform in [0, 1).
        share: expected share of kept tokens.

    Returns:
        float32 `[rows, tokens]`, 1 where a token is KEPT.
    """
    return (noise < share).astype(jnp.float32)


def blockwise_kept(
    draw: Draw, grid: tuple[int, ...], *, share: float = 0.4, min_block: int = 16
) -> jax.Array:
    """Keeps rectangles of one image until a share of its tokens is kept (MaskEmbed, ablation).

    The last rectangle is kept whole, so the share is usually passed.

    Args:
        draw: random numbers of every rectangle: for area, aspect, top and left.
        grid: tokens along height and width.
        share: least share of kept tokens; `int(share * tokens)` bounds the area of a rectangle.
        min_block: smallest area.

    Returns:
        float32 `[tokens]`, 1 where a token is KEPT.

    Raises:
        ValueError: if the largest area is not above the smallest.
    """
    rows, columns = grid
    max_block = int(share * rows * columns)
    if not 0 < min_block < max_block:
        raise ValueError(
            f"share {share} of {rows} x {columns} tokens bounds a block to {max_block}, but "
            f"min_block is {min_block}; lower it or enlarge the grid."
        )
    wanted = math.ceil(round(share * rows * columns, 6))
    row, column = jnp.arange(rows)[:, None], jnp.arange(columns)[None, :]

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return state[1].sum() < wanted

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        attempt, kept = state
        uniform = draw(attempt)
        area = jnp.floor(min_block + uniform[0] * (max_block - min_block))
        aspect = 0.3 + uniform[1] * (1 / 0.3 - 0.3)
        height = jnp.clip(jnp.floor(jnp.sqrt(area / aspect)), 1, rows)
        width = jnp.minimum(jnp.floor(area / height), columns)
        top = jnp.floor(uniform[2] * (rows - height + 1))
        left = jnp.floor(uniform[3] * (columns - width + 1))
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        return attempt + 1, kept | inside

    start = (jnp.int32(0), jnp.zeros(grid, bool))
    kept = jax.lax.while_loop(unfinished, step, start)[1]
    return kept.reshape(-1).astype(jnp.float32)


def mask_triples(
    kept: jax.Array, *, complement: bool = True, null: bool = True, null_value: float = 1.0
) -> jax.Array:
    """Every random mask, its complement, and the null mask that hides nothing (MaskEmbed).

    Args:
        kept: `[batch, tokens]`, 1 where a token is kept.
        complement: add the complement.
        null: add the null mask.
        null_value: of the null mask. The official block-wise sampler leaves zeros there, which
            hide everything.

    Returns:
        `[rows * batch, tokens]` with 1 to 3 rows for each image, those of an image together.
    """
    rows = [kept]
    if complement:
        rows.append(1 - kept)
    if null:
        rows.append(jnp.full_like(kept, null_value))
    return jnp.stack(rows, axis=1).reshape(-1, kept.shape[1])


def for_views(x: jax.Array, views: int) -> jax.Array:
    """Each row once for every view of its image: `[batch, ...]` -> `[batch * views, ...]`."""
    return x if views == 1 else jnp.repeat(x, views, axis=0)


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
