import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from mim_jax.data import open_source
from mim_jax.data.folder import open_folder
from mim_jax.data.folder_maps import CLASS_LIST
from tests.data.images import write_images, write_maps


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes of images with their maps."""
    for name in ("a", "b"):
        write_images(tmp_path / "data" / name, 2, suffix=".jpg")
    write_maps(tmp_path / "data", tmp_path / "data" / "segmentation")
    return tmp_path / "data"


def test_maps_mirror_the_images_and_are_none_themselves(root: pathlib.Path) -> None:
    source = pickle.loads(pickle.dumps(open_folder(str(root), "train")))
    assert len(source) == 4 and source.class_names == ("a", "b")
    for index, value in enumerate([0, 1, 0, 1]):
        classes = source.segmentation(index)
        assert classes.dtype == np.uint8
        assert classes.shape == source[index]["image"].shape[:2] == (16 + value, 20)
        assert (classes[0] == 255).all() and (classes[1:] == value).all()


def test_maps_of_a_flat_folder_need_no_labels(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 3)
    write_maps(tmp_path, tmp_path / "segmentation")
    source = open_folder(str(tmp_path), "train")
    assert len(source) == 3 and source.num_classes is None
    assert source.segmentation(2)[1, 0] == 2


def test_table_of_labels_needs_no_rows_for_maps(root: pathlib.Path) -> None:
    rows = [f"{name}/00{i}.jpg,{name}" for name in "ab" for i in range(2)]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))
    assert open_folder(str(root), "train").labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("place", ["val/segmentation", "segmentation/val"])
def test_maps_lie_in_a_split_folder_or_beside_it(tmp_path: pathlib.Path, place: str) -> None:
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "val", 2)
    write_maps(tmp_path / "val", tmp_path / place)
    (tmp_path / place.removesuffix("/val") / CLASS_LIST).write_text("sky\nsea\n")
    validation = open_source(str(tmp_path), "validation")
    assert len(validation) == 2
    assert [validation.segmentation(i)[1, 0] for i in range(2)] == [0, 1]
    train = open_source(str(tmp_path), "train")
    assert len(train) == 3 and train.segmentation(0) is None


def test_map_is_of_the_image_as_it_is_shown(tmp_path: pathlib.Path) -> None:
    image = Image.new("L", (30, 20))
    image.getexif()[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "0.jpg", exif=image.getexif())
    (tmp_path / "segmentation").mkdir()
    Image.new("L", (20, 30)).save(tmp_path / "segmentation" / "0.png")
    source = open_folder(str(tmp_path), "train")
    assert source.segmentation(0).shape == source[0]["image"].shape[:2] == (30, 20)


def test_images_without_map_are_named(root: pathlib.Path) -> None:
    (root / "segmentation" / "b" / "001.png").unlink()
    message = (
        r"segmentation has no map for 1 of 4 images, such as 'b/001.jpg'; expected 'b/001.png'"
    )
    with pytest.raises(ValueError, match=message):
        open_folder(str(root), "train")


def test_maps_without_image_are_named(root: pathlib.Path) -> None:
    for name in ("x.png", "a/000.jpg"):
        (root / "segmentation" / name).touch()
    message = r"has 2 files that are no map of an image, such as 'a/000.jpg', 'x.png'; take"
    with pytest.raises(ValueError, match=message):
        open_folder(str(root), "train")


def test_map_of_another_size_is_named(root: pathlib.Path) -> None:
    Image.new("L", (16, 20)).save(root / "segmentation" / "a" / "000.png")
    source = open_folder(str(root), "train")
    message = r"a/000.png has 20 x 16 pixels, but its image 16 x 20; it must have"
    with pytest.raises(ValueError, match=message):
        source.segmentation(0)
    assert source.segmentation(1) is not None


def test_broken_map_is_named(root: pathlib.Path) -> None:
    path = root / "segmentation" / "a" / "000.png"
    source = open_folder(str(root), "train")
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"segmentation map .*a/000.png: it is not a PNG"):
        source.segmentation(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"segmentation map .*a/000.png: .*No such file"):
        source.segmentation(0)


def test_class_beyond_the_list_is_named(root: pathlib.Path) -> None:
    (root / "segmentation" / CLASS_LIST).write_text("grass\n")
    source = open_folder(str(root), "train")
    assert source.segmentation(0)[1, 0] == 0
    with pytest.raises(
        ValueError, match=r"a/001.png has the class 1, but classes.txt names 1, 0 to"
    ):
        source.segmentation(1)


@pytest.mark.parametrize("names", [0, 256])
def test_more_names_than_numbers_and_none_are_errors(root: pathlib.Path, names: int) -> None:
    (root / "segmentation" / CLASS_LIST).write_text("".join(f"{i}\n" for i in range(names)))
    with pytest.raises(ValueError, match=rf"classes.txt names {names} classes; give 1 to 255"):
        open_folder(str(root), "train")
