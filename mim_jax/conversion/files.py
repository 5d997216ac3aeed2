"""Reads and writes state dicts: `.safetensors` without PyTorch, `.pth` with it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy the bfloat16 that safetensors files may hold
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mim_jax.conversion.torchscript import is_torchscript, read_torchscript

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")

WRAPPERS = ("model", "state_dict")
"""Keys under which training code stores the state dict beside its optimizer."""

PREFIXES = ("_orig_mod.", "module.")
"""What `torch.compile` and `DistributedDataParallel` put before all keys, in this order."""

METADATA = {"format": "pt"}
"""Says that arrays are laid out as PyTorch does; transformers 4 reads no file without it."""


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by official key.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar` file. One that holds
            a whole training state is read for the first of `WRAPPERS` that it has. Prefixes of
            `PREFIXES` are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, damaged, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        try:
            return _without_prefixes(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    if path.name.endswith(TORCH_SUFFIXES):
        return _without_prefixes(_read_torch(path))
    raise ValueError(
        f"{path}: unknown kind {path.suffix!r}; known are .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)}."
    )


def write_state_dict(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by official key; a `.pth` gets them under `model`, as the MAE code does.

    Raises:
        ValueError: for an unknown file kind.
    """
    path = Path(path)
    if not path.name.endswith((".safetensors", *TORCH_SUFFIXES)):
        raise ValueError(f"{path}: unknown kind {path.suffix!r}; write .safetensors or .pth.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".safetensors":
        # safetensors writes the memory of an array, whatever the strides of a view say.
        arrays = {key: np.asarray(value, order="C") for key, value in state.items()}
        save_file(arrays, temporary, metadata=METADATA)
    else:
        torch = _torch(path)
        # Copied, because PyTorch wants memory that it may write to.
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
        torch.save({"model": tensors}, temporary)
    os.replace(temporary, path)


def _without_prefixes(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays, their keys without those prefixes that all of them have."""
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} needs PyTorch: pip install 'mim-jax[torch]', or use a .safetensors file."
        ) from error
    return torch


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import argparse

    if is_torchscript(path):  # none of whose code need run
        return {k: np.asarray(v, np.float32) for k, v in read_torchscript(path).items()}
    torch = _torch(path)
    try:
        # Own runs of the MAE code keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds for damaged or unsafe files
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it holds a {unsafe[1]}, and loading that could run code of the file's author. Write "
            "the state dict alone to a new file."
            if unsafe
            else f"it is damaged or of another kind ({type(error).__name__})."
        )
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    is_state = isinstance(content, dict) and all(
        isinstance(value, torch.Tensor) for value in content.values()
    )
    if not is_state or not content:
        raise ValueError(f"{path} holds no state dict, neither directly nor under {WRAPPERS}.")
    return {key: value.detach().float().numpy() for key, value in content.items()}
