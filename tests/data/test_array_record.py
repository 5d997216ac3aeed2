import json
import logging
import os
import pathlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mim_jax.data import array_record, open_source
from mim_jax.data.decode import UnreadableImage
from tests.data.images import encoded


def grey_png(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((6, 8), value, np.uint8)), "PNG")


def write_shard(path: pathlib.Path, records: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


def packed(value: int, **more: Any) -> bytes:
    return msgpack.packb({"image": grey_png(value), **more})


def write_manifest(folder: pathlib.Path, splits: dict[str, list[int]], **more: Any) -> None:
    described = {
        split: {
            "shards": [
                {"file": f"{split}-{number}.array_record", "examples": count}
                for number, count in enumerate(counts)
            ]
        }
        for split, counts in splits.items()
    }
    classes = {"class_names": ["a", "b"], "num_classes": 2, "multi_label": False}
    manifest = {"version": 1, **classes, **more, "splits": described}
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two shards of `train` with 3 and 4 examples and one of `val` with 2; values count up."""
    values = iter(range(0, 90, 10))
    for name, count in (("train-0", 3), ("train-1", 4), ("val-0", 2)):
        records = [packed(next(values), label=number % 2) for number in range(count)]
        write_shard(tmp_path / f"{name}.array_record", records)
    write_manifest(tmp_path, {"train": [3, 4], "val": [2]})
    return tmp_path


def values_of(source: Any) -> list[int]:
    return [int(source[index]["image"][0, 0, 0]) for index in range(len(source))]


@pytest.mark.parametrize("form", ["{}", "array_record:{}"])
def test_a_folder_with_a_manifest_is_a_source(folder: pathlib.Path, form: str) -> None:
    source = open_source(form.format(folder))
    assert values_of(source) == [0, 10, 20, 30, 40, 50, 60]
    assert [source[index]["label"] for index in range(4)] == [0, 1, 0, 0]
    assert source.class_names == ("a", "b") and source.num_classes == 2
    assert values_of(open_source(form.format(folder), "val")) == [70, 80]


def test_slices_part_the_shuffled_order(folder: pathlib.Path) -> None:
    first, rest = (values_of(open_source(str(folder), s)) for s in ("train[:60%]", "train[60%:]"))
    assert sorted(first + rest) == [0, 10, 20, 30, 40, 50, 60]
    assert first != sorted(first + rest)[: len(first)]


def test_channels_and_bits_are_as_asked(folder: pathlib.Path) -> None:
    image = open_source(str(folder), channels=1, bits=16)[1]["image"]
    assert image.shape == (6, 8, 1) and image.dtype == np.uint16
    assert int(image[0, 0, 0]) == 10 * 257


def test_shards_without_a_manifest_are_labelled_as_found(tmp_path: pathlib.Path) -> None:
    for number in range(2):
        records = [packed(number), packed(9, label=5)]
        write_shard(tmp_path / f"x.array_record-{number:05d}-of-00002", records)
    for pattern in ("x.array_record@2", "*", ""):
        source = open_source(f"array_record:{tmp_path / pattern}")
        assert values_of(source) == [0, 9, 1, 9]
        assert set(source[0]) == {"image"} and source[1]["label"] == 5
        assert source.num_classes is None


def test_the_path_of_a_shard_takes_its_classes_from_the_manifest_beside(
    folder: pathlib.Path,
) -> None:
    source = open_source(f"{folder}/train-1.array_record")
    assert values_of(source) == [30, 40, 50, 60]
    assert source.class_names == ("a", "b")


def test_opening_by_a_manifest_reads_no_shard(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_record, "_opened", lambda path: pytest.fail(f"{path} was opened"))
    assert len(open_source(str(folder))) == 7


def test_several_labels_become_a_vector(tmp_path: pathlib.Path) -> None:
    records = [packed(0, label=[0, 2]), packed(0, label=[])]
    write_shard(tmp_path / "train-0.array_record", records)
    names = {"class_names": None, "num_classes": 3, "multi_label": True}
    write_manifest(tmp_path, {"train": [2]}, **names)
    source = open_source(str(tmp_path))
    assert source.multi_label  # type: ignore[attr-defined]
    assert [source[index]["label"].tolist() for index in range(2)] == [[1, 0, 1], [0, 0, 0]]
    assert source[0]["label"].dtype == np.uint8
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"labels \[0, 2\] do not fit None classes"):
        open_source(str(tmp_path / "train-0.array_record"))[0]


def test_a_source_can_be_pickled(folder: pathlib.Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(str(folder))))
    assert values_of(source) == [0, 10, 20, 30, 40, 50, 60]


def test_threads_share_a_source(folder: pathlib.Path) -> None:
    source = open_source(str(folder))
    order = np.random.default_rng(0).integers(0, 7, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: int(source[index]["image"][0, 0, 0]), order))
    assert found == [10 * index for index in order]


def test_an_index_beyond_the_end_is_an_error(folder: pathlib.Path) -> None:
    source = open_source(str(folder))
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"has 7 examples, none with index {index}"):
            source[index]


def test_one_file_is_open_for_each_shard_in_use(folder: pathlib.Path) -> None:
    source = open_source(str(folder))
    array_record._reader.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    values_of(source)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    array_record._reader.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: pathlib.Path) -> None:
    broken = msgpack.packb({"image": grey_png(3)[:40], "name": "pictures/7.png"})
    write_shard(tmp_path / "x.array_record", [packed(1), broken])
    source = open_source(str(tmp_path / "x.array_record"))
    with pytest.raises(UnreadableImage, match=r"x\.array_record, record 1 \(pictures/7\.png\): "):
        source[1]


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.array_record"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    png = encoded(Image.fromarray(noise), "PNG")
    write_shard(path, [msgpack.packb({"image": png}) for _ in range(20)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"scratch!"
    path.write_bytes(data)
    source = open_source(str(path))
    damaged = []
    for index in range(20):
        try:
            np.testing.assert_array_equal(source[index]["image"][..., 0], noise)
        except UnreadableImage as error:
            assert f"{path}, record {index}: " in str(error)
            damaged.append(index)
    assert len(damaged) == 1


@pytest.mark.parametrize("record", [b"\x0a\x10\x0a\x0e\x0a\x05image", b"", b"\x81", b"\xc3"])
def test_a_record_of_another_layout_is_an_error_that_names_the_way(
    tmp_path: pathlib.Path, record: bytes
) -> None:
    write_shard(tmp_path / "x.array_record", [record])
    source = open_source(str(tmp_path / "x.array_record"))
    with pytest.raises(ValueError, match=r"record 0 is not a msgpack map.*'tfds:NAME") as error:
        source[0]
    assert not isinstance(error.value, UnreadableImage)


def test_a_folder_of_tfds_is_an_error_that_names_the_way(tmp_path: pathlib.Path) -> None:
    write_shard(tmp_path / "x-train.array_record-00000-of-00001", [b"x"])
    for name in ("features.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"written by TensorFlow Datasets.*'tfds:NAME"):
        open_source(f"array_record:{tmp_path}")


@pytest.mark.parametrize("content", [b"no shard", b""])
def test_a_file_that_is_no_shard_is_an_error(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "x.array_record").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.array_record is not a whole ArrayRecord file"):
        open_source(str(tmp_path / "x.array_record"))


def test_a_shard_that_is_cut_off_is_an_error(folder: pathlib.Path) -> None:
    path = folder / "train-1.array_record"
    path.write_bytes(path.read_bytes()[:-100])
    source = open_source(str(folder))
    assert source[0]["label"] == 0
    with pytest.raises(ValueError, match=r"train-1\.array_record is not a whole ArrayRecord file"):
        source[3]


def test_a_missing_shard_is_an_error(folder: pathlib.Path) -> None:
    source = open_source(str(folder))
    (folder / "train-1.array_record").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards that .*lists are missing"):
        open_source(str(folder))
    with pytest.raises(FileNotFoundError, match=r"train-1\.array_record is no longer there"):
        source[5]


def test_a_shard_with_another_number_of_records_is_an_error(folder: pathlib.Path) -> None:
    write_manifest(folder, {"train": [3, 5]})
    with pytest.raises(ValueError, match="holds 4 records, but 5 are expected"):
        open_source(str(folder))[3]


def test_an_unknown_split_lists_the_known(folder: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no split 'test'; it has train, val"):
        open_source(str(folder), "test")


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 1, "splits": []}'])
def test_a_damaged_manifest_is_an_error(folder: pathlib.Path, content: str) -> None:
    (folder / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json is no manifest of .*'folder:"):
        open_source(str(folder))


def test_a_newer_manifest_is_an_error(folder: pathlib.Path) -> None:
    write_manifest(folder, {"train": [3, 4]}, version=2)
    with pytest.raises(ValueError, match=r"has version 2, but .* reads 1"):
        open_source(str(folder))


def test_reading_logs_nothing(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        values_of(open_source(str(folder)))
    assert not caplog.records


def two_folders(root: pathlib.Path, **of_second: Any) -> str:
    """Write shards of one name but different lengths into two folders, and a list of both."""
    for folder, count, more in (("a", 3, {}), ("b", 5, of_second)):
        records = [packed(10 * number + count, label=number % 2) for number in range(count)]
        write_shard(root / folder / "train-0.array_record", records)
        write_manifest(root / folder, {"train": [count]}, **more)
    (root / "train.txt").write_text("a/train-0.array_record\nb/train-0.array_record\n")
    return f"array_record:{root / 'train.txt'}"


def test_shards_of_several_folders_are_counted_by_the_manifest_of_each(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = two_folders(tmp_path)
    with monkeypatch.context() as patched:
        patched.delattr(array_record, "_opened")  # nothing is opened
        source = open_source(name)
    assert len(source) == 8
    assert source.class_names == ("a", "b")
    values = [int(source[index]["image"][0, 0, 0]) for index in range(8)]
    assert values == [3, 13, 23, 5, 15, 25, 35, 45]


def test_folders_with_different_classes_are_not_one_source(tmp_path: pathlib.Path) -> None:
    name = two_folders(tmp_path, class_names=["b", "a"])
    with pytest.raises(ValueError, match=r"/a and in .*/b have different classes.*'mix:1\*"):
        open_source(name)
    (tmp_path / "b" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"only one has such a file"):
        open_source(name)


def test_a_manifest_may_name_shards_of_other_folders(tmp_path: pathlib.Path) -> None:
    write_shard(tmp_path / "elsewhere" / "x.array_record", [packed(7, label=1), packed(8, label=0)])
    (tmp_path / "here").mkdir()
    write_manifest(tmp_path / "here", {"train": [2]})
    manifest = tmp_path / "here" / "dataset.json"
    manifest.write_text(manifest.read_text().replace("train-0.", "../elsewhere/x."))
    source = open_source(f"array_record:{tmp_path / 'here'}")
    assert (len(source), source.num_classes, source[0]["label"]) == (2, 2, 1)
