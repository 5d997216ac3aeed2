import pickle

import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.data.pipeline import evaluation_batches, train_batches
from mim_jax.data.sources import open_source
from mim_jax.data.synthetic.pairs import SCHEMA
from mim_jax.data.table_missing import with_missing
from mim_jax.data.table_views import (
    Marginals,
    TableEvaluation,
    TableViews,
    table_evaluation,
    table_views,
)

COLUMNS = len(SCHEMA.columns)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def distinct_table(rows: int = 20, columns: int = 10) -> np.ndarray:
    """Every value tells its row (behind the point) and its column."""
    return (np.arange(columns) + np.arange(rows)[:, None] / 100).astype(np.float32)


def black(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((32, 32, 3), np.uint8)


def views(source, **options) -> TableViews:
    return TableViews(black, (32, 32), Marginals(source.table, source.missing), **options)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.3, 3), (0.29, 2), (1.0, 10)])
def test_so_many_columns_hold_the_value_of_another_row(rate, count):
    table = distinct_table()
    marginals = Marginals(table, np.zeros(table.shape, bool))
    row = np.arange(10, dtype=np.float32) - 100
    for seed in range(20):
        corrupted = marginals.corrupted(row, rate, rng(seed))
        changed = np.flatnonzero(corrupted != row)
        assert len(changed) == count
        assert all(value in table[:, column] for column, value in enumerate(corrupted) if
                   column in changed)  # fmt: skip
    assert row[0] == -100  # it is not changed in place


def test_columns_and_rows_are_uniform_and_drawn_independently():
    table = distinct_table(rows=5)
    marginals, row = Marginals(table, np.zeros(table.shape, bool)), np.full(10, -1, np.float32)
    draws = np.array([marginals.corrupted(row, 0.3, rng(seed)) for seed in range(3000)])
    np.testing.assert_allclose((draws != row).mean(axis=0), 0.3, atol=0.04)
    rows = np.rint((draws - np.arange(10)) * 100)
    drawn = rows[draws != row]
    np.testing.assert_allclose(np.bincount(drawn.astype(int), minlength=5) / 9000, 0.2, atol=0.02)
    firsts = [r[d >= 0] for r, d in zip(rows, draws)]
    same = np.mean([r[0] == r[1] for r in firsts])
    assert same == pytest.approx(0.2, abs=0.03)  # one row for all would give 1


def test_values_come_from_cells_that_are_there():
    table = distinct_table()
    missing = rng().random(table.shape) < 0.8
    missing[:, 4] = True
    marginals, row = Marginals(table, missing), np.full(10, -1, np.float32)
    allowed = [set(table[~missing[:, column], column]) for column in range(10)]
    for seed in range(50):
        corrupted = marginals.corrupted(row, 1.0, rng(seed))
        assert corrupted[4] == -1  # of a column without any value nothing can be drawn
        assert all(v in allowed[c] for c, v in enumerate(corrupted) if c != 4)


def test_pre_training_gives_the_row_and_the_corrupted_row_with_every_image():
    source = open_source("synthetic:pairs", "train[:60]")
    transform = views(source)
    results = [transform(source[7], rng(seed)) for seed in range(300)]
    for result in results:
        assert set(result) == {"image", "table", "table_corrupted", "table_missing"}
        np.testing.assert_array_equal(result["table"], source.table[7])
        assert result["table_corrupted"].dtype == np.float32
    corrupted = np.mean([np.any(r["table"] != r["table_corrupted"]) for r in results])
    augmented = np.mean([not r["image"].any() for r in results])
    assert corrupted > 0.9 and augmented == pytest.approx(0.95, abs=0.04)
    plain = next(r["image"] for r in results if r["image"].any())
    np.testing.assert_array_equal(plain, TableEvaluation((32, 32))(source[7])["image"])


def test_fine_tuning_corrupts_the_row_itself_where_it_augments_the_image():
    source = open_source("synthetic:pairs", "train[:60]")
    transform = views(source, probability=0.8, corrupt_input=True)
    results = [transform(source[7], rng(seed)) for seed in range(300)]
    assert all(set(r) == {"image", "table", "table_missing"} for r in results)
    augmented = np.array([not r["image"].any() for r in results])
    corrupted = np.array([np.any(r["table"] != source.table[7]) for r in results])
    assert augmented.mean() == pytest.approx(0.8, abs=0.06)
    assert not corrupted[~augmented].any() and corrupted[augmented].mean() > 0.9


def test_missing_cells_are_marked_in_every_view():
    source = with_missing(open_source("synthetic:pairs", "train[:60]"), "random_values", 0.4)
    for transform in (views(source), TableEvaluation((32, 32))):
        result = transform(source[3], rng())
        assert result["table_missing"].dtype == np.int32
        np.testing.assert_array_equal(result["table_missing"], source.missing[3])


def test_evaluation_resizes_and_changes_nothing_else():
    source = open_source("synthetic:pairs", "test[:3]")
    example = {**source[0], "image": np.repeat(source[0]["image"], 2, axis=1)}
    result = TableEvaluation((64, 64))(example)
    assert result["image"].shape == (64, 64, 3)  # though the image is twice as wide
    same = TableEvaluation((64, 64))(source[0])
    np.testing.assert_array_equal(same["image"], source[0]["image"])
    for name in ("table", "table_corrupted"):
        np.testing.assert_array_equal(same[name], source.table[0])


def test_batches_hold_the_views_and_do_not_depend_on_the_reader():
    source = open_source("synthetic:pairs", "train[:60]")
    config = configs.defaults()
    config.data.update(image_size=(32, 32), color_jitter=(0.8, 0.8, 0.8, 0.2))
    config.data.table.update(rotation=45.0)
    transform = table_views(config.data, source)
    copy = pickle.loads(pickle.dumps(transform))
    first, again = (
        list(train_batches(source, t, batch_size=8, seed=3, num_steps=3, threads=n))
        for t, n in ((transform, 1), (copy, 3))
    )
    for one, other in zip(first, again):
        assert {
            k: one[k].shape for k in ("image", "table", "table_corrupted", "table_missing")
        } == {
            "image": (8, 32, 32, 3),
            "table": (8, COLUMNS),
            "table_corrupted": (8, COLUMNS),
            "table_missing": (8, COLUMNS),
        }
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    batch = next(evaluation_batches(source, table_evaluation(config.data), batch_size=8))
    np.testing.assert_array_equal(batch["table"], source.table[:8])
    np.testing.assert_array_equal(batch["label"], source.labels[:8])


def test_settings_of_the_config_decide_which_changes_there_are():
    source = open_source("synthetic:pairs", "train[:10]")
    config = configs.defaults()
    names = [type(step).__name__ for step in table_views(config.data, source).augment.steps]
    assert names == ["RandomGrey", "RandomBlur", "RandomResizedCrop", "RandomFlip"]
    config.data.color_jitter = (0.5, 0.5, 0.5, 0.2)
    config.data.table.update(grey_probability=0.0, blur_probability=0.0, rotation=45.0)
    steps = table_views(config.data, source).augment.steps
    assert [type(step).__name__ for step in steps] == [
        "RandomRotation", "ColorJitter", "RandomResizedCrop", "RandomFlip"
    ]  # fmt: skip
    assert (steps[1].hue, steps[1].probability) == (0.2, 0.8)


def test_shares_out_of_range_are_errors():
    source = open_source("synthetic:pairs", "train[:10]")
    with pytest.raises(ValueError, match=r"corruption must be in \[0, 1\], got 1.3"):
        views(source, corruption=1.3)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got -0.1"):
        views(source, probability=-0.1)
