"""Data in object stores: read in place or copied, they give the examples that files give."""

import pathlib
import pickle

import numpy as np
import pytest

from mim_jax import object_store
from mim_jax.data import open_source
from mim_jax.data.decode import UnreadableImage
from mim_jax.data.local_copy import CACHE_VARIABLE
from tests import object_stores
from tests.data.test_array_record import grey_png, packed, write_manifest, write_shard
from tests.data.test_tar_shards import labelled, write_tar


@pytest.fixture(scope="module", params=("gs", "s3"))
def bucket(request):
    with {"gs": object_stores.gcs, "s3": object_stores.s3}[request.param]() as url:
        yield url


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "index"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "copies"))
    return tmp_path / "copies"


def put(folder: pathlib.Path, url: str) -> str:
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    object_store.upload(paths, url)
    return url


def assert_same(source, expected):
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == len(expected)
    assert source.num_classes == expected.num_classes
    for index in range(len(expected)):
        ours, theirs = source[index], expected[index]
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        assert ours.get("label") == theirs.get("label")


def test_tar_shards_are_read_in_place(bucket, tmp_path, cache, monkeypatch):
    folder = tmp_path / "tars"
    (folder / "train").mkdir(parents=True)
    for shard in range(2):
        path = folder / "train" / f"x-{shard:03d}.tar"
        write_tar(path, labelled(range(5 * shard, 5 * shard + 5)))
    url = put(folder, f"{bucket}/tars")
    expected = open_source(f"tar:{folder}")
    for pattern in ("", "/{split}/x-{000..001}.tar", "/train/*.tar"):
        assert_same(open_source(f"tar:{url}{pattern}"), expected)
    assert len(open_source(f"{url}/train/x-001.tar")) == 5
    assert not cache.exists()

    read = []
    monkeypatch.setattr(object_store, "opened", lambda *a: read.append(a))  # indexes are kept
    source = open_source(f"tar:{url}")
    object_store.remove(f"{url}/train", ["x-000.tar"])
    with pytest.raises(UnreadableImage, match=f"{url}/train/x-000.tar"):
        source[0]
    with pytest.raises(FileNotFoundError, match=r"1 of 2 tar shards are missing.*x-000\.tar"):
        open_source(f"tar:{url}/train/x-{{000..001}}.tar")
    with pytest.raises(FileNotFoundError, match="no tar shard matches"):
        open_source(f"tar:{url}/none-*.tar")
    assert not read


def test_array_record_shards_are_read_in_place_at_gs_and_copied_from_s3(bucket, tmp_path, cache):
    folder = tmp_path / "records"
    for name, count in (("train-0", 3), ("train-1", 4), ("val-0", 2)):
        records = [packed(10 * number + len(name), label=number % 2) for number in range(count)]
        write_shard(folder / f"{name}.array_record", records)
    write_manifest(folder, {"train": [3, 4], "val": [2]})
    url = put(folder, f"{bucket}/records")
    for split in ("train", "val"):
        expected = open_source(f"array_record:{folder}", split)
        assert_same(open_source(f"array_record:{url}", split), expected)
    shard = next(name for name in object_store.files(url) if name != "dataset.json")
    expected = open_source(f"array_record:{folder / shard}")
    assert_same(open_source(f"{url}/{shard}"), expected)
    pattern = f"array_record:{url}/{{split}}-{{0,1}}.array_record"
    assert_same(open_source(pattern), open_source(f"array_record:{folder}"))
    assert cache.exists() == url.startswith("s3")
    with pytest.raises(FileNotFoundError, match="has no split 'nothing'"):
        open_source(f"array_record:{url}", "nothing")


def test_a_folder_is_copied_once_and_follows_the_store(bucket, tmp_path, cache, monkeypatch):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey_png(int(path.stem)))
    url = put(tmp_path / "images", f"{bucket}/images")
    assert_same(open_source(f"folder:{url}"), open_source(f"folder:{tmp_path / 'images'}"))

    download, copied = object_store.download, []

    def counted(url, names, to):
        copied.extend(names)
        download(url, names, to)

    monkeypatch.setattr(object_store, "download", counted)
    assert len(open_source(f"folder:{url}")) == 3
    assert not copied
    object_store.write(f"{url}/b/3.png", grey_png(9) + b"more")
    object_store.remove(url, ["a/1.png"])
    source = open_source(f"folder:{url}")
    assert copied == ["3.png"]
    assert [source[i]["image"].max() for i in range(len(source))] == [2, 9]

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "small"))
    with pytest.raises(OSError, match=f"set {CACHE_VARIABLE} to a folder on a larger disk"):
        open_source(f"folder:{url}")


def test_what_cannot_be_read_there_is_refused_with_the_way_out(bucket):
    with pytest.raises(ValueError, match="mount the bucket"):
        open_source(f"table:{bucket}/x.csv")
    with pytest.raises(ValueError, match="'tar:URL'"):
        open_source(f"{bucket}/images")
    with pytest.raises(FileNotFoundError, match="nothing at"):
        open_source(f"folder:{bucket}/nothing")
    scheme = bucket.partition(":")[0]
    with pytest.raises(FileNotFoundError, match=f"no bucket {scheme}://nowhere"):
        open_source(f"tar:{scheme}://nowhere/x.tar")
