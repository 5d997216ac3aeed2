"""The worst that folders hold: each file is read, or left out and named."""

import logging
import os
import pathlib
import shutil
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from mim_jax.data import open_source, train_batches
from mim_jax.data.decode import UnreadableImage
from mim_jax.data.folder import open_folder
from mim_jax.data.transforms import RandomResizedCrop
from tests.data.images import (
    encoded,
    encoded_array,
    encoded_bands,
    encoded_png,
    random_samples,
    smooth_image,
    write_images,
)

COLOUR = Image.fromarray(smooth_image())  # 40 x 60
GREY_16 = Image.fromarray(random_samples(40, 60, 1, np.uint16)[..., 0])
JPEG = encoded(COLOUR, "JPEG")
TURNED = Image.Exif()
TURNED[0x0112] = 6
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", COLOUR.size)]}

READ = {
    "grey.jpg": (encoded(COLOUR.convert("L"), "JPEG"), (40, 60)),
    "cmyk.jpg": (encoded(COLOUR.convert("CMYK"), "JPEG"), (40, 60)),
    "turned.jpg": (encoded(COLOUR, "JPEG", exif=TURNED), (60, 40)),
    "trailer.jpg": (JPEG + b"bytes of a camera", (40, 60)),
    "grey_16.tif": (encoded(GREY_16, "TIFF"), (40, 60)),
    "grey_16.png": (encoded(GREY_16, "PNG"), (40, 60)),
    "palette.png": (encoded(COLOUR.convert("P"), "PNG", transparency=3), (40, 60)),
    "alpha.webp": (encoded(Image.fromarray(random_samples(40, 60, 4)), "WEBP"), (40, 60)),
    "bilevel.tiff": (encoded(COLOUR.convert("1"), "TIFF"), (40, 60)),
    "line.png": (encoded(COLOUR.resize((4000, 1)), "PNG"), (1, 4000)),
    "dot.png": (encoded(COLOUR.resize((1, 1)), "PNG"), (1, 1)),
    "animated.gif": (encoded(COLOUR, "GIF", **FRAMES), (40, 60)),
    "animated.webp": (encoded(COLOUR, "WEBP", **FRAMES), (40, 60)),
    "pages.tif": (encoded(COLOUR, "TIFF", **FRAMES), (40, 60)),
    "jpeg_named.png": (JPEG, (40, 60)),
    "UPPER.JPG": (JPEG, (40, 60)),
    "array.npy": (encoded_array(random_samples(40, 60, 3)), (40, 60)),
}
UNREADABLE = {
    "empty.jpg": (b"", "the file is empty"),
    "corrupt.jpg": (JPEG[:20] + b"\xff" * 200 + JPEG[220:], ""),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "([Tt]runcated|not processed)"),
    "truncated.png": (encoded(COLOUR, "PNG")[:1000], "truncated"),
    "text.png": (b"a note", "not an image of a known format"),
    "bomb.png": (encoded_png(random_samples(1, 1, 3), 2, (100_000, 100_000)), "exceeds limit"),
    "five_bands.tif": (encoded_bands(random_samples(8, 9, 5)), "has 5 channels, but 3 are asked"),
    "float.tif": (encoded(COLOUR.convert("F"), "TIFF"), "no fixed range; convert it to 8 or 16"),
    "float.npy": (encoded_array(np.zeros((8, 9))), "no fixed range; convert it to 8 or 16"),
}
BACKENDS = ["opencv", "pillow"]


def write(folder: pathlib.Path, files: dict[str, tuple]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 16])
def test_each_kind_of_image_is_read(tmp_path: pathlib.Path, backend: str, bits: int) -> None:
    write(tmp_path, READ)
    source = open_folder(str(tmp_path), "train", bits=bits, backend=backend)
    assert len(source) == len(READ)
    crop = RandomResizedCrop((16, 16), backend=backend)
    for i in range(len(source)):
        image = source[i]["image"]
        assert image.shape == (*READ[pathlib.Path(source.path(i)).name][1], 3)
        assert image.dtype == f"uint{bits}"
        assert crop(image, np.random.default_rng(0)).shape == (16, 16, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_broken_file_is_named_with_its_reason(tmp_path: pathlib.Path, backend: str) -> None:
    write(tmp_path, UNREADABLE)
    source = open_folder(str(tmp_path), "train", backend=backend)
    assert len(source) == len(UNREADABLE)
    for i in range(len(source)):
        name = pathlib.Path(source.path(i)).name
        with pytest.raises(UnreadableImage, match=f"/{name}: .*{UNREADABLE[name][1]}"):
            source[i]


def test_a_run_passes_over_the_broken_files_and_names_each(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, READ | UNREADABLE)
    source = open_source(str(tmp_path))
    crop = RandomResizedCrop((16, 16))
    with caplog.at_level(logging.WARNING):
        batch = next(train_batches(source, crop, batch_size=len(source), seed=0, num_steps=1))
    assert batch["unreadable"].sum() == len(UNREADABLE)
    named = {record.getMessage().split(": ")[1].split("/")[-1] for record in caplog.records}
    assert named == set(UNREADABLE)


def test_bands_are_read_where_they_are_asked_for(tmp_path: pathlib.Path) -> None:
    for dtype, bits in ((np.uint8, 8), (np.uint16, 16)):
        samples = random_samples(30, 40, 5, dtype)
        folder = tmp_path / str(bits)
        write(folder, {"a.tif": (encoded_bands(samples), 0), "b.npy": (encoded_array(samples), 0)})
        source = open_folder(str(folder), "train", channels=5, bits=bits)
        for i in range(2):
            np.testing.assert_array_equal(source[i]["image"], samples)
        batches = train_batches(source, RandomResizedCrop((8, 8)), batch_size=2, seed=0)
        image = next(batches)["image"]
        batches.close()
        assert image.shape == (2, 8, 8, 5) and image.dtype == dtype


def test_names_of_any_bytes_are_files_of_their_own(tmp_path: pathlib.Path) -> None:
    names = [os.fsencode(unicodedata.normalize(form, "é.png")) for form in ("NFC", "NFD")]
    names += [b"caf\xe9.png", "写真 1.png".encode(), b"a'\"\n b.png"]
    written = []
    for value, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path), name)
        try:
            with open(path, "xb") as file:
                file.write(encoded(Image.new("L", (4, 4), value), "PNG"))
        except (FileExistsError, OSError):
            continue  # a file system that takes no such bytes, or no two forms of an accent
        written.append(value)
    source = open_source(str(tmp_path))
    assert sorted(int(source[i]["image"][0, 0, 0]) for i in range(len(source))) == written


def test_undecodable_name_can_be_printed(tmp_path: pathlib.Path) -> None:
    try:
        open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "xb").close()
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(UnreadableImage) as error:
        open_source(str(tmp_path))[0]
    assert r"caf\udce9.png: the file is empty" in str(error.value).encode("utf-8").decode()


def test_links_lead_to_images_or_are_named(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "elsewhere", 2)
    root = tmp_path / "root"
    write_images(root, 1)
    (root / "1_file.png").symlink_to(tmp_path / "elsewhere" / "001.png")
    (root / "2_nowhere.png").symlink_to(tmp_path / "missing.png")
    (root / "3_itself.png").symlink_to(root / "3_itself.png")
    (root / "itself").symlink_to(root / "itself")
    (root / "up").symlink_to(root)
    (root / "x.jpg").mkdir()  # a folder, whatever its name
    (root / "x.jpg" / "y.jpg").symlink_to(tmp_path / "elsewhere")
    source = open_folder(str(root), "train")
    found = [os.path.relpath(source.path(i), root) for i in range(len(source))]
    assert found == [
        "000.png", "1_file.png", "2_nowhere.png", "3_itself.png",
        "x.jpg/y.jpg/000.png", "x.jpg/y.jpg/001.png",
    ]  # fmt: skip
    for i in (0, 1, 4, 5):
        assert source[i]["image"].shape[2] == 3
    with pytest.raises(UnreadableImage, match=r"2_nowhere\.png: No such file or directory"):
        source[2]
    with pytest.raises(UnreadableImage, match=r"3_itself\.png: Too many levels of symbolic links"):
        source[3]


def test_two_links_into_each_other_end(tmp_path: pathlib.Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        write_images(tmp_path / name, 1)
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    assert len(open_source(str(tmp_path))) == 4  # a, a/link, b, b/link


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_pipe_is_passed_over(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    assert len(open_source(str(tmp_path))) == 1


def test_what_may_not_be_read_is_named(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, 2)
    write_images(tmp_path / "locked", 1)
    (tmp_path / "001.png").chmod(0)
    (tmp_path / "locked").chmod(0)
    if os.access(tmp_path / "001.png", os.R_OK):
        pytest.skip("this user may read everything")
    try:
        source = open_source(str(tmp_path))
        assert len(source) == 2
        assert f"folder left out: {tmp_path}/locked: Permission denied" in caplog.text
        with pytest.raises(UnreadableImage, match=r"001\.png: Permission denied"):
            source[1]
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_hundred_thousand_files_open_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "kept"))
    root = tmp_path / "root"
    data = encoded(COLOUR.resize((8, 8)), "PNG")
    for i in range(10):
        folder = root / f"class_{i}"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(data)
        for j in range(1, 10_000):
            os.link(folder / "0.png", folder / f"{j}.png")
    open_source(str(root))
    start = time.perf_counter()
    source = open_source(str(root))
    assert time.perf_counter() - start < 2
    assert len(source) == 100_000 and source.num_classes == 10
    assert source[99_999]["label"] == 9
    shutil.rmtree(root)  # pytest would keep it for three runs
