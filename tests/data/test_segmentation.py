import numpy as np
import pytest
from PIL import Image

from mim_jax.data import open_source
from mim_jax.data.segmentation import decode_map, patch_classes, segmentation_of
from tests.data.images import encoded, encoded_png, smooth_image


def test_values_of_grey_and_numbers_of_a_palette_are_classes() -> None:
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(decode_map(encoded(Image.fromarray(classes), "PNG")), classes)
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    palette.putpalette(list(range(255, 219, -1)))
    for bits in (4, 8):
        data = encoded(palette, "PNG", bits=bits)
        np.testing.assert_array_equal(decode_map(data), classes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PNG"),
        (encoded(Image.fromarray(smooth_image()), "JPEG"), "not a PNG"),
        (encoded(Image.fromarray(smooth_image()), "PNG"), "8 bits a sample and colour type 2"),
        (encoded_png(np.zeros((4, 4, 2), np.uint8), 4), "colour type 4; a map of classes has one"),
        (encoded_png(np.zeros((4, 4, 1), np.uint16), 0), "16 bits a sample and colour type 0"),
        # A decoder would turn its classes 0 and 1 into 0 and 255.
        (encoded(Image.new("1", (4, 4)), "PNG"), "1 bits a sample and colour type 0"),
        (encoded(Image.new("L", (40, 40)), "PNG")[:50], "truncated|broken|Truncated"),
    ],
)
def test_what_is_no_map_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_map(data)


def test_patch_has_the_class_of_most_of_its_pixels_row_by_row() -> None:
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, (15, 12)).astype(np.uint8)
    found = patch_classes(classes, (3, 4))  # of 15 pixels each
    assert found.shape == (12,) and found.dtype == np.int32
    for number, label in enumerate(found):
        row, column = divmod(number, 4)
        patch = classes[row * 5 : row * 5 + 5, column * 3 : column * 3 + 3]
        counts = [(patch == value).sum() for value in range(3)]
        assert counts[label] == max(counts)
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize(
    ("pixels", "label"),
    [
        ([7, 7, 2, 2], 2),  # a tie: the smallest
        ([254, 254, 254, 0], 254),
        ([255, 255, 9, 3], 3),  # half without a class: the others decide
        ([255, 255, 255, 9], -1),
        ([255, 255, 255, 255], -1),
    ],
)
def test_ties_and_pixels_without_a_class(pixels: list[int], label: int) -> None:
    classes = np.array(pixels, np.uint8).reshape(2, 2)
    assert patch_classes(classes, (1, 1)).tolist() == [label]


def test_grid_that_does_not_divide_the_map_is_an_error() -> None:
    with pytest.raises(ValueError, match="a grid of 3 x 4 patches does not divide 28 x 28"):
        patch_classes(np.zeros((28, 28), np.uint8), (3, 4))


def test_data_without_maps_know_no_segmentation() -> None:
    assert segmentation_of(open_source("embedded"), 0) is None
