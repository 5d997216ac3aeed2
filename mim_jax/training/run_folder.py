"""The folder of a run: a local one, or a place in an object store, `gs://...` or `s3://...`.

Object stores know neither appending nor renaming, so a run there works in a temporary folder of
this machine (below TMPDIR), and the store is brought up to date once a minute, before each
checkpoint, and at the end. Checkpoints are written

- at `gs://`: by Orbax, directly and by all processes; a checkpoint counts once it is committed.
- at `s3://`, where Orbax cannot write: in the temporary folder, from where they are copied when
  they are complete, in the same layout. That takes a run of a single process.
"""

import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import jax

from mim_jax import object_store
from mim_jax.training.checkpoints import (
    COMMITTED,
    DAMAGED,
    FOLDER,
    checkpoint_steps,
    checkpoints_among,
    complete_checkpoints,
)

SECONDS_BETWEEN_UPLOADS = 60

LARGE = 64 * 2**20
"""Bytes of a file that is copied at the end only: it may be an export that is being written."""

_log = logging.getLogger(__name__)


class RunFolder:
    """Where a run is kept; a context manager.

    Attributes:
        local: the folder on this machine that the run works in.
        checkpoints: what `Checkpoints` is to be given as the run.
        name: for messages: what the user called it.
    """

    def __init__(self, where: str | Path) -> None:
        """Opens it; of a run that is in an object store already, fetches what goes on.

        Raises:
            ModuleNotFoundError: the library for the store is not installed.
            OSError: the store cannot be read: no credentials, no bucket, and the like.
            ValueError: a run of several processes at `s3://`.
        """
        self._url = object_store.object_url(where)
        self.name: Path | str = self._url or Path(where)
        self.local = Path(where)
        self.checkpoints: Path | str = self.local
        self._kept: Callable[[], Iterable[int]] | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._sent_checkpoints: dict[int, set[str]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if self._url is None:
            return
        self._direct = self._url.startswith("gs:")
        if not self._direct and jax.process_count() > 1:
            raise ValueError(
                f"a run of {jax.process_count()} processes cannot write checkpoints to {self._url}:"
                " Orbax has no support for s3://. Choose a --workdir at gs://, or on a file system "
                "that all machines share (Lustre, EFS, NFS)."
            )
        names = object_store.files(self._url)
        self._temporary = Path(tempfile.mkdtemp(prefix="mim_jax_run_"))
        self.local = self._temporary / self._url.rpartition("/")[2]
        self.local.mkdir()
        object_store.download(self._url, [name for name in names if "/" not in name], self.local)
        self._sent = {name: _stamp(path) for name, path in self._files().items()}
        self.checkpoints = self._url if self._direct else self.local
        if not self._direct:
            self._fetch_checkpoints(names)

    def _fetch_checkpoints(self, names: dict[str, int]) -> None:
        """Brings all complete checkpoints here, and removes what is left of others."""
        assert self._url
        complete = complete_checkpoints(names)
        for step, parts in complete.items():
            place = f"{self._url}/{FOLDER}/{step}"
            object_store.download(place, parts, self.local / FOLDER / str(step))
            self._sent_checkpoints[step] = parts - {COMMITTED}
        for step, parts in checkpoints_among(names).items():
            if step not in complete:
                object_store.remove(f"{self._url}/{FOLDER}/{step}", sorted(parts))

    def __enter__(self) -> "RunFolder":
        if self._url and jax.process_index() == 0:
            self._thread = threading.Thread(target=self._keep_up, name="uploads", daemon=True)
            self._thread.start()
        return self

    def public(self, path: Path) -> Path | str:
        """What the user is told of a file of the run."""
        if self._url is None:
            return path
        return f"{self._url}/{path.relative_to(self.local).as_posix()}"

    def follow(self, kept: Callable[[], Iterable[int]]) -> None:
        """Removes checkpoints from `s3://` that are no longer among those that are kept.

        That a folder is gone is not enough: something may clear away old temporary files.

        Args:
            kept: gives the steps, at any time and from any thread.
        """
        self._kept = kept

    def keep(self, *, strict: bool = False) -> None:
        """Brings logs and pictures in the store up to date.

        Args:
            strict: raise if that is not possible, instead of a warning.

        Raises:
            OSError: if strict.
        """
        if self._url is None or jax.process_index() != 0:
            return
        try:
            self._send(large=False)
        except OSError as error:
            if strict:
                raise
            _log.warning("%s; it is tried again", error)

    def _keep_up(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_UPLOADS):
            self.keep()
            try:
                self._send_checkpoints()
            except OSError as error:
                _log.warning("%s; it is tried again", error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._url is None:
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            try:
                self._send(large=True)
                self._send_checkpoints()
            except OSError as failure:
                message = f"{failure}. What is not in {self._url} yet is in {self.local}"
                if error is None:
                    raise OSError(message) from failure
                _log.warning("%s", message)
                return
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _files(self) -> dict[str, Path]:
        """Files of the run by name, without checkpoints."""
        found = {
            path.relative_to(self.local).as_posix(): path
            for path in sorted(self.local.rglob("*"))
            if path.is_file() and path.suffix != ".tmp"
        }
        return {
            name: path
            for name, path in found.items()
            if name.partition("/")[0] not in (FOLDER, DAMAGED)
        }

    def _send(self, *, large: bool) -> None:
        """Copies what changed since it was last copied, without or with large files."""
        with self._lock:
            for name, path in self._files().items():
                with contextlib.suppress(FileNotFoundError):
                    stamp = _stamp(path)
                    if self._sent.get(name) == stamp:
                        continue
                    if stamp[0] <= LARGE:
                        data = path.read_bytes()  # as one, for the file may be growing
                        _write(f"{self._url}/{name}", data)
                    elif large:
                        object_store.upload({name: path}, str(self._url))
                    else:
                        continue
                    self._sent[name] = stamp

    def _send_checkpoints(self) -> None:
        """Copies complete checkpoints, and removes those that are no longer kept."""
        if self._direct:
            return
        changed = False
        for step in checkpoint_steps(self.local):
            parts = _parts(self.local / FOLDER / str(step))
            if parts.keys() - self._sent_checkpoints.get(step, set()):
                self._send_checkpoint(step, parts)
                changed = True
        if self._kept is not None:
            kept = set(self._kept())
            if changed or self._sent_checkpoints.keys() - kept:
                self._remove_checkpoints(kept)

    def _send_checkpoint(self, step: int, parts: dict[str, Path]) -> None:
        folder, place = self.local / FOLDER / str(step), f"{self._url}/{FOLDER}/{step}"
        new = parts.keys() - self._sent_checkpoints.get(step, set())
        mark = folder / COMMITTED
        try:
            object_store.upload({name: parts[name] for name in sorted(new)}, place)
            content = mark.read_bytes() if mark.is_file() else b""
        except FileNotFoundError as error:
            if folder.is_dir():
                raise OSError(str(error)) from error
        if parts.keys() - _parts(folder).keys():
            return  # it was one too many, and is being removed
        object_store.write(f"{place}/{COMMITTED}", content)
        self._sent_checkpoints[step] = set(parts)

    def _remove_checkpoints(self, kept: set[int]) -> None:
        """Removes all checkpoints but some from the store, the marks that they are whole first."""
        url = f"{self._url}/{FOLDER}"
        there = checkpoints_among(f"{FOLDER}/{name}" for name in object_store.files(url))
        for step in there.keys() - kept:
            parts = sorted(there[step], key=lambda name: name != COMMITTED)
            object_store.remove(f"{url}/{step}", parts)
            self._sent_checkpoints.pop(step, None)


def _parts(folder: Path) -> dict[str, Path]:
    """Files of a checkpoint by name, without the mark that it is complete."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path
        for name, path in names.items()
        if name != COMMITTED and path.suffix != ".tmp" and path.is_file()
    }


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _write(url: str, data: bytes) -> None:
    """Writes an object; a missing bucket is no file that vanished."""
    try:
        object_store.write(url, data)
    except FileNotFoundError as error:
        raise OSError(str(error)) from error
