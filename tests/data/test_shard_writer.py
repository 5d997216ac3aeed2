import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mim_jax.data import open_source, shard_writer
from mim_jax.data.decode import decode_image
from mim_jax.data.image_writer import encode_image
from mim_jax.data.records import record_of
from mim_jax.data.shard_writer import convert
from tests.data.images import encoded, smooth_image
from tests.data.test_array_record import grey_png, write_shard


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
    """Twelve JPEG files of growing size in the classes `ant` and `bee`."""
    folder = tmp_path / "pictures"
    for number in range(12):
        path = folder / ("ant" if number < 5 else "bee") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(30 + 2 * number, 60, seed=number)).save(path, quality=90)
    return folder


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(source: Any) -> list[Any]:
    return [record_of(source, index) for index in range(len(source))]


def test_files_keep_their_bytes_labels_and_names(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = open_source(f"folder:{pictures}")
    result = convert(source, tmp_path / "out", shards=3)
    assert (result.examples, result.shards, result.unreadable) == (12, 3, ())
    written = open_source(str(tmp_path / "out"))
    assert records_of(written) == records_of(source)
    assert written.class_names == ("ant", "bee")
    for index in (0, 11):
        np.testing.assert_array_equal(written[index]["image"], source[index]["image"])
        assert written[index]["label"] == source[index]["label"]


def test_the_manifest_tells_shards_and_classes(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    convert(open_source(f"folder:{pictures}"), tmp_path / "out", shards=5)
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["class_names"] == ["ant", "bee"] and manifest["num_classes"] == 2
    train = manifest["splits"]["train"]
    assert [shard["examples"] for shard in train["shards"]] == [2, 2, 3, 2, 3]
    assert train["class_counts"] == [5, 7]
    assert train["unreadable"] == []
    names = {"dataset.json", *(shard["file"] for shard in train["shards"])}
    assert set(files_of(tmp_path / "out")) == names


def test_larger_images_are_shrunk_and_smaller_ones_keep_their_bytes(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = open_source(f"folder:{pictures}")
    convert(source, tmp_path / "out", short_side=40)
    written = open_source(str(tmp_path / "out"))
    for index in range(12):
        before, after = source[index]["image"], written[index]["image"]
        if before.shape[0] <= 40:
            assert record_of(written, index) == record_of(source, index)
        else:
            assert after.shape == (40, round(60 * 40 / before.shape[0]), 3)
            assert abs(float(after.mean()) - float(before.mean())) < 2


def test_shrinking_turns_images_upright(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(smooth_image(40, 60)).save(tmp_path / "in" / "a.jpg", exif=exif)
    convert(open_source(f"folder:{tmp_path}/in"), tmp_path / "out", short_side=20)
    assert open_source(str(tmp_path / "out"))[0]["image"].shape == (30, 20, 3)


@pytest.mark.parametrize(
    ("channels", "bits", "start"),
    [
        *[(1, 8, b"\xff\xd8"), (3, 8, b"\xff\xd8"), (4, 8, b"\x89PNG"), (1, 16, b"\x89PNG")],
        *[(3, 16, b"\x89PNG"), (4, 16, b"\x89PNG"), (2, 8, b"\x93NUMPY"), (7, 16, b"\x93NUMPY")],
    ],
)
def test_images_of_any_channels_and_bits_can_be_written(
    channels: int, bits: int, start: bytes
) -> None:
    smooth = np.resize(smooth_image().transpose(2, 0, 1), (channels, 40, 60)).transpose(1, 2, 0)
    image = smooth if bits == 8 else smooth.astype(np.uint16) * 257 + 13
    for lossless in (False, True):
        data = encode_image(image, lossless)
        again = decode_image(data, channels, "opencv", bits)
        assert again.dtype == image.dtype
        if lossless or start != b"\xff\xd8":
            np.testing.assert_array_equal(again, image)
        else:
            assert data.startswith(start)
            assert np.abs(again.astype(int) - image).mean() < 3
        if not lossless:
            assert data.startswith(start)


def test_images_in_memory_are_kept_exactly(tmp_path: pathlib.Path) -> None:
    source = open_source("embedded", "test[:30]")
    convert(source, tmp_path)
    written = open_source(str(tmp_path), channels=1)
    for index in range(30):
        np.testing.assert_array_equal(written[index]["image"], source[index]["image"])
        assert written[index]["label"] == source[index]["label"]


def test_lists_of_labels_are_kept(pictures: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rows = [f"{path.relative_to(pictures)},x;y" for path in sorted(pictures.rglob("*.jpg"))]
    (pictures / "labels.csv").write_text("\n".join(["file,label", *rows[:-1], rows[-1][:-4] + ","]))
    source = open_source(f"folder:{pictures}")
    assert source.multi_label  # type: ignore[attr-defined]
    convert(source, tmp_path / "out")
    written = open_source(str(tmp_path / "out"))
    for index in range(12):
        np.testing.assert_array_equal(written[index]["label"], source[index]["label"])
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["multi_label"] and manifest["splits"]["train"]["class_counts"] == [11, 11]


def test_unreadable_images_are_left_out_and_named(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (pictures / "ant" / "02.jpg").write_bytes(b"no image")
    whole = (pictures / "bee" / "07.jpg").read_bytes()
    (pictures / "bee" / "07.jpg").write_bytes(whole[: len(whole) // 2])
    result = convert(open_source(f"folder:{pictures}"), tmp_path / "out", shards=2)
    assert result.examples == 10
    assert [message.split(": ")[0] for message in result.unreadable] == ["ant/02.jpg", "bee/07.jpg"]
    written = open_source(str(tmp_path / "out"))
    assert [record["name"][-6:] for record in records_of(written)] == [
        f"{number:02d}.jpg" for number in range(12) if number not in (2, 7)
    ]
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    train = manifest["splits"]["train"]
    assert train["unreadable"] == list(result.unreadable)
    assert [shard["examples"] for shard in train["shards"]] == [5, 5]
    assert train["class_counts"] == [4, 6]


def test_labels_of_shards_without_classes_are_kept(tmp_path: pathlib.Path) -> None:
    records = [msgpack.packb({"image": grey_png(0), "label": label}) for label in (7, 3)]
    write_shard(tmp_path / "x.array_record", records)
    convert(open_source(str(tmp_path / "x.array_record")), tmp_path / "out")
    written = open_source(str(tmp_path / "out"))
    assert [written[i]["label"] for i in range(2)] == [7, 3] and written.num_classes is None


def test_splits_share_a_folder(pictures: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for split, part in (("train", "train[:75%]"), ("val", "train[75%:]")):
        convert(open_source(f"folder:{pictures}", part), tmp_path / "out", split)
    train, val = (open_source(str(tmp_path / "out"), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 3)
    names = {record["name"] for record in records_of(train) + records_of(val)}
    assert len(names) == 12


def test_the_same_call_again_changes_nothing(
    pictures: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"folder:{pictures}")
    first = convert(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(shard_writer, "_packed", lambda *rest: pytest.fail("an image was read"))
    assert convert(source, tmp_path / "out") == first
    assert files_of(tmp_path / "out") == before


def test_shards_do_not_depend_on_threads(pictures: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = open_source(f"folder:{pictures}")
    for threads in (1, 8):
        convert(source, tmp_path / str(threads), shards=2, short_side=32, threads=threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "8")


def test_after_an_error_only_the_missing_shards_are_made(
    pictures: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"folder:{pictures}")
    convert(source, tmp_path / "whole", shards=4)
    packed, made = shard_writer._packed, []

    def fails_at_seven(source: Any, index: int, short_side: int | None) -> Any:
        if index == 7:
            raise OSError("the disk is full")
        return packed(source, index, short_side)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_packed", fails_at_seven)
        with pytest.raises(OSError, match="the disk is full"):
            convert(source, tmp_path / "out", shards=4)
    assert [path.name[:11] for path in sorted((tmp_path / "out").glob("*.array_record"))] == [
        "train-00000",
        "train-00001",
    ]

    def noted(source: Any, index: int, short_side: int | None) -> Any:
        made.append(index)
        return packed(source, index, short_side)

    monkeypatch.setattr(shard_writer, "_packed", noted)
    convert(source, tmp_path / "out", shards=4)
    assert sorted(made) == [6, 7, 8, 9, 10, 11]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: pathlib.Path) -> None:
    code = (
        "import pathlib, sys; from mim_jax.data import open_source; "
        "from mim_jax.data.shard_writer import convert; "
        "convert(open_source('embedded', 'test[:400]'), pathlib.Path(sys.argv[1]), shards=40)"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(killed)])
    while len(list(killed.glob("*.array_record"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shards = list(killed.glob("*.array_record"))
    assert 3 <= len(shards) < 40 and not (killed / "dataset.json").exists()
    kept = {path: os.stat(path).st_mtime_ns for path in shards}
    for folder in (killed, tmp_path / "whole"):
        convert(open_source("embedded", "test[:400]"), folder, shards=40)
    assert files_of(killed) == files_of(tmp_path / "whole")
    assert {path: os.stat(path).st_mtime_ns for path in shards} == kept


def test_other_arguments_do_not_go_on_with_an_unfinished_conversion(
    pictures: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"folder:{pictures}")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_write_shard", lambda *rest: exec("raise OSError('full')"))
        with pytest.raises(OSError, match="full"):
            convert(source, tmp_path, shards=4)
    with pytest.raises(ValueError, match=r"unfinished conversion of .*'shards': 4.* not of"):
        convert(source, tmp_path, shards=3)
    assert convert(source, tmp_path, shards=4).examples == 12


def test_another_conversion_does_not_take_the_place_of_a_split(
    pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = open_source(f"folder:{pictures}")
    convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="holds the split 'train' already, made from"):
        convert(source, tmp_path / "out", short_side=16)
    with pytest.raises(ValueError, match="with other class_names and num_classes than embedded"):
        convert(open_source("embedded", "test"), tmp_path / "out", "test")


def test_a_source_of_unreadable_images_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images of folder:.* can be read"):
        convert(open_source(f"folder:{tmp_path}/in"), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shards": 13}, "shards must be between 1 and 12, the number of examples, got 13"),
        ({"shards": -1}, "shards must be between 1 and 12"),
        ({"short_side": 0}, "short_side must be at least 1 pixel, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
        ({"split": "a/b"}, "split 'a/b' is not understood"),
        ({"split": "train[:9]"}, r"the name of a split, without a slice, got 'train\[:9\]'"),
    ],
)
def test_bad_arguments_are_errors(
    pictures: pathlib.Path, tmp_path: pathlib.Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(open_source(f"folder:{pictures}"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_progress_is_shown(pictures: pathlib.Path, tmp_path: pathlib.Path) -> None:
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    convert(open_source(f"folder:{pictures}"), tmp_path / "out", shards=2, console=console)
    assert "12/12" in console.export_text()


def test_a_picture_in_memory_is_shrunk_without_loss(tmp_path: pathlib.Path) -> None:
    convert(open_source("embedded", "test[:3]"), tmp_path, short_side=14)
    record = record_of(open_source(str(tmp_path)), 0)
    assert record is not None and record["image"].startswith(b"\x89PNG")
    assert open_source(str(tmp_path))[0]["image"].shape == (14, 14, 3)


def test_bytes_are_kept_of_any_source_with_files(tmp_path: pathlib.Path) -> None:
    data = encoded(Image.fromarray(smooth_image()), "WEBP")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.webp").write_bytes(data)
    convert(open_source(f"folder:{tmp_path}/in"), tmp_path / "one")
    convert(open_source(str(tmp_path / "one")), tmp_path / "two")
    record = record_of(open_source(str(tmp_path / "two")), 0)
    assert record == {"image": data, "name": "a.webp"}
