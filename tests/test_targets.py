import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.targets import (
    denormalize_patches,
    normalize_patches,
    patch_statistics,
    patchify,
    unpatchify,
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
