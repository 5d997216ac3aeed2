import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax import masking
from mim_jax.masking import (
    bernoulli_kept,
    block_mask,
    block_masking,
    blockwise_kept,
    enlarge_mask,
    mask_triples,
    split_by_mask,
    uniform_draws,
    uniform_kept,
)

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)

# Every new shape costs a compilation: grid, masked, smallest and largest block.
BLOCKS = [((14, 14), 98, 16, None), ((6, 10), 20, 4, 8), ((4, 4), 15, 2, None)]


@functools.cache
def masks_of(setting):
    grid, masked, smallest, largest = setting
    call = functools.partial(block_masking, batch=16, grid=grid, masked=masked)
    return jax.jit(lambda key: call(key, min_block=smallest, max_block=largest))


@few
@given(st.sampled_from(BLOCKS), seeds)
def test_every_image_has_exactly_the_wanted_number_of_masked_tokens(setting, seed):
    mask = np.asarray(masks_of(setting)(jax.random.key(seed)))
    (rows, columns), masked, _, _ = setting
    assert mask.shape == (16, rows * columns)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(mask.sum(axis=1), masked)


def test_images_of_a_batch_are_masked_differently_and_a_key_always_alike():
    call = masks_of(BLOCKS[0])
    mask = np.asarray(call(jax.random.key(0)))
    assert len(np.unique(mask, axis=0)) == 16
    np.testing.assert_array_equal(call(jax.random.key(0)), mask)
    assert np.any(np.asarray(call(jax.random.key(1))) != mask)


def test_masked_tokens_lie_together():
    mask = np.asarray(masks_of(BLOCKS[0])(jax.random.key(5))).reshape(-1, 14, 14)
    neighbours = (mask[:, :, 1:] == mask[:, :, :-1]).mean()
    # Half of all pairs agree if tokens are masked one by one.
    assert neighbours > 0.75


def test_the_middle_is_masked_more_often_than_the_corners_and_sides_are_alike():
    keys = jax.random.split(jax.random.key(1), 40)
    share = np.mean([masks_of(BLOCKS[0])(key) for key in keys], axis=(0, 1)).reshape(14, 14)
    corners = share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert share[5:9, 5:9].mean() > corners + 0.1
    np.testing.assert_allclose(share[0].mean(), share[-1].mean(), atol=0.06)
    np.testing.assert_allclose(share[:, 0].mean(), share[0].mean(), atol=0.06)


def scripted(*attempts):
    table = jnp.asarray([[*attempt, *[0.0] * (4 - len(attempt))] for attempt in attempts])
    return lambda attempt: table[attempt]


def test_a_rectangle_too_large_for_what_is_left_is_drawn_again():
    # Aspect 1 is at 0.5. Area 4 of cap 4: 2 x 2 at the top left; then the cap is 1, and another
    # 2 x 2 masks too much; area 1 (the cap, below the smallest block) fits.
    draw = scripted((0.0, 0.5, 0.0, 0.0), (0.0, 0.5, 0.99, 0.99), (0.999, 0.5, 0.99, 0.99))
    mask = block_mask(draw, (5, 5), 5, min_block=4)
    expected = np.zeros((5, 5))
    expected[:2, :2], expected[4, 4] = 1, 1
    np.testing.assert_array_equal(mask, expected.reshape(-1))


def test_a_rectangle_as_high_as_the_grid_does_not_count():
    # Area 9 of cap 9 is 3 x 3, as high as the grid.
    draw = scripted((0.99, 0.5, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0), *[(0.0, 0.5, 0.99, 0.99)] * 3)
    mask = np.asarray(block_mask(draw, (3, 6), 9, min_block=4)).reshape(3, 6)
    assert mask[0, 0] == 1
    assert mask[2, 0] == 0


def test_blocks_that_never_fit_are_filled_up_in_raster_order(monkeypatch):
    monkeypatch.setattr(masking, "MAX_ATTEMPTS", 50)
    mask = block_mask(uniform_draws(jax.random.key(0)), (2, 2), 3, min_block=64)
    np.testing.assert_array_equal(mask, [1, 1, 1, 0])


@pytest.mark.parametrize(("grid", "masked"), [((1, 9), 3), ((4, 4), 16), ((4, 4), 0)])
def test_a_grid_or_number_without_room_for_blocks_is_an_error(grid, masked):
    with pytest.raises(ValueError, match="cannot be masked on a grid"):
        block_mask(uniform_draws(jax.random.key(0)), grid, masked)


@few
@given(seeds)
def test_visible_and_masked_ids_are_in_raster_order_and_complete(seed):
    random = np.random.default_rng(seed)
    mask = random.permuted(np.tile([1, 1, 0, 0, 0, 1, 0], (4, 1)), axis=1).astype(np.float32)
    visible, hidden = split_by_mask(jnp.asarray(mask), 3)
    for row, shown, removed in zip(mask, visible, hidden, strict=True):
        np.testing.assert_array_equal(shown, np.flatnonzero(row == 0))
        np.testing.assert_array_equal(removed, np.flatnonzero(row == 1))


def test_an_enlarged_mask_repeats_every_cell():
    mask = np.asarray([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    expected = np.kron(mask.reshape(2, 3), np.ones((4, 4)))
    np.testing.assert_array_equal(enlarge_mask(jnp.asarray(mask), (2, 3), 4)[0], expected)


def test_the_kept_share_of_uniform_masks_is_uniform():
    samples, tokens = 10_000, 196
    noise = jax.random.uniform(jax.random.key(0), (samples, 1 + tokens))
    share = np.asarray(uniform_kept(noise)).mean(axis=1)
    # The number of kept tokens is uniform on 0..tokens; spread evenly inside its step it is
    # uniform on [0, 1].
    spread = (share * tokens + np.random.default_rng(0).random(samples)) / (tokens + 1)
    assert scipy.stats.kstest(spread, "uniform").pvalue > 1e-3


def test_bernoulli_masks_keep_every_token_with_the_given_probability():
    noise = jax.random.uniform(jax.random.key(3), (10_000, 8))
    counts = np.asarray(bernoulli_kept(noise, 0.25)).sum(axis=1)
    expected = scipy.stats.binom.pmf(np.arange(9), 8, 0.25)
    seen = np.bincount(counts.astype(int), minlength=9)
    head = np.append(seen[:5], seen[5:].sum()), np.append(expected[:5], expected[5:].sum())
    assert scipy.stats.chisquare(head[0], 10_000 * head[1]).pvalue > 1e-3


@few
@given(seeds)
def test_blockwise_masks_keep_at_least_the_wanted_share(seed):
    kept = np.asarray(compiled_blockwise()(jax.random.split(jax.random.key(seed), 8)))
    assert kept.shape == (8, 80)
    assert np.all(kept.mean(axis=1) >= 0.4)
    assert np.all(kept.mean(axis=1) < 0.8)  # one rectangle past the goal at most


@functools.cache
def compiled_blockwise():
    return jax.jit(jax.vmap(lambda key: blockwise_kept(uniform_draws(key), (8, 10))))


def test_a_grid_too_small_for_the_smallest_block_is_an_error():
    with pytest.raises(ValueError, match="bounds a block to 14, but min_block is 16"):
        blockwise_kept(uniform_draws(jax.random.key(0)), (6, 6))


@few
@given(seeds)
def test_triples_are_a_mask_its_complement_and_all_ones_image_by_image(seed):
    noise = np.random.default_rng(seed).random((5, 13), np.float32)
    kept = uniform_kept(jnp.asarray(noise))
    triples = np.asarray(mask_triples(kept)).reshape(5, 3, 12)
    np.testing.assert_array_equal(triples[:, 0], kept)
    np.testing.assert_array_equal(triples[:, 0] + triples[:, 1], 1)
    np.testing.assert_array_equal(triples[:, 2], 1)


def test_the_complement_of_a_mask_that_keeps_all_hides_all():
    np.testing.assert_array_equal(mask_triples(jnp.ones((1, 3)), null=False), [[1] * 3, [0] * 3])


def test_complement_and_null_mask_can_be_left_out():
    kept = jnp.asarray([[1.0, 0.0], [0.0, 0.0]])
    alone = mask_triples(kept, complement=False, null=False)
    np.testing.assert_array_equal(alone, kept)
    with_null = mask_triples(kept, complement=False)
    np.testing.assert_array_equal(with_null, [[1, 0], [1, 1], [0, 0], [1, 1]])
    official = mask_triples(kept, complement=False, null_value=0.0)
    np.testing.assert_array_equal(official, [[1, 0], [0, 0], [0, 0], [0, 0]])
