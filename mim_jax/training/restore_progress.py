"""A long restore says how far it is, so that slow is not taken for hung."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mim_jax import object_store

SECONDS_BETWEEN = 15

GIGABYTE = 1e9


@contextlib.contextmanager
def telling_progress(say: Callable[[str], object], step: int, folder: Path | str) -> Iterator[None]:
    """While its body restores a checkpoint: time and bytes read, every `SECONDS_BETWEEN` seconds.

    A restore that is over sooner says nothing and costs nothing.

    Args:
        say: prints a line.
        step: of the checkpoint.
        folder: of the checkpoint. Of its bytes, a process of several reads only its share.
    """
    over = threading.Event()
    start, bytes_before = time.monotonic(), bytes_read()

    def tell() -> None:
        size = None
        while not over.wait(SECONDS_BETWEEN):
            size = size_of(folder) if size is None else size
            now = bytes_read()
            text = f"restoring the checkpoint of step {step}: {time.monotonic() - start:.0f} s"
            if now is not None and bytes_before is not None:
                read = (now - bytes_before) / GIGABYTE
                text += f", {read:.3f} GB read of the {size / GIGABYTE:.3f} GB in {folder}"
            say(text)

    thread = threading.Thread(target=tell, name="restore progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def bytes_read() -> int | None:
    """What this process has read so far, from files and the network; None where that is unknown."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), None)


def size_of(folder: Path | str) -> int:
    """Bytes of all files below a folder; 0 if it cannot be listed."""
    try:
        if url := object_store.object_url(folder):
            return sum(object_store.files(url).values())
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    except OSError:
        return 0
