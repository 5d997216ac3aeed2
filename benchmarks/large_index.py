"""What do ten million examples cost before the first image is read? Measures sources and orders.

    python -m benchmarks.large_index

Makes synthetic indices in a temporary folder: shards and folders that are empty, with manifests and
kept indices that promise `--records` examples in `--shards` shards or folders. Nothing is read of
an example, so this is all that a start has to wait for and to hold. Each case runs in a process of
its own, which has imported all modules before: seconds to open the source, to order it and to get
the indices of a first batch; the memory that it holds after that, over what it held before; and the
peak in between. Then two more processes get the source as worker processes of the pipeline do, and
after that as a plain pickle, walk over all of its index, and tell what memory each has alone.

Of shards without a manifest, and of folders that are listed, the files are real and fewer; the
figures have their number. All files were made just before, so they are in the page cache.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks import measure
from mim_jax.data import folder_index, tar_shards
from mim_jax.data.domains import DomainOrder, domains_of
from mim_jax.data.index_cache import CACHE_VARIABLE
from mim_jax.data.one_copy import OneCopy
from mim_jax.data.order import ShuffledOrder
from mim_jax.data.sources import Source, open_source
from mim_jax.data.tar_shards import TarIndex

BATCH = 4096
_COUNTED = (1000, 10)  # shards without a manifest, and records in each
_LISTED = 100_000  # real files in folders of 1,000
_TABLE = 500_000  # rows
_WORTH_SHARING = 100_000  # examples; for fewer, no worker processes are started
_IMAGE_BYTES = 100_000
_TAR = 10  # tar files are so many times as large
_STATUS = Path("/proc/self/status")


def make_array_record(root: Path, shards: int, each: int) -> str:
    """Write a manifest of empty shards."""
    names = [f"train-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
    for name in names:
        (root / name).touch()
    split = {"shards": [{"file": name, "examples": each} for name in names]}
    manifest = {"version": 1, "class_names": None, "num_classes": None, "multi_label": False}
    (root / "dataset.json").write_text(json.dumps({**manifest, "splits": {"train": split}}))
    return f"array_record:{root}"


def make_counted(root: Path, shards: int, each: int) -> str:
    """Write whole shards of tiny records, without a manifest."""
    first = root / "x-0.array_record"
    writer = ArrayRecordWriter(str(first), "group_size:1")
    for _ in range(each):
        writer.write(b"record")
    writer.close()
    for i in range(1, shards):
        shutil.copyfile(first, root / f"x-{i}.array_record")
    return f"array_record:{root}"


def make_list(root: Path, shards: int, each: int) -> str:
    """Write a text file that lists such shards."""
    make_counted(root, shards, each)
    (root / "train.txt").write_text("".join(f"x-{i}.array_record\n" for i in range(shards)))
    return f"array_record:{root / 'train.txt'}"


def make_tar(root: Path, shards: int, each: int) -> str:
    """Make empty tar files, whose kept indices tell of images with the labels 0 and 1."""
    index = TarIndex(
        offsets=np.arange(each) * (_IMAGE_BYTES + 1536) + 512,
        sizes=np.full(each, _IMAGE_BYTES),
        labels=np.arange(each, dtype=np.int32) % 2,
        label_counts=np.ones(each, np.int32),
        multi_label=False,
        damaged=False,
    )
    for i in range(shards):
        (root / f"x-{i:05d}.tar").touch()
    with mock.patch.object(tar_shards, "read_index", lambda path: index):
        open_source(f"tar:{root}")
    return f"tar:{root}"


def make_folder(root: Path, folders: int, each: int) -> str:
    """Make empty class folders, whose kept list tells of images."""
    for i in range(folders):
        (root / f"class_{i:05d}").mkdir()
    real = folder_index.list_folder
    files = [b"image_%09d.jpg" % i for i in range(each)]

    def listed(path: bytes) -> tuple[list[bytes], list[bytes], bool]:
        return real(path) if os.path.basename(path) == b"" else (files, [], True)

    # Folders that changed a moment ago are trusted here.
    with (
        mock.patch.object(folder_index, "list_folder", listed),
        mock.patch.object(folder_index, "_SETTLED_AFTER", -(10**18)),
    ):
        folder_index.index_folder(root)
    return f"folder:{root}"


def make_listed(root: Path, files: int, each: int) -> str:
    """Make empty image files."""
    for i in range(files):
        if i % each == 0:
            (root / f"class_{i // each:05d}").mkdir()
        (root / f"class_{i // each:05d}" / f"image_{i:09d}.jpg").touch()
    return f"folder:{root}"


def make_table(root: Path, rows: int, each: int) -> str:
    """Write a table whose images are not there."""
    del each
    with (root / "table.csv").open("w") as file:
        file.write("image,label,age\n")
        file.writelines(f"images/{i:09d}.jpg,{i % 10},{i % 97}\n" for i in range(rows))
    open_source(f"table:{root / 'table.csv'}")  # keeps the schema
    return f"table:{root / 'table.csv'}"


def measured(name: str, split: str, domains: bool) -> dict[str, Any]:
    """What a source costs this process and a worker of it."""
    order: Any = None
    open_source("synthetic:faces")  # what is imported late, is imported now
    figures: dict[str, Any] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = call()
        figures[f"{what}_seconds"] = round(time.perf_counter() - wall, 4)
        figures[f"{what}_processor_seconds"] = round(time.process_time() - processor, 4)
        return result

    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    source: Source = timed("open", lambda: open_source(name, split))
    if domains:
        source = timed("domains", lambda: domains_of(source, name))
        order = DomainOrder(source, BATCH, seed=0, domains_per_batch=1)
    else:
        order = ShuffledOrder(source, BATCH, seed=0)
    timed("first_batch", lambda: order.rows(0, 0, BATCH))
    timed("later_batch", lambda: order.rows(12_345, 0, BATCH))
    gc.collect()
    examples = len(source)
    figures["examples"] = examples
    figures["memory_mb"] = round((_memory("VmRSS") - before) / 1e6, 1)
    figures["peak_mb"] = round((_memory("VmHWM") - before) / 1e6, 1)
    figures["bytes_per_example"] = round((_memory("VmRSS") - before) / examples, 1)
    if examples < _WORTH_SHARING:
        return figures
    for way, given in (("shared", OneCopy(walk_over(source))), ("copied", walk_over(source))):
        pickled = timed(f"worker_{way}_pickle", functools.partial(cloudpickle.dumps, given))
        figures[f"worker_{way}_pickled_bytes"] = len(pickled)
        figures[f"worker_{way}_mb"] = round(_memory_of_worker(pickled) / 1e6, 1)
    return figures


def walk_over(source: Any) -> Callable[[], Any]:
    """A function that holds a source, as the function that makes batches does."""

    def walked() -> Any:
        arrays = [given for given in _arrays(source, set()) if given.size]
        return sum(int(array.reshape(-1)[:: 4096 // array.itemsize].sum()) for array in arrays)

    return walked


def _arrays(value: Any, seen: set[int]) -> list[np.ndarray]:
    """All arrays that a source holds."""
    if isinstance(value, np.ndarray):
        return [value]
    if id(value) in seen or isinstance(value, str | int | type):
        return []
    seen.add(id(value))
    if isinstance(value, list | tuple):
        parts = list(value) if len(value) < 100 else []
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [array for part in parts for array in _arrays(part, seen)]


def _memory_of_worker(pickled: bytes) -> int:
    """Bytes that each of two new processes has for itself after it has walked over its source."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_work, args=(theirs,)))
        processes[-1].start()
        ours.send_bytes(pickled)
        pipes.append(ours)
    for ask in ("walked", "told"):  # the second only after both have walked
        answers = []
        for pipe in pipes:
            answers.append(pipe.recv())
            assert answers[-1][0] == ask
        for pipe in pipes:
            pipe.send(ask)
    for process in processes:
        process.join()
    return max(grown for _, grown in answers)


def _work(pipe: Any) -> None:
    cloudpickle.dumps(OneCopy(len))
    before = _private()
    pickled = pipe.recv_bytes()  # Grain keeps it, too, as long as the process runs
    given = cloudpickle.loads(pickled)
    given()
    pipe.send(("walked", 0))
    pipe.recv()
    pipe.send(("told", _private() - before))
    pipe.recv()
    del pickled


def _private() -> int:
    fields = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kinds = ("Private_Clean:", "Private_Dirty:")
    return sum(int(line.split()[1]) * 1024 for line in fields if line.startswith(kinds))


def _memory(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "large_index.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(measured(**json.loads(options.case))))
        return
    report = measure.Report("large_index", arguments)
    base = Path(tempfile.mkdtemp())
    os.environ[CACHE_VARIABLE] = str(base / "kept")
    each = options.records // options.shards
    made = {
        "array_record": (make_array_record, options.shards, each),
        "counted": (make_counted, *_COUNTED),
        "list": (make_list, *_COUNTED),
        "tar": (make_tar, options.shards // _TAR, each * _TAR),
        "folder": (make_folder, options.shards, each),
        "listed": (make_listed, _LISTED, 1000),
        "table": (make_table, _TABLE, 0),
    }
    try:
        names = {}
        for key, (make, count, per) in made.items():
            (base / key).mkdir()
            names[key] = make(base / key, count, per)
        cases = {
            "ArrayRecord, manifest": ("array_record", "train", False),
            "ArrayRecord, counted": ("counted", "train", False),
            "ArrayRecord, list of shards": ("list", "train", False),
            "ArrayRecord, slice": ("array_record", "train[:99%]", False),
            "tar, index kept": ("tar", "train", False),
            "tar, domains": ("tar", "train", True),
            "folder, list kept": ("folder", "train", False),
            "folder, listed": ("listed", "train", False),
            "table": ("table", "train", False),
            "mixture of tar and folder": ("mix", "train", False),
        }
        names["mix"] = f"mix:0.5*{names['tar']}+0.5*{names['folder']}"
        figures = {}
        for title, (key, split, domains) in cases.items():
            case = json.dumps({"name": names[key], "split": split, "domains": domains})
            command = [sys.executable, "-m", "benchmarks.large_index", "--case", case]
            environment = {**os.environ, CACHE_VARIABLE: ""} if key == "listed" else None
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            figures[title] = json.loads(run.stdout)
    finally:
        shutil.rmtree(base)
    report.write(options.output, {"batch": BATCH, "cases": figures})
    print(table(figures))


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The cases as a table of text."""
    columns = {
        "examples": "examples",
        "open s": "open_seconds",
        "of a core": "open_processor_seconds",
        "batch ms": "first_batch_seconds",
        "MB": "memory_mb",
        "peak MB": "peak_mb",
        "B/example": "bytes_per_example",
        "worker MB": "worker_shared_mb",
        "copied MB": "worker_copied_mb",
    }
    lines = [f"{'':30}" + "".join(f"{title:>12}" for title in columns)]
    for name, row in figures.items():
        values = {**row, "first_batch_seconds": round(1000 * row["first_batch_seconds"], 1)}
        cells = (f"{values.get(key, ''):>12}" for key in columns.values())
        lines.append(f"{name:30}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
