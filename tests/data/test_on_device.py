import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.data.on_device import denormalize, normalize, random_flip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def every_pixel_value() -> np.ndarray:
    """uint8 `[1, 16, 16, 3]` with all 256 values in every channel."""
    return np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)


def test_normalize_scales_each_channel_by_its_own_statistics():
    images = every_pixel_value()
    expected = (images.astype(np.float64) / 255 - MEAN) / STD
    ours = normalize(jnp.asarray(images), MEAN, STD)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_denormalize_inverts_normalize_for_every_pixel_value():
    images = every_pixel_value()
    again = denormalize(normalize(jnp.asarray(images), MEAN, STD), MEAN, STD)
    assert again.dtype == jnp.uint8
    np.testing.assert_array_equal(again, images)


def test_denormalize_rounds_and_clips_to_what_a_picture_can_show():
    pixels = jnp.asarray([-3.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0]).reshape(1, 1, 6, 1)
    np.testing.assert_array_equal(denormalize(pixels, (0,), (1,)).ravel(), [0, 0, 0, 1, 255, 255])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_flip_mirrors_whole_images_left_to_right(dtype):
    images = np.random.default_rng(0).integers(0, 256, (64, 2, 5, 3)).astype(dtype)
    ours = np.asarray(random_flip(jax.random.key(0), jnp.asarray(images)))
    assert ours.dtype == dtype
    mirrored = np.all(ours == images[:, :, ::-1], axis=(1, 2, 3))
    unchanged = np.all(ours == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ unchanged)
    # Each image has its own coin: neither all nor none of 64.
    assert 10 < mirrored.sum() < 54


def test_half_of_the_images_are_flipped():
    images = jnp.asarray([[[[0.0], [1.0]]]]).repeat(10_000, axis=0)
    share = float(random_flip(jax.random.key(1), images)[:, 0, 0, 0].mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 100)


def test_a_flip_is_a_pure_function_of_its_key():
    images = jnp.arange(32.0).reshape(16, 1, 2, 1)
    first, again = (random_flip(jax.random.key(0), images) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(random_flip(jax.random.key(1), images) != first)
