"""Procedural data: examples drawn by formulas, for laptops, tests and experiments.

Each module here is one kind, known by its file name. It defines `open_split(split, option)`, which
gives the whole `train` or `test` split; `option` is what follows the name, "" for nothing.
"""

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mim_jax.data.sources import Source

SPLITS = ("train", "test")


def synthetic_names() -> list[str]:
    """Names of all kinds, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_synthetic(text: str, split: str) -> "Source":
    """Open a kind of procedural data.

    Args:
        text: its name, with an option behind a colon: `faces`, `collections:2`.
        split: `train` or `test`.

    Raises:
        ValueError: an unknown name, split or option.
    """
    name, _, option = text.partition(":")
    names = synthetic_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown synthetic data {name!r}; known are {', '.join(names)}.{hint}")
    if split not in SPLITS:
        raise ValueError(f"synthetic data have the splits 'train' and 'test', not {split!r}")
    return importlib.import_module(f"{__name__}.{name}").open_split(split, option)
