"""How long does a folder of very many files delay a run? Measures the index of image folders.

    python -m benchmarks.folder_index --files 100000 --per-folder 1000

Makes the files in a temporary folder, as links to a few tiny images, opens the folder twice, and
deletes it. The first time lists the folders and keeps the list; the second reads it. The files were
made just before, so the folders are in memory: from a cold or a network disk the first time takes
longer, the second hardly.
"""

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import measure
from mim_jax.data.folder import open_folder
from mim_jax.data.index_cache import CACHE_VARIABLE

_LOOKUPS = 10_000
_LINKS = 1000  # to one file; file systems allow some ten thousand


def make_files(root: Path, files: int, per_folder: int) -> None:
    """Fill `root` with class folders of `per_folder` images each, `files` in all."""
    for first in range(0, files, per_folder):
        folder = root / f"class_{first // per_folder:06d}"
        folder.mkdir()
        paths = [folder / f"image_{i:09d}.png" for i in range(first, first + per_folder)]
        for i, path in enumerate(paths[: files - first]):
            if i % _LINKS:
                os.link(paths[i - i % _LINKS], path)
            else:
                Image.new("RGB", (8, 8)).save(path)


def measure_index(root: Path) -> dict[str, Any]:
    """Return seconds of the first and the second opening, and what the source costs after that."""
    figures: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = call()
        figures[f"{name}_seconds"] = round(time.perf_counter() - wall, 4)
        figures[f"{name}_processor_seconds"] = round(time.process_time() - processor, 4)
        return result

    timed("first_open", lambda: open_folder(str(root), "train"))
    source = timed("second_open", lambda: open_folder(str(root), "train"))
    pickled = timed("pickle", lambda: pickle.dumps(source))
    timed("unpickle", lambda: pickle.loads(pickled))
    chosen = np.random.default_rng(0).integers(0, len(source), _LOOKUPS).tolist()
    timed("lookups", lambda: [source.path(i) for i in chosen])
    return {"files": len(source), "pickled_bytes": len(pickled), "lookups": _LOOKUPS, **figures}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--per-folder", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "folder_index.json")
    options = parser.parse_args(arguments)
    report = measure.Report("folder_index", arguments)
    root, kept = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    os.environ[CACHE_VARIABLE] = str(kept)
    try:
        make_files(root, options.files, options.per_folder)
        time.sleep(2.5)  # lists of folders that changed a moment ago are not trusted
        figures = measure_index(root)
        figures["kept_bytes"] = sum(file.stat().st_size for file in kept.iterdir())
    finally:
        shutil.rmtree(root)
        shutil.rmtree(kept)
    report.write(options.output, {"per_folder": options.per_folder, **figures})


if __name__ == "__main__":
    main(sys.argv[1:])
