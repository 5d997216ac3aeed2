import pathlib
import pickle

import numpy as np
import pandas as pd
import pytest

from mim_jax.data.decode import UnreadableImage
from mim_jax.data.inspection import inspect_source
from mim_jax.data.pipeline import evaluation_batches
from mim_jax.data.shard_writer import convert
from mim_jax.data.sources import open_source
from mim_jax.data.table import TableOptions, TableSource
from mim_jax.data.table_schema import read_schema
from mim_jax.data.table_views import TableEvaluation
from tests.data.tables import frame_of_cars, write_cars, write_pictures, write_table


def opened(path: pathlib.Path, options: str = "label=model", split: str = "train") -> TableSource:
    source = open_source(f"table:{path}?{options}", split)
    assert isinstance(source, TableSource)
    return source


@pytest.mark.parametrize("name", ["cars.csv", "cars.parquet"])
def test_rows_become_codes_and_deviations_with_their_images(tmp_path, name):
    source = opened(write_cars(tmp_path, name=name))
    frame = frame_of_cars()
    assert source.schema.names == ("color", "doors", "price", "miles")
    assert source.schema.category_counts == (3, 2) and source.schema.num_continuous == 2
    assert source.class_names == ("fast", "slow") and source.num_classes == 2
    expected = np.stack(
        [
            np.arange(12) % 3,
            np.arange(12) % 2,
            *((frame[c] - frame[c].mean()) / frame[c].std(ddof=0) for c in ("price", "miles")),
        ],
        axis=1,
    )
    assert source.table.dtype == np.float32 and not source.missing.any()
    np.testing.assert_allclose(source.table, expected, atol=1e-5)
    example = source[4]
    assert example["label"] == 0 and example["image"].shape == (9, 10, 3)
    assert (example["image"] == 20).all()
    np.testing.assert_array_equal(example["table"], source.table[4])


def test_empty_cells_are_missing_and_hold_a_valid_value(tmp_path):
    write_pictures(tmp_path, 12)
    frame = frame_of_cars()
    frame.loc[2, "color"] = None
    frame.loc[[1, 5], "price"] = np.nan
    frame["doors"] = frame["doors"].astype("Int64")
    frame.loc[7, "doors"] = pd.NA
    tables = []
    for name in ("a.csv", "b.parquet"):
        write_table(frame, tmp_path / name)
        source = opened(tmp_path / name)
        assert np.argwhere(source.missing).tolist() == [[1, 2], [2, 0], [5, 2], [7, 1]]
        assert (source.table[source.missing] == 0).all()
        assert source.schema.columns[1].values == (3, 5)
        assert source.schema.columns[2].mean == pytest.approx(frame["price"].mean())
        tables.append(source.table)
    np.testing.assert_array_equal(*tables)


def test_the_schema_is_kept_and_read_again(tmp_path):
    path = write_cars(tmp_path)
    first = opened(path)
    file = tmp_path / "cars.schema.json"
    assert read_schema(file) == first.schema
    # Other numbers, but the means of before; an edited order of the values.
    text = file.read_text().replace('["blue", "green", "red"]', '["red", "blue", "green"]')
    file.write_text(text)
    frame = frame_of_cars()
    frame["price"] += 1000
    write_table(frame, path)
    second = opened(path)
    assert second.table[:3, 0].tolist() == [1, 2, 0]
    std = first.schema.columns[2].std
    np.testing.assert_allclose(second.table[:, 2] - first.table[:, 2], 1000 / std, atol=1e-4)


def test_the_schema_goes_to_the_file_that_is_named(tmp_path):
    path = write_cars(tmp_path)
    file = tmp_path / "mine.json"
    source = opened(path, f"label=model&schema={file}")
    assert read_schema(file) == source.schema
    assert not (tmp_path / "cars.schema.json").exists()
    with pytest.raises(FileNotFoundError):
        opened(path, f"label=model&schema={tmp_path}/nowhere/mine.json")


def test_columns_taken_out_of_the_schema_are_left_out(tmp_path):
    path = write_cars(tmp_path)
    opened(path)
    file = tmp_path / "cars.schema.json"
    lines = [line for line in file.read_text().splitlines() if '"price"' not in line]
    file.write_text("\n".join(lines))
    assert opened(path).schema.names == ("color", "doors", "miles")


def test_test_data_are_coded_as_the_training_data_whichever_is_opened_first(tmp_path):
    whole = frame_of_cars(30)
    write_pictures(tmp_path, 30)
    train, test = whole[:20], whole[20:]
    write_table(train, tmp_path / "train.csv")
    write_table(test, tmp_path / "test.csv")
    in_folder = opened(tmp_path, split="test")
    assert in_folder.schema.columns[2].mean == pytest.approx(train["price"].mean())
    assert read_schema(tmp_path / "schema.json") == in_folder.schema
    np.testing.assert_array_equal(in_folder[0]["image"], np.full((10, 10, 3), 100))
    # The same, by a column of one file.
    write_table(whole.assign(split=["train"] * 20 + ["testing"] * 10), tmp_path / "all.csv")
    in_file = opened(tmp_path / "all.csv", split="test")
    assert in_file.schema == in_folder.schema and (len(in_file), in_file.split) == (10, "test")
    np.testing.assert_array_equal(in_file.table, in_folder.table)
    np.testing.assert_array_equal(in_file[3]["image"], in_folder[3]["image"])
    with pytest.raises(FileNotFoundError, match=r"no row of the split 'val'; it has 'testing'"):
        opened(tmp_path / "all.csv", split="val")
    with pytest.raises(FileNotFoundError, match=r"no table of the split 'val', such as val\.csv"):
        opened(tmp_path, split="val")


def test_slices_share_schema_and_images(tmp_path):
    path = write_cars(tmp_path, 20)
    whole = opened(path)
    parts = [opened(path, split=split) for split in ("train[:80%]", "train[80%:]")]
    assert [len(part) for part in parts] == [16, 4]
    assert all(part.schema == whole.schema for part in parts)
    seen = {int(part[i]["image"][0, 0, 0]) // 5 for part in parts for i in range(len(part))}
    assert seen == set(range(20))
    for part in parts:
        row = int(part[2]["image"][0, 0, 0]) // 5
        np.testing.assert_array_equal(part.table[2], whole.table[row])
        assert part.labels[2] == whole.labels[row] == part[2]["label"]
    with pytest.raises(FileNotFoundError, match="hold out a part by a slice"):
        opened(path, split="test")


def test_a_path_alone_opens_a_table_and_label_is_the_default_column(tmp_path):
    path = write_cars(tmp_path)
    write_table(frame_of_cars().rename(columns={"model": "label"}), path)
    assert open_source(str(path)).class_names == ("fast", "slow")
    write_table(frame_of_cars(), tmp_path / "other.csv")
    unlabelled = open_source(str(tmp_path / "other.csv"))
    assert unlabelled.num_classes is None and "label" not in unlabelled[0]
    assert unlabelled.schema.category_counts == (3, 2, 2)


def test_images_may_lie_elsewhere_under_another_column(tmp_path):
    write_pictures(tmp_path / "elsewhere", 12)
    frame = frame_of_cars().rename(columns={"image": "photo & file"})
    write_table(frame, tmp_path / "cars.csv")
    options = f"image=photo %26 file&images={tmp_path}/elsewhere&ignore=price,miles"
    source = opened(tmp_path / "cars.csv", options)
    assert (source[2]["image"] == 10).all()
    assert source.schema.names == ("color", "doors", "model")


def test_an_unreadable_image_names_its_file_and_is_replaced(tmp_path):
    path = write_cars(tmp_path)
    (tmp_path / "pictures/003.png").write_bytes(b"nonsense")
    (tmp_path / "pictures/004.png").unlink()
    frame = frame_of_cars()
    frame.loc[5, "image"] = None
    write_table(frame, path)
    source = opened(path)
    for index, message in ((3, r"003\.png"), (4, r"004\.png: No such"), (5, "row 6 of the split")):
        with pytest.raises(UnreadableImage, match=message):
            source[index]
    batch = next(evaluation_batches(source, TableEvaluation((6, 6)), batch_size=12))
    assert np.flatnonzero(batch["unreadable"]).tolist() == [3, 4, 5]
    assert batch["table"].shape == (12, 4) and batch["table_missing"].dtype == np.int32


def test_an_unseen_category_is_an_error_or_missing(tmp_path):
    write_pictures(tmp_path, 12)
    frame = frame_of_cars()
    write_table(frame, tmp_path / "train.csv")
    frame.loc[4, "color"] = "pink"
    frame.loc[6, "doors"] = 4
    write_table(frame, tmp_path / "test.csv")
    message = (
        r"test\.csv: row 5 \(without the header\), column 'color' is 'pink', which is none of the "
        r"3 values of the schema: 'blue', 'green', 'red'\. .*\?unseen=missing"
    )
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, split="test")
    source = opened(tmp_path, "label=model&unseen=missing", split="test")
    assert np.argwhere(source.missing).tolist() == [[4, 0], [6, 1]]
    frame.loc[2, "model"] = "flying"
    write_table(frame, tmp_path / "test.csv")
    with pytest.raises(ValueError, match=r"row 3 .*column 'model' is 'flying', which is none of"):
        opened(tmp_path, "label=model&unseen=missing", split="test")


def test_rows_are_counted_in_the_file_and_not_in_the_split(tmp_path):
    path = write_cars(tmp_path)
    frame = frame_of_cars().assign(split=["train"] * 6 + ["test"] * 6)
    frame.loc[8, "color"] = "pink"
    write_table(frame, path)
    with pytest.raises(ValueError, match=r"row 9 \(without the header\), column 'color'"):
        opened(path, split="test")


def test_a_column_that_is_missing_is_named(tmp_path):
    write_pictures(tmp_path, 12)
    write_table(frame_of_cars(), tmp_path / "train.csv")
    write_table(frame_of_cars().drop(columns=["price", "doors"]), tmp_path / "test.csv")
    opened(tmp_path)
    message = r"test\.csv has no column 'doors', 'price'; it has 'image', 'color', 'model', 'miles'"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, split="test")
    for options, column in (("image=photo", "photo"), ("label=class", "class"), ("ignore=x", "x")):
        with pytest.raises(ValueError, match=f"has no column '{column}'"):
            opened(tmp_path / "train.csv", options)


def test_a_word_among_numbers_is_named(tmp_path):
    write_pictures(tmp_path, 30)
    frame = frame_of_cars(30).astype({"price": object})
    frame.loc[10, "price"] = "cheap"
    write_table(frame, tmp_path / "cars.csv")
    message = r"row 11 .*column 'price' is 'cheap', but most values of this column are numbers"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "cars.csv")
    write_table(frame_of_cars(30), tmp_path / "train.csv")
    write_table(frame, tmp_path / "test.csv")
    with pytest.raises(ValueError, match=r"row 11 .*is 'cheap', but the column is numerical"):
        opened(tmp_path, split="test")


def test_a_row_without_label_is_an_error_until_labels_are_left_aside(tmp_path):
    path = write_cars(tmp_path)
    frame = frame_of_cars()
    frame.loc[3, "model"] = None
    write_table(frame, path)
    with pytest.raises(ValueError, match=r"row 4 .*column 'model' is empty.*\?ignore=model"):
        opened(path)
    assert opened(path, "ignore=model").num_classes is None


def test_options_that_contradict_a_kept_schema_are_errors(tmp_path):
    path = write_cars(tmp_path)
    opened(path)
    with pytest.raises(ValueError, match=r"made for the label 'model', not for 'color'"):
        opened(path, "label=color")
    with pytest.raises(ValueError, match="has the column 'price', which is to be ignored"):
        opened(path, "ignore=price")


def test_files_that_are_no_tables_are_errors(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("image,x\n")
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    (tmp_path / "latin.csv").write_bytes(b"image,x\n\xff\xfe,1\n")
    for name, message in (
        ("empty.csv", "empty.csv cannot be read as a table"),
        ("header.csv", "header.csv has no rows"),
        ("bad.parquet", "bad.parquet cannot be read as a table"),
        ("latin.csv", "latin.csv cannot be read as a table"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / name, "")
    (tmp_path / "cars.xls").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cars\.xls must end in one of \.csv, \.parquet"):
        opened(tmp_path / "cars.xls", "")
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv' does not exist"):
        open_source(str(tmp_path / "nothing.csv"))


def test_unknown_options_name_the_nearest():
    with pytest.raises(ValueError, match=r"no option 'lable=x'.*Did you mean 'label'\?"):
        TableOptions.from_text("lable=x")
    with pytest.raises(ValueError, match="unseen must be 'error' or 'missing', got 'drop'"):
        TableOptions.from_text("unseen=drop")


def test_sources_can_be_pickled_and_inspected(tmp_path):
    source = opened(write_cars(tmp_path), split="train[:50%]")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])
    np.testing.assert_array_equal(copy.table, source.table)
    facts = inspect_source(source)
    assert (facts.count, facts.sampled, facts.channels) == (6, 6, 3)
    assert sum(facts.class_counts) == 6 and facts.bytes_per_image > 0


def test_tables_are_not_converted_to_shards_that_would_lose_the_rows(tmp_path):
    source = opened(write_cars(tmp_path))
    with pytest.raises(ValueError, match="of the kind 'table', but shards hold images and labels"):
        convert(source, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_folder_that_may_not_be_written_does_not_stop_reading(tmp_path, monkeypatch, caplog):
    path = write_cars(tmp_path)

    def refuse(schema, file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mim_jax.data.table.write_schema", refuse)
    assert len(opened(path)) == 12
    assert "cars.schema.json" in caplog.text and "?schema=FILE" in caplog.text


def test_a_name_of_a_file_with_a_zero_byte_is_an_error(tmp_path):
    frame = frame_of_cars()
    frame.loc[3, "image"] = "pictures/\0.png"
    frame.to_parquet(tmp_path / "cars.parquet")
    with pytest.raises(ValueError, match="'image' has zero bytes"):
        open_source(f"table:{tmp_path / 'cars.parquet'}")
