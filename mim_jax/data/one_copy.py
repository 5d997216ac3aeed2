"""One copy of large arrays for all worker processes: they map memory instead of unpickling it."""

import mmap
import os
import pickle
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import cloudpickle

_Result = TypeVar("_Result")

# Smaller arrays travel in the pickle itself.
_SMALLEST = 2**16
_ALIGNMENT = 64


class OneCopy(Generic[_Result]):
    """A function that can be pickled at a constant cost, however large the arrays that it holds.

    Where it is pickled for the first time, its large arrays are written to memory that has no
    name in any file system, and so is gone with this process and its workers, however they end.
    A process that unpickles the function maps that memory: all of them together hold one copy,
    and what one of them changes is changed for itself alone.

    It can be unpickled on the same machine only, while the object that was pickled exists. On
    systems other than Linux, it is pickled with its arrays.
    """

    def __init__(self, function: Callable[..., _Result]) -> None:
        """Wrap a function."""
        self._function = function
        self._pickled: tuple[bytes, str, list[tuple[int, int]]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> _Result:
        """Call the function."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the function without its large arrays."""
        if not hasattr(os, "memfd_create"):
            return OneCopy, (self._function,)
        if self._pickled is None:
            self._pickled = self._in_shared_memory()
        return _mapped, self._pickled

    def _in_shared_memory(self) -> tuple[bytes, str, list[tuple[int, int]]]:
        """Return the pickled function, and where its large arrays begin and end in which file."""
        buffers: list[memoryview] = []

        def is_small(buffer: pickle.PickleBuffer) -> bool:
            data = buffer.raw()
            if data.nbytes >= _SMALLEST:
                buffers.append(data)
            return data.nbytes < _SMALLEST

        pickled = cloudpickle.dumps(self._function, protocol=5, buffer_callback=is_small)
        if not buffers:
            return pickled, "", []
        file = os.memfd_create("mim_jax arrays")
        weakref.finalize(self, os.close, file)
        places: list[tuple[int, int]] = []
        end = 0
        for data in buffers:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + data.nbytes
            places.append((start, end))
        os.ftruncate(file, end)
        with mmap.mmap(file, end) as memory:
            for (start, stop), data in zip(places, buffers, strict=True):
                memory[start:stop] = data
        return pickled, f"/proc/{os.getpid()}/fd/{file}", places


def _mapped(pickled: bytes, path: str, places: list[tuple[int, int]]) -> OneCopy[Any]:
    buffers = []
    if places:
        with open(path, "rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        buffers = [memory[start:stop] for start, stop in places]
    return OneCopy(pickle.loads(pickled, buffers=buffers))
