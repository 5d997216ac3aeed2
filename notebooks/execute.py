#!/usr/bin/env python3
"""Executes the notebooks in place, for authors: their outputs are kept in the repository.

    python notebooks/execute.py                  # all
    python notebooks/execute.py quick_start      # one

Needs the extra `notebooks`. A notebook runs in a temporary folder, so that what it writes is gone
afterwards and no path of this machine is in its outputs.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SECONDS = 600
"""Longest time for one cell, on a machine that is busy with other work."""


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run from top to bottom.

    Args:
        path: of the notebook, which is left as it is.
        folder: working directory of the run.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    # Its own devices, whatever this process simulates.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # the same picture as the PNG
    # All else differs between machines, and says nothing about the notebook.
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    return notebook


def main(names: list[str]) -> None:
    """Executes the notebooks of these names, or all."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)


if __name__ == "__main__":
    main(sys.argv[1:])
