import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from mim_jax.data import open_source
from mim_jax.data.decode import UnreadableImage
from tests.data.images import encoded, smooth_image, write_images


def test_sub_folders_are_classes_sorted_by_name(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "zebra", 2)
    write_images(tmp_path / "ant" / "deeper", 3)
    source = open_source(str(tmp_path))
    assert source.class_names == ("ant", "zebra")
    assert source.num_classes == 2
    assert [source[i]["label"] for i in range(len(source))] == [0, 0, 0, 1, 1]
    assert [int(source[i]["image"][0, 0, 0]) for i in range(len(source))] == [0, 10, 20, 0, 10]


def test_folder_without_sub_folders_is_unlabelled(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 3)
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 3
    assert source.num_classes is None and source.class_names is None
    assert set(source[0]) == {"image"}
    assert source[2]["image"].shape == (18, 20, 3)


def test_each_suffix_is_read_and_other_files_are_passed_over(tmp_path: pathlib.Path) -> None:
    suffixes = [
        ".jpg",
        ".JPEG",
        ".jfif",
        ".png",
        ".webp",
        ".tif",
        ".tiff",
        ".gif",
        ".bmp",
        ".ppm",
        ".jp2",
    ]
    for i, suffix in enumerate(suffixes):
        image = Image.fromarray(smooth_image())
        (image.convert("L") if suffix == ".pgm" else image).save(tmp_path / f"{i}{suffix}")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert len(source) == len(suffixes)
    for i in range(len(source)):
        assert source[i]["image"].shape == (40, 60, 3)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_mixed_images_get_the_asked_number_of_channels(
    tmp_path: pathlib.Path, channels: int | None
) -> None:
    for mode in ("L", "RGB", "RGBA", "P"):
        Image.fromarray(smooth_image()).convert(mode).save(tmp_path / f"{mode}.png")
    source = open_source(str(tmp_path), channels=channels)
    assert {source[i]["image"].shape for i in range(4)} == {(40, 60, channels or 3)}


def test_split_folder_is_used(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "train" / "b", 3)
    write_images(tmp_path / "val" / "b", 2)
    assert len(open_source(str(tmp_path), "train")) == 6
    validation = open_source(str(tmp_path), "validation")
    assert len(validation) == 2
    # Though only one class is present, its label is that of the training split.
    assert validation.class_names == ("a", "b")
    assert validation[0]["label"] == 1


def test_split_that_is_not_there_is_an_error(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "train", 1)
    write_images(tmp_path / "val", 1)
    with pytest.raises(FileNotFoundError, match="has no split 'test'; it has 'train', 'val'"):
        open_source(str(tmp_path), "test")


def test_folder_without_split_folders_is_the_train_split_alone(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 4)
    assert len(open_source(str(tmp_path), "train")) == len(open_source(str(tmp_path), "all")) == 4
    with pytest.raises(FileNotFoundError, match=r"no sub-folder 'test'.*'train\[90%:\]'"):
        open_source(str(tmp_path), "test")


def test_slices_part_the_folder_and_mix_the_classes(tmp_path: pathlib.Path) -> None:
    for label in "abc":
        write_images(tmp_path / label, 20)
    first, rest = (open_source(str(tmp_path), s) for s in ("train[:75%]", "train[75%:]"))
    assert (len(first), len(rest)) == (45, 15)
    assert {rest[i]["label"] for i in range(15)} == {0, 1, 2}
    pictures = [
        (source[i]["label"], source[i]["image"].shape) for source in (first, rest)
        for i in range(len(source))
    ]  # fmt: skip
    assert len(set(pictures)) == 60


def test_links_are_followed_but_not_in_a_circle(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "elsewhere", 2)
    write_images(tmp_path / "root" / "a", 1)
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "missing")
    source = open_source(str(tmp_path / "root"))
    assert [source[i]["label"] for i in range(len(source))] == [0, 1, 1]


def test_names_beyond_ascii_and_pickling_work(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "größe 1", 2)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert source.class_names == ("größe 1",)
    assert int(source[1]["image"][0, 0, 0]) == 10


def test_unreadable_file_is_named(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 1)
    (tmp_path / "001.jpg").write_bytes(b"")
    (tmp_path / "002.jpg").write_bytes(encoded(Image.fromarray(smooth_image()), "JPEG")[:300])
    write_images(tmp_path / "gone", 1)
    source = open_source(str(tmp_path))
    (tmp_path / "gone" / "000.png").unlink()
    with pytest.raises(UnreadableImage, match=r"001\.jpg: the file is empty"):
        source[1]
    with pytest.raises(UnreadableImage, match=r"002\.jpg: "):
        source[2]
    with pytest.raises(UnreadableImage, match=r"gone/000\.png: No such file"):
        source[3]


def test_both_back_ends_see_the_same_pictures(tmp_path: pathlib.Path) -> None:
    Image.fromarray(smooth_image()).save(tmp_path / "a.png")
    images = [open_source(str(tmp_path), backend=b)[0]["image"] for b in ("opencv", "pillow")]
    np.testing.assert_array_equal(*images)


def test_missing_folder_is_an_error_with_the_nearest_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"picture' does not exist; did you mean '.*pictures"
    ):
        open_source(f"folder:{tmp_path}/picture")


def test_folder_without_images_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"image folder {tmp_path} is empty"):
        open_source(str(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"film")
    with pytest.raises(FileNotFoundError, match=r"holds no image: 1 files with the suffixes \.mp4"):
        open_source(str(tmp_path))
    with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
        open_source(str(tmp_path / "a.mp4"))
