import pickle

import numpy as np
import pytest
from PIL import Image

from mim_jax.data.sources import open_source
from mim_jax.data.synthetic.pairs import CLASSES, HUES, SHAPES


def columns(source) -> dict[str, np.ndarray]:
    return dict(zip(source.schema.names, source.table.T))


def test_splits_have_their_sizes_schema_and_classes():
    train, test = (open_source("synthetic:pairs", split) for split in ("train", "test"))
    assert (len(train), len(test), train.kind) == (1620, 400, "table")
    assert train.schema.category_counts == (4, 3, 2, 5) and train.schema.num_continuous == 4
    assert train.table.shape == train.missing.shape == (1620, 8) and not train.missing.any()
    assert train.num_classes == len(CLASSES) == 12
    counts = np.bincount(train.labels, minlength=12)
    assert counts.min() > 90 and counts.max() < 180
    example = train[3]
    assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8
    np.testing.assert_array_equal(example["table"], train.table[3])


def test_examples_are_a_function_of_split_and_index():
    first, again = (open_source("synthetic:pairs", "train") for _ in range(2))
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(first.table, again.table)
    for index in (0, 7, 1619):
        np.testing.assert_array_equal(first[index]["image"], copy[index]["image"])
        np.testing.assert_array_equal(first[index]["image"], again[index]["image"])
    assert np.any(first[0]["image"] != open_source("synthetic:pairs", "test")[0]["image"])


def test_the_row_tells_the_class_but_for_one_cell_in_ten():
    source = open_source("synthetic:pairs", "train")
    told = columns(source)
    for name, truth, count in (
        ("hue", source.labels // len(SHAPES), len(HUES)),
        ("shape", source.labels % len(SHAPES), len(SHAPES)),
    ):
        expected = 0.9 + 0.1 / count
        assert np.mean(told[name] == truth) == pytest.approx(expected, abs=0.02)


def test_the_image_shows_the_hue_and_the_place_of_its_class():
    source = open_source("synthetic:pairs", "test[:100]")
    told = columns(source)
    hits, places = [], []
    for index in range(len(source)):
        hsv = np.asarray(Image.fromarray(source[index]["image"]).convert("HSV")).astype(float)
        rgb = source[index]["image"].astype(float)
        ground = np.median(rgb.reshape(-1, 3), axis=0)
        object_ = np.linalg.norm(rgb - ground, axis=-1) > 90
        if object_.sum() < 60:
            continue
        angles = hsv[object_][:, 0] / 256 * 2 * np.pi
        hue = np.angle(np.exp(1j * angles).mean()) / (2 * np.pi) * len(HUES)
        hits.append(round(hue) % len(HUES) == source.labels[index] // len(SHAPES))
        x = np.flatnonzero(object_.any(axis=0)).mean()
        places.append((x, told["x"][index]))
    assert len(hits) > 50 and np.mean(hits) > 0.8
    assert np.corrcoef(np.array(places).T)[0, 1] > 0.7


def test_slices_are_rows_of_the_whole():
    whole = open_source("synthetic:pairs", "train")
    labelled, rest = (open_source("synthetic:pairs", f"train[{s}]") for s in (":120", "120:"))
    assert (len(labelled), len(rest)) == (120, 1500)
    assert set(labelled.labels) == set(range(12))
    row = np.flatnonzero((whole.table == labelled.table[5]).all(axis=1))
    assert len(row) == 1
    np.testing.assert_array_equal(labelled[5]["image"], whole[int(row[0])]["image"])
    everything = np.concatenate([labelled.table, rest.table])
    np.testing.assert_array_equal(np.sort(everything, axis=0), np.sort(whole.table, axis=0))


def test_options_and_other_splits_are_errors():
    with pytest.raises(ValueError, match="has no options, got 'x'"):
        open_source("synthetic:pairs:x")
    with pytest.raises(ValueError, match="'train' and 'test', not 'val'"):
        open_source("synthetic:pairs", "val")
