import logging
import multiprocessing
import os
import pathlib
import pickle

import numpy as np
import pytest

from mim_jax.data import folder_index
from mim_jax.data.folder_index import FolderIndex, PackedNames, index_folder


@pytest.fixture(autouse=True)
def kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Keep the lists of folders of any size in `tmp_path`, and trust those just made."""
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(folder_index, "_FEWEST_KEPT", 0)
    monkeypatch.setattr(folder_index, "_SETTLED_AFTER", -(10**18))
    return tmp_path / "kept"


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    for folder in ("", "b", "a", "a/deep", "a-z", "empty"):
        (tmp_path / "root" / folder).mkdir(exist_ok=True)
    for path in ("9.png", "10.jpg", "b/1.png", "a/2.png", "a/deep/3.png", "a-z/4.png", "no.txt"):
        (tmp_path / "root" / path).touch()
    return tmp_path / "root"


FILES = ["10.jpg", "9.png", "a/2.png", "a/deep/3.png", "a-z/4.png", "b/1.png"]


def listed_folders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each folder is added that is listed from now on."""
    seen: list[str] = []
    real = folder_index.list_folder

    def list_folder(path: bytes) -> tuple[list[bytes], list[bytes], bool]:
        seen.append(os.path.basename(os.path.normpath(os.fsdecode(path))))
        return real(path)

    monkeypatch.setattr(folder_index, "list_folder", list_folder)
    return seen


def touch_later(path: pathlib.Path) -> None:
    """Make a file, and a new time of its folder in spite of a coarse clock."""
    path.touch()
    status = path.parent.stat()
    os.utime(path.parent, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def test_order_is_files_then_folders_by_name(root: pathlib.Path) -> None:
    index = index_folder(root)
    assert list(index.paths()) == FILES
    assert [index.path(i) for i in range(len(index))] == FILES
    assert index.first.tolist() == [0, 2, 3, 4, 5, 6, 6]


def test_kept_list_is_read_instead_of_the_folders(
    root: pathlib.Path, kept: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(root)
    seen = listed_folders(monkeypatch)
    assert list(index_folder(root).paths()) == FILES
    assert seen == []
    assert len(list(kept.iterdir())) == 1


def test_changed_folder_is_listed_again_alone(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(root)
    seen = listed_folders(monkeypatch)
    touch_later(root / "a" / "deep" / "0.png")
    assert list(index_folder(root).paths()) == [*FILES[:3], "a/deep/0.png", *FILES[3:]]
    assert seen == ["deep"]
    (root / "b" / "1.png").unlink()
    (root / "b").rmdir()
    touch_later(root / "0.png")
    assert "b/1.png" not in list(index_folder(root).paths())
    assert index_folder(root).path(0) == "0.png"
    assert seen == ["deep", "root"]


def test_folder_that_changed_a_moment_ago_is_not_trusted(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(root.parent / "kept"))
    monkeypatch.setattr(folder_index, "_FEWEST_KEPT", 0)
    index_folder(root)
    times = root.stat()
    (root / "b" / "new.png").touch()
    os.utime(root / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "b/new.png" in list(index_folder(root).paths())


def test_link_that_leads_somewhere_later_is_found(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (root / "link").symlink_to(tmp_path / "later")
    assert list(index_folder(root).paths()) == FILES
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "5.png").touch()
    assert list(index_folder(root).paths()) == [*FILES, "link/5.png"]
    (tmp_path / "later" / "5.png").unlink()
    (tmp_path / "later").rmdir()
    assert list(index_folder(root).paths()) == FILES


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "changed", "other"])
def test_broken_list_is_made_anew(
    root: pathlib.Path, kept: pathlib.Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    index_folder(root)
    (file,) = kept.iterdir()
    data = file.read_bytes()
    if damage == "other":
        np.savez(file, header=np.zeros(3))
    else:
        middle = data.index(b"10.jpg")
        changed = data[:middle] + b"11" + data[middle + 2 :]
        parts = {"empty": b"", "cut": data[:-40], "text": b"text", "changed": changed}
        file.write_bytes(parts[damage])
    assert list(index_folder(root).paths()) == FILES
    assert file.read_bytes()[:4] == b"PK\3\4"
    assert ("is broken and made anew" in caplog.text) == (damage != "other")
    caplog.clear()
    assert list(index_folder(root).paths()) == FILES
    assert not caplog.text


def test_list_that_cannot_be_kept_is_a_warning(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "file" / "kept"))
    with caplog.at_level(logging.WARNING):
        assert list(index_folder(root).paths()) == FILES
    assert len(caplog.records) == 1
    assert "cannot be kept" in caplog.text and "set MIM_JAX_INDEX_CACHE" in caplog.text


def test_nothing_is_kept_of_small_folders_or_where_the_variable_is_empty(
    root: pathlib.Path, kept: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_index, "_FEWEST_KEPT", 13)  # 6 files and 6 folders
    index_folder(root)
    assert not kept.exists()
    monkeypatch.setattr(folder_index, "_FEWEST_KEPT", 12)
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", "")
    index_folder(root)
    assert not kept.exists()
    monkeypatch.delenv("MIM_JAX_INDEX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    index_folder(root)
    assert len(list((kept / "mim_jax" / "index").iterdir())) == 1


def test_list_is_replaced_where_other_suffixes_count(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_folder(root)
    monkeypatch.setattr(folder_index, "_SUFFIXES", (b".txt",))
    assert list(index_folder(root).paths()) == ["no.txt"]


def test_several_processes_may_list_at_once(root: pathlib.Path, kept: pathlib.Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=index_folder, args=(root,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [file.suffix for file in kept.iterdir()] == [".npz"]
    assert list(index_folder(root).paths()) == FILES


def test_folder_that_cannot_be_listed_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        index_folder(tmp_path / "missing")


def test_million_files_stay_small() -> None:
    names = b"".join(b"image_%08d.jpeg\0" % i for i in range(1000)) * 1000
    folders = PackedNames(b"\0" + b"".join(b"class_%03d\0" % i for i in range(1000)))
    first = np.concatenate([[0], np.arange(0, 1_000_001, 1000)])
    index = FolderIndex(folders, PackedNames(names), first)
    assert index.path(999_999) == "class_999/image_00000999.jpeg"
    assert index.path(1000) == "class_001/image_00000000.jpeg"
    assert len(pickle.dumps(index)) < 30e6


def test_maps_are_no_images_of_the_index_kept_or_not(root: pathlib.Path) -> None:
    for folder in ("segmentation/a", "a/segmentation"):
        (root / folder).mkdir(parents=True)
        (root / folder / "2.png").touch()
    expected = ["10.jpg", "9.png", "a/2.png", "a/deep/3.png", "a/segmentation/2.png", *FILES[4:]]
    for _ in range(2):
        assert list(index_folder(root).paths()) == expected
