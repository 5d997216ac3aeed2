import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.masking import (
    block_grid,
    block_tokens,
    complementary_views,
    disjoint_counts,
    disjoint_masking,
    gather_tokens,
    num_kept,
    num_tokens,
    random_masking,
    restore_tokens,
    token_grid,
    weighted_masking,
)

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def draw_noise(seed: int, batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, tokens), np.float32)


# Every new shape costs a compilation, so shapes come from a list: batch, tokens, kept.
SHAPES = [(1, 2, 1), (3, 7, 2), (2, 16, 4), (4, 10, 9), (2, 20, 19)]


@st.composite
def noise_and_kept(draw):
    """Noise `[batch, tokens]`, and a number of visible tokens."""
    batch, tokens, kept = draw(st.sampled_from(SHAPES))
    return draw_noise(draw(seeds), batch, tokens), kept


@few
@given(noise_and_kept())
def test_every_sample_keeps_exactly_as_many_tokens_as_asked(case):
    noise, kept = case
    batch, tokens = noise.shape
    masking = random_masking(jnp.asarray(noise), kept)
    assert masking.keep_ids.shape == (batch, kept)
    for ids in np.asarray(masking.keep_ids):
        assert len(set(ids)) == kept
    np.testing.assert_array_equal(masking.mask.sum(axis=1), tokens - kept)
    assert set(np.unique(masking.mask)) == {0.0, 1.0}


@few
@given(noise_and_kept())
def test_mask_is_zero_exactly_at_the_kept_positions(case):
    noise, kept = case
    masking = random_masking(jnp.asarray(noise), kept)
    expected = np.ones_like(noise)
    np.put_along_axis(expected, np.asarray(masking.keep_ids), 0, axis=1)
    np.testing.assert_array_equal(masking.mask, expected)


@few
@given(noise_and_kept())
def test_the_kept_tokens_have_the_smallest_noise_in_ascending_order(case):
    noise, kept = case
    masking = random_masking(jnp.asarray(noise), kept)
    np.testing.assert_array_equal(
        np.take_along_axis(noise, np.asarray(masking.keep_ids), axis=1),
        np.sort(noise, axis=1)[:, :kept],
    )


@few
@given(noise_and_kept())
def test_restore_ids_lead_back_from_the_drawn_order(case):
    noise, kept = case
    masking = random_masking(jnp.asarray(noise), kept)
    restore_ids = np.asarray(masking.restore_ids)
    for keep, restore in zip(np.asarray(masking.keep_ids), restore_ids, strict=True):
        np.testing.assert_array_equal(restore[keep], np.arange(kept))
        assert sorted(restore) == list(range(noise.shape[1]))


@few
@given(noise_and_kept(), seeds)
def test_changing_the_noise_of_one_sample_leaves_the_others_unchanged(case, seed):
    noise, kept = case
    other = noise.copy()
    other[0] = np.random.default_rng(seed).permutation(noise[0])
    before = random_masking(jnp.asarray(noise), kept)
    after = random_masking(jnp.asarray(other), kept)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])


@few
@given(noise_and_kept(), seeds)
def test_permuting_the_samples_permutes_the_masking(case, seed):
    noise, kept = case
    order = np.random.default_rng(seed).permutation(len(noise))
    before = random_masking(jnp.asarray(noise), kept)
    after = random_masking(jnp.asarray(noise[order]), kept)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[order], b)


def test_every_token_is_kept_equally_often():
    samples, tokens, kept = 20_000, 16, 4
    noise = jax.random.uniform(jax.random.key(0), (samples, tokens))
    counts = np.asarray(1 - random_masking(noise, kept).mask).sum(axis=0)
    assert counts.sum() == samples * kept
    # Of `kept` draws without replacement each count has the variance n p (1 - p); the counts of a
    # sample add up to `kept`, which leaves tokens - 1 degrees of freedom.
    share = kept / tokens
    statistic = np.sum((counts - samples * share) ** 2) / (samples * share * (1 - share))
    statistic *= (tokens - 1) / tokens
    assert 1e-3 < scipy.stats.chi2.sf(statistic, tokens - 1) < 1 - 1e-3


def test_every_pair_of_tokens_is_kept_together_equally_often():
    samples, tokens, kept = 20_000, 6, 3
    noise = jax.random.uniform(jax.random.key(1), (samples, tokens))
    visible = np.asarray(1 - random_masking(noise, kept).mask)
    together = (visible.T @ visible)[~np.eye(tokens, dtype=bool)] / samples
    expected = kept * (kept - 1) / (tokens * (tokens - 1))
    np.testing.assert_allclose(
        together, expected, atol=5 * np.sqrt(expected * (1 - expected) / samples)
    )


@few
@given(noise_and_kept())
def test_visible_tokens_return_to_their_true_places_and_mask_tokens_fill_the_rest(case):
    noise, kept = case
    batch, tokens = noise.shape
    masking = random_masking(jnp.asarray(noise), kept)
    truth = np.random.default_rng(0).normal(size=(batch, tokens, 3)).astype(np.float32)
    mask_token = np.full((1, 1, 3), 7.0, np.float32)
    visible = gather_tokens(jnp.asarray(truth), masking.keep_ids)
    restored = restore_tokens(visible, mask_token, masking.restore_ids)
    removed = np.asarray(masking.mask)[..., None] == 1
    np.testing.assert_array_equal(restored, np.where(removed, mask_token, truth))


def test_restored_tokens_keep_the_type_of_the_visible_ones():
    masking = random_masking(jnp.asarray(draw_noise(0, 2, 4)), 2)
    visible = jnp.ones((2, 2, 3), jnp.bfloat16)
    restored = restore_tokens(visible, jnp.zeros((1, 1, 3), jnp.float32), masking.restore_ids)
    assert restored.dtype == jnp.bfloat16


def test_gather_picks_tokens_in_the_order_of_the_ids():
    tokens = jnp.arange(2 * 4).reshape(2, 4, 1)
    picked = gather_tokens(tokens, jnp.asarray([[3, 0], [1, 2]]))
    np.testing.assert_array_equal(picked[..., 0], [[3, 0], [5, 6]])


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"), [(196, 0.75, 49), (256, 0.75, 64), (49, 0.75, 12), (10, 0.5, 5)]
)
def test_number_of_kept_tokens_is_truncated_as_in_the_official_code(tokens, ratio, kept):
    assert num_kept(tokens, ratio) == kept


def test_a_ratio_that_truncates_to_no_token_is_an_error_with_the_mend():
    # 10 * (1 - 0.9) is 0.9999999999999998 in floating point, and int() of it is 0.
    with pytest.raises(ValueError, match=r"0\.9 leaves none of 10 tokens.*lower the ratio"):
        num_kept(10, 0.9)


def test_a_ratio_that_removes_no_token_is_an_error_with_the_mend():
    # 1 - 1e-17 is 1 in floating point.
    with pytest.raises(ValueError, match=r"removes none of 4 tokens; raise the ratio"):
        num_kept(4, 1e-17)


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 1.0, 75.0, float("nan")])
def test_a_ratio_outside_zero_to_one_is_an_error(ratio):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        num_kept(196, ratio)


@few
@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_the_number_of_kept_tokens_leaves_something_on_both_sides(tokens, ratio):
    try:
        kept = num_kept(tokens, ratio)
    except ValueError:
        assert int(tokens * (1 - ratio)) in (0, tokens)
    else:
        assert kept == int(tokens * (1 - ratio))
        assert 0 < kept < tokens


def test_grid_and_number_of_tokens_of_the_papers_sizes():
    assert token_grid((224, 224), (16, 16)) == (14, 14)
    assert num_tokens((224, 224), (14, 14)) == 256
    assert token_grid((8, 12), (4, 2)) == (2, 6)
    assert token_grid((8, 12, 16), (4, 4, 4)) == (2, 3, 4)


@pytest.mark.parametrize(
    ("size", "patch", "nearest"),
    [
        ((225, 224), (16, 16), r"\(224, 224\)"),
        ((30, 47), (16, 16), r"\(32, 48\)"),
        ((3, 3), (16, 16), r"\(16, 16\)"),
        ((0, 16), (16, 16), r"\(16, 16\)"),
    ],
)
def test_an_image_that_patches_do_not_tile_is_an_error_that_names_the_nearest_size(
    size, patch, nearest
):
    with pytest.raises(ValueError, match=f"not divisible.*nearest size that fits is {nearest}"):
        token_grid(size, patch)


def test_image_and_patch_of_different_rank_are_an_error():
    with pytest.raises(ValueError, match="same number of axes"):
        token_grid((224, 224), (16,))


def test_a_patch_without_pixels_is_an_error():
    with pytest.raises(ValueError, match="at least 1 pixel"):
        token_grid((224, 224), (0, 16))


WEIGHTS = np.asarray([0.3, 0.02, 0.1, 0.25, 0.08], np.float32)  # adds up to 0.75, not 1


def weighted_draws(samples: int, weights: np.ndarray = WEIGHTS, kept: int = 2):
    exponential = jax.random.exponential(jax.random.key(2), (samples, len(weights)))
    return weighted_masking(exponential, jnp.broadcast_to(weights, exponential.shape), kept)


def shares(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float64) / weights.sum(dtype=np.float64)


def test_the_first_of_the_weighted_tokens_follows_the_weights():
    samples = 10_000
    first = np.asarray(weighted_draws(samples).keep_ids[:, 0])
    counts = np.bincount(first, minlength=len(WEIGHTS))
    assert scipy.stats.chisquare(counts, samples * shares(WEIGHTS)).pvalue > 1e-3


def test_the_second_weighted_token_follows_the_weights_of_those_that_are_left():
    pairs = np.asarray(weighted_draws(20_000).keep_ids)
    second = pairs[pairs[:, 0] == 0, 1]
    assert 0 not in second
    counts = np.bincount(second, minlength=len(WEIGHTS))[1:]
    assert scipy.stats.chisquare(counts, counts.sum() * shares(WEIGHTS[1:])).pvalue > 1e-3


@few
@given(noise_and_kept(), seeds)
def test_every_weighted_draw_is_a_permutation(case, seed):
    noise, kept = case
    exponential = -np.log1p(-noise)
    masking = weighted_masking(exponential, jnp.asarray(draw_noise(seed, *noise.shape)), kept)
    np.testing.assert_array_equal(
        np.sort(masking.restore_ids, axis=1),
        np.broadcast_to(np.arange(noise.shape[1]), noise.shape),
    )
    np.testing.assert_array_equal(masking.mask.sum(axis=1), noise.shape[1] - kept)


def test_tokens_of_weight_zero_are_drawn_last_even_at_zero_noise():
    weights = jnp.asarray([[0.0, 0.5, 0.0, 1e-30]])
    masking = weighted_masking(jnp.asarray([[0.0, 1.0, 5.0, 2.0]]), weights, 2)
    np.testing.assert_array_equal(masking.keep_ids, [[1, 3]])
    np.testing.assert_array_equal(masking.restore_ids, [[2, 0, 3, 1]])


def test_equal_weights_are_plain_random_masking():
    noise = draw_noise(0, 4, 10)
    weighted = weighted_masking(noise, jnp.full(noise.shape, 0.1), 3)
    for ours, plain in zip(weighted, random_masking(jnp.asarray(noise), 3), strict=True):
        np.testing.assert_array_equal(ours, plain)


@few
@given(st.sampled_from([(2, 16, 4), (3, 6, 3), (1, 4, 1)]), seeds)
def test_complementary_views_show_every_token_exactly_once(sizes, seed):
    batch, tokens, views = sizes
    masking = complementary_views(jnp.asarray(draw_noise(seed, batch, tokens)), views)
    kept = tokens // views
    assert masking.keep_ids.shape == (views * batch, kept)
    shown = 1 - np.asarray(masking.mask).reshape(batch, views, tokens)
    np.testing.assert_array_equal(shown.sum(axis=1), 1)
    for keep, restore in zip(masking.keep_ids, masking.restore_ids, strict=True):
        np.testing.assert_array_equal(restore[keep], np.arange(kept))
        assert sorted(restore) == list(range(tokens))


def test_the_first_of_the_complementary_views_is_plain_random_masking():
    noise = jnp.asarray(draw_noise(3, 2, 8))
    for ours, plain in zip(complementary_views(noise, 4), random_masking(noise, 2), strict=True):
        np.testing.assert_array_equal(ours[::4], plain)


def test_views_that_cannot_be_equal_are_an_error():
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 4 equal views"):
        complementary_views(jnp.zeros((1, 10)), 4)


compiled_views = jax.jit(disjoint_masking, static_argnums=(3, 4))


def two_views(seed: int, units: int, ratio: float, prediction: float, blocks=None, batch: int = 3):
    kept, swapped = disjoint_counts(units, ratio, prediction)
    random = np.random.default_rng(seed)
    return compiled_views(
        jnp.asarray(draw_noise(seed, batch, units)),
        jnp.asarray(random.permutation(kept)),
        jnp.asarray(random.permutation(units - kept)),
        swapped,
        blocks,
    )


# units, mask ratio, prediction ratio, grid of blocks
VIEWS = [
    (49, 0.6, 1.0, (7, 7)),
    (36, 0.75, 1.0, None),
    (12, 0.5, 1.0, (3, 4)),
    (40, 0.6, 0.8, None),
    (20, 0.3, 0.9, None),
]


@few
@given(st.sampled_from(VIEWS), seeds)
def test_two_views_mask_equally_many_tokens_and_their_orders_are_permutations(sizes, seed):
    units, ratio, prediction, blocks = sizes
    masking = two_views(seed, units, ratio, prediction, blocks)
    size = 4 if blocks else 1
    kept = size * int(units * (1 - ratio))
    assert masking.keep_ids.shape == (6, kept)
    np.testing.assert_array_equal(masking.mask.sum(axis=1), size * units - kept)
    for keep, restore in zip(masking.keep_ids, masking.restore_ids, strict=True):
        np.testing.assert_array_equal(restore[keep], np.arange(kept))
        assert sorted(restore) == list(range(size * units))


@few
@given(st.sampled_from(VIEWS), seeds)
def test_the_share_of_tokens_masked_in_some_view_is_the_prediction_ratio(sizes, seed):
    units, ratio, prediction, blocks = sizes
    masked = np.asarray(two_views(seed, units, ratio, prediction, blocks).mask).reshape(3, 2, -1)
    union = masked.max(axis=1).mean(axis=1)
    # Both counts are rounded down, so the share misses by less than two units.
    reachable = min(prediction, 2 * ratio)
    np.testing.assert_allclose(union, reachable, atol=2 / units)
    if prediction == 1 and ratio >= 0.5:
        np.testing.assert_array_equal(union, 1)
        shown = 1 - masked
        assert not np.any(shown[:, 0] * shown[:, 1])


@few
@given(seeds)
def test_blocks_are_masked_as_a_whole(seed):
    mask = np.asarray(two_views(seed, 12, 0.5, 1.0, (3, 4)).mask).reshape(-1, 3, 2, 4, 2)
    np.testing.assert_array_equal(mask.min(axis=(2, 4)), mask.max(axis=(2, 4)))


def test_the_permutations_are_those_of_the_whole_batch():
    # Where two images have the same noise, their second views agree as well.
    noise = jnp.asarray(np.repeat(draw_noise(0, 1, 12), 2, axis=0))
    masking = disjoint_masking(noise, jnp.asarray([2, 0, 1, 3]), jnp.arange(8)[::-1], 3)
    np.testing.assert_array_equal(masking.keep_ids[1], masking.keep_ids[3])


def test_tokens_of_a_block_are_its_four_corners_in_turn():
    ids = block_tokens(jnp.asarray([[0, 5]]), (2, 3))  # a grid of 4 x 6 tokens
    np.testing.assert_array_equal(ids, [[0, 16, 1, 17, 6, 22, 7, 23]])


def test_an_odd_grid_has_no_blocks():
    assert block_grid((14, 10)) == (7, 5)
    with pytest.raises(ValueError, match=r"7 x 14 tokens cannot be cut .* both sides are even"):
        block_grid((7, 14))


@pytest.mark.parametrize("prediction", [0.5, 1.1])
def test_a_prediction_ratio_below_the_mask_ratio_or_above_one_is_an_error(prediction):
    with pytest.raises(ValueError, match=r"must lie between mask_ratio 0\.6 and 1"):
        disjoint_counts(49, 0.6, prediction)


@pytest.mark.parametrize(
    ("units", "ratio", "prediction", "counts"),
    [(49, 0.6, 1.0, (19, 19)), (196, 0.6, 1.0, (78, 78)), (49, 0.6, 0.8, (19, 9))],
)
def test_counts_of_the_published_settings(units, ratio, prediction, counts):
    assert disjoint_counts(units, ratio, prediction) == counts
