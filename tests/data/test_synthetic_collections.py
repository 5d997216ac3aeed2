import pickle

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mim_jax.data import open_source
from mim_jax.data.mixture import MixtureSource
from mim_jax.data.synthetic.collections import _COSINES, COLLECTIONS, _stored

NAMES = [f"synthetic:collections:{number}" for number in range(len(COLLECTIONS))]


def images(name: str, split: str, first: int, last: int) -> np.ndarray:
    source = open_source(name, split)
    return np.stack([source[index]["image"] for index in range(first, last)])


@pytest.mark.parametrize("name", NAMES)
def test_a_collection_has_as_many_real_as_fake_examples(name: str) -> None:
    for split, count in (("train", 2000), ("test", 500)):
        source = open_source(name, split)
        assert len(source) == count
        assert source.class_names == ("real", "fake")
        assert np.bincount(source.labels).tolist() == [count // 2, count // 2]
        for index in (0, 1, count - 1):
            example = source[index]
            assert example["label"] == source.labels[index]
            assert example["image"].shape == (32, 32, 3)
            assert example["image"].dtype == np.uint8


def test_an_example_depends_on_collection_split_and_index_alone() -> None:
    for name in NAMES:
        source = open_source(name, "train")
        copied = pickle.loads(pickle.dumps(source))
        for index in (7, 3, 7):
            np.testing.assert_array_equal(copied[index]["image"], source[index]["image"])
    different = [images(name, split, 0, 2) for name in NAMES for split in ("train", "test")]
    for i, first in enumerate(different):
        for second in different[i + 1 :]:
            assert (first != second).mean() > 0.5


def test_collections_differ_in_colour_but_classes_do_not() -> None:
    """A detector cannot go by the mean colour, which tells only the collection."""
    labels = np.arange(200) % 2
    colours = np.stack([images(name, "train", 0, 200).mean(axis=(1, 2)) for name in NAMES])
    collection = np.repeat(np.arange(4), 200)
    flat = colours.reshape(-1, 3) / 255
    by_collection = LogisticRegression(max_iter=1000).fit(flat, collection)
    assert by_collection.score(flat, collection) > 0.6
    for of_one in colours:
        score = LogisticRegression().fit(of_one[:100], labels[:100]).decision_function(of_one[100:])
        assert abs(roc_auc_score(labels[100:], score) - 0.5) < 0.2


def test_forging_changes_a_part_of_the_image() -> None:
    """Noise is drawn once more, which makes small differences everywhere."""
    source = open_source(NAMES[0], "train")
    forged = source[1]["image"].astype(int)
    photograph, rng = source._photograph(1, COLLECTIONS[0])
    rng.integers(1999)  # which donor
    original = _stored(photograph, COLLECTIONS[0].step).astype(int)
    changed = np.abs(forged - original).max(axis=-1) > 25
    assert 0.05 < changed.mean() < 0.5
    assert changed[8:24, 8:24].mean() > changed.mean()


def test_compression_keeps_multiples_of_its_steps_in_each_block() -> None:
    photograph = np.random.default_rng(0).uniform(0.3, 0.7, (32, 32, 3))
    coarse, fine = (_stored(photograph, step).astype(float) / 255 for step in (0.3, 1e-4))
    np.testing.assert_allclose(fine, photograph, atol=0.004)
    first = _COSINES @ coarse[:8, :8, 0] @ _COSINES.T
    steps = first / (0.3 * (1 + (np.arange(8)[:, None] + np.arange(8)) / 2))
    assert np.abs(steps - np.round(steps)).max() < 0.1


def test_collections_can_be_mixed_and_sliced() -> None:
    mixture = open_source("mix:" + " + ".join(f"1*{name}|train[:90%]" for name in NAMES))
    assert isinstance(mixture, MixtureSource)
    assert mixture.class_names == ("real", "fake")
    assert len(mixture) == 4 * 1800
    assert mixture[5]["image"].shape == (32, 32, 3)
    assert len(open_source(NAMES[1], "test[:10]")) == 10


@pytest.mark.parametrize("option", ["", "4", "-1", "sharp"])
def test_an_unknown_collection_is_an_error_that_names_the_known_ones(option: str) -> None:
    with pytest.raises(ValueError, match="name one of 0, 1, 2, 3, as in 'synthetic:collections:0'"):
        open_source(f"synthetic:collections:{option}")


def test_an_index_beyond_the_end_is_an_error() -> None:
    source = open_source(NAMES[0], "test")
    for index in (500, -1):
        with pytest.raises(IndexError, match="500 examples"):
            source[index]
