import pickle

import numpy as np
import pytest

from mim_jax.data import open_source
from mim_jax.data.synthetic.faces import (
    IDENTITY_FACTORS,
    IMAGES_PER_IDENTITY,
    NUISANCE_FACTORS,
    draw_face,
)

FACE, PLAIN = np.zeros(8), np.zeros(4)


def changed(vector: np.ndarray, index: int, value: float) -> np.ndarray:
    vector = vector.copy()
    vector[index] = value
    return vector


def test_splits_have_their_identities_and_share_none():
    train, test = (open_source("synthetic:faces", split) for split in ("train", "test"))
    assert (len(train), train.num_classes) == (200 * 30, 200)
    assert (len(test), test.num_classes) == (50 * 30, 250)
    for source, numbers in ((train, range(200)), (test, range(200, 250))):
        counts = np.bincount(source.labels, minlength=250)
        np.testing.assert_array_equal(np.flatnonzero(counts), numbers)
        assert set(counts[counts > 0]) == {IMAGES_PER_IDENTITY}
        for index in (0, 29, 30, len(source) - 1):
            assert source[index]["label"] == source.labels[index]


def test_an_example_is_a_function_of_split_and_index():
    source = open_source("synthetic:faces", "test")
    copy = pickle.loads(pickle.dumps(source))
    image = source[47]["image"]
    assert image.shape == (28, 28, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, copy[47]["image"])
    np.testing.assert_array_equal(image, draw_face(*source.factors(47)))
    part = open_source("synthetic:faces", "test[:10]")
    assert len(part) == 10 and part[0]["label"] >= 200


def test_images_of_an_identity_share_its_factors_alone():
    source = open_source("synthetic:faces")
    first, second, other = (source.factors(i) for i in (60, 61, 90))
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[0] != other[0]).all() and (first[1] != second[1]).all()
    assert all((np.abs(vector) <= 1).all() for vector in (*first, *other))
    assert (source[60]["image"] != source[61]["image"]).any()


@pytest.mark.parametrize("index", range(8), ids=IDENTITY_FACTORS)
def test_every_factor_of_identity_shows(index):
    low, high = (draw_face(changed(FACE, index, x), PLAIN).astype(int) for x in (-1, 1))
    assert np.abs(low - high).max() > 40


@pytest.mark.parametrize("index", range(4), ids=NUISANCE_FACTORS)
def test_every_nuisance_shows(index):
    low, high = (draw_face(FACE, changed(PLAIN, index, x)).astype(int) for x in (-1, 1))
    assert np.abs(low - high).max() > 40


def test_a_turn_to_the_other_side_is_the_mirror_image():
    left, right = (draw_face(FACE, np.array([x, 0, 0.2, 0])) for x in (-0.7, 0.7))
    np.testing.assert_array_equal(left, right[:, ::-1])
    darkest = draw_face(FACE, np.array([1.0, 0, 1, 0]), 112)[85:95].sum(axis=(0, 2)).argmin()
    assert darkest > 56, "the mouth moves to the right"


def test_the_option_is_the_side_and_larger_images_show_the_same_face():
    small, large = open_source("synthetic:faces"), open_source("synthetic:faces:112")
    image = large[3]["image"]
    assert image.shape == (112, 112, 3)
    shrunk = image.reshape(28, 4, 28, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small[3]["image"]).mean() < 4


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("synthetic:faces:7", "train", "at least 8"),
        ("synthetic:faces:big", "train", "faces:big is not understood"),
        ("synthetic:faces", "val", "'train' and 'test'"),
    ],
)
def test_what_does_not_exist_is_named(name, split, message):
    with pytest.raises(ValueError, match=message):
        open_source(name, split)


def test_wrong_factors_and_indices_are_named():
    with pytest.raises(ValueError, match="8 factors of identity and 4 of nuisance"):
        draw_face(PLAIN, FACE)
    with pytest.raises(IndexError, match="1500 examples"):
        open_source("synthetic:faces", "test")[1500]
