"""ArrayRecord shards as a source: records of encoded images, read at random by their number.

A record is a msgpack map: `image` (the bytes of an image file), optionally `label` (an integer, or
a list of integers where an example may have several) and `name` (where the image came from).
Beside the shards lies a manifest, `dataset.json`, with the classes and the shards of each split;
`mim-jax data convert` writes both. Shards without a manifest can be read too, and shards of several
folders, named by a list or a pattern, each folder with its manifest or without.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
from etils import epath

from mim_jax import object_store
from mim_jax.data.decode import UnreadableImage, check_channels, choose_backend
from mim_jax.data.local_copy import local_copy, path_of_copy
from mim_jax.data.records import Record, decoded
from mim_jax.data.shards import shard_paths
from mim_jax.data.stages import stage

MANIFEST = "dataset.json"
MANIFEST_VERSION = 1
MAX_OPEN_SHARDS = 128
"""Per process, over all sources. Opening one again takes about 0.1 ms on a local disk."""

# Random access: no read-ahead, and no threads of its own.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32768
_THREADS = 16  # that look for shards and count their records
_CLASSES = ("class_names", "num_classes", "multi_label")
_SHARD_NAME = re.compile(r".*\.array_record(-\d{5}-of-\d{5})?")


class ArrayRecordSource:
    """Records of ArrayRecord shards, in the order of the shards.

    Attributes: as for `Source`, and
        class_counts: examples of each class, where the manifest tells; else None.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        counts: Sequence[int],
        classes: dict[str, Any],
        channels: int,
        bits: int,
        backend: str,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        names = classes.get("class_names")
        self.name = name
        self.num_classes: int | None = classes.get("num_classes")
        self.class_names = tuple(names) if names else None
        self.multi_label = bool(classes.get("multi_label"))
        self.class_counts = class_counts
        self.channels = channels
        self._bits = bits
        self._backend = backend
        self._paths = tuple(paths)
        self._counts = tuple(counts)
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` `[height, width, channels]` and, if labelled, `label`.

        Raises:
            UnreadableImage: the record is damaged or its image cannot be decoded; names it.
            ValueError: the shard holds other records than described above.
        """
        record = self.record(index)
        place = self._place(*self._shard_and_position(index), record)
        with stage("decode"):
            return decoded(
                record, place, self.num_classes, self.channels, self._bits, self._backend
            )

    def record(self, index: int) -> Record:
        """Return one record as it is stored."""
        shard, position = self._shard_and_position(index)
        reader = _reader(self._paths[shard], self._counts[shard])
        try:
            with stage("read"):
                data = reader.read([position])[0]
        except RuntimeError as error:  # the shard is damaged here
            raise UnreadableImage(f"{self._place(shard, position)}: {error}") from error
        return _unpacked(data, self._place(shard, position))

    def _shard_and_position(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard]) - self._counts[shard])

    def _place(self, shard: int, position: int, record: Record | None = None) -> str:
        name = f" ({record['name']})" if record and record.get("name") else ""
        return f"{self._paths[shard]}, record {position}{name}"


def open_array_record(
    pattern: str,
    split: str,
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> ArrayRecordSource:
    """Return a split of a data set in ArrayRecord shards, without reading a record.

    Without a manifest, the number of records comes from the ends of the files, examples are
    labelled as their records are, and `num_classes` is None: evaluation needs a manifest.

    Args:
        pattern: a folder with a manifest, or shards as `mim_jax.data.shards.shard_paths` has it. At
            gs://, records are read by ranges of bytes.
        split: a split name without slice.
        channels: of the decoded images; None for 3.
        bits: 8 or 16, of the decoded images.
        backend: `opencv`, `pillow` or `auto`.

    Raises:
        FileNotFoundError: no such folder or shard, some shards missing, or no such split.
        ValueError: a file that is not an ArrayRecord file, a damaged manifest, or shards of folders
            whose classes differ.
    """
    channels = 3 if channels is None else channels
    check_channels(channels)
    folder = _place(pattern)
    class_counts = None
    if (folder / MANIFEST).is_file():
        told = read_manifest(folder / MANIFEST)
        described = _described_split(told, folder, split)
        known = {str(folder / shard["file"]): shard["examples"] for shard in described["shards"]}
        paths = tuple(str(folder / shard["file"]) for shard in described["shards"])
        class_counts = described.get("class_counts")
        _check_there(paths, folder / MANIFEST)
    else:
        _refuse_tfds_folder(folder)
        paths = shard_paths(pattern, split, is_shard_name, "ArrayRecord")
        known, told = _told_beside(paths)
    return ArrayRecordSource(
        name=f"array_record:{pattern}" + ("" if split == "train" else f":{split}"),
        paths=paths,
        counts=_counts(paths, known),
        classes=told,
        channels=channels,
        bits=bits,
        backend=choose_backend(backend),
        class_counts=class_counts,
    )


def array_record_copy(pattern: str, split: str) -> str:
    """Copy the shards of a split in an object store, and return the pattern of the copies.

    Args:
        pattern: as for `open_array_record`, at a URL.
        split: a split name without slice.

    Raises:
        FileNotFoundError: no such folder or shard, some shards missing, or no such split.
        OSError: see `mim_jax.data.local_copy.local_copy`.
    """
    folder = _place(pattern)
    if (folder / MANIFEST).exists():
        shards = _described_split(read_manifest(folder / MANIFEST), folder, split)["shards"]
        wanted = [str(folder / name) for name in (MANIFEST, *(shard["file"] for shard in shards))]
    else:
        wanted = list(shard_paths(pattern, split, is_shard_name, "ArrayRecord"))
        beside = _place(wanted[0]).parent / MANIFEST
        wanted += [str(beside)] if beside.exists() else []
    local_copy(wanted)
    return path_of_copy(str(folder))


def _place(path: str) -> pathlib.Path | epath.Path:
    """Return an absolute path by which to look and read, here or in an object store."""
    if url := object_store.object_url(path):
        object_store.file_system(url)  # which tells what is not installed
        return epath.Path(url)
    return pathlib.Path(path).expanduser().absolute()


def is_shard_name(name: str) -> bool:
    """Return whether a file of this name is taken for an ArrayRecord shard."""
    return _SHARD_NAME.fullmatch(name) is not None and not name.startswith(".")


def read_manifest(path: pathlib.Path | epath.Path) -> dict[str, Any]:
    """Return a manifest.

    Returns:
        A dictionary with
            version: of this layout.
            class_names: in the order of the labels, or None.
            num_classes: None if unlabelled.
            multi_label: whether labels are lists.
            splits: by name, each with `shards` (a list of `file` and `examples`), and what
                `mim_jax.data.shard_writer` tells of their making.

    Raises:
        ValueError: not JSON, not of this layout, or of a newer one.
    """
    try:
        manifest = json.loads(path.read_text())
        version, splits = manifest["version"], manifest["splits"]
        _ = [(shard["file"], shard["examples"]) for s in splits.values() for shard in s["shards"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no manifest of ArrayRecord shards ({type(error).__name__}: {error}); write "
            f"one with 'mim-jax data convert'. Images in this folder are read by "
            f"'folder:{path.parent}'"
        ) from error
    if version != MANIFEST_VERSION:
        raise ValueError(
            f"{path} has version {version}, but this version of mim_jax reads {MANIFEST_VERSION}"
        )
    return manifest


def _described_split(
    manifest: dict[str, Any], folder: pathlib.Path | epath.Path, split: str
) -> dict[str, Any]:
    splits = manifest["splits"]
    if split not in splits:
        raise FileNotFoundError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _check_there(paths: Sequence[str], manifest: pathlib.Path | epath.Path) -> None:
    if url := object_store.object_url(str(manifest.parent)):
        names = object_store.files(url)
        there = [path.removeprefix(f"{url}/") in names for path in paths]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            there = list(pool.map(os.path.isfile, paths))
    missing = [path for path, is_there in zip(paths, there, strict=True) if not is_there]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards that {manifest} lists are missing, the first "
            f"is {missing[0]}"
        )


def _told_beside(paths: Sequence[str]) -> tuple[dict[str, int], dict[str, Any]]:
    """Return what manifests in the folders of shards tell: examples by path, and the classes.

    Raises:
        ValueError: a damaged manifest, or folders whose classes differ.
    """
    examples: dict[str, int] = {}
    classes: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys(map(os.path.dirname, paths)):
        file = _place(folder) / MANIFEST
        told = read_manifest(file) if file.is_file() else {"splits": {}}
        classes[folder] = {key: told.get(key) or None for key in _CLASSES}
        for split in told["splits"].values():
            for shard in split["shards"]:
                examples[os.path.join(folder, shard["file"])] = shard["examples"]
    first, *others = classes
    for other in others:
        if classes[other] != classes[first]:
            raise ValueError(
                f"the shards in {first} and in {other} have different classes, as {MANIFEST} there "
                "tells, or only one has such a file; convert them together by 'mim-jax data "
                f"convert', or mix them: 'mix:1*array_record:{first}+1*array_record:{other}'"
            )
    return examples, classes[first]


def _counts(paths: Sequence[str], known: dict[str, int]) -> list[int]:
    """Return the number of records of each shard, where it is not known from the file."""

    def count(path: str) -> int:
        return known[path] if path in known else _opened(path).num_records()

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(count, paths))


def _opened(path: str) -> Any:
    # Imported here: it loads a library of 20 MB that other sources do not need.
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
    if reader.ok():
        return reader
    if not _place(path).exists():
        raise FileNotFoundError(f"the shard {path} is no longer there")
    raise ValueError(f"{path} is not a whole ArrayRecord file; make it again")


@functools.lru_cache(maxsize=MAX_OPEN_SHARDS)
def _reader(path: str, examples: int) -> Any:
    """Return the open reader of a shard; safe to use from several threads."""
    reader = _opened(path)
    if reader.num_records() != examples:
        raise ValueError(
            f"{path} holds {reader.num_records()} records, but {examples} are expected; it was "
            f"changed after {MANIFEST} was written, or after this run began"
        )
    return reader


def _unpacked(data: bytes, place: str) -> Record:
    try:
        record = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException):
        record = None
    if isinstance(record, dict) and isinstance(record.get("image"), bytes):
        return record
    raise ValueError(
        f"{place} is not a msgpack map with the bytes of an 'image'. Shards of tf.train.Example, "
        "as TensorFlow Datasets writes them, are read by 'tfds:NAME?data_dir=FOLDER'; others are "
        "written anew by 'mim-jax data convert'"
    )


def _refuse_tfds_folder(folder: pathlib.Path | epath.Path) -> None:
    if (folder / "features.json").is_file() and (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"{folder} was written by TensorFlow Datasets; its folder is "
            "DATA_DIR/NAME[/CONFIG]/VERSION, so read it by 'tfds:NAME[/CONFIG]:VERSION"
            "?data_dir=DATA_DIR'"
        )
