import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.targets import (
    batch_normalized,
    denormalize_patches,
    hog,
    hog_tokens,
    normalize_patches,
    patch_statistics,
    patchify,
    unit_length,
    unpatchify,
    whiten,
)

few = settings(max_examples=15, deadline=None)
# Every new shape costs a compilation, so shapes come from a list: images, patch.
SHAPES = [
    ((2, 8, 8, 3), (4, 4)),
    ((1, 6, 8, 3), (2, 4)),
    ((3, 4, 10, 1), (4, 5)),
    ((2, 3, 2, 5), (1, 1)),
    ((1, 4, 6, 2), (4, 6)),
]


@st.composite
def images_and_patch(draw):
    """Images `[batch, height, width, channels]`, and a patch size that fits."""
    shape, patch = draw(st.sampled_from(SHAPES))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    return random.normal(size=shape).astype(np.float32), patch


def random_patches(seed: int = 0, shape=(2, 3, 48), scale: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0.3, scale, shape)
    return values.astype(np.float32)


@few
@given(images_and_patch())
def test_unpatchify_inverts_patchify(case):
    images, patch = case
    patches = patchify(jnp.asarray(images), patch)
    np.testing.assert_array_equal(unpatchify(patches, images.shape[1:3], patch), images)


@few
@given(images_and_patch())
def test_patches_are_row_major_and_their_values_ordered_row_column_channel(case):
    images, (patch_height, patch_width) = case
    _, height, width, channels = images.shape
    expected = []
    for image in images:
        patches = []
        for top in range(0, height, patch_height):
            for left in range(0, width, patch_width):
                values = []
                for row in range(patch_height):
                    for column in range(patch_width):
                        for channel in range(channels):
                            values.append(image[top + row, left + column, channel])
                patches.append(values)
        expected.append(patches)
    patches = patchify(jnp.asarray(images), (patch_height, patch_width))
    np.testing.assert_array_equal(patches, np.asarray(expected))


def test_images_that_patches_do_not_tile_are_an_error():
    with pytest.raises(ValueError, match="not divisible"):
        patchify(jnp.zeros((1, 10, 8, 3)), (4, 4))


@few
@given(st.sampled_from([2, 3, 48]), st.floats(0.1, 30))
def test_statistics_use_the_unbiased_variance(values, scale):
    patches = random_patches(shape=(2, 3, values), scale=scale)
    mean, deviation = patch_statistics(jnp.asarray(patches))
    exact = patches.astype(np.float64)
    expected = np.sqrt(exact.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    assert mean.shape == deviation.shape == (2, 3, 1)
    np.testing.assert_allclose(mean, exact.mean(axis=-1, keepdims=True), atol=1e-5 * scale)
    np.testing.assert_allclose(deviation, expected, rtol=1e-5)


def test_normalized_patches_have_zero_mean_and_unit_unbiased_variance():
    patches = np.asarray(normalize_patches(jnp.asarray(random_patches(scale=3))), np.float64)
    np.testing.assert_allclose(patches.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(patches.var(axis=-1, ddof=1), 1, rtol=1e-5)


def test_a_patch_of_one_colour_is_normalized_to_zero():
    np.testing.assert_array_equal(normalize_patches(jnp.full((1, 2, 48), 0.5)), 0)


@few
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_denormalize_inverts_normalize(seed, scale):
    patches = random_patches(seed, scale=scale)
    again = denormalize_patches(normalize_patches(jnp.asarray(patches)), jnp.asarray(patches))
    np.testing.assert_allclose(again, patches, rtol=1e-5, atol=1e-5 * scale)


def test_denormalized_predictions_take_mean_and_deviation_from_the_target():
    target, prediction = random_patches(0, scale=5), random_patches(1)
    shown = np.asarray(denormalize_patches(jnp.asarray(prediction), jnp.asarray(target)))
    mean, deviation = target.mean(-1), target.std(-1, ddof=1)
    np.testing.assert_allclose(
        shown.mean(-1), prediction.mean(-1) * deviation + mean, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        shown.std(-1, ddof=1), prediction.std(-1, ddof=1) * deviation, rtol=1e-4
    )


def random_bytes(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@few
@given(st.integers(0, 1000))
def test_histograms_are_those_of_a_loop_over_pixels(seed):
    image = random_bytes(seed, 1, 4, 8, 2)
    expected = np.zeros((1, 2, 9, 2))
    for channel in range(2):
        for row in range(4):
            for column in range(8):
                pixels = image[0, :, :, channel].astype(int)
                down = pixels[row + 1, column] - pixels[row - 1, column] if 0 < row < 3 else 0
                right = pixels[row, column + 1] - pixels[row, column - 1] if 0 < column < 7 else 0
                place = int(np.degrees(np.arctan2(down, right)) % 180 // 20) if down else 0
                expected[0, column // 4, place, channel] += np.hypot(down, right) / 16
    np.testing.assert_allclose(hog(jnp.asarray(image), 4)[:, 0], expected, rtol=1e-5, atol=1e-4)


def test_an_image_of_one_colour_has_empty_histograms_and_targets():
    histograms = hog(jnp.full((1, 16, 16, 3), 200, jnp.uint8))
    np.testing.assert_array_equal(histograms, 0)
    np.testing.assert_array_equal(hog_tokens(histograms), 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_horizontal_ramp_has_only_the_first_orientation(sign):
    ramp = np.broadcast_to(sign * 4 * np.arange(16) + 64, (1, 16, 16))[..., None]
    histograms = np.asarray(hog(jnp.asarray(ramp)))
    assert np.all(histograms[..., 0, :] > 0)
    np.testing.assert_array_equal(histograms[..., 1:, :], 0)


def test_a_quarter_turn_moves_the_energy_by_ninety_degrees():
    # Waves at 30 degrees, in the middle of bin 1; turned, at 120 degrees, in bin 6.
    row, column = np.mgrid[:32, :32]
    angle = np.radians(30)
    phase = 0.05 * (np.cos(angle) * column + np.sin(angle) * row)
    image = (127 + 120 * np.sin(phase))[None, :, :, None].astype(np.float32)
    before = np.asarray(hog(jnp.asarray(image))).sum(axis=(0, 1, 2, 4))
    after = np.asarray(hog(jnp.asarray(np.rot90(image, axes=(1, 2)).copy())))
    assert before.argmax() == 1
    assert after.sum(axis=(0, 1, 2, 4)).argmax() == 6


def test_a_finer_cell_gives_more_histograms():
    images = jnp.asarray(random_bytes(0, 2, 28, 28, 1))
    assert hog(images, 7).shape == (2, 4, 4, 9, 1)
    coarse, fine = hog(images, 14), hog(images, 7)
    means = np.asarray(fine).reshape(2, 2, 2, 2, 2, 9, 1).mean(axis=(2, 4))
    np.testing.assert_allclose(coarse, means, rtol=1e-5)
    with pytest.raises(ValueError, match="not divisible"):
        hog(images, 8)


def test_values_of_a_token_are_ordered_cell_row_cell_column_orientation_channel():
    histograms = np.random.default_rng(0).random((2, 4, 6, 9, 3)).astype(np.float32)
    tokens = np.asarray(hog_tokens(jnp.asarray(histograms)))
    assert tokens.shape == (2, 6, 108)
    exact = histograms.astype(np.float64)
    mean, variance = exact.mean(axis=3, keepdims=True), exact.var(axis=3, keepdims=True)
    exact = (exact - mean) / np.sqrt(variance + 1e-5)
    # Token 4 is row 1, column 1; cell (1, 0) of it is cell (3, 2).
    ours = tokens[:, 4].reshape(2, 2, 2, 9, 3)
    np.testing.assert_allclose(ours[:, 1, 0], exact[:, 3, 2], rtol=1e-4, atol=1e-5)


@few
@given(st.integers(0, 1000), st.sampled_from([-1, 1]))
def test_whitened_features_have_zero_mean_and_unit_variance_along_their_axis(seed, axis):
    features = 5 + 3 * random_patches(seed, (2, 16, 16))
    whitened = np.asarray(whiten(jnp.asarray(features), axis=axis), np.float64)
    np.testing.assert_allclose(whitened.mean(axis=axis), 0, atol=1e-5)
    np.testing.assert_allclose(whitened.var(axis=axis), 1, rtol=1e-3)


def test_features_are_normalized_in_float32():
    for normalize in (whiten, unit_length, batch_normalized):
        assert normalize(jnp.ones((2, 3, 4), jnp.bfloat16)).dtype == jnp.float32


def test_unit_vectors_keep_their_direction_and_zero_stays_zero_without_nan_gradients():
    features = jnp.asarray([[3.0, -4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit_length(features), [[0.6, -0.8], [0, 0]], rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: unit_length(x).sum())(features)))


def test_batch_normalized_features_have_one_mean_and_one_unbiased_variance():
    features = random_patches(1, (3, 4, 5), scale=2)
    features[1] += 7
    ours = np.asarray(batch_normalized(jnp.asarray(features)))
    exact = features.astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
