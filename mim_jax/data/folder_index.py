"""The image files below a folder: listed once, remembered between runs, small in memory.

A network disk takes minutes to list a million files. The list is therefore kept, one file for each
folder, in `$XDG_CACHE_HOME/mim_jax/index` or `~/.cache/mim_jax/index`, or in the folder that the
environment variable `MIM_JAX_INDEX_CACHE` names (nothing is kept if that is set to an empty text).
From then on only those sub-folders are listed again whose times have changed. To delete the kept
lists is safe at any time.
"""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from mim_jax.data.index_cache import index_file, keep_index

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm",
    ".pgm", ".jp2", ".npy",
)  # fmt: skip

MAPS_FOLDER = "segmentation"
"""A sub-folder of this name holds segmentation maps, no images: see `mim_jax.data.folder_maps`."""

_SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
_FORMAT = b"1"
_KEPT = ("folders", "names", "first", "times")
# To list fewer files and folders takes no longer than to read the list.
_FEWEST_KEPT = 2000
# Clocks of file systems are coarse: a folder that changed a moment ago may change again without a
# new time, so its list is not trusted the next time.
_SETTLED_AFTER = 2_000_000_000  # nanoseconds
_NEVER = (-1, -1)

_log = logging.getLogger(__name__)


class PackedNames:
    """Many names as one buffer: small in memory, and shared by all worker processes.

    Attributes:
        terminated: uint8, all names, each with a zero byte behind it.
    """

    def __init__(self, terminated: bytes | memoryview | np.ndarray) -> None:
        """Take all names, each with a zero byte behind it, which no file name can hold."""
        self.terminated = np.frombuffer(terminated, np.uint8)
        self._ends = np.flatnonzero(self.terminated == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self.terminated[self._start(index) : self._ends[index]].tobytes()

    def part(self, first: int, stop: int) -> memoryview:
        """Return the names from `first` to before `stop`, each with its zero byte, uncopied."""
        return self.terminated[self._start(first) : self._start(stop)].data

    def _start(self, index: int) -> int:
        return int(self._ends[index - 1]) + 1 if index else 0


class FolderIndex:
    """The image files below a folder, in order: those in it, then each sub-folder by its name.

    Attributes:
        folders: the folder itself, as an empty name, and all below it, relative to it.
        names: of the files of all folders one after another, without the folder.
        first: int64 `[folders + 1]`, where the files of each folder begin among `names`.
    """

    def __init__(self, folders: PackedNames, names: PackedNames, first: np.ndarray) -> None:
        self.folders = folders
        self.names = names
        self.first = first

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Return the path of a file, relative to the folder."""
        folder = int(np.searchsorted(self.first, index, side="right")) - 1
        return os.fsdecode(os.path.join(self.folders[folder], self.names[index]))

    def paths(self) -> Iterator[str]:
        """Yield the paths of all files, relative to the folder."""
        for number, (first, stop) in enumerate(zip(self.first[:-1], self.first[1:])):
            folder = self.folders[number]
            for index in range(first, stop):
                yield os.fsdecode(os.path.join(folder, self.names[index]))


def index_folder(root: pathlib.Path) -> FolderIndex:
    """Return the index of all image files below a folder.

    Files are known by their suffix and not opened. Links to folders are followed, but never in a
    circle; names that begin with a dot are passed over, and so is the sub-folder `MAPS_FOLDER`. A
    sub-folder that may not be listed is left out with a warning.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    cache = index_file("", os.path.realpath(root))
    known = {} if cache is None else _read_listings(cache, root)
    listings = _listings(os.fsencode(root), known)
    names = PackedNames(b"".join(listing.files for listing in listings.values()))
    counts = [len(PackedNames(listing.files)) for listing in listings.values()]
    first = np.cumsum([0, *counts], dtype=np.int64)
    folders = PackedNames(b"".join(folder + b"\0" for folder in listings))
    index = FolderIndex(folders, names, first)
    is_new = len(known) != len(listings) or any(known.get(f) is not x for f, x in listings.items())
    if cache is not None and is_new and len(names) + len(folders) >= _FEWEST_KEPT:
        times = np.array([listing.times for listing in listings.values()], np.int64)
        keep_index(
            cache,
            root,
            header=np.frombuffer(_header(root), np.uint8),
            folders=folders.terminated,
            names=names.terminated,
            first=first,
            times=times,
        )
    return index


@dataclasses.dataclass(slots=True)
class _Listing:
    """What lies in one folder.

    Attributes:
        times: of its last change, mtime and ctime in nanoseconds.
        files: the names of its image files in order, each with a zero byte behind it.
        folders: the names of its sub-folders in order.
    """

    times: tuple[int, int]
    files: bytes | memoryview
    folders: list[bytes]


def _listings(root: bytes, known: dict[bytes, _Listing]) -> dict[bytes, _Listing]:
    """Return a listing for every folder below `root`, by its relative path, in order."""
    listings: dict[bytes, _Listing] = {}
    # With each folder goes the chain of folders it was reached through: meeting one of them
    # again means that a link points upwards.
    pending: list[tuple[bytes, tuple[tuple[int, int], ...]]] = [(b"", ())]
    while pending:
        folder, chain = pending.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if identity in chain:
                continue
            listing = known.get(folder)
            times = (status.st_mtime_ns, status.st_ctime_ns)
            if listing is None or listing.times != times:
                listing = _listed(path, times)
        except OSError as error:
            if not folder:
                raise
            _log.warning("folder left out: %s: %s", printable(os.fsdecode(path)), error.strerror)
            continue
        listings[folder] = listing
        below = (*chain, identity)
        names = listing.folders if folder else image_folders(listing.folders)
        pending += [(os.path.join(folder, name), below) for name in reversed(names)]
    return listings


def _listed(path: bytes, times: tuple[int, int]) -> _Listing:
    settled = max(times) < time.time_ns() - _SETTLED_AFTER
    files, folders, complete = list_folder(path)
    packed = b"".join(name + b"\0" for name in files)
    return _Listing(times if settled and complete else _NEVER, packed, folders)


def list_folder(path: bytes) -> tuple[list[bytes], list[bytes], bool]:
    """Return the names of the image files and of the sub-folders that lie in a folder, in order.

    The third is False if another list could be right later although the folder has not changed:
    because of a link to nowhere, which may lead to a folder tomorrow.
    """
    files, folders, complete = [], [], True
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if _is_folder(entry):
                folders.append(name)
            elif name.lower().endswith(_SUFFIXES):
                # Not a pipe or a socket, which nobody would ever finish reading.
                if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                    files.append(name)
            elif entry.is_symlink():
                complete = False
    return sorted(files), sorted(folders), complete


def image_folders(names: list[bytes]) -> list[bytes]:
    """Return those of the names of sub-folders that may hold images of the data set."""
    return [name for name in names if name != os.fsencode(MAPS_FOLDER)]


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _read_listings(cache: pathlib.Path, root: pathlib.Path) -> dict[bytes, _Listing]:
    """Return the listings that are kept in a file, none if it is not there or broken."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            if arrays["header"].tobytes() != _header(root):
                return {}
            return _unpacked_listings(**{key: arrays[key] for key in _KEPT})
    except OSError:  # not there, or not to be read; what cannot be written is said later
        return {}
    except Exception as error:  # a broken file raises nearly anything
        _log.warning("the kept list of files %s is broken and made anew: %s", cache, error)
        return {}


def _unpacked_listings(
    folders: np.ndarray, names: np.ndarray, first: np.ndarray, times: np.ndarray
) -> dict[bytes, _Listing]:
    listings: dict[bytes, _Listing] = {}
    all_names = PackedNames(names)
    rows = zip(first[:-1].tolist(), first[1:].tolist(), times.tolist(), strict=True)
    for folder, (start, stop, (mtime, ctime)) in zip(
        folders.tobytes().split(b"\0")[:-1], rows, strict=True
    ):
        listings[folder] = _Listing((mtime, ctime), all_names.part(start, stop), [])
        if folder:
            parent, name = os.path.split(folder)
            listings[parent].folders.append(name)
    return listings


def _header(root: pathlib.Path) -> bytes:
    return b"\0".join([_FORMAT, os.fsencode(os.path.realpath(root)), *_SUFFIXES])


def printable(path: str) -> str:
    """Return a path that can be written anywhere, whatever bytes its name is made of."""
    return path.encode("utf-8", "backslashreplace").decode()


def first_few(names: Sequence[str]) -> str:
    """Return the first three names, for messages."""
    return ", ".join(repr(name) for name in names[:3])
