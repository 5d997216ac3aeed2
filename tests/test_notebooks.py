"""The notebooks: what is kept of them, and that they run from top to bottom."""

import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
pytest.importorskip("nbclient", reason="needs the extra `notebooks`")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes
MACHINE_PATH = re.compile(r"/(home|root|tmp|usr|opt|var|mnt|Users)/|[A-Z]:\\\\")

NEEDS = {"weights_to_pytorch": ("torch", "transformers")}
"""Packages that a notebook imports, beyond the extra `notebooks`."""

SHORTER = {
    "bring_your_own_images": {
        '"epochs": 6.0': '"epochs": 1.0',
        '"epochs": 15.0': '"epochs": 3.0',
        '"epochs": 10.0': '"epochs": 2.0',
    },
    "quick_start": {'"epochs": 6.0': '"epochs": 1.0'},
    "reconstruction_gallery": {'"epochs": 5.0': '"epochs": 2.0'},  # with two sheets of pictures
    "weights_to_pytorch": {'"epochs": 4.0': '"epochs": 1.0'},
    "what_encoders_see": {'"epochs": 6.0': '"epochs": 2.5', '"epochs": 8.0': '"epochs": 2.5'},
}
"""Code of a notebook that the test replaces, since whole trainings would take it minutes."""

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute_module():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook):
    return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


def test_kept_outputs_are_those_of_one_run_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run notebooks/execute.py"
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))
    assert len(pictures(notebook)) >= 2
    assert path.stat().st_size < LARGEST
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not MACHINE_PATH.search(text), "an output shows a path of the author's machine"


def shortened(path, folder):
    """A copy of the notebook that trains for a shorter time."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in SHORTER.get(path.stem, {}).items():
        assert any(old in cell.source for cell in code_cells(notebook)), f"no {old} in {path.name}"
        for cell in code_cells(notebook):
            cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    absent = [name for name in NEEDS.get(path.stem, ()) if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"needs {' and '.join(absent)}, which is no part of the extra `notebooks`")
    again = execute_module().executed(shortened(path, tmp_path), tmp_path)
    assert len(pictures(again)) == len(pictures(nbformat.read(path, as_version=4)))
