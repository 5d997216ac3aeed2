"""Reads the tensors of a TorchScript archive, as OpenAI released CLIP; none of its code runs."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
"""Types of numbers by PyTorch's name for their memory."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, np.ndarray]:
    """Parameters and buffers of the module in an archive, by their dotted names.

    Raises:
        ValueError: if the archive holds no module.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl"))
        root = root.removesuffix("constants.pkl")
        with archive.open(f"{root}data.pkl") as file:
            module = _Unpickler(file, archive, f"{root}data/").load()
    if not isinstance(module, _Hollow):
        raise ValueError(f"{path} is a TorchScript archive without a module.")
    return dict(_tensors(module))


class _Hollow:
    """Stands for any class of an archive: keeps its attributes, and runs none of its code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Hollow":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)


def _tensor(memory: np.ndarray, offset: int, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """Stands for PyTorch's `_rebuild_tensor_v2`; strides count numbers."""
    view = np.lib.stride_tricks.as_strided(
        memory[offset:], shape, [stride * memory.itemsize for stride in strides], writeable=False
    )
    return np.array(view)


class _Unpickler(pickle.Unpickler):
    """Builds arrays and hollow modules, and nothing else."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive = archive
        self.folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return type(name, (_Hollow,), {})

    def persistent_load(self, reference: Any) -> np.ndarray:
        _, storage, key, _, _ = reference
        kind = STORAGES.get(storage.__name__)
        if kind is None:
            raise ValueError(f"the archive holds a {storage.__name__}, which is not known.")
        return np.frombuffer(self.archive.read(f"{self.folder}{key}"), kind)


def _tensors(module: _Hollow, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in vars(module).items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Hollow):
            yield from _tensors(value, f"{prefix}{name}.")
