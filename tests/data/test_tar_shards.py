import io
import json
import logging
import os
import pathlib
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mim_jax.data import open_source, tar_shards
from mim_jax.data.decode import UnreadableImage
from mim_jax.data.records import record_of
from tests.data.images import encoded


@pytest.fixture(autouse=True)
def index_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((6, 8), value, np.uint8)), "PNG")


def write_tar(
    path: pathlib.Path, members: dict[str, bytes], tar_format: int = tarfile.GNU_FORMAT
) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def labelled(values: range) -> dict[str, bytes]:
    """Two members for each value: a picture of it, and a label of 0, 1 or 2."""
    members = {}
    for value in values:
        members[f"{value:04d}.png"] = png(value)
        members[f"{value:04d}.cls"] = str(value % 3).encode()
    return members


def values_of(source: object) -> list[int]:
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]  # type: ignore


def test_members_of_one_key_are_an_example(tmp_path: pathlib.Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"x-{shard:03d}.tar", labelled(range(5 * shard, 5 * shard + 5)))
    for name in (f"tar:{tmp_path}/x-{{000..001}}.tar", f"tar:{tmp_path}", f"tar:{tmp_path}/*.tar"):
        source = open_source(name)
        assert values_of(source) == list(range(10))
        assert [source[i]["label"] for i in range(10)] == [i % 3 for i in range(10)]
        assert source.num_classes == 3 and source.class_names is None


def test_the_path_of_a_tar_file_is_a_source(tmp_path: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(4)))
    assert values_of(open_source(str(path))) == [0, 1, 2, 3]
    assert len(open_source(str(path), "train[:50%]")) == 2


def test_channels_and_bits_are_as_asked(tmp_path: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(4)))
    image = open_source(str(path), channels=1, bits=16)[3]["image"]
    assert image.shape == (6, 8, 1) and image.dtype == np.uint16 and image[0, 0, 0] == 3 * 257


@pytest.mark.parametrize("field", ["label", "cls"])
def test_labels_may_be_in_json(tmp_path: pathlib.Path, field: str) -> None:
    members = {}
    for value in range(3):
        members[f"{value}.json"] = json.dumps({field: 2 - value, "text": "any"}).encode()
        members[f"{value}.png"] = png(value)
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert [source[i]["label"] for i in range(3)] == [2, 1, 0]


def test_lists_of_labels_become_vectors(tmp_path: pathlib.Path) -> None:
    members = {}
    for key, labels in (("a", [0, 3]), ("b", []), ("c", [1])):
        members[f"{key}.png"] = png(0)
        members[f"{key}.json"] = json.dumps({"label": labels}).encode()
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert source.multi_label and source.num_classes == 4  # type: ignore[attr-defined]
    vectors = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert [source[i]["label"].tolist() for i in range(3)] == vectors
    assert source.labels.tolist() == vectors  # type: ignore[attr-defined]


def test_other_members_are_passed_over(tmp_path: pathlib.Path) -> None:
    members = {
        "./a/0.jpg": encoded(Image.fromarray(np.full((6, 8), 7, np.uint8)), "JPEG"),
        "./a/0.seg.png": png(99),
        "./a/0.txt": b"a caption",
        "./a/._0.png": b"of a Mac",
        "./b/0.PNG": png(8),
        "./b/0.json": b'{"text": "no label"}',
        "./c/0.txt": b"no image",
        "notes": b"no suffix",
    }
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert values_of(source) == [7, 8]
    assert source.num_classes is None and set(source[0]) == {"image"}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path: pathlib.Path, tar_format: int) -> None:
    folder = "größe/" + "x" * 200
    members = {f"{folder}/{number}.png": png(number) for number in range(3)}
    source = open_source(str(write_tar(tmp_path / "x.tar", members, tar_format)))
    assert values_of(source) == [0, 1, 2]


def test_records_keep_the_bytes_and_name_the_member(tmp_path: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(3)))
    record = record_of(open_source(str(path)), 2)
    assert record == {"image": png(2), "name": f"{path}/0002.png", "label": 2}


def test_labels_that_some_lack_are_left_out_with_a_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {**labelled(range(3)), "9.png": png(9)}
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert source.num_classes is None and set(source[0]) == {"image"}
    assert "labels left out, for 1 images have none" in caplog.text


def test_the_index_is_kept_until_the_shard_changes(
    tmp_path: pathlib.Path, index_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(4)))
    open_source(str(path))
    assert len(list(index_cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "read_index", lambda path: pytest.fail("the tar file was read"))
        source = open_source(str(path))
    assert values_of(source) == [0, 1, 2, 3] and source[2]["label"] == 2
    tar_shards._opened.cache_clear()
    write_tar(path, labelled(range(5, 8)))
    assert values_of(open_source(str(path))) == [5, 6, 7]


def test_a_damaged_cache_is_made_again(tmp_path: pathlib.Path, index_cache: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(4)))
    open_source(str(path))
    (file,) = index_cache.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:100], b"PK" + whole[2:50]):
        file.write_bytes(content)
        assert len(open_source(str(path))) == 4
        assert file.stat().st_size == len(whole)


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "file" / "cache"))
    assert len(open_source(str(write_tar(tmp_path / "x.tar", labelled(range(4)))))) == 4
    assert "x.tar cannot be kept in" in caplog.text and "MIM_JAX_INDEX_CACHE" in caplog.text


def test_with_an_empty_cache_variable_nothing_is_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", "")
    monkeypatch.chdir(tmp_path)
    assert len(open_source(str(write_tar(tmp_path / "x.tar", labelled(range(4)))))) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_the_index_is_small(tmp_path: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(256)))
    pickled = pickle.dumps(open_source(str(path)))
    assert len(pickled) < 2_000 + 256 * 24
    assert values_of(pickle.loads(pickled)) == list(range(256))


def test_threads_share_a_source(tmp_path: pathlib.Path) -> None:
    source = open_source(str(write_tar(tmp_path / "x.tar", labelled(range(100)))))
    order = np.random.default_rng(0).integers(0, 100, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: int(source[index]["image"][0, 0, 0]), order))
    assert found == order


def test_files_are_opened_when_an_image_is_read(tmp_path: pathlib.Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", labelled(range(4)))
    tar_shards._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(f"tar:{tmp_path}")
    assert len(os.listdir("/proc/self/fd")) == before
    source[0], source[1], source[11]
    assert len(os.listdir("/proc/self/fd")) == before + 2


@pytest.mark.parametrize("cut", [10, 1_000])
def test_of_a_cut_tar_the_whole_images_are_read_and_a_warning_names_it(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    image = encoded(Image.fromarray(noise), "PNG")
    path = write_tar(tmp_path / "x.tar", {f"{number}.png": image for number in range(5)})
    with tarfile.open(path) as tar:
        last = tar.getmember("4.png")
    end = last.offset_data + last.size
    path.write_bytes(path.read_bytes()[: end - cut])
    for _ in range(2):  # the second time from the cache
        source = open_source(str(path))
        assert len(source) == 4
        np.testing.assert_array_equal(source[3]["image"][..., 0], noise)
        assert f"{path} is cut off or damaged: only its first images are read" in caplog.text
        caplog.clear()


def test_of_a_tar_damaged_in_the_middle_the_first_images_are_read(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "x.tar", labelled(range(6)))
    with tarfile.open(path) as tar:
        header = tar.getmember("0003.png").offset
    data = bytearray(path.read_bytes())
    data[header : header + 512] = b"?" * 512
    path.write_bytes(data)
    assert values_of(open_source(str(path))) == [0, 1, 2]
    assert "is cut off or damaged" in caplog.text


def test_a_whole_tar_gives_no_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        path = write_tar(tmp_path / "x.tar", labelled(range(6)))
        values_of(open_source(str(path)))
        data = path.read_bytes().rstrip(b"\0")
        path.write_bytes(data + bytes(-len(data) % 512))  # without the two blocks at the end
        values_of(open_source(str(path)))
    assert not caplog.records


def test_an_unreadable_image_is_named(tmp_path: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": png(0), "b.png": b"no image", "c.png": b""})
    source = open_source(str(path))
    for index, member in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(UnreadableImage, match=f"{path}/{member}: "):
            source[index]
    tar_shards._opened.cache_clear()
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"x\.tar, image at byte 512: No such file"):
        source[0]


def test_an_index_beyond_the_end_is_an_error(tmp_path: pathlib.Path) -> None:
    source = open_source(str(write_tar(tmp_path / "x.tar", labelled(range(3)))))
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"has 3 examples, none with index {index}"):
            source[index]


@pytest.mark.parametrize(
    ("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz"), (None, "zstd")]
)
def test_a_compressed_tar_is_an_error(tmp_path: pathlib.Path, mode: str | None, name: str) -> None:
    path = tmp_path / "x.tar"
    if mode is None:
        path.write_bytes(b"\x28\xb5\x2f\xfd and so on")
    else:
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=rf"x\.tar is compressed by {name}.*plain \.tar"):
        open_source(str(path))
    path.rename(tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match="is compressed by"):
        open_source(f"tar:{tmp_path}")


@pytest.mark.parametrize("content", [b"", b"no tar file", b"?" * 2_000])
def test_a_file_that_is_no_tar_is_an_error(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar is not a tar file"):
        open_source(str(tmp_path / "x.tar"))


def test_a_tar_without_images_is_an_error(tmp_path: pathlib.Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"text"})
    with pytest.raises(FileNotFoundError, match=r"holds no image: no member ends in \.jpg"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("a.cls", b"dog", r"a\.cls is not an integer: b'dog'"),
        ("a.cls", b"-1", r"a\.cls: the label -1 is neither an integer from 0 on"),
        ("a.json", b"{", r"a\.json is not a JSON object"),
        ("a.json", b"[1]", r"a\.json is not a JSON object"),
        ("a.json", b'{"label": "dog"}', r"a\.json: the label 'dog' is neither"),
        ("a.json", b'{"label": [1, -2]}', r"a\.json: the label \[1, -2\] is neither"),
    ],
)
def test_a_label_that_is_no_integer_is_an_error(
    tmp_path: pathlib.Path, member: str, content: bytes, message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": png(0), member: content})
    with pytest.raises(ValueError, match=message):
        open_source(str(path))


def test_lists_and_single_labels_do_not_mix(tmp_path: pathlib.Path) -> None:
    single = {"a.png": png(0), "a.cls": b"1"}
    several = {"b.png": png(0), "b.json": b'{"label": [1]}'}
    write_tar(tmp_path / "one" / "x.tar", {**single, **several})
    with pytest.raises(ValueError, match=r"x\.tar: some labels are lists and others are single"):
        open_source(f"tar:{tmp_path}/one")
    write_tar(tmp_path / "two" / "x.tar", single)
    write_tar(tmp_path / "two" / "y.tar", several)
    with pytest.raises(ValueError, match=r"labels are lists in .*y\.tar, but single in .*x\.tar"):
        open_source(f"tar:{tmp_path}/two")


def test_missing_shards_are_an_error(tmp_path: pathlib.Path) -> None:
    write_tar(tmp_path / "x-000.tar", labelled(range(2)))
    with pytest.raises(FileNotFoundError, match="1 of 2 tar shards are missing"):
        open_source(f"tar:{tmp_path}/x-{{000..001}}.tar")
    with pytest.raises(FileNotFoundError, match="no tar shard matches"):
        open_source(f"tar:{tmp_path}/y-*.tar")


def test_the_index_of_many_shards_is_read_from_one_file(
    tmp_path: pathlib.Path, index_cache: pathlib.Path
) -> None:
    for first in (0, 2, 4):
        write_tar(tmp_path / f"x-{first}.tar", labelled(range(first, first + 2)))
    assert values_of(open_source(f"tar:{tmp_path}")) == [0, 1, 2, 3, 4, 5]
    for kept in index_cache.glob("tar-*"):
        kept.unlink()
    source = open_source(f"tar:{tmp_path}")
    assert values_of(source) == [0, 1, 2, 3, 4, 5] and source[5]["label"] == 2
    assert not list(index_cache.glob("tar-*"))
    tar_shards._opened.cache_clear()
    write_tar(tmp_path / "x-2.tar", labelled(range(7, 10)))
    assert values_of(open_source(f"tar:{tmp_path}")) == [0, 1, 7, 8, 9, 4, 5]
