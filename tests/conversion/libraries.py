"""PyTorch, transformers and timm for parity tests; each missing one is a reason to skip."""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest


def need_transformers() -> tuple[Any, Any]:
    """PyTorch and transformers."""
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch")
    return torch, pytest.importorskip("transformers")


def need_timm() -> tuple[Any, Any]:
    """PyTorch and timm, whose own code runs unchanged even where torchvision is not installed.

    timm's package imports torchvision for data augmentation and for a batch norm, none of which a
    ViT uses, and there is no torchvision for every build of PyTorch. Where it is missing, names
    without content stand in for it while timm is imported, and are gone afterwards.
    """
    torch = pytest.importorskip("torch", reason="timm computes with PyTorch")
    pytest.importorskip("huggingface_hub", reason="timm imports it")
    with _names_of_torchvision():
        try:
            return torch, importlib.import_module("timm")
        except ModuleNotFoundError as error:
            pytest.skip(f"timm is not installed: {error}")


class _Anything(type):
    """A class whose every attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Names(types.ModuleType):
    """A module in which every name is a class without content."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


@contextlib.contextmanager
def _names_of_torchvision() -> Iterator[None]:
    try:
        importlib.import_module("torchvision")
    except Exception:
        pass  # missing, or built for another PyTorch
    else:
        yield
        return
    parts = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    names = [f"torchvision{part}" for part in parts]
    try:
        for name in names:
            sys.modules[name] = _Names(name)
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
