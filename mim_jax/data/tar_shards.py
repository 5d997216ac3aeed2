"""Tar shards in the WebDataset layout as a source: indexed once, then read at random.

An example is the consecutive members of a tar file whose names agree up to the first dot of the
file name: `0001.jpg` (the image), and its label in `0001.cls` (an integer) or `0001.json` (`label`
or `cls`: an integer, or a list of integers where an example may have several). Other members, such
as `0001.txt`, are passed over.

Reference: https://github.com/webdataset/webdataset
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from mim_jax import object_store
from mim_jax.data.decode import UnreadableImage, check_channels, choose_backend
from mim_jax.data.folder_index import IMAGE_SUFFIXES
from mim_jax.data.index_cache import index_file, keep_index
from mim_jax.data.records import Record, decoded
from mim_jax.data.shards import shard_paths
from mim_jax.data.stages import stage

MAX_OPEN_SHARDS = 128
"""Per process, over all sources."""

_INDEX_VERSION = 1
_THREADS_INDEXING = 8
_BLOCK = 512
_REMOTE_BLOCK = 8 * 2**20  # of a shard in an object store, which is read whole to be indexed
_NAME_LENGTH = 100  # in the header just before the image; of longer names, the beginning
_COMPRESSED_STARTS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_COMPRESSED_SUFFIXES = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")

_log = logging.getLogger(__name__)


class TarSource:
    """Images in tar files, in the order of the files and of their members.

    Attributes: as for `Source`.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        index: "TarIndex",
        ends: np.ndarray,
        channels: int,
        bits: int,
        backend: str,
    ) -> None:
        """Take the index of all shards; `ends` are the examples up to each shard's end."""
        self.name = name
        self.num_classes = index.num_classes
        self.class_names: tuple[str, ...] | None = None
        self.multi_label = index.multi_label
        self.channels = channels
        self._bits = bits
        self._backend = backend
        self._paths = tuple(paths)
        self._index = index
        self._ends = ends

    def __len__(self) -> int:
        return len(self._index.offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` `[height, width, channels]` and, if labelled, `label`.

        Raises:
            UnreadableImage: the image cannot be read or decoded; names the shard and the member.
        """
        record = self.record(index)
        with stage("decode"):
            return decoded(
                record, record["name"], self.num_classes, self.channels, self._bits, self._backend
            )

    def record(self, index: int) -> Record:
        """Return the bytes of one image, with its label, and `name`: the shard and the member."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        path = self._paths[int(np.searchsorted(self._ends, index, side="right"))]
        offset, size = int(self._index.offsets[index]), int(self._index.sizes[index])
        try:
            with stage("read"):
                data = _read_range(path, offset - _BLOCK, offset + size)
        except OSError as error:
            place = f"{path}, image at byte {offset}"
            raise UnreadableImage(f"{place}: {error.strerror or error}") from error
        member = data[:_NAME_LENGTH].partition(b"\0")[0].decode(errors="replace")
        record: Record = {"image": data[_BLOCK:], "name": f"{path}/{member}"}
        label = self._index.label(index)
        return record if label is None else {**record, "label": label}

    @property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, or uint8 `[n, num_classes]` if multi-label; None if unlabelled."""
        return self._index.all_labels()


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Where the images of one or more tar files lie, and their labels, as flat arrays.

    Attributes:
        offsets: int64 `[n]`, the first byte of each image in its file.
        sizes: int64 `[n]`, bytes of each image.
        labels: int32 `[sum of label_counts]`, the labels of all examples one after another.
        label_counts: int32 `[n]`, how many labels each example has; -1 where none is stated.
        multi_label: whether labels are lists.
        damaged: whether the tar file ends before its end mark.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    label_counts: np.ndarray
    multi_label: bool
    damaged: bool

    @functools.cached_property
    def num_classes(self) -> int | None:
        """The largest label plus one; None unless every example has a label."""
        if not len(self.labels) or (self.label_counts < 0).any():
            return None
        return int(self.labels.max()) + 1

    @functools.cached_property
    def _label_ends(self) -> np.ndarray:
        return np.cumsum(np.maximum(self.label_counts, 0), dtype=np.int64)

    def label(self, index: int) -> int | list[int] | None:
        """Return the label or labels of one example; None if the examples are unlabelled."""
        if self.num_classes is None:
            return None
        if not self.multi_label:  # one each
            return int(self.labels[index])
        end = int(self._label_ends[index])
        return self.labels[end - int(self.label_counts[index]) : end].tolist()

    def all_labels(self) -> np.ndarray | None:
        """Return int32 `[n]`, or uint8 `[n, num_classes]` if multi-label; None if unlabelled."""
        if self.num_classes is None or not self.multi_label:
            return None if self.num_classes is None else self.labels
        vectors = np.zeros((len(self.offsets), self.num_classes), np.uint8)
        vectors[np.repeat(np.arange(len(vectors)), self.label_counts), self.labels] = 1
        return vectors


def open_tar(
    pattern: str,
    split: str,
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> TarSource:
    """Return the images of tar shards.

    The first time, all headers and labels are read (not the images), and the places of the images
    are kept where the lists of files in folders are (see `mim_jax.data.folder_index`), until a
    shard changes its size or time. A shard in an object store is read once from end to end for
    that; images are then read by ranges of bytes. The largest label plus one is the number of
    classes; if an example has no label, all count as unlabelled.

    Of a tar file that ends too early, or is damaged in the middle, the whole images before that
    place are read; a warning names the file.

    Args:
        pattern: see `mim_jax.data.shards.shard_paths`.
        split: a split name without slice.
        channels: of the decoded images; None for 3.
        bits: 8 or 16, of the decoded images.
        backend: `opencv`, `pillow` or `auto`.

    Raises:
        FileNotFoundError: no such shard, some shards missing, no such split, or no image.
        ValueError: a compressed tar file, a file that is no tar file, or a label that is not an
            integer.
    """
    channels = 3 if channels is None else channels
    check_channels(channels)
    paths = shard_paths(pattern, split, _is_shard_name, "tar")
    joined, ends = _index_of_all(paths)
    if len(joined.labels) and joined.num_classes is None:
        unlabelled = int((joined.label_counts < 0).sum())
        _log.warning("tar:%s: labels left out, for %d images have none", pattern, unlabelled)
    if not len(joined.offsets):
        raise FileNotFoundError(
            f"tar:{pattern} holds no image: no member ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    return TarSource(
        name=f"tar:{pattern}" + ("" if split == "train" else f":{split}"),
        paths=paths,
        index=joined,
        ends=ends,
        channels=channels,
        bits=bits,
        backend=choose_backend(backend),
    )


def _is_shard_name(name: str) -> bool:
    # Compressed ones are taken too, to be refused with a reason.
    return name.endswith((".tar", *_COMPRESSED_SUFFIXES)) and not name.startswith(".")


def _index_of_all(paths: Sequence[str]) -> tuple[TarIndex, np.ndarray]:
    """Return the index of all shards, and the examples up to the end of each, int64 `[shards]`.

    Beside the index of each shard, that of all is kept: it is read ten times as fast.
    """
    with ThreadPoolExecutor(_THREADS_INDEXING) as pool:
        identities = list(pool.map(_identity, paths))
        cache = index_file("tars-", *identities, _INDEX_VERSION)
        known = None if cache is None else _read_cache(cache)
        if cache is not None and known is not None:
            with np.load(cache) as stored:
                return known, stored["ends"]
        indexes = list(pool.map(_cached_index, paths, identities))
    for path, index in zip(paths, indexes):
        if index.damaged:
            _log.warning("%s is cut off or damaged: only its first images are read", path)
    joined = _joined(indexes, paths)
    ends = np.cumsum([len(index.offsets) for index in indexes], dtype=np.int64)
    if cache is not None and len(paths) > 1 and not joined.damaged:  # which is said each time
        keep_index(cache, f"{paths[0]} and others", ends=ends, **dataclasses.asdict(joined))
    return joined, ends


def _joined(indexes: Sequence[TarIndex], paths: Sequence[str]) -> TarIndex:
    labelled = [index for index in indexes if len(index.labels)]
    if len({index.multi_label for index in labelled}) > 1:
        kinds = {index.multi_label: path for index, path in zip(indexes, paths)}
        raise ValueError(f"labels are lists in {kinds[True]}, but single in {kinds[False]}")
    return TarIndex(
        offsets=np.concatenate([index.offsets for index in indexes]),
        sizes=np.concatenate([index.sizes for index in indexes]),
        labels=np.concatenate([index.labels for index in indexes]),
        label_counts=np.concatenate([index.label_counts for index in indexes]),
        multi_label=any(index.multi_label for index in indexes),
        damaged=any(index.damaged for index in indexes),
    )


@functools.lru_cache(maxsize=MAX_OPEN_SHARDS)
def _opened(path: str) -> BinaryIO:
    """Return a shard, open for `os.pread`, which is safe from several threads."""
    return open(path, "rb", buffering=0)  # closed when it leaves the cache


def _read_range(path: str, start: int, end: int) -> bytes:
    if object_store.object_url(path):
        return object_store.read(path, start, end)
    file = _opened(path)  # held by this name: it must not be closed meanwhile
    return os.pread(file.fileno(), end - start, start)


def _identity(path: str) -> tuple[object, ...]:
    """Return what changes when a shard does."""
    if object_store.object_url(path):
        return path, object_store.version(path)
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


def _cached_index(path: str, identity: tuple[object, ...]) -> TarIndex:
    """Return the index of one shard, from the cache where it is known."""
    cache = index_file("tar-", *identity, _INDEX_VERSION)
    known = None if cache is None else _read_cache(cache)
    if known is not None:
        return known
    index = read_index(path)
    if cache is not None:
        keep_index(cache, path, **dataclasses.asdict(index))
    return index


def _read_cache(cache: pathlib.Path) -> TarIndex | None:
    try:
        with np.load(cache) as stored:
            return TarIndex(
                offsets=stored["offsets"],
                sizes=stored["sizes"],
                labels=stored["labels"],
                label_counts=stored["label_counts"],
                multi_label=bool(stored["multi_label"]),
                damaged=bool(stored["damaged"]),
            )
    except Exception:  # not there, or broken, which raises nearly anything
        return None


def read_index(path: str) -> TarIndex:
    """Return the index of one tar file, from its headers and labels.

    Raises:
        ValueError: it is compressed or no tar file, or a label is not an integer.
    """
    remote = object_store.object_url(path)
    with object_store.opened(path, _REMOTE_BLOCK) if remote else open(path, "rb") as file:
        _refuse_compressed(file, path)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        groups = _Groups(path, size)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    groups.add(member, file)
                end = tar.offset
        except tarfile.ReadError as error:
            if not groups.members:
                raise ValueError(f"{path} is not a tar file ({error})") from error
            end = None
        # Past the last member, tar files have blocks of zeros; where tarfile stopped before
        # anything else, it met what it could not read.
        whole = end is not None and not any(_read_at(file, _BLOCK, end))
    return groups.index(damaged=not whole)


def _read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _refuse_compressed(file: BinaryIO, path: str) -> None:
    start = file.read(6)
    file.seek(0)
    for mark, name in _COMPRESSED_STARTS.items():
        if start.startswith(mark):
            raise ValueError(
                f"{path} is compressed by {name}, so images cannot be read from its middle; unpack "
                "it to a plain .tar (images hardly shrink)"
            )


class _Groups:
    """Collects the members of a tar file into examples, one key after another."""

    def __init__(self, path: str, file_size: int) -> None:
        self.members = 0
        self._path = path
        self._file_size = file_size
        self._key = ""
        self._image: tuple[int, int] | None = None
        self._label: int | list[int] | None = None
        self._images: list[tuple[int, int]] = []
        self._labels: list[int] = []
        self._label_counts: list[int] = []
        self._kinds: set[bool] = set()  # whether a label is a list

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        self.members += 1
        folder, name = os.path.split(member.name)
        if not member.isreg() or name.startswith("."):
            return
        stem, _, suffix = name.partition(".")
        key = os.path.join(folder, stem)
        if key != self._key:
            self._close()
            self._key = key
        place = member.offset_data, member.size
        if sum(place) > self._file_size:  # cut off within this member
            return
        suffix = f".{suffix.lower()}"
        if suffix in IMAGE_SUFFIXES and self._image is None:
            self._image = place
        elif suffix in (".cls", ".json"):
            text = _read_at(file, member.size, member.offset_data)
            self._set_label(_label(text, suffix, f"{self._path}/{member.name}"))

    def _set_label(self, label: int | list[int] | None) -> None:
        if label is not None:
            self._label = label

    def _close(self) -> None:
        """End the example of the present key."""
        if self._image is not None:
            self._images.append(self._image)
            if self._label is None:
                self._label_counts.append(-1)
            else:
                labels = self._label if isinstance(self._label, list) else [self._label]
                self._labels += labels
                self._label_counts.append(len(labels))
                self._kinds.add(isinstance(self._label, list))
        self._image = self._label = None

    def index(self, damaged: bool) -> TarIndex:
        self._close()
        if len(self._kinds) > 1:
            raise ValueError(f"{self._path}: some labels are lists and others are single")
        places = np.array(self._images, np.int64).reshape(-1, 2)
        return TarIndex(
            offsets=np.ascontiguousarray(places[:, 0]),
            sizes=np.ascontiguousarray(places[:, 1]),
            labels=np.array(self._labels, np.int32),
            label_counts=np.array(self._label_counts, np.int32),
            multi_label=True in self._kinds,
            damaged=damaged,
        )


def _label(text: bytes, suffix: str, place: str) -> int | list[int] | None:
    """Return what a `.cls` or `.json` member says; None for JSON without a label."""
    try:
        if suffix == ".cls":
            value: Any = int(text)
        else:
            content = json.loads(text)
            value = content.get("label", content.get("cls"))
    except (ValueError, AttributeError) as error:
        kind = "an integer" if suffix == ".cls" else "a JSON object"
        raise ValueError(f"{place} is not {kind}: {text[:40]!r}") from error
    labels = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(x, int) and x >= 0 for x in labels):
        raise ValueError(
            f"{place}: the label {value!r} is neither an integer from 0 on nor a list of them"
        )
    return value
