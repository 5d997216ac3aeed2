import gzip
import pathlib
import pickle

import numpy as np
import pytest

from mim_jax.data import open_source
from mim_jax.data.fashion_mnist import fashion_mnist_folder, read_idx
from mim_jax.data.records import record_of
from mim_jax.data.segmentation import segmentation_of
from mim_jax.data.sources import ArraySource, SubsetSource
from tests.data.images import write_images, write_maps

needs_full_set = pytest.mark.skipif(
    not (fashion_mnist_folder() / "train-images-idx3-ubyte.gz").is_file(),
    reason="the full Fashion-MNIST is not installed",
)


def write_idx(path: pathlib.Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def small_fashion_mnist(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    images = np.arange(20 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(20, 28, 28)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) % 10)
    monkeypatch.setenv("MIM_JAX_FASHION_MNIST", str(tmp_path))
    return tmp_path


def test_embedded_source_keeps_the_contract() -> None:
    source = open_source("embedded", "test")
    assert source.name == "embedded:test"
    assert source.num_classes == 10
    assert source.class_names is not None and source.class_names[9] == "Ankle boot"
    element = source[3]
    assert element["image"].shape == (28, 28, 1) and element["image"].dtype == np.uint8
    assert type(element["label"]) is int and element["label"] == 3


def test_grey_data_are_repeated_over_three_channels() -> None:
    grey, colour = open_source("embedded", "test"), open_source("embedded", "test", channels=3)
    assert colour[5]["image"].shape == (28, 28, 3)
    for channel in range(3):
        np.testing.assert_array_equal(colour[5]["image"][..., channel], grey[5]["image"][..., 0])


def test_slices_of_arrays_select_in_order() -> None:
    whole, part = open_source("embedded", "test"), open_source("embedded", "test[100:200]")
    assert len(part) == 100
    np.testing.assert_array_equal(part[0]["image"], whole[100]["image"])
    assert len(open_source("embedded", "train[:90%]")) == 3600


def test_fashion_mnist_is_read_from_the_folder_in_the_environment(
    small_fashion_mnist: pathlib.Path,
) -> None:
    source = open_source("fashion_mnist", "train[5:]")
    assert len(source) == 15
    assert source[0]["label"] == 5
    assert int(source[0]["image"][0, 0, 0]) == (5 * 28 * 28) % 256


def test_missing_fashion_mnist_says_how_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_JAX_FASHION_MNIST", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist") as error:
        open_source("fashion_mnist")
    assert "MIM_JAX_FASHION_MNIST" in str(error.value)
    assert "'embedded'" in str(error.value)


def test_damaged_idx_file_is_named(small_fashion_mnist: pathlib.Path) -> None:
    path = small_fashion_mnist / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz: not a complete gzip file"):
        open_source("fashion_mnist")
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        open_source("fashion_mnist")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match=r"19 values do not fill the shape \(20,\)"):
        open_source("fashion_mnist")
    write_idx(path, np.zeros(19, np.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        open_source("fashion_mnist")
    assert read_idx(path).shape == (19,)


@needs_full_set
def test_full_fashion_mnist_has_its_sizes() -> None:
    test = open_source("fashion_mnist", "test")
    assert len(test) == 10_000
    assert np.bincount([test[i]["label"] for i in range(len(test))]).tolist() == [1000] * 10


@pytest.mark.parametrize("name", ["embedded", "fashion_mnist"])
def test_unknown_split_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="has the splits 'train' and 'test', not 'val'"):
        open_source(name, "val")


@pytest.mark.parametrize(
    ("name", "nearest"), [("embeded", "'embedded'"), ("fashion-mnist", "'fashion_mnist'")]
)
def test_unknown_name_lists_the_forms_and_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data source '{name}'") as error:
        open_source(name)
    for form in ("'embedded'", "'fashion_mnist'", "'tfds:NAME", "'folder:PATH'", "'tar:", "'mix:"):
        assert form in str(error.value)
    assert f"Did you mean {nearest}?" in str(error.value)


def test_sources_can_be_pickled() -> None:
    source = open_source("embedded", "test[:10]")
    subset = SubsetSource(source, "subset", np.array([7, 2]))
    copy = pickle.loads(pickle.dumps(subset))
    assert [copy[i]["label"] for i in range(2)] == [7, 2]
    assert (copy.name, copy.num_classes, len(copy)) == ("subset", 10, 2)


def test_array_source_checks_its_arrays() -> None:
    message = r"images must be uint8 or uint16 \[n, height, width, channels\], got float32"
    with pytest.raises(ValueError, match=message):
        ArraySource("x", np.zeros((2, 4, 4, 1), np.float32))
    with pytest.raises(ValueError, match=r"got uint8 \(2, 4, 4\)"):
        ArraySource("x", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) do not match 2 images"):
        ArraySource("x", np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int))
    unlabelled = ArraySource("x", np.zeros((2, 4, 4, 1), np.uint8))
    assert unlabelled.num_classes is None and set(unlabelled[0]) == {"image"}


def test_wrong_number_of_channels_is_an_error() -> None:
    message = r"channels must be 1 \(grey\) or 3 \(RGB\) for 'embedded', got 2"
    with pytest.raises(ValueError, match=message):
        open_source("embedded", channels=2)


def test_sixteen_bits_keep_white_white() -> None:
    eight, sixteen = (open_source("embedded", "test[:50]", bits=bits) for bits in (8, 16))
    for index in range(50):
        image = sixteen[index]["image"]
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image, eight[index]["image"].astype(np.uint16) * 257)
    assert max(int(sixteen[index]["image"].max()) for index in range(50)) == 65_535


@pytest.mark.parametrize("name", ["embedded", "folder:x", "tar:x", "array_record:x", "mix:1*x"])
def test_another_number_of_bits_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"bits must be 8 .*or 16.*got 12"):
        open_source(name, bits=12)


def test_labels_of_a_subset_are_known_without_reading_it() -> None:
    subset = SubsetSource(open_source("embedded", "test"), "subset", np.array([13, 7, 2]))
    assert subset.labels is not None and subset.labels.tolist() == [3, 7, 2]
    assert not subset.multi_label
    bare = ArraySource("x", np.zeros((2, 4, 4, 1), np.uint8))
    assert SubsetSource(bare, "subset", range(1)).labels is None


def test_records_of_a_subset_are_those_of_its_source(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 5)
    source = open_source(str(tmp_path))
    subset = SubsetSource(source, "subset", np.array([4, 1]))
    assert record_of(subset, 0) == record_of(source, 4)
    assert record_of(SubsetSource(open_source("embedded"), "subset", range(3)), 0) is None


def test_segmentation_of_a_subset_is_that_of_its_source(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 5)
    write_maps(tmp_path, tmp_path / "segmentation")
    source = open_source(str(tmp_path))
    subset = SubsetSource(source, "subset", np.array([4, 1]))
    np.testing.assert_array_equal(segmentation_of(subset, 0), segmentation_of(source, 4))
    half, rest = (open_source(str(tmp_path), split) for split in ("train[:60%]", "train[60%:]"))
    shapes = [segmentation_of(part, i).shape for part in (half, rest) for i in range(len(part))]
    assert sorted(shapes) == [(16 + i, 20) for i in range(5)]
    assert segmentation_of(SubsetSource(open_source("embedded"), "subset", range(3)), 0) is None


@pytest.mark.parametrize("name", ["x.array_record", "x.array_record-00000-of-00001", "x.tar"])
def test_the_path_of_a_shard_that_is_missing_is_not_taken_for_a_name(
    tmp_path: pathlib.Path, name: str
) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder .*{name}"):
        open_source(f"{tmp_path}/{name}")
