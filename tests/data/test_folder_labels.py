import os
import pathlib
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from mim_jax.data import EvaluationCrop, RandomResizedCrop, evaluation_batches, train_batches
from mim_jax.data.folder import FolderSource, open_folder
from tests.data.images import write_images


def write_table(folder: pathlib.Path, *rows: str, header: str = "file,label") -> None:
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


def labels_of(source: FolderSource) -> list:
    return [np.asarray(source[i]["label"]).tolist() for i in range(len(source))]


def test_table_labels_a_flat_folder(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 3)
    write_table(tmp_path, "001.png,zebra", "./000.png, ant", "002.png,zebra")
    source = pickle.loads(pickle.dumps(open_folder(str(tmp_path), "train")))
    assert source.class_names == ("ant", "zebra") and source.num_classes == 2
    assert not source.multi_label
    assert labels_of(source) == [0, 1, 1]
    assert source.labels.tolist() == [0, 1, 1]


def test_table_counts_before_sub_folders(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1)
    write_table(tmp_path, "a/000.png,day", "b/000.png,day")
    assert open_folder(str(tmp_path), "train").class_names == ("day",)


def test_several_labels_are_a_vector(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 4)
    write_table(
        tmp_path, "3,000.png,sea; sky", "1,001.png,", '2,"002.png",sun;', "0,003.png,sky;sea;sun",
        header="id,file,label",
    )  # fmt: skip
    source = open_folder(str(tmp_path), "train")
    assert source.multi_label and source.class_names == ("sea", "sky", "sun")
    assert labels_of(source) == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert source[0]["label"].dtype == np.uint8
    assert source.record(1)["label"] == []
    assert source.labels.tolist() == labels_of(source)


def test_batches_carry_vectors(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 3)
    write_table(tmp_path, "000.png,a;b", "001.png,", "002.png,b")
    source = open_folder(str(tmp_path), "train")
    batch = next(train_batches(source, RandomResizedCrop((8, 8)), batch_size=3, seed=0))
    vectors = np.array([[1, 1], [0, 0], [0, 1]])
    np.testing.assert_array_equal(batch["label"], vectors[batch["index"]])
    first, last = evaluation_batches(source, EvaluationCrop((8, 8)), batch_size=2)
    np.testing.assert_array_equal(first["label"], vectors[:2])
    np.testing.assert_array_equal(last["label"], [vectors[2], [-1, -1]])  # the row behind the end
    assert first["label"].dtype == np.int8


def test_batch_of_two_types_is_an_error(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 2)
    sources = {bits: open_folder(str(tmp_path), "train", bits=bits) for bits in (8, 16)}

    class Mixed(FolderSource):
        def __getitem__(self, index: int) -> dict:
            return sources[8 * (index + 1)][index]

    mixed = Mixed.__new__(Mixed)
    mixed.__dict__.update(sources[8].__dict__)
    with pytest.raises(ValueError, match=r"is uint16, but the others of its batch are uint8; open"):
        next(evaluation_batches(mixed, EvaluationCrop((8, 8)), batch_size=2))


def test_table_beside_the_split_folders_labels_each_split(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1)
    write_table(tmp_path, "train/000.png,a", "train/001.png,c", "val/000.png,b")
    train, validation = (open_folder(str(tmp_path), split) for split in ("train", "val"))
    assert train.class_names == validation.class_names == ("a", "b", "c")
    assert (labels_of(train), labels_of(validation)) == ([0, 2], [1])


def test_table_in_each_split_folder_gives_one_set_of_classes(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "train", 1)
    write_images(tmp_path / "test", 1)
    write_table(tmp_path / "train", "000.png,b")
    write_table(tmp_path / "test", "000.png,a;b")
    train, test = (open_folder(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b")
    assert (labels_of(train), labels_of(test)) == ([[0, 1]], [[1, 1]])


def test_names_match_in_either_form_of_an_accent(tmp_path: pathlib.Path) -> None:
    name = unicodedata.normalize("NFD", "café.png")
    Image.new("L", (4, 4)).save(tmp_path / name)
    write_table(tmp_path, unicodedata.normalize("NFC", "café.png,a"))
    assert labels_of(open_folder(str(tmp_path), "train")) == [0]


def test_table_of_a_spreadsheet_and_names_of_any_bytes_are_read(tmp_path: pathlib.Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    try:
        Image.new("L", (4, 4)).save(os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbffile,label\r\ncaf\xe9.png,a\r\n\r\n")
    assert labels_of(open_folder(str(tmp_path), "train")) == [0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["000.png,a"],
            r"labels.csv has no row for 4 of 5 images, such as '001.png', '002.png', '003.png'; "
            "add rows",
        ),
        (
            [*(f"00{i}.png,a" for i in range(5)), "x.png,a", "000.PNG,b"],
            r"labels.csv has rows for 2 files that are not there, such as 'x.png', '000.PNG'; take",
        ),
        (["000.png,a", "./000.png,b"], r"line 3: '000.png' has a row already; give several labels"),
        (["000.png"], "line 2: '000.png' has no label"),
        (["000.png,;"], "gives no label to any file"),
    ],
)
def test_table_that_does_not_fit_is_an_error(
    tmp_path: pathlib.Path, rows: list[str], message: str
) -> None:
    write_images(tmp_path, 5)
    write_table(tmp_path, *rows)
    with pytest.raises(ValueError, match=message):
        open_folder(str(tmp_path), "train")


def test_table_without_its_header_is_an_error(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 1)
    write_table(tmp_path, header="000.png;a")
    with pytest.raises(ValueError, match=r"must begin with the line 'file,label', got '000.png;a'"):
        open_folder(str(tmp_path), "train")
