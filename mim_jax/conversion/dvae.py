"""Reads DALL-E's tokenizer: a state dict, or the pickled module that OpenAI released."""

import importlib
import pickle
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mim_jax import layout
from mim_jax.conversion.files import read_state_dict
from mim_jax.models.dvae import GROUPS, DVAEEncoder

TRUSTED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}
"""What a pickled module may call; they build tensors and containers, and nothing else."""


def dvae_layout(encoder: DVAEEncoder) -> layout.Layout:
    """The table of the official encoder, whose keys end in `.w` and `.b`."""

    def convolution(key: str, path: str) -> Iterator[layout.Rule]:
        yield layout.Rule(f"{key}.w", f"{path}/kernel", layout.CONV2D)
        yield layout.Rule(f"{key}.b", f"{path}/bias")

    def rules() -> Iterator[layout.Rule]:
        yield from convolution("blocks.input", "input")
        for group in range(1, GROUPS + 1):
            for block in range(1, encoder.blocks_per_group + 1):
                key, path = f"blocks.group_{group}.block_{block}", f"group_{group}/block_{block}"
                if group > 1 and block == 1:
                    yield from convolution(f"{key}.id_path", f"{path}/identity")
                for i in range(1, 5):
                    yield from convolution(f"{key}.res_path.conv_{i}", f"{path}/conv_{i}")
        yield from convolution("blocks.output.conv", "output")

    return layout.Layout(tuple(rules()))


def read_dvae(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by official key.

    Args:
        path: `.safetensors` or `.pth` with a state dict, or OpenAI's `encoder.pkl`. Of the
            latter only the tensors are read: no code of the file runs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind.
    """
    path = Path(path)
    if path.suffix != ".pkl" or not path.is_file():
        return read_state_dict(path)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path} needs PyTorch: pip install 'mim-jax[torch]'.") from error
    try:
        module = torch.load(
            path, map_location="cpu", pickle_module=_tensors_only(), weights_only=False
        )
        state = dict(_parameters(module))
    except Exception as error:  # PyTorch raises many kinds for damaged or unsafe files
        raise ValueError(f"{path} is no pickled module of PyTorch: {error}") from error
    if not state:
        raise ValueError(f"{path} holds no parameters.")
    return {key: value.detach().float().numpy() for key, value in state.items()}


class _Hollow:
    """Stands for any class of a pickle: keeps its state, and runs none of its code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Hollow":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TRUSTED:
            return getattr(importlib.import_module(module), name)
        return type(name, (_Hollow,), {})


def _tensors_only() -> Any:
    """What `torch.load` takes for the module `pickle`."""
    module = types.ModuleType("tensors_only")
    module.Unpickler = _Unpickler  # type: ignore[attr-defined]
    module.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]
    return module


def _parameters(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors of a hollow `torch.nn.Module` by their dotted names."""
    for name, value in vars(module).get("_parameters", {}).items():
        if value is not None:
            yield prefix + name, value
    for name, child in vars(module).get("_modules", {}).items():
        yield from _parameters(child, f"{prefix}{name}.")
