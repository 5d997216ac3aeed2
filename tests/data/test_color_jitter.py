import numpy as np
import pytest

from mim_jax.data.color_jitter import ColorJitter
from tests.data.images import smooth_image


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


class FixedDraws:
    """A generator whose order and factors are given."""

    def __init__(self, order: list[int], factors: list[float]) -> None:
        self.order, self.factors = order, list(factors)

    def permutation(self, length: int) -> list[int]:
        assert sorted(self.order) == list(range(length))
        return self.order

    def random(self) -> float:
        return self.factors.pop(0)


def expected_change(image: np.ndarray, which: int, factor: float) -> np.ndarray:
    """torchvision's formulas on uint8 images: a mix with black, mean grey, or the grey image."""
    luma = np.rint(image @ np.asarray([0.299, 0.587, 0.114]))[..., None]
    other = (0.0, np.floor(luma.mean() + 0.5), luma)[which]
    return np.clip(other + factor * (image - other), 0, 255)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_it_mixes_as_torchvision_does_in_any_order(order):
    strengths, draws = (0.4, 0.3, 0.2), [0.9, 0.2, 0.6]
    ours = ColorJitter(*strengths)(picture(), FixedDraws(order, draws))
    expected = picture().astype(np.float64)
    for which, draw in zip(order, draws):
        factor = 1 - strengths[which] + 2 * strengths[which] * draw
        expected = expected_change(expected, which, factor)
    # Pillow rounds after every change.
    np.testing.assert_allclose(ours, expected, atol=3)


def test_factors_are_uniform_around_one():
    image = np.full((1, 1, 1), 100, np.uint8)
    rng = np.random.default_rng(0)
    factors = [ColorJitter(brightness=0.5)(image, rng).item() / 100 for _ in range(2000)]
    assert 0.49 <= min(factors) < 0.53 and 1.47 < max(factors) <= 1.51
    assert np.mean(factors) == pytest.approx(1.0, abs=0.03)
    assert np.mean(np.asarray(factors) < 0.75) == pytest.approx(0.25, abs=0.04)


def test_saturation_changes_no_grey_image():
    grey = smooth_image(8, 8)[..., :1]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(ColorJitter(saturation=0.9)(grey, rng), grey)
    assert np.any(ColorJitter(contrast=0.9)(grey, rng) != grey)


def test_the_same_draws_give_the_same_image_and_others_another():
    jitter = ColorJitter(0.4, 0.4, 0.4)
    first, again, other = (jitter(picture(), np.random.default_rng(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.uint16), np.zeros((4, 4, 5), np.uint8)], ids=str
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"set data\.color_jitter to \(0, 0, 0\)"):
        ColorJitter(0.4)(image, np.random.default_rng(0))


def test_a_negative_strength_is_an_error():
    with pytest.raises(ValueError, match="must not be negative"):
        ColorJitter(contrast=-0.1)
