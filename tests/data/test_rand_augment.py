import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from mim_jax.data.rand_augment import OPERATIONS, TWO_SIDED, Composed, RandAugment
from mim_jax.data.transforms import RandomResizedCrop
from tests.data.images import smooth_image

RECIPE = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)


def operated(name: str, image: np.ndarray, strength: float) -> np.ndarray:
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    result = OPERATIONS[name](picture, strength, FILL[0] if grey else FILL)
    return np.asarray(result).reshape(image.shape)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def draws(augment: RandAugment, count: int) -> list[list[tuple[str, float]]]:
    rng = np.random.default_rng(0)
    return [augment.drawn(rng) for _ in range(count)]


def test_recipe_string_gives_the_settings_of_the_recipe():
    augment = RandAugment.from_string(RECIPE, MEAN)
    assert augment == RandAugment(FILL, magnitude=9.0, magnitude_std=0.5, operations=2)
    assert RandAugment.from_string("rand-inc1", (0.5,)) == RandAugment((128,), 10.0, 0.0, 2)
    assert RandAugment.from_string("rand-inc1-n3-m5", (0.5,)) == RandAugment((128,), 5.0, 0.0, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-m9-p0.5-inc1", r"'p0\.5' is not known; expected rand, then any of m, n, mstd"),
        ("rand-m9-mstd-inc1", "'mstd' is not known"),
        ("rand-m9-inc1-", "'' is not known"),
        ("augmix-m3", "'augmix' is not known"),
        ("rand-m9-mstd0.5", "add -inc1"),
        ("rand-m9-inc0", "add -inc1"),
        ("rand-n1.5-inc1", "n must be a whole number"),
        ("rand-m11-inc1", r"magnitude must be in \[0, 10\], got 11"),
        ("rand-n0-inc1", "operations must be at least 1, got 0"),
    ],
)
def test_strings_that_name_nothing_known_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        RandAugment.from_string(text, MEAN)


@pytest.mark.parametrize("channels", [2, 4, 10])
def test_other_channel_counts_are_refused_before_any_image_is_read(channels):
    with pytest.raises(
        ValueError, match=f'1 or 3 channels, not {channels}; set data.augment to ""'
    ):
        RandAugment.from_string(RECIPE, (0.5,) * channels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint16), r"got uint16 \(8, 8, 3\); set data.augment"),
        (np.zeros((8, 8, 1), np.uint8), r"of 3 channels, got uint8 \(8, 8, 1\)"),
    ],
)
def test_images_of_another_type_or_channel_count_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(FILL)(image, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fill": (256,)}, "fill must be in 0..255"), ({"magnitude_std": -1.0}, "not be negative")],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(**{"fill": FILL, **options})


def test_every_operation_is_drawn_equally_often():
    names = [name for drawn in draws(RandAugment(FILL), 6000) for name, _ in drawn]
    counts = [names.count(name) for name in OPERATIONS]
    assert len(OPERATIONS) == 15
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("operations", [1, 2, 3])
def test_every_drawn_operation_is_carried_out_in_half_of_the_cases(operations):
    numbers = [len(drawn) for drawn in draws(RandAugment(FILL, operations=operations), 4000)]
    expected = stats.binom.pmf(range(operations + 1), operations, 0.5) * 4000
    assert stats.chisquare(np.bincount(numbers), expected).pvalue > 0.001


def test_magnitudes_are_normal_and_clipped():
    augment = RandAugment.from_string(RECIPE, MEAN)
    magnitudes = [10 * abs(s) for drawn in draws(augment, 4000) for _, s in drawn]
    assert max(magnitudes) == 10
    assert np.mean(np.equal(magnitudes, 10)) == pytest.approx(stats.norm.sf(2), abs=0.01)
    inside = [m for m in magnitudes if m < 10]
    assert stats.kstest(inside, stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > 0.001


def test_without_deviation_every_strength_is_the_magnitude():
    strengths = [abs(s) for drawn in draws(RandAugment(FILL, 7.0), 50) for _, s in drawn]
    assert set(strengths) == {0.7}


def test_only_two_sided_operations_are_negative_and_in_half_of_the_cases():
    drawn = [pair for pairs in draws(RandAugment(FILL, 9.0), 6000) for pair in pairs]
    signs = [strength > 0 for name, strength in drawn if name in TWO_SIDED]
    assert np.mean(signs) == pytest.approx(0.5, abs=0.03)
    assert all(strength > 0 for name, strength in drawn if name not in TWO_SIDED)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])),
)
def test_shape_and_type_are_kept_and_the_result_depends_on_the_generator_alone(seed, shape):
    image = noise(*shape)
    before = image.copy()
    augment = RandAugment(FILL[: shape[2]], 9.0, 0.5, 3)
    first, again = (augment(image, np.random.default_rng(seed)) for _ in range(2))
    assert first.shape == shape and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)


def test_operations_follow_each_other(monkeypatch):
    augment, image = RandAugment(FILL), noise()
    monkeypatch.setattr(RandAugment, "drawn", lambda *_: [("Invert", 1.0), ("SolarizeAdd", 0.9)])
    expected = operated("SolarizeAdd", 255 - image, 0.9)
    np.testing.assert_array_equal(augment(image, np.random.default_rng(0)), expected)


def test_autocontrast_stretches_every_channel_to_the_full_range():
    image = (noise() // 4 + 50).astype(np.uint8)
    result = operated("AutoContrast", image, 0.9)
    assert result.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert result.max(axis=(0, 1)).min() >= 254  # Pillow rounds down


def test_equalize_makes_values_uniform():
    image = (noise(64, 64) ** 0.5 * 10).astype(np.uint8)
    result = operated("Equalize", image, 0.9)[..., 0].ravel()
    assert stats.kstest(result, stats.uniform(0, 255).cdf).statistic < 0.1
    assert stats.kstest(image[..., 0].ravel(), stats.uniform(0, 255).cdf).statistic > 0.2


@pytest.mark.parametrize(("strength", "bits"), [(0.2, 4), (0.5, 2), (0.9, 1), (1.0, 0)])
def test_posterize_keeps_the_highest_bits(strength, bits):
    image = noise()
    expected = image >> (8 - bits) << (8 - bits) if bits else np.zeros_like(image)
    np.testing.assert_array_equal(operated("PosterizeIncreasing", image, strength), expected)


@pytest.mark.parametrize(("strength", "threshold"), [(0.0, 256), (0.5, 128), (0.9, 26), (1.0, 0)])
def test_solarize_inverts_values_from_a_threshold_on(strength, threshold):
    image = noise()
    expected = np.where(image < threshold, image, 255 - image)
    np.testing.assert_array_equal(operated("SolarizeIncreasing", image, strength), expected)


def test_solarize_add_raises_dark_values():
    image = noise()
    expected = np.where(image < 128, np.minimum(image.astype(int) + 99, 255), image)
    np.testing.assert_array_equal(operated("SolarizeAdd", image, 0.9), expected)


@pytest.mark.parametrize("strength", [-0.9, 0.9])
def test_enhancements_blend_with_what_has_none_of_the_property(strength):
    """Black, the mean grey, the grey image, and the smoothed image."""
    image = smooth_image(20, 30)
    factor = 1 + 0.9 * strength
    luma = np.asarray(Image.fromarray(image).convert("L"))[..., None].astype(float)
    for name, degenerate in (
        ("BrightnessIncreasing", 0.0),
        ("ContrastIncreasing", float(int(luma.mean() + 0.5))),
        ("ColorIncreasing", luma),
    ):
        expected = np.clip(degenerate + factor * (image - degenerate), 0, 255)
        np.testing.assert_allclose(operated(name, image, strength), expected, atol=1)
    sharpness = operated("SharpnessIncreasing", image, strength).astype(float)
    change = np.abs(np.diff(sharpness, axis=1)).sum() / np.abs(np.diff(image / 1.0, axis=1)).sum()
    assert (change > 1) == (strength > 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_translations_are_a_share_of_the_size(axis, sign):
    image = noise(20, 40)
    name, size = ("TranslateYRel", 20) if axis == 0 else ("TranslateXRel", 40)
    pixels = 9 if axis == 0 else 18  # 45 %
    result = operated(name, image, float(sign))
    shifted = np.roll(image, -sign * pixels, axis)
    come_in = np.arange(size) >= size - pixels if sign > 0 else np.arange(size) < pixels
    come_in = come_in[:, None, None] if axis == 0 else come_in[None, :, None]
    np.testing.assert_array_equal(result, np.where(come_in, FILL, shifted))


@pytest.mark.parametrize(("name", "axis"), [("ShearX", 1), ("ShearY", 0)])
def test_shears_move_rows_or_columns_in_proportion_to_their_distance(name, axis):
    ramp = np.arange(40, dtype=np.uint8) * 4
    image = np.repeat(np.broadcast_to(ramp, (40, 40))[..., None], 3, 2)
    image = image if axis == 1 else image.swapaxes(0, 1)
    result = operated(name, np.ascontiguousarray(image), 1.0).astype(float)
    result = result if axis == 1 else result.swapaxes(0, 1)
    for distance in (0, 10, 30):
        moved = 0.3 * (distance + 0.5)
        inside = result[distance, 2:25, 0]
        np.testing.assert_allclose(inside, 4.0 * (np.arange(2, 25) + moved), atol=1)


def test_rotation_at_full_strength_is_by_30_degrees_about_the_centre():
    bar = np.zeros((61, 61, 3), np.uint8)
    bar[:, 29:32] = 255
    bright = np.argwhere(operated("Rotate", bar, 1.0)[..., 0] > 200) - 30.0
    angle = np.degrees(np.arctan2(bright[:, 1], bright[:, 0]))[np.abs(bright[:, 0]) > 15]
    assert np.median(angle % 180) == pytest.approx(30, abs=1)
    assert np.abs(bright.mean(axis=0)).max() < 0.5


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"])
def test_what_comes_in_from_outside_has_the_fill_and_zero_strength_changes_nothing(name):
    image = np.full((40, 40, 3), 255, np.uint8)
    corners = operated(name, image, 1.0)[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert any(tuple(corner) == FILL for corner in corners.tolist())
    np.testing.assert_array_equal(operated(name, noise(), 0.0), noise())


def test_colour_leaves_grey_images_as_they_are():
    image = noise(channels=1)
    np.testing.assert_array_equal(operated("ColorIncreasing", image, 0.9), image)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "ColorIncreasing"])
def test_a_grey_image_changes_as_a_channel_of_an_image_of_three_equal_channels(name):
    image = noise(channels=1)
    grey = np.asarray(OPERATIONS[name](Image.fromarray(image[..., 0]), 0.9, 99))
    colour = OPERATIONS[name](Image.fromarray(image.repeat(3, -1)), 0.9, (99, 99, 99))
    np.testing.assert_array_equal(grey, np.asarray(colour)[..., 1])


def test_composed_hands_one_generator_from_step_to_step():
    crop, augment = RandomResizedCrop((16, 16)), RandAugment.from_string(RECIPE, MEAN)
    composed = Composed((crop, augment))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        expected = augment(crop(noise(), rng), rng)
        np.testing.assert_array_equal(composed(noise(), np.random.default_rng(seed)), expected)


def test_transforms_can_be_pickled_and_compared():
    composed = Composed((RandomResizedCrop((8, 8)), RandAugment.from_string(RECIPE, MEAN)))
    assert pickle.loads(pickle.dumps(composed)) == composed
