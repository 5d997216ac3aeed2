"""Checkpoint layouts: one table names each array on both sides, and converts it both ways.

A layout is data. A method declares one for its paper's official PyTorch checkpoint; a teacher or
a downstream library gets one of its own. Conversion is plain NumPy and exact in both directions.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


CONV3D = Transform(lambda w: w.transpose(2, 3, 4, 1, 0), lambda k: k.transpose(4, 3, 0, 1, 2))
"""A PyTorch convolution weight `[out, in, kh, kw, kd]` as a kernel `[kh, kw, kd, in, out]`."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One array: its official key, its path in our parameters, and how to convert it.

    Attributes:
        key: key in the official state dict.
        path: path in our parameters, joined by "/".
        transform: conversion in both directions.
        index: which part of our parameter it is, as NumPy indexes it: one block of a stack made
            by `nn.scan`, or the query's part of a fused projection; `()` for the whole.
    """

    key: str
    path: str
    transform: Transform = AS_IS
    index: tuple[int | slice, ...] = ()


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
        collections: mutable collections that the file holds as well, such as `batch_stats`. Paths
            of their arrays begin with the collection: what `load` and `save` call parameters has
            them beside the parameters.
    """

    rules: tuple[Rule, ...]
    constants: tuple[Constant, ...] = ()
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()

    def joined(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """What `load` and `save` call parameters, of Linen variables."""
        return {**variables["params"], **{name: variables[name] for name in self.collections}}

    def parted(self, joined: Mapping[str, Any]) -> dict[str, Any]:
        """The Linen variables that `joined` was given; collections that are absent stay so."""
        apart = {name: joined[name] for name in self.collections if name in joined}
        params = {name: part for name, part in joined.items() if name not in self.collections}
        return {"params": params, **apart}

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
        flat: dict[str, Array] = {}
        for rule in self.rules:
            if rule.key not in state:
                continue
            if rule.path not in shapes:
                problems.append(f"{rule.key}: the model has no parameter {rule.path}")
                continue
            wanted = np.broadcast_to(np.False_, shapes[rule.path])[rule.index].shape
            given = np.asarray(state[rule.key])
            official = rule.transform.save(np.empty(wanted, np.bool_)).shape
            if given.shape != official:
                problems.append(
                    f"{rule.key}: shape {given.shape} in the file, {official} in the model"
                )
                continue
            value = rule.transform.load(given.astype(np.float32))
            if rule.index:
                whole = flat.setdefault(rule.path, np.empty(shapes[rule.path], np.float32))
                whole[rule.index] = value
            else:
                flat[rule.path] = value
        for constant in self.constants:
            if constant.key in state:
                problems += _differences(constant, np.asarray(state[constant.key]))
        if problems:
            raise ValueError(
                "the checkpoint does not fit the model:\n  " + "\n  ".join(problems) + "\n"
                "Check that the config's model has the sizes of the checkpoint."
            )
        return unflatten_dict({tuple(path.split("/")): value for path, value in flat.items()})

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
            value = rule.transform.save(flat[rule.path][rule.index])
            state[rule.key] = np.asarray(value, order="C")
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


class BlockNames(NamedTuple):
    """What a family of checkpoints calls the parts of a block.

    Attributes:
        norm1: LayerNorm before attention.
        qkv: the fused projection, or three names of its parts.
        qkv_bias: its bias or biases; under `qkv_bias="query_value"`, those of query and value.
        out: output projection of the attention.
        norm2: LayerNorm before the MLP.
        fc1: first linear layer of the MLP.
        fc2: second one.
        layer_scales: factors on both branches.
        position_bias: table of relative positions, and the key of its index table, or "".
    """

    norm1: str = "norm1"
    qkv: tuple[str, ...] = ("attn.qkv.weight",)
    qkv_bias: tuple[str, ...] = ("attn.qkv.bias",)
    out: str = "attn.proj"
    norm2: str = "norm2"
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    layer_scales: tuple[str, str] = ("ls1.gamma", "ls2.gamma")
    position_bias: tuple[str, str] = ("", "")


TIMM = BlockNames()
"""timm and the MAE code."""

CAE = BlockNames(
    qkv_bias=("attn.q_bias", "attn.v_bias"),
    layer_scales=("gamma_1", "gamma_2"),
    position_bias=("attn.relative_position_bias_table", "attn.relative_position_index"),
)
"""The codes of BEiT and CAE."""


def transformer_rules(
    key: str, path: str, blocks: Any, width: int, names: BlockNames = TIMM
) -> Iterable[Rule]:
    """Rules of a stack of blocks (`blocks.0.attn.qkv.weight`, ...).

    Args:
        key: official prefix, such as "blocks".
        path: path of our `Transformer`.
        blocks: the `Transformer` itself.
        width: token width.
        names: what the checkpoint calls the parts.
    """
    heads = (blocks.heads, blocks.head_width or width // blocks.heads)
    split = (3, *heads)
    everything = slice(None)
    table: list[tuple[str, str, Transform, tuple[int | slice, ...]]] = []

    def add(
        official: str,
        ours: str,
        transform: Transform = AS_IS,
        part: tuple[int | slice, ...] = (),
    ) -> None:
        table.append((official, ours, transform, part))

    def add_linear(official: str, ours: str, transform: Transform) -> None:
        add(f"{official}.weight", f"{ours}/kernel", transform)
        add(f"{official}.bias", f"{ours}/bias")

    if len(names.qkv) == 1:
        add(names.qkv[0], "attention/qkv/kernel", linear(outputs=split))
    else:
        for i, name in enumerate(names.qkv):
            add(name, "attention/qkv/kernel", linear(outputs=heads), (everything, i))
    per_head = reshape(heads, (-1,))
    if blocks.qkv_bias == "query_value":
        # Where three names are given, the key has none here.
        for name, ours in zip((names.qkv_bias[0], names.qkv_bias[-1]), ("query", "value")):
            add(name, f"attention/{ours}_bias", per_head)
    elif blocks.qkv_bias == "full" and len(names.qkv_bias) == 1:
        add(names.qkv_bias[0], "attention/qkv/bias", reshape(split, (-1,)))
    elif blocks.qkv_bias == "full":
        for i, name in enumerate(names.qkv_bias):
            add(name, "attention/qkv/bias", per_head, (i,))
    if blocks.position_bias is not None:
        add(names.position_bias[0], "attention/position_bias/table")
    add_linear(names.out, "attention/out", linear(inputs=heads))
    add_linear(names.fc1, "mlp/fc1", linear())
    add_linear(names.fc2, "mlp/fc2", linear())
    for official, ours in ((names.norm1, "norm1"), (names.norm2, "norm2")):
        add(f"{official}.weight", f"{ours}/scale")
        add(f"{official}.bias", f"{ours}/bias")
    if blocks.layer_scale is not None:
        for i, name in enumerate(names.layer_scales, 1):
            add(name, f"layer_scale{i}/scale")
    for i in range(blocks.depth):
        block = f"{path}/blocks" if blocks.scan else f"{path}/blocks_{i}"
        for official, ours, transform, part in table:
            index = (i, *part) if blocks.scan else part
            yield Rule(f"{key}.{i}.{official}", f"{block}/{ours}", transform, index)


def vit_rules(path: str, encoder: Any, key: str = "", names: BlockNames = TIMM) -> Iterable[Rule]:
    """Rules of a ViT in timm's names, without fixed positions.

    Args:
        path: path of our `ViT`.
        encoder: the `ViT` itself.
        key: official prefix, such as "encoder.".
        names: what the checkpoint calls the parts of a block.
    """
    if encoder.class_token:
        yield Rule(f"{key}cls_token", f"{path}/cls_token")
    if encoder.registers:
        yield Rule(f"{key}reg_token", f"{path}/registers")
    if encoder.learned_positions:
        shape = encoder.position_table().shape
        one_more_axis = reshape(shape, (1, *shape))
        yield Rule(f"{key}pos_embed", f"{path}/positions", one_more_axis)
    convolution = CONV2D if len(encoder.patch_size) == 2 else CONV3D
    yield Rule(f"{key}patch_embed.proj.weight", f"{path}/patch_embed/kernel", convolution)
    if encoder.patch_bias:
        yield Rule(f"{key}patch_embed.proj.bias", f"{path}/patch_embed/bias")
    if encoder.pre_norm:
        yield from layer_norm_rules(f"{key}norm_pre", f"{path}/pre_norm")
    blocks = encoder.transformer
    yield from transformer_rules(
        f"{key}blocks", f"{path}/transformer", blocks, encoder.width, names
    )
    if encoder.final_norm:
        yield from layer_norm_rules(f"{key}norm", f"{path}/norm")


def vit_constants(encoder: Any, key: str = "") -> tuple[Constant, ...]:
    """The fixed position table of a ViT in timm's names, if it has one."""
    if not encoder.positions.startswith("sincos"):
        return ()
    return (Constant(f"{key}pos_embed", encoder.position_table()[None]),)


def layer_norm_rules(key: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a LayerNorm."""
    return Rule(f"{key}.weight", f"{path}/scale"), Rule(f"{key}.bias", f"{path}/bias")


def linear_rules(key: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a linear layer."""
    return Rule(f"{key}.weight", f"{path}/kernel", linear()), Rule(f"{key}.bias", f"{path}/bias")
