"""Parameter trees by path: a path joins the keys of nested dictionaries by "/"."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def path_string(path: tuple[Any, ...]) -> str:
    """A JAX key path as text, such as `params/encoder/norm/scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies `function(path, leaf)` to every leaf."""
    return jax.tree_util.tree_map_with_path(lambda p, leaf: function(path_string(p), leaf), tree)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of nested dictionaries by path."""
    return flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def split(tree: Mapping[str, Any], patterns: Iterable[str]) -> tuple[dict, dict]:
    """Two trees: leaves whose path matches none of the patterns, and those that match one.

    A pattern is a regular expression that must match from the start of the path.
    """
    patterns = tuple(patterns)
    flat = flatten(tree)
    matched = {k for k in flat if any(re.match(pattern, k) for pattern in patterns)}
    return (
        unflatten({k: v for k, v in flat.items() if k not in matched}),
        unflatten({k: v for k, v in flat.items() if k in matched}),
    )


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return unflatten({**flatten(first), **flatten(second)})


def differences(given: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> list[str]:
    """How the names and shapes of some arrays differ from those of a model, one line each.

    Args:
        given: arrays (or shapes) by path.
        wanted: the model's, by path.
        where: what the given ones are in, such as "the checkpoint".
    """
    lines = [f"missing: {path}" for path in sorted(set(wanted) - set(given))]
    lines += [f"unexpected: {path}" for path in sorted(set(given) - set(wanted))]
    for path in sorted(set(given) & set(wanted)):
        ours, theirs = tuple(wanted[path].shape), tuple(given[path].shape)
        if ours != theirs:
            lines.append(f"{path}: {theirs} in {where}, {ours} in the model")
    return lines


def subtree(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Leaves below a path prefix, by the rest of their path."""
    start = prefix.rstrip("/") + "/"
    return {k.removeprefix(start): v for k, v in flatten(tree).items() if k.startswith(start)}
