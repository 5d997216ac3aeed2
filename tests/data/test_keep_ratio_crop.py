"""The crop that keeps the middle, against timm's formulas."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax import config as configs
from mim_jax.data.keep_ratio_crop import KeepRatioCrop, centre
from mim_jax.data.resize import resized
from mim_jax.data.transforms import RandomResizedCrop
from mim_jax.training.experiment import training_crop
from tests.data.images import random_samples, smooth_image


class Given:
    """Random numbers given one by one."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def size_of_timm(height: int, width: int, target: tuple[int, int], draws: list[float]):
    """`ResizeKeepRatio.get_params` written out for area (0.08, 1) and aspect (3/4, 4/3)."""
    draws = iter(draws)
    ratio_h, ratio_w = height / target[0], width / target[1]
    ratio = max(ratio_h, ratio_w) * 0.0 + min(ratio_h, ratio_w) * 1.0
    factor = (1.0, 1.0)
    if next(draws) < 0.5:
        scale = 1.0 / math.sqrt(0.08 + 0.92 * next(draws))
        factor = (scale, scale)
    if next(draws) < 0.5:
        low, high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.sqrt(math.exp(low + (high - low) * next(draws)))
        factor = (factor[0] / aspect, factor[1] * aspect)
    return tuple(round(x * f / ratio) for x, f in zip((height, width), factor))


@settings(max_examples=100, deadline=None)
@given(height=st.integers(20, 500), width=st.integers(20, 500), seed=st.integers(0, 2**32))
def test_size_before_the_cut_is_that_of_timm(height: int, width: int, seed: int) -> None:
    draws = list(np.random.default_rng(seed).random(8))
    size = KeepRatioCrop((32, 48)).resized_size(height, width, np.random.default_rng(seed))
    assert size == size_of_timm(height, width, (32, 48), draws)


def test_zoom_and_aspect_change_half_of_the_images_each() -> None:
    crop, rng = KeepRatioCrop((64, 64)), np.random.default_rng(0)
    sizes = np.array([crop.resized_size(640, 640, rng) for _ in range(4000)])
    unchanged = np.all(sizes == 64, axis=1).mean()
    square = np.all(sizes[:, :1] == sizes, axis=1).mean()
    assert abs(unchanged - 0.25) < 0.03
    assert abs(square - 0.5) < 0.05  # some changes of the aspect round to none
    largest = 64 / math.sqrt(0.08) * math.sqrt(4 / 3)
    assert sizes.max() <= round(largest) and sizes.min() >= round(64 * math.sqrt(3 / 4))


def test_without_changes_the_short_side_fits_and_the_middle_is_cut() -> None:
    image = smooth_image(40, 60)
    # No zoom, no aspect, bicubic.
    cut = KeepRatioCrop((20, 20), backend="pillow")(image, Given(0.9, 0.9, 0.9))
    whole = resized(image, (20, 30), "bicubic", "pillow")
    np.testing.assert_array_equal(cut, whole[:, 5:25])
    linear = KeepRatioCrop((20, 20), backend="pillow")(image, Given(0.9, 0.9, 0.1))
    np.testing.assert_array_equal(linear, resized(image, (20, 30), "bilinear", "pillow")[:, 5:25])


def test_a_zoom_shows_that_share_of_the_area() -> None:
    image = smooth_image(80, 80)
    # A quarter of the area: the middle of an image of twice the size.
    share = (0.25 - 0.08) / 0.92
    cut = KeepRatioCrop((20, 20), backend="pillow")(image, Given(0.1, share, 0.9, 0.9))
    whole = resized(image, (40, 40), "bicubic", "pillow")
    np.testing.assert_array_equal(cut, whole[10:30, 10:30])


def test_a_side_that_is_too_small_is_continued_by_reflection() -> None:
    image = np.arange(3 * 4, dtype=np.uint8).reshape(3, 4, 1)
    expected = np.pad(image, ((1, 2), (0, 0), (0, 0)), mode="reflect")[:, 1:3]
    np.testing.assert_array_equal(centre(image, (6, 2)), expected)
    np.testing.assert_array_equal(centre(image, (3, 4)), image)


@pytest.mark.parametrize("shape", [(1, 900, 3), (900, 1, 1), (5, 5, 5), (33, 70, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_image_gives_a_crop_of_the_asked_size_and_type(shape, dtype) -> None:
    crop = KeepRatioCrop((16, 12))
    for seed in range(4):
        cut = crop(random_samples(*shape, dtype), np.random.default_rng(seed))
        assert cut.shape == (16, 12, shape[2])
        assert cut.dtype == dtype


def test_a_crop_is_a_function_of_its_generator_and_can_be_sent_to_a_worker() -> None:
    image, crop = smooth_image(50, 70), KeepRatioCrop((24, 24))
    cuts = [c(image, np.random.default_rng(7)) for c in (crop, pickle.loads(pickle.dumps(crop)))]
    np.testing.assert_array_equal(*cuts)
    others = [crop(image, np.random.default_rng(seed)) for seed in range(8)]
    assert any(np.any(other != cuts[0]) for other in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(size=(0, 4)), "whole pixels"),
        (dict(size=(4, 4), area=(0.0, 1.0)), "area must satisfy"),
        (dict(size=(4, 4), aspect=(2.0, 1.0)), "aspect must satisfy"),
        (dict(size=(4, 4), backend="gimp"), "gimp"),
    ],
)
def test_impossible_options_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        KeepRatioCrop(**fields)


def test_the_config_chooses_the_crop_and_its_ranges() -> None:
    assert isinstance(training_crop(configs.load("mae:tiny")), RandomResizedCrop)
    changes = {"data.crop": "keep_ratio", "data.crop_area": (0.3, 0.9)}
    crop = training_crop(configs.load("mae:tiny", changes))
    assert crop == KeepRatioCrop((28, 28), area=(0.3, 0.9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.crop": "centre"}, "data.crop is 'centre'; known are random_resized, keep_ratio"),
        (
            {"data.crop": "keep_ratio", "data.target_size": (8, 8)},
            "data.crop 'keep_ratio' gives one rendering",
        ),
    ],
)
def test_a_crop_that_is_unknown_or_cannot_be_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        configs.resolve(configs.load("mae:tiny", changes), "cpu")
