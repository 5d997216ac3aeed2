"""Places in object stores, `gs://BUCKET/PATH` and `s3://BUCKET/PATH`, by gcsfs and s3fs (fsspec).

Credentials, regions and endpoints are those that these libraries find by themselves.
"""

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Of each scheme: the library, and the extra of this package that installs it."""

CREDENTIALS = {
    "gs": "run 'gcloud auth application-default login', set GOOGLE_APPLICATION_CREDENTIALS to the "
    "file of a service account, or give the machine's service account access",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a "
    "role with access",
}

_URL = re.compile(rf"({'|'.join(LIBRARIES)}):/+(.+)")
_NO_CREDENTIALS = re.compile(
    r"credential|anonymous caller|unauthorized|\b401\b|access token|expired", re.IGNORECASE
)
_NO_ACCESS = re.compile(r"forbidden|access ?denied|\b403\b", re.IGNORECASE)
_LONGEST_REASON = 300


def object_url(path: str | Path) -> str | None:
    """The URL of a place in an object store; None for any other path.

    A URL that went through `pathlib.Path`, which makes one slash of two, is taken as well.
    """
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def file_system(url: str) -> Any:
    """The fsspec file system of a URL; one object per process.

    Raises:
        ModuleNotFoundError: its library is not installed.
    """
    scheme = url.partition(":")[0]
    library, extra = LIBRARIES[scheme]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ModuleNotFoundError(
            f'{url} is read by {library}, which is not installed: pip install "mim-jax[{extra}]"'
        ) from error
    import fsspec

    # Listings must be what is there, for other processes write too.
    return fsspec.filesystem(scheme, use_listings_cache=False)


def files(url: str) -> dict[str, int]:
    """Bytes of all objects below a URL, by their names relative to it; empty if there are none."""
    with _explained(url) as store:
        prefix = f"{url.partition('://')[2]}/"
        found = store.find(url, detail=True)
        return {
            name.removeprefix(prefix): int(facts["size"])
            for name, facts in sorted(found.items())
            if name.startswith(prefix)
        }


def names_in(folder: str) -> list[str]:
    """Names of the objects directly in a folder; empty if there are none."""
    with _explained(folder) as store:
        try:
            found = store.ls(folder, detail=True)
        except FileNotFoundError:
            if "/" not in folder.partition("://")[2]:
                raise  # a bucket
            return []
        names = [facts["name"] for facts in found if facts["type"] == "file"]
        return sorted(name.rpartition("/")[2] for name in names)


def version(url: str) -> str:
    """What changes with an object's content."""
    with _explained(url) as store:
        facts = store.info(url)
    return str(facts.get("ETag") or facts.get("generation"))


def modified(url: str) -> dict[str, tuple[int, float]]:
    """Of an object, or of all objects below a URL, by URL: bytes, and time of change since 1970."""
    with _explained(url) as store:
        found = store.find(url, detail=True)
        scheme = url.partition(":")[0]
        return {
            f"{scheme}://{name}": (
                int(facts["size"]),
                (facts.get("LastModified") or facts.get("mtime")).timestamp(),
            )
            for name, facts in sorted(found.items())
        }


def opened(url: str, block_size: int) -> BinaryIO:
    """An object as a file that is read from its beginning to its end in blocks of some bytes."""
    with _explained(url) as store:
        return store.open(url, "rb", block_size=block_size, cache_type="readahead")


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or those of a range."""
    with _explained(url) as store:
        return store.cat_file(url, start=start, end=end)


def write(url: str, data: bytes) -> None:
    """Writes an object at once."""
    with _explained(url) as store:
        store.pipe_file(url, data)


def upload(paths: Mapping[str, Path], url: str) -> None:
    """Writes files to their names below a URL."""
    with _explained(url) as store:
        for name, path in paths.items():
            store.put_file(str(path), f"{url}/{name}")


def download(url: str, names: Iterable[str], folder: Path) -> None:
    """Writes objects to their names below a folder."""
    targets = {f"{url}/{name}": folder / name for name in names}
    for path in targets.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with _explained(url) as store:
        if targets:
            store.get(list(targets), [str(path) for path in targets.values()])


def remove(url: str, names: Iterable[str]) -> None:
    """Removes objects by their names below a URL, one after another."""
    with _explained(url) as store:
        for name in names:
            store.rm_file(f"{url}/{name}")


@contextlib.contextmanager
def _explained(url: str) -> Iterator[Any]:
    """Gives the file system; of its errors, says what can be done."""
    store = file_system(url)
    try:
        yield store
    except FileNotFoundError as error:
        bucket = url.partition("://")[2].partition("/")[0]
        if _is_missing(store, bucket):
            scheme = url.partition(":")[0]
            raise FileNotFoundError(
                f"there is no bucket {scheme}://{bucket} (or these credentials do not see it); "
                "make it first, or check the name"
            ) from error
        raise FileNotFoundError(f"{url} is not there: {_reason(error)}") from error
    except Exception as error:  # of many kinds, of libraries that may not be installed
        scheme, text = url.partition(":")[0], f"{type(error).__name__}: {error}"
        if isinstance(error, PermissionError) or _NO_ACCESS.search(text):
            raise PermissionError(
                f"no access to {url} ({_reason(error)}): {CREDENTIALS[scheme]}"
            ) from error
        if _NO_CREDENTIALS.search(text):
            raise PermissionError(
                f"no valid credentials for {url} ({_reason(error)}): {CREDENTIALS[scheme]}"
            ) from error
        raise OSError(f"{url}: {_reason(error)}") from error


def _is_missing(store: Any, bucket: str) -> bool:
    try:
        store.ls(bucket)
    except FileNotFoundError:
        return True
    except Exception:  # the first error tells more
        return False
    return False


def _reason(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) < _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
