import cv2
import numpy as np
import pytest

from mim_jax.data.color_jitter import ColorJitter
from mim_jax.data.photometric import RandomBlur, RandomFlip, RandomGrey, RandomRotation
from tests.data.images import smooth_image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_grey_is_luma_in_all_channels():
    image = smooth_image(12, 9)
    grey = RandomGrey(1.0)(image, rng())
    assert grey.shape == image.shape and grey.dtype == np.uint8
    np.testing.assert_allclose(
        grey, np.repeat(image @ [0.299, 0.587, 0.114], 3).reshape(grey.shape), atol=1
    )
    one = image[..., :1]
    np.testing.assert_array_equal(RandomGrey(1.0)(one, rng()), one)


def test_blur_is_a_gaussian_of_a_width_between_the_bounds():
    point = np.zeros((31, 31, 1), np.uint16)
    point[15, 15] = 60_000
    for sigma in (0.7, 2.0):
        blurred = RandomBlur(1.0, (sigma, sigma))(point, rng()).astype(float)
        assert blurred.shape == point.shape
        assert blurred.sum() == pytest.approx(60_000, rel=0.01)
        places = np.arange(31) - 15
        variance = (blurred[..., 0].sum(axis=0) * places**2).sum() / blurred.sum()
        assert variance == pytest.approx(sigma**2, rel=0.05)
    peaks = [RandomBlur(1.0)(point, rng(seed)).max() for seed in range(50)]
    narrowest, widest = 60_000, 60_000 / (2 * np.pi * 2.0**2)
    assert 0.98 * widest < min(peaks) < 3 * widest and 0.5 * narrowest < max(peaks) <= narrowest


def test_rotation_turns_around_the_middle_and_reflects_the_outside():
    image = smooth_image(41, 41)
    turned = RandomRotation(45.0, 1.0)(image, rng(3))
    assert turned.shape == image.shape and np.any(turned != image)
    np.testing.assert_allclose(turned[20, 20], image[20, 20], atol=1)
    white = np.full((20, 30, 1), 255, np.uint8)
    np.testing.assert_array_equal(RandomRotation(45.0, 1.0)(white, rng()), white)
    np.testing.assert_array_equal(RandomRotation(0.0, 1.0)(image, rng()), image)


def test_rotations_are_uniform_to_both_sides():
    image = np.zeros((101, 101, 1), np.uint8)
    image[48:53, 90:95] = 255  # to the right of the middle
    angles = []
    for seed in range(300):
        moments = cv2.moments(RandomRotation(30.0, 1.0)(image, rng(seed)))
        x, y = moments["m10"] / moments["m00"] - 50, moments["m01"] / moments["m00"] - 50
        angles.append(np.degrees(np.arctan2(y, x)))
    assert max(np.abs(angles)) < 31 and np.mean(angles) == pytest.approx(0, abs=3)
    assert np.std(angles) == pytest.approx(30 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    "change",
    [RandomGrey(0.3), RandomBlur(0.3, (1.0, 2.0)), RandomRotation(45.0, 0.3), RandomFlip(0.3)],
    ids=lambda change: type(change).__name__,
)
def test_changes_happen_with_their_probability_and_follow_the_generator(change):
    image = smooth_image(8, 11)
    results = [change(image, rng(seed)) for seed in range(500)]
    share = np.mean([np.any(result != image) for result in results])
    assert share == pytest.approx(0.3, abs=0.06)
    again = [change(image, rng(seed)) for seed in range(500)]
    assert all(np.array_equal(*both) for both in zip(results, again))


def test_flip_mirrors_left_and_right():
    image = smooth_image(5, 6)
    np.testing.assert_array_equal(RandomFlip(1.0)(image, rng()), image[:, ::-1])


def test_hue_turns_colours_and_leaves_grey_alone():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    hues = []
    for seed in range(200):
        turned = ColorJitter(hue=0.2)(red, rng(seed))
        assert turned.max() == pytest.approx(200, abs=2)  # the value stays
        hue = cv2.cvtColor(turned[:1, :1].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[0, 0, 0]
        hues.append((hue + 180) % 360 - 180)
    assert -74 < min(hues) < -60 and 60 < max(hues) < 74
    grey = np.full((3, 3, 3), 90, np.uint8)
    np.testing.assert_array_equal(ColorJitter(hue=0.5)(grey, rng()), grey)
    one = np.full((3, 3, 1), 90, np.uint8)
    np.testing.assert_array_equal(ColorJitter(hue=0.5)(one, rng()), one)


def test_without_hue_the_draws_of_the_jitter_are_those_of_three_changes():
    image, draws, jitter = smooth_image(4, 4), rng(5), ColorJitter(0.4, 0.3, 0.2)
    jitter(image, draws)
    expected = rng(5)
    expected.permutation(3), expected.random(3)
    assert draws.random() == expected.random()


def test_jitter_happens_with_its_probability():
    image = smooth_image(4, 4)
    changed = [
        np.any(ColorJitter(0.8, 0.8, 0.8, 0.2, probability=0.8)(image, rng(s)) != image)
        for s in range(400)
    ]
    assert np.mean(changed) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomGrey(1.5), r"probability must be in \[0, 1\], got 1.5"),
        (lambda: RandomBlur(sigma=(0.0, 2.0)), "sigma must satisfy 0 < low <= high"),
        (lambda: RandomBlur(kernel=4), "kernel must be odd and positive, got 4"),
        (lambda: RandomRotation(200.0), r"degrees must be in \[0, 180\], got 200"),
        (lambda: ColorJitter(hue=0.6), "hue of color_jitter must be at most 0.5, got 0.6"),
        (lambda: ColorJitter(0.1, probability=1.5), r"probability must be in \[0, 1\], got 1.5"),
        (
            lambda: RandomGrey(1.0)(np.zeros((2, 2, 3), np.uint16), rng()),
            r"uint8 images of 1 or 3 channels, got uint16 \(2, 2, 3\)",
        ),
    ],
)
def test_wrong_settings_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
