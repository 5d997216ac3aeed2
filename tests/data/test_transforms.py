import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mim_jax.data.resize import resized
from mim_jax.data.transforms import CropWithTarget, EvaluationCrop, RandomResizedCrop
from tests.data.images import random_samples, smooth_image

BACKENDS = ["opencv", "pillow"]


def box_of_torchvision(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], uniforms: list
) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.get_params` written out, with its uniform draws given one by one."""
    draws = iter(uniforms)
    for _ in range(10):
        target = height * width * (area[0] + (area[1] - area[0]) * next(draws))
        log_aspect = (math.log(aspect[0]), math.log(aspect[1]))
        ratio = math.exp(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * next(draws))
        w = round(math.sqrt(target * ratio))
        h = round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            i = math.floor(next(draws) * (height - h + 1))
            j = math.floor(next(draws) * (width - w + 1))
            return i, j, h, w
    if width / height < min(aspect):
        w, h = width, round(width / min(aspect))
    elif width / height > max(aspect):
        h, w = height, round(height * max(aspect))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 500), width=st.integers(1, 500), seed=st.integers(0, 2**32))
def test_box_is_that_of_torchvision(height: int, width: int, seed: int) -> None:
    crop = RandomResizedCrop((32, 32))
    uniforms = list(np.random.default_rng(seed).random(40))
    box = crop.box(height, width, np.random.default_rng(seed))
    assert box == box_of_torchvision(height, width, (0.2, 1.0), (3 / 4, 4 / 3), uniforms)
    top, left, box_height, box_width = box
    assert 0 <= top <= height - box_height and box_height >= 1
    assert 0 <= left <= width - box_width and box_width >= 1


def test_boxes_have_the_asked_areas_aspects_and_places() -> None:
    crop, rng = RandomResizedCrop((8, 8), area=(0.1, 0.5)), np.random.default_rng(0)
    boxes = np.array([crop.box(400, 400, rng) for _ in range(4000)], float)
    area, aspect = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.098 and area.max() < 0.502
    assert abs(area.mean() - 0.3) < 0.01
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert abs(np.log(aspect).mean()) < 0.01
    centre = boxes[:, 0] + boxes[:, 2] / 2
    assert abs(centre.mean() - 200) < 4


@pytest.mark.parametrize(
    ("shape", "box"), [((10, 400), (0, 193, 10, 13)), ((400, 10), (193, 0, 13, 10))]
)
def test_long_images_fall_back_to_the_centre(
    shape: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    crop = RandomResizedCrop((8, 8), area=(0.9, 1.0))
    assert crop.box(*shape, np.random.default_rng(0)) == box


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_single_draw_clips_and_never_retries(height: int, width: int, seed: int) -> None:
    crop = RandomResizedCrop((8, 8), area=(0.08, 1.0), single_draw=True)
    u = np.random.default_rng(seed).random(4)
    target = height * width * (0.08 + 0.92 * u[0])
    ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[1])
    w = min(max(round(math.sqrt(target * ratio)), 1), width)
    h = min(max(round(math.sqrt(target / ratio)), 1), height)
    expected = (int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w)
    assert crop.box(height, width, np.random.default_rng(seed)) == expected


def test_pillow_crop_has_the_pixels_of_crop_and_resize() -> None:
    image = smooth_image(90, 120)
    crop = RandomResizedCrop((32, 48), backend="pillow")
    top, left, height, width = crop.box(90, 120, np.random.default_rng(4))
    whole = Image.fromarray(image).crop((left, top, left + width, top + height))
    expected = np.asarray(whole.resize((48, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop(image, np.random.default_rng(4)), expected)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (331, 517), (224, 224)])
@pytest.mark.parametrize("size", [224, 96, 256])
def test_pillow_evaluation_crop_is_exactly_resize_and_centre_crop(
    height: int, width: int, size: int
) -> None:
    image = smooth_image(height, width)
    short = int(size / 0.875) if size <= 224 else size
    if height <= width:
        new_height, new_width = short, int(short * width / height)
    else:
        new_height, new_width = int(short * height / width), short
    whole = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    expected = np.asarray(whole)[top : top + size, left : left + size]
    result = EvaluationCrop((size, size), backend="pillow")(image)
    np.testing.assert_array_equal(result, expected)


def test_default_crop_ratio_is_that_of_mae() -> None:
    assert EvaluationCrop((224, 224)).resized_size(300, 400) == (256, 341)
    assert EvaluationCrop((448, 448)).resized_size(300, 400) == (448, 597)
    assert EvaluationCrop((28, 28)).resized_size(28, 28) == (32, 32)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_evaluation_crop_of_any_size_is_covered_by_the_image(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    crop = EvaluationCrop(size)
    height, width = crop.resized_size(*shape)
    assert height >= int(size[0] / 0.875) and width >= int(size[1] / 0.875)
    assert height == int(size[0] / 0.875) or width == int(size[1] / 0.875)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_line_of_pixels_is_cropped_without_growing_to_a_gigabyte(shape: tuple[int, int]) -> None:
    image = np.arange(4000, dtype=np.uint16).reshape(*shape, 1) * 16
    for crop in (EvaluationCrop((224, 224)), RandomResizedCrop((224, 224))):
        tracemalloc.start()
        result = crop(image, np.random.default_rng(0))
        assert tracemalloc.get_traced_memory()[1] < 2e7
        tracemalloc.stop()
        assert result.shape == (224, 224, 1)
        # The middle of the line, where each pixel has become 256 rows or columns.
        assert np.abs(result.astype(int) - 16 * 2000).max() <= 32


def test_ends_left_out_do_not_change_the_crop() -> None:
    image = smooth_image(20, 20 * 64)
    crop = EvaluationCrop((40, 40), backend="pillow")
    middle = slice(20 * 32 - 20 * 4, 20 * 32 + 20 * 4)
    np.testing.assert_array_equal(crop(image), crop(image[:, middle]))


def test_image_of_the_right_size_passes_unchanged_with_ratio_one() -> None:
    image = smooth_image(28, 28)[..., :1]
    np.testing.assert_array_equal(EvaluationCrop((28, 28), crop_ratio=1.0)(image), image)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("shape", [(28, 28), (100, 40), (32, 300)])
def test_channels_and_type_are_kept(
    backend: str, dtype: type, channels: int, shape: tuple[int, int]
) -> None:
    image = random_samples(*shape, channels, dtype)
    random = RandomResizedCrop((32, 24), backend=backend)(image, np.random.default_rng(0))
    centre = EvaluationCrop((32, 24), backend=backend)(image)
    assert random.shape == centre.shape == (32, 24, channels)
    assert random.dtype == centre.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(20, 30), (90, 100), (20, 100), (57, 68)])
def test_each_channel_is_resized_by_itself(
    backend: str, dtype: type, interpolation: str, size: tuple[int, int]
) -> None:
    image = random_samples(60, 70, 7, dtype)
    together = resized(image, size, interpolation, backend)
    for channel in range(7):
        alone = resized(image[..., channel : channel + 1], size, interpolation, backend)
        # OpenCV rounds in another order, by how many channels it works on at once.
        difference = np.abs(together[..., channel].astype(int) - alone[..., 0]).max()
        assert difference <= (1 if backend == "opencv" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(20, 30), (90, 100), (57, 68)])
def test_sixteen_bits_are_resized_as_eight_but_finer(
    backend: str, interpolation: str, size: tuple[int, int]
) -> None:
    """The steps in the image make the kernels overshoot at black and white."""
    eight = np.repeat(np.repeat(random_samples(6, 7, 5) // 128 * 255, 10, 0), 10, 1)
    sixteen = resized(eight.astype(np.uint16) * 257, size, interpolation, backend)
    difference = sixteen / 257 - resized(eight, size, interpolation, backend)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(10, 10), (10, 200), (200, 10), (95, 105)])
@pytest.mark.parametrize(("channels", "white"), [(1, 254), (5, 254), (5, 254 * 257)])
def test_shrinking_does_not_alias(
    backend: str, interpolation: str, size: tuple[int, int], channels: int, white: int
) -> None:
    """Single-pixel stripes, shrunk across, become even grey and keep their mean."""
    stripes = np.zeros((100, 100, channels), np.uint8 if white < 256 else np.uint16)
    stripes[:, ::2] = white
    result = resized(stripes, size, interpolation, backend) * (254 / white)
    assert abs(result.mean() - 127) < 3
    if size[1] == 10:
        assert result[:, 1:-1].std() < 8


@pytest.mark.parametrize("size", [(20, 20), (150, 150), (30, 150), (56, 58)])
def test_backends_agree_on_smooth_images(size: tuple[int, int]) -> None:
    image = smooth_image(60, 60)
    by_backend = [resized(image, size, "bicubic", backend).astype(int) for backend in BACKENDS]
    assert np.abs(by_backend[0] - by_backend[1]).mean() < 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_renderings_of_a_crop_show_the_same_box(backend: str) -> None:
    image = smooth_image(60, 50)
    crop = RandomResizedCrop((32, 24), area=(0.1, 0.6), backend=backend)
    for seed in range(5):
        pictures = CropWithTarget(crop, (12, 16), "lanczos")(image, np.random.default_rng(seed))
        # The first is what the crop alone gives, from the same draws and no more.
        np.testing.assert_array_equal(pictures["image"], crop(image, np.random.default_rng(seed)))
        box = crop.box(60, 50, np.random.default_rng(seed))
        cut = image[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        expected = resized(cut, (12, 16), "lanczos", backend)
        np.testing.assert_array_equal(pictures["target_image"], expected)


def test_the_two_renderings_draw_what_the_crop_alone_draws() -> None:
    image, crop = smooth_image(60, 50), RandomResizedCrop((8, 8))
    alone, twice = np.random.default_rng(0), np.random.default_rng(0)
    crop(image, alone)
    CropWithTarget(crop, (4, 4))(image, twice)
    assert alone.random() == twice.random()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": (8,)}, r"size must be \(height, width\) in whole pixels"),
        ({"target_interpolation": "box"}, "unknown interpolation 'box'; use one of bicubic"),
    ],
)
def test_bad_options_of_a_second_rendering_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropWithTarget(RandomResizedCrop((8, 8)), **{"target_size": (4, 4), **options})


@pytest.mark.parametrize(("height", "width"), [(28, 28), (37, 91), (300, 200), (3, 200), (90, 41)])
@pytest.mark.parametrize("backend", ["opencv", "pillow"])
def test_map_goes_where_its_image_goes(height: int, width: int, backend: str) -> None:
    # Four areas of the classes 1, 2, 0 and 1, in the image black where the class is even.
    classes = np.zeros((height, width), np.uint8)
    classes[: height // 2] += 1
    classes[:, width // 2 :] += 1
    image = (classes % 2 * 255)[..., None].astype(np.uint8)
    crop = EvaluationCrop((28, 36), backend=backend)
    shown, mapped = crop(image)[..., 0] > 127, crop.of_classes(classes)
    assert mapped.shape == (28, 36) and mapped.dtype == np.uint8
    middle = np.ones_like(shown)
    middle[13:15], middle[:, 17:19] = False, False  # at the border the image is a mixture
    if height > 3:  # of three rows none ends in the middle
        np.testing.assert_array_equal(shown[middle], mapped[middle] % 2 == 1)
    assert (shown != (mapped % 2 == 1)).mean() < 0.1
    assert len(np.unique(mapped)) == 3


def test_map_is_resized_as_pillow_does_it_by_nearest_neighbours() -> None:
    classes = np.random.default_rng(0).integers(0, 256, (50, 71), np.uint8)
    crop = EvaluationCrop((30, 30), crop_ratio=0.75)
    whole = Image.fromarray(classes).resize((56, 40), Image.Resampling.NEAREST)
    assert crop.resized_size(50, 71) == (40, 56)
    expected = np.asarray(whole.crop((13, 5, 43, 35)))
    np.testing.assert_array_equal(crop.of_classes(classes), expected)


def test_map_of_the_right_size_passes_unchanged_with_ratio_one() -> None:
    classes = np.arange(28 * 28, dtype=np.int32).reshape(28, 28)
    crop = EvaluationCrop((28, 28), crop_ratio=1.0)
    np.testing.assert_array_equal(crop.of_classes(classes), classes)


def test_transforms_can_be_pickled_and_compared() -> None:
    crop = RandomResizedCrop((8, 8))
    for transform in (crop, EvaluationCrop((8, 8)), CropWithTarget(crop, (4, 4))):
        assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 8)}, r"size must be \(height, width\) in whole pixels"),
        ({"area": (0.5, 0.2)}, "area must satisfy 0 < low <= high <= 1"),
        ({"aspect": (0.0, 1.0)}, "aspect must satisfy 0 < low <= high"),
        ({"tries": 0}, "tries must be at least 1"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; use one of bicubic, bilinear"),
        ({"backend": "cv"}, "unknown image backend 'cv'"),
    ],
)
def test_bad_options_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(**{"size": (8, 8), **options})


def test_bad_crop_ratio_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"crop_ratio must be in \(0, 1\], got 1.5"):
        EvaluationCrop((8, 8), crop_ratio=1.5)
