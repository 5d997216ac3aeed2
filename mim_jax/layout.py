"""Checkpoint layouts: one table names each array on both sides, and converts it both ways.

A layout is data. A method declares one for its paper's official PyTorch checkpoint; a teacher or
a downstream library gets one of its own. Conversion is plain NumPy and exact in both directions.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse functions on one array: official to ours, and ours to official."""

    load: Callable[[Array], Array]
    save: Callable[[Array], Array]


AS_IS = Transform(lambda x: x, lambda x: x)
"""The same array on both sides: biases, norm scales, tokens."""


def linear(inputs: Sequence[int] | None = None, outputs: Sequence[int] | None = None) -> Transform:
    """A PyTorch Linear weight `[out, in]` as a kernel `[*inputs, *outputs]`; default `[in, out]`.

    `linear(outputs=(3, 12, 64))` is a fused query-key-value projection with 12 heads; its rows
    are ordered q, k, v, inside each by head.
    """
    outputs_rank = len(outputs or (1,))

    def load(weight: Array) -> Array:
        rows, columns = weight.shape
        return weight.T.reshape(*(inputs or (columns,)), *(outputs or (rows,)))

    def save(kernel: Array) -> Array:
        rows = int(np.prod(kernel.shape[-outputs_rank:]))
        return kernel.reshape(-1, rows).T

    return Transform(load, save)


def reshape(shape: Sequence[int], official: Sequence[int]) -> Transform:
    """The same values in another shape on each side, such as a bias split into heads."""
    return Transform(lambda x: x.reshape(*shape), lambda x: x.reshape(*official))


CONV2D = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda k: k.transpose(3, 2, 0, 1))
"""A PyTorch convolution weight `[out, in, kh, kw]` as a kernel `[kh, kw, in, out]`."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One array: its official key, its path in our parameters, and how to convert it.

    Attributes:
        key: key in the official state dict.
        path: path in our parameters, joined by "/".
        transform: conversion in both directions.
        index: position along the leading axis of a parameter stacked by `nn.scan`, or None.
    """

    key: str
    path: str
    transform: Transform = AS_IS
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Constant:
    """An official key that is a fixed table here: checked when loaded, written when saved.

    Attributes:
        key: key in the official state dict.
        value: the table in its official shape.
        tolerance: largest absolute difference that passes.
    """

    key: str
    value: Array
    tolerance: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Layout:
    """A complete table of an official checkpoint.

    Attributes:
        rules: one entry for each official array.
        constants: official keys that are not parameters here.
        optional: regular expressions of keys that a file may lack as a whole (an encoder-only
            release); their parameters are then left out of the result.
        unused: regular expressions of keys that a file may hold and this model has no place for
            (the decoder, for a classifier); see `left_out`.
    """

    rules: tuple[Rule, ...]
    constants: tuple[Constant, ...] = ()
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def left_out(self, state: Mapping[str, Array]) -> list[str]:
        """Keys of an official state dict that `load` passes over, sorted."""
        known = {rule.key for rule in self.rules} | {table.key for table in self.constants}
        return sorted(
            key
            for key in set(state) - known
            if any(re.fullmatch(pattern, key) for pattern in self.unused)
        )

    def load(self, state: Mapping[str, Array], like: Mapping[str, Any]) -> dict[str, Any]:
        """Converts an official state dict to our parameters.

        Args:
            state: official arrays by key.
            like: our parameters (or their shapes); decides what is expected.

        Returns:
            Nested parameters, float32, without those of an absent optional group.

        Raises:
            ValueError: with the full list of missing, unexpected and wrongly shaped keys.
        """
        shapes = {"/".join(k): tuple(v.shape) for k, v in flatten_dict(dict(like)).items()}
        absent = [
            pattern
            for pattern in self.optional
            if not any(re.fullmatch(pattern, key) for key in state)
        ]

        def skipped(key: str) -> bool:
            return any(re.fullmatch(pattern, key) for pattern in absent)

        known = [rule.key for rule in self.rules] + [table.key for table in self.constants]
        expected = {key for key in known if not skipped(key)}
        problems = [f"missing: {key}" for key in sorted(expected - set(state))]
        unexpected = set(state) - expected - set(self.left_out(state))
        problems += [f"unexpected: {key}" for key in sorted(unexpected)]
        pieces: dict[str, dict[int | None, Array]] = {}
        for rule in self.rules:
            if rule.key not in state:
                continue
            if rule.path not in shapes:
                problems.append(f"{rule.key}: the model has no parameter {rule.path}")
                continue
            wanted = shapes[rule.path] if rule.index is None else shapes[rule.path][1:]
            given = np.asarray(state[rule.key])
            official = rule.transform.save(np.empty(wanted, np.bool_)).shape
            if given.shape != official:
                problems.append(
                    f"{rule.key}: shape {given.shape} in the file, {official} in the model"
                )
                continue
            value = rule.transform.load(given.astype(np.float32))
            pieces.setdefault(rule.path, {})[rule.index] = value
        for constant in self.constants:
            if constant.key in state:
                problems += _differences(constant, np.asarray(state[constant.key]))
        if problems:
            raise ValueError(
                "the checkpoint does not fit the model:\n  " + "\n  ".join(problems) + "\n"
                "Check that the config's model has the sizes of the checkpoint."
            )
        return _assemble(pieces)

    def save(self, params: Mapping[str, Any]) -> dict[str, Array]:
        """Converts our parameters to an official state dict; the exact inverse of `load`.

        Raises:
            ValueError: if a parameter has no rule, or a rule finds no parameter.
        """
        flat = {"/".join(k): np.asarray(v) for k, v in flatten_dict(dict(params)).items()}
        paths = {rule.path for rule in self.rules}
        problems = [f"no rule for parameter {path}" for path in sorted(set(flat) - paths)]
        problems += [f"no parameter {path}" for path in sorted(paths - set(flat))]
        if problems:
            raise ValueError("the layout does not fit the parameters:\n  " + "\n  ".join(problems))
        state = {constant.key: constant.value for constant in self.constants}
        for rule in self.rules:
            value = flat[rule.path] if rule.index is None else flat[rule.path][rule.index]
            state[rule.key] = np.asarray(rule.transform.save(value), order="C")
        return state


def _differences(constant: Constant, given: Array) -> list[str]:
    """What is wrong with a fixed table found in a file; empty if nothing."""
    if given.shape != constant.value.shape:
        return [
            f"{constant.key}: shape {given.shape} in the file, {constant.value.shape} in the model"
        ]
    error = float(np.max(np.abs(given - constant.value)))
    if not error <= constant.tolerance:
        return [f"{constant.key}: differs from this model's fixed table by up to {error:.3g}"]
    return []


def _assemble(pieces: Mapping[str, Mapping[int | None, Array]]) -> dict[str, Any]:
    """Nested parameters from arrays by path, stacking those that come by index."""
    flat = {}
    for path, by_index in pieces.items():
        whole = by_index.get(None)
        if whole is None:
            whole = np.stack([by_index[i] for i in range(len(by_index))])
        flat[tuple(path.split("/"))] = whole
    return unflatten_dict(flat)


def transformer_rules(
    key: str, path: str, *, depth: int, width: int, heads: int, scan: bool = False
) -> Iterable[Rule]:
    """Rules of a stack of timm blocks (`blocks.0.attn.qkv.weight`, ...).

    Args:
        key: official prefix, such as "blocks".
        path: path of our `Transformer`.
        depth: number of blocks.
        width: token width.
        heads: attention heads.
        scan: whether our parameters are stacked.
    """
    head_width = width // heads
    split = (3, heads, head_width)
    table = (
        ("attn.qkv.weight", "attention/qkv/kernel", linear(outputs=split)),
        ("attn.qkv.bias", "attention/qkv/bias", reshape(split, (-1,))),
        ("attn.proj.weight", "attention/out/kernel", linear(inputs=(heads, head_width))),
        ("attn.proj.bias", "attention/out/bias", AS_IS),
        ("mlp.fc1.weight", "mlp/fc1/kernel", linear()),
        ("mlp.fc1.bias", "mlp/fc1/bias", AS_IS),
        ("mlp.fc2.weight", "mlp/fc2/kernel", linear()),
        ("mlp.fc2.bias", "mlp/fc2/bias", AS_IS),
        ("norm1.weight", "norm1/scale", AS_IS),
        ("norm1.bias", "norm1/bias", AS_IS),
        ("norm2.weight", "norm2/scale", AS_IS),
        ("norm2.bias", "norm2/bias", AS_IS),
    )
    for i in range(depth):
        block = f"{path}/blocks" if scan else f"{path}/blocks_{i}"
        for official, ours, transform in table:
            yield Rule(f"{key}.{i}.{official}", f"{block}/{ours}", transform, i if scan else None)


def vit_rules(
    path: str, *, depth: int, width: int, heads: int, scan: bool = False
) -> Iterable[Rule]:
    """Rules of a timm ViT without positions and norm: class token, patch embedding, blocks.

    Args:
        path: path of our `ViT`.
        depth: number of blocks.
        width: token width.
        heads: attention heads.
        scan: whether our blocks are stacked.
    """
    yield Rule("cls_token", f"{path}/cls_token")
    yield Rule("patch_embed.proj.weight", f"{path}/patch_embed/kernel", CONV2D)
    yield Rule("patch_embed.proj.bias", f"{path}/patch_embed/bias")
    yield from transformer_rules(
        "blocks", f"{path}/transformer", depth=depth, width=width, heads=heads, scan=scan
    )


def layer_norm_rules(key: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a LayerNorm."""
    return Rule(f"{key}.weight", f"{path}/scale"), Rule(f"{key}.bias", f"{path}/bias")


def linear_rules(key: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a linear layer."""
    return Rule(f"{key}.weight", f"{path}/kernel", linear()), Rule(f"{key}.bias", f"{path}/bias")
