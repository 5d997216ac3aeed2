"""Finds and reads golden cases: numbers that a paper's own code computed at a tiny size."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def golden_folder() -> Path:
    return Path(os.environ.get("MIM_JAX_GOLDEN", ROOT.parent / "shared" / "golden"))


def case_params(method: str, kind: str = "") -> list:
    """One pytest parameter for each `case<N>[_<kind>].npz` of a method, or one that skips."""
    folder = golden_folder() / method
    suffix = f"_{kind}" if kind else ""
    paths = [p for p in sorted(folder.glob("*.npz")) if re.fullmatch(rf"\w*?\d+{suffix}", p.stem)]
    if paths:
        return [pytest.param(path, id=path.stem) for path in paths]
    reason = (
        f"no golden case {method}/case*{suffix}.npz in {golden_folder()}; "
        "set MIM_JAX_GOLDEN to the folder that holds them"
    )
    return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]


class Case:
    """One golden file: `cfg`, and arrays by group."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.cfg = json.loads(str(self.arrays.pop("cfg")))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose key starts with `prefix/`, by the rest of the key."""
        start = prefix + "/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}

    def text(self, key: str):
        """A JSON text."""
        return json.loads(str(self.arrays[key]))


def mask_major(rows, views: int) -> np.ndarray:
    """Rows of one image after the other in the official order: one view after the other."""
    rows = np.asarray(rows)
    return rows.reshape(-1, views, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def assert_close(ours, golden: np.ndarray, name: str, relative: float = 1e-4) -> None:
    """Equal to 1e-4 relative plus 1e-5 absolute, as the golden files ask."""
    np.testing.assert_allclose(
        np.asarray(ours), golden, rtol=relative, atol=1e-5, err_msg=name, strict=False
    )
    assert np.shape(ours) == golden.shape, name


def assert_gradient_close(ours, golden: np.ndarray, name: str, relative: float = 1e-4) -> None:
    """Equal relative to the tensor's own largest value."""
    assert np.shape(ours) == golden.shape, name
    scale = float(np.max(np.abs(golden)))
    error = float(np.max(np.abs(np.asarray(ours) - golden)))
    assert error <= relative * scale + 1e-7, f"{name}: off by {error:.2e} of {scale:.2e}"


def images_nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
