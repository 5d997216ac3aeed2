import numpy as np
import pytest

from mim_jax.training import pictures
from mim_jax.training.pictures import picture_grid


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def corners_of(tile: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where a tile stands in a picture, pixel by pixel."""
    height, width = tile.shape[:2]
    starts = (picture == tile[0, 0]).all(-1)[: -height + 1 or None, : -width + 1 or None]
    return [
        (down, across)
        for down, across in np.argwhere(starts).tolist()
        if (picture[down : down + height, across : across + width] == tile).all()
    ]


def corner_of(tile: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    (corner,) = corners_of(tile, picture)
    return corner


@pytest.mark.parametrize("size", [(96, 96), (224, 224), (100, 130)])
def test_images_stand_in_the_picture_pixel_by_pixel(size):
    columns = {
        "image": random_images(3, *size, 3),
        "prediction + visible": random_images(3, *size, 3, seed=1),
    }
    picture = picture_grid(columns, "What a reader must know.")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    corners = [[corner_of(image, picture) for image in images] for images in columns.values()]
    for column in corners:  # one below the other, in order
        assert len({across for _, across in column}) == 1
        assert np.diff([down for down, _ in column]).min() > size[0]
    for left, right in zip(*corners, strict=True):  # side by side
        assert left[0] == right[0]
        assert right[1] - left[1] > size[1]


def test_small_images_are_enlarged_by_whole_pixels():
    images = random_images(2, 28, 28, 3)
    picture = picture_grid({"image": images})
    for image in images:
        assert len(corners_of(image.repeat(4, 0).repeat(4, 1), picture)) == 1


def test_scale_is_obeyed():
    image = random_images(1, 40, 40, 3)
    picture = picture_grid({"image": image}, scale=2)
    corner_of(image[0].repeat(2, 0).repeat(2, 1), picture)
    assert not corners_of(image[0].repeat(3, 0).repeat(3, 1), picture)


def test_a_map_of_patches_is_as_large_as_its_image():
    columns = {"image": random_images(1, 224, 224, 3), "map": random_images(1, 14, 14, 1)}
    picture = picture_grid(columns)
    tile = columns["map"][0].repeat(3, -1).repeat(16, 0).repeat(16, 1)
    assert corner_of(tile, picture)[0] == corner_of(columns["image"][0], picture)[0]


def test_grey_images_become_three_equal_channels():
    image = random_images(1, 96, 96, 1)
    picture = picture_grid({"image": image})
    assert len(corners_of(np.concatenate([image[0]] * 3, -1), picture)) == 1


@pytest.mark.parametrize(("channels", "shown"), [(2, [0, 0, 0]), (4, [0, 1, 2]), (10, [0, 1, 2])])
def test_of_other_channel_counts_the_first_are_shown(channels, shown):
    image = random_images(1, 96, 96, channels)
    assert len(corners_of(image[0][..., shown], picture_grid({"image": image}))) == 1


def test_titles_do_not_reach_into_the_next_column():
    white = np.full((1, 96, 96, 3), 255, np.uint8)
    title = "a_title_wider_than_its_tile and more words"
    alone = picture_grid({title: white})
    beside = picture_grid({title: white, "image": white, title + "!": white})
    head = alone.shape[0] - 96 - 2 * pictures.GAP  # rows above the tiles
    text = (beside[:head] < 128).any((0, 2)).astype(int)
    gaps = [len(run) for run in "".join(map(str, text)).strip("0").split("1")]
    assert sum(gap >= pictures.GAP - 1 for gap in gaps) >= 2
    middle = alone.shape[1] - pictures.MARGIN
    assert not (beside[:head, middle : middle + pictures.GAP] < 128).any()


def test_every_title_and_the_caption_are_written():
    white = np.full((1, 96, 96, 3), 255, np.uint8)
    blank = picture_grid({" ": white, "  ": white})
    titled = picture_grid({"image": white, "  ": white})
    assert (blank < 128).sum() == 0
    assert (titled < 128).sum() > 0
    captioned = picture_grid({"image": white, "  ": white}, "A caption")
    assert captioned.shape[0] > titled.shape[0] and captioned.shape[1] == titled.shape[1]
    assert (captioned[titled.shape[0] - pictures.MARGIN :] < 128).any()


def test_a_long_caption_wraps_to_the_width_and_keeps_its_line_breaks():
    font = pictures.load_font(13)
    lines = pictures.wrapped("one two three four five six\n\nseven", font, 80)
    assert " ".join(lines).split() == ["one", "two", "three", "four", "five", "six", "seven"]
    assert all(font.getlength(line) <= 80 for line in lines)
    assert lines[-2:] == ["", "seven"] and len(lines) > 4
    images = {"image": random_images(1, 96, 96, 3)}
    long = picture_grid(images, "word " * 40)
    assert long.shape[1] == picture_grid(images).shape[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "at least one column"),
        ({"a": np.zeros((1, 8, 8, 3))}, "'a' is float64"),
        ({"a": np.zeros((8, 8, 3), np.uint8)}, r"\[8, 8, 3\]; expected uint8"),
        ({"a": np.zeros((0, 8, 8, 3), np.uint8)}, "none of them zero"),
        (
            {"a": np.zeros((1, 8, 8, 3), np.uint8), "b": np.zeros((2, 8, 8, 3), np.uint8)},
            "number of rows",
        ),
    ],
)
def test_columns_that_make_no_picture_are_named(columns, message):
    with pytest.raises(ValueError, match=message):
        picture_grid(columns)


def test_scale_zero_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        picture_grid({"a": np.zeros((1, 8, 8, 3), np.uint8)}, scale=0)
