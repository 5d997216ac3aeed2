import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mim_jax.data import open_source
from tests.data.images import encoded


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Twenty grey images of different heights; image i is filled with the value i."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, 12, 1)),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            image = Image.fromarray(np.full((8 + i, 12), i, np.uint8))
            # Encoded bytes: encoding an array is the one step for which TFDS needs TensorFlow.
            yield i, {"image": encoded(image, "PNG"), "label": i % 3}


class TinyWords(tfds.core.GeneratorBasedBuilder):
    """A data set without images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"word": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": iter([(0, {"word": "one"})])}

    def _generate_examples(self):
        yield from ()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPictures, TinyWords):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_images_and_labels_are_read(data_dir: pathlib.Path) -> None:
    source = open_source(f"tfds:tiny_pictures:1.0.0?data_dir={data_dir}")
    assert len(source) == 20
    assert source.num_classes == 3 and source.class_names == ("a", "b", "c")
    for i in range(20):
        element = source[i]
        value = int(element["image"][0, 0, 0])
        assert element["image"].shape == (8 + value, 12, 1) and element["image"].dtype == np.uint8
        assert (element["image"] == value).all()
        assert type(element["label"]) is int and element["label"] == value % 3


def test_folder_comes_from_the_environment_and_channels_can_be_asked(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    source = open_source("tfds:tiny_pictures", "train[:25%]", channels=3)
    assert len(source) == 5
    assert source[0]["image"].shape[-1] == 3


def test_source_can_be_pickled(data_dir: pathlib.Path) -> None:
    source = open_source(f"tfds:tiny_pictures?data_dir={data_dir}")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[7]["image"], source[7]["image"])


def test_unknown_split_is_an_error_with_the_known_ones(data_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'tfds:tiny_pictures' has no split 'test'; it has train"):
        open_source(f"tfds:tiny_pictures?data_dir={data_dir}", "test")


def test_data_set_that_is_not_prepared_says_how_to_prepare_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="'tfds:tiny_pictures' is not prepared") as error:
        open_source(f"tfds:tiny_pictures?data_dir={tmp_path}")
    assert "tfds build tiny_pictures --file_format=array_record" in str(error.value)


def test_data_set_without_random_access_says_how_to_convert_it(tmp_path: pathlib.Path) -> None:
    builder = TinyPictures(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = next(tmp_path.glob("**/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match="in a format without random access"):
        open_source(f"tfds:tiny_pictures?data_dir={tmp_path}")


def test_unknown_data_set_is_an_error_with_the_nearest(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="knows no data set 'imagenette2'") as error:
        open_source(f"tfds:imagenette2?data_dir={tmp_path}")
    assert "did you mean imagenette" in str(error.value)


def test_data_set_without_images_lists_its_features(data_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has no feature 'image'; it has word"):
        open_source(f"tfds:tiny_words?data_dir={data_dir}")


def test_malformed_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"is not understood; write tfds:NAME"):
        open_source("tfds:name?folder=x")


def test_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        open_source("tfds:mnist")


def test_importing_the_data_room_loads_neither_tfds_nor_other_frameworks() -> None:
    code = (
        "import sys, mim_jax.data; "
        "print([m for m in ('tensorflow', 'torch', 'tensorflow_datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
