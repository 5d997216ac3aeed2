"""Copies of data in object stores, for the sources that read files of this machine only."""

import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mim_jax import object_store

CACHE_VARIABLE = "MIM_JAX_DATA_CACHE"
"""Names the folder of the copies."""

_THREADS = 16
_UNFINISHED = ".unfinished_"

_log = logging.getLogger(__name__)


def local_copy(urls: Sequence[str]) -> list[str]:
    """Copy objects, or all objects below URLs, where they are not yet copied; return the paths.

    A copy lies in `~/.cache/mim_jax/data/SCHEME/BUCKET/PATH`. An object is copied again if its size
    or its time differs, which S3 tells in whole seconds. Several processes may do so together.

    Raises:
        FileNotFoundError: there is nothing at a URL.
        OSError: the disk has too little space, or the store cannot be read.
    """
    cache = _cache()
    wanted: dict[str, tuple[int, float]] = {}
    for url in urls:
        found = object_store.modified(url)
        if not found:
            raise FileNotFoundError(f"there is nothing at {url}")
        wanted |= found
    missing = {
        url: facts for url, facts in wanted.items() if not _is_copy(_path(cache, url), *facts)
    }
    total = sum(size for size, _ in missing.values())
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if total > free:
        raise OSError(
            f"{urls[0]} is copied to {cache}, but {total / 1e9:,.1f} GB are needed there and "
            f"{free / 1e9:,.1f} GB are free; set {CACHE_VARIABLE} to a folder on a larger disk, or "
            "pack the images into tar shards, which are read where they are"
        )
    if missing:
        _log.warning("copying %d files (%.3f GB) to %s", len(missing), total / 1e9, cache)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda url: _copy(url, _path(cache, url), wanted[url][1]), missing))
    for url in urls:
        _remove_others(_path(cache, url), {_path(cache, url) for url in wanted})
    return [str(_path(cache, url)) for url in urls]


def path_of_copy(url: str) -> str:
    """Return where the copy of a URL lies, or will lie."""
    return str(_path(_cache(), url))


def _cache() -> pathlib.Path:
    if folder := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home, "mim_jax", "data")


def _path(cache: pathlib.Path, url: str) -> pathlib.Path:
    return cache / url.replace("://", "/", 1)


def _is_copy(path: pathlib.Path, size: int, modified: float) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    return status.st_size == size and abs(status.st_mtime - modified) < 0.001


def _copy(url: str, path: pathlib.Path, modified: float) -> None:
    folder, name = url.rsplit("/", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=path.parent) as unfinished:
        copied = pathlib.Path(unfinished, name)
        object_store.download(folder, [name], copied.parent)
        os.utime(copied, (modified, modified))
        os.replace(copied, path)


def _remove_others(folder: pathlib.Path, kept: set[pathlib.Path]) -> None:
    """Remove from a copied folder what is no longer in the store."""
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept and not path.parent.name.startswith(_UNFINISHED):
            path.unlink(missing_ok=True)
