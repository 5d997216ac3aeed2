import numpy as np
import pytest

from mim_jax.evaluation.confusion import COLOURS, colours_of, confusion, confusion_picture
from mim_jax.training.pictures import FRAME


def random_counts(classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 100, (classes, classes))


def matrix_of(picture: np.ndarray) -> np.ndarray:
    """The part of a picture inside the frame of the cells."""
    frame = (picture == FRAME).all(-1)
    rows = np.flatnonzero(frame.mean(axis=1) > 0.35)
    columns = np.flatnonzero(frame.mean(axis=0) > 0.35)[:-2]  # without the scale of colours
    return picture[rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]]


def test_confusion_counts_true_classes_in_rows():
    logits = np.eye(3)[[0, 1, 1, 2, 0]]
    counts = confusion(logits, np.asarray([0, 1, 0, 1, 0]))
    np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 1, 1], [0, 0, 0]])


def test_colours_darken_steadily_with_the_share():
    for share, colour in COLOURS.items():
        assert tuple(colours_of(np.asarray(share))) == colour
    brightness = colours_of(np.linspace(0, 1, 100)).astype(int).sum(axis=-1)
    assert np.all(np.diff(brightness) < 0)


@pytest.mark.parametrize("classes", [2, 10, 20, 21, 100])
def test_cells_have_the_colours_of_their_shares_of_the_row(classes):
    counts = np.roll(np.eye(classes, dtype=int), 1, axis=1) * 7
    matrix = matrix_of(confusion_picture(counts))
    cell = (len(matrix) + 1) / classes
    assert matrix.shape == (classes * cell - 1, classes * cell - 1, 3)
    assert cell >= 12 and cell == int(cell)
    corners = matrix[2 :: int(cell), 2 :: int(cell)]  # beside the numbers
    expected = np.where(counts[..., None] == 7, COLOURS[1.0], COLOURS[0.0])
    np.testing.assert_array_equal(corners, expected)


def test_numbers_are_written_up_to_twenty_classes():
    for classes, written in ((20, True), (21, False)):
        # All rows have equal shares, so that only numbers can differ.
        some, other = (np.full((classes, classes), count) for count in (11, 88))
        differ = np.any(matrix_of(confusion_picture(some)) != matrix_of(confusion_picture(other)))
        assert differ == written


def test_the_largest_numbers_fit_into_their_cells():
    few, many = (confusion_picture(np.full((3, 3), n)) for n in (9, 10**12))
    assert many.shape[1] > few.shape[1]


def test_long_names_are_cut_and_stand_upright():
    short = confusion_picture(random_counts(3), ("a", "b", "c"))
    long = confusion_picture(random_counts(3), ("word " * 50, "b", "c"))
    longer = confusion_picture(random_counts(3), ("word " * 90, "b", "c"))
    assert long.shape == longer.shape
    assert 100 < long.shape[0] - short.shape[0] < 200
    assert 100 < long.shape[1] - short.shape[1] < 200


def test_names_titles_and_caption_are_written():
    plain = confusion_picture(random_counts(3), (" ", " ", " "))
    named = confusion_picture(random_counts(3), ("a", "b", "c"))
    captioned = confusion_picture(random_counts(3), ("a", "b", "c"), "What a reader must know.")
    assert (named < 128).sum() > (plain < 128).sum()
    assert captioned.shape[0] > named.shape[0]
    assert (captioned[named.shape[0] - 8 :] < 128).any()


def test_a_class_without_examples_is_an_empty_row():
    counts = random_counts(3)
    counts[1] = 0
    assert confusion_picture(counts).shape == confusion_picture(random_counts(3)).shape


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        (np.zeros((2, 3), int), None, r"counts are int64 \(2, 3\); expected integers"),
        (np.zeros((2, 2)), None, "counts are float64"),
        (np.full((2, 2), -1), None, "from 0 on"),
        (np.zeros((0, 0), int), None, r"\(0, 0\)"),
        (np.ones((2, 2), int), ("a",), "there are 2 classes, but 1 class names"),
    ],
)
def test_what_makes_no_picture_is_an_error(counts, names, message):
    with pytest.raises(ValueError, match=message):
        confusion_picture(counts, names)
