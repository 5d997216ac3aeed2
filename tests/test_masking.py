import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.masking import (
    gather_tokens,
    num_kept,
    num_tokens,
    random_masking,
    restore_tokens,
    token_grid,
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
