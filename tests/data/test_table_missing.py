import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data.configured import evaluation_source, training_source
from mim_jax.data.sources import open_source
from mim_jax.data.synthetic.pairs import SCHEMA
from mim_jax.data.table import TableSource
from mim_jax.data.table_missing import (
    PROTOCOLS,
    column_importance,
    open_with_missing,
    with_missing,
)

COLUMNS = len(SCHEMA.columns)


def pairs(split: str = "train[:200]") -> TableSource:
    return open_source("synthetic:pairs", split)


def source_of(table: np.ndarray, labels: np.ndarray | None, split: str = "train") -> TableSource:
    missing = np.zeros(table.shape, bool)
    return TableSource("a table", split, SCHEMA, table, missing, labels, None)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.37, 0.7, 1.0])
def test_random_values_are_exactly_the_share_of_all_cells(rate):
    source = with_missing(pairs(), "random_values", rate)
    assert source.missing.sum() == int(200 * COLUMNS * rate)
    assert (source.table[source.missing] == 0).all()
    np.testing.assert_array_equal(source.table[~source.missing], pairs().table[~source.missing])


def test_random_values_follow_the_seed_of_their_split():
    table = np.ones((50, COLUMNS), np.float32)
    masks = []
    for split, seed in (("train", 2021), ("val", 2022), ("test", 2023)):
        source = with_missing(source_of(table, None, split), "random_values", 0.3)
        np.random.seed(seed)
        drawn = np.random.choice(50 * COLUMNS, int(50 * COLUMNS * 0.3), replace=False)
        expected = np.zeros(50 * COLUMNS, bool)
        expected[drawn] = True
        np.testing.assert_array_equal(source.missing, expected.reshape(50, COLUMNS))
        masks.append(source.missing)
    assert np.any(masks[0] != masks[1]) and np.any(masks[1] != masks[2])


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.3, 2), (0.5, 4), (0.99, 7), (1.0, 8)])
def test_the_same_whole_columns_are_missing_in_all_splits(protocol, rate, count):
    train, test = pairs(), pairs("test[:100]")
    parts = [
        with_missing(train, protocol, rate),
        with_missing(test, protocol, rate, lambda: train),
    ]
    columns = [np.flatnonzero(part.missing.any(axis=0)).tolist() for part in parts]
    assert columns[0] == columns[1] and len(columns[0]) == count
    assert all(part.missing[:, columns[0]].all() for part in parts)


def test_columns_rank_by_what_they_tell_about_the_label():
    importance = column_importance(pairs())
    assert importance.sum() == pytest.approx(1)
    assert set(np.argsort(-importance)[:2]) == {0, 1}  # hue and shape
    most, least = (with_missing(pairs(), p, 0.25).missing[0] for p in PROTOCOLS[3:])
    assert np.flatnonzero(most).tolist() == [0, 1]
    assert set(np.flatnonzero(least)) == set(np.argsort(importance)[:2])


def test_most_and_least_important_columns_are_complements():
    most, least = (with_missing(pairs(), p, 0.5).missing[0] for p in PROTOCOLS[3:])
    np.testing.assert_array_equal(most, ~least)


def test_cells_that_were_missing_before_stay_missing():
    source = pairs().without(np.arange(200 * COLUMNS).reshape(200, COLUMNS) % 9 == 0, "holes")
    for protocol in PROTOCOLS:
        result = with_missing(source, protocol, 0.4)
        assert (result.missing | ~source.missing).all()
    assert with_missing(source, "none", 0.4) is source


def test_missing_cells_leave_images_and_labels_as_they_are():
    source, without = pairs(), with_missing(pairs(), "random_values", 0.5)
    assert len(without) == 200 and without.kind == "table" and without.schema == source.schema
    np.testing.assert_array_equal(without[17]["image"], source[17]["image"])
    assert without[17]["label"] == source[17]["label"]
    np.testing.assert_array_equal(without[17]["missing"], without.missing[17])


def test_opening_ranks_columns_by_the_training_split():
    options = ("synthetic:pairs", "test[:50]", "train[:200]")
    source = open_with_missing(*options, "most_important", 0.25)
    expected = with_missing(pairs("test[:50]"), "most_important", 0.25, pairs)
    np.testing.assert_array_equal(source.missing, expected.missing)
    assert not open_with_missing(*options, "none", 0.0).missing.any()
    images = open_with_missing("embedded", "test[:5]", "train", "random_values", 0.5)
    assert len(images) == 5 and images.name == "embedded:test[:5]"


def test_a_config_takes_the_same_columns_out_of_training_and_evaluation():
    config = configs.defaults()
    config.data.update(source="synthetic:pairs", split="train[:30]")
    config.data.table.update(missing="least_important", missing_rate=0.5)
    parts = [training_source(config), evaluation_source(config, "test[:40]")]
    train = with_missing(pairs("train[:30]"), "least_important", 0.5)
    assert [len(part) for part in parts] == [30, 40]
    for part in parts:
        np.testing.assert_array_equal(part.missing[0], train.missing[0])


def test_wrong_settings_are_errors():
    table = np.ones((4, COLUMNS), np.float32)
    with pytest.raises(ValueError, match="'rvm'; known are none, random_values, random_columns"):
        with_missing(pairs(), "rvm", 0.1)
    with pytest.raises(ValueError, match=r"missing_rate must be in \[0, 1\], got 1.5"):
        with_missing(pairs(), "random_values", 1.5)
    with pytest.raises(ValueError, match="'fold2' has no seed for missing values; known are train"):
        with_missing(source_of(table, None, "fold2"), "random_values", 0.5)
    with pytest.raises(ValueError, match="a table is no table with labels"):
        with_missing(source_of(table, None), "most_important", 0.5)
