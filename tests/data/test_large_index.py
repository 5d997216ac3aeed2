"""What an example costs before it is read; measured by the allocations of Python and NumPy."""

import contextlib
import json
import pathlib
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from mim_jax.data import folder_index, tar_shards
from mim_jax.data.order import ShuffledOrder
from mim_jax.data.sources import SubsetSource, open_source
from mim_jax.data.tar_shards import TarIndex

MILLION = 1_000_000
SLACK = 500_000  # bytes, for what does not grow with the examples


@contextlib.contextmanager
def allocations() -> Iterator[dict[str, int]]:
    """Give the bytes that are held at the end of the block, and the most that were in it."""
    figures: dict[str, int] = {}
    tracemalloc.start()
    try:
        yield figures
        figures["held"], figures["peak"] = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


@pytest.fixture(autouse=True)
def kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_JAX_INDEX_CACHE", str(tmp_path / "kept"))


@pytest.fixture
def manifest(tmp_path: pathlib.Path) -> str:
    """A manifest of 100 empty shards with a million examples together."""
    shards = [{"file": f"x-{n}.array_record", "examples": MILLION // 100} for n in range(100)]
    for shard in shards:
        (tmp_path / str(shard["file"])).touch()
    content = {"version": 1, "splits": {"train": {"shards": shards}}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return f"array_record:{tmp_path}"


class Sized:
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


@pytest.mark.parametrize("length", [10_000, 10**7, 10**12])
def test_shuffling_allocates_for_the_batch_and_not_for_the_source(length: int) -> None:
    with allocations() as bytes_:
        rows = ShuffledOrder(Sized(length), batch_size=4096, seed=3).rows(1, 0, 4096)
    assert len(np.unique(rows.indices)) == 4096
    assert bytes_["peak"] < 100 * 4096


def test_a_manifest_costs_nothing_for_an_example(manifest: str) -> None:
    open_source(manifest)  # imports
    with allocations() as bytes_:
        source = open_source(manifest)
    assert len(source) == MILLION
    assert bytes_["peak"] < SLACK


def test_a_slice_costs_the_index_of_an_example_and_one_byte_to_make(manifest: str) -> None:
    with allocations() as bytes_:
        source = open_source(manifest, "train[:75%]")
    assert isinstance(source, SubsetSource) and len(source) == 750_000
    assert bytes_["held"] < 750_000 * 8 + SLACK
    # Beside the work on 2**18 examples at once.
    assert bytes_["peak"] < MILLION * (8 + 1) + 2**18 * 80


def test_an_example_of_tar_shards_costs_24_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = MILLION // 4
    index = TarIndex(
        offsets=np.arange(each) * 1024,
        sizes=np.full(each, 100),
        labels=np.arange(each, dtype=np.int32) % 10,
        label_counts=np.ones(each, np.int32),
        multi_label=False,
        damaged=False,
    )
    for number in range(4):
        (tmp_path / f"x-{number}.tar").touch()
    with monkeypatch.context() as patched:
        patched.setattr(tar_shards, "read_index", lambda path: index)
        open_source(f"tar:{tmp_path}")
    with allocations() as bytes_:
        source = open_source(f"tar:{tmp_path}")
        label = source._index.label(MILLION - 1)  # type: ignore[attr-defined]
    assert (len(source), label) == (MILLION, 9)
    assert bytes_["held"] < 24 * MILLION + SLACK


def test_a_file_of_a_folder_costs_its_name_and_13_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    for number in range(100):
        (root / f"class_{number:02d}").mkdir(parents=True)
    real = folder_index.list_folder
    files = [b"%010d.jpg" % number for number in range(MILLION // 100)]

    def listed(path: bytes) -> tuple[list[bytes], list[bytes], bool]:
        found = real(path)
        return found if found[1] else (files, [], True)

    with monkeypatch.context() as patched:
        patched.setattr(folder_index, "list_folder", listed)
        patched.setattr(folder_index, "_SETTLED_AFTER", -(10**18))
        folder_index.index_folder(root)
    with allocations() as bytes_:
        source = open_source(f"folder:{root}")
    assert (len(source), source.num_classes) == (MILLION, 100)
    assert source.path(MILLION - 1).endswith("class_99/0000009999.jpg")  # type: ignore[attr-defined]
    # Behind the name a zero byte, where it ends 8, its label 4.
    assert bytes_["held"] < (len(files[0]) + 13) * MILLION + SLACK
    assert bytes_["peak"] < 3 * bytes_["held"]
