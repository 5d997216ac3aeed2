"""How a run is spread over devices: a mesh, and a PartitionSpec for every array by its path.

Axes of the mesh: `data` (copies of the parameters), `fsdp` (parameters and optimizer state cut
into pieces, gathered when used) and `tensor` (heads and hidden units cut). The batch is split over
`data` and `fsdp`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mim_jax.training.tree import map_with_path

AXES = ("data", "fsdp", "tensor")

LARGEST = "fsdp:largest"
"""In place of a spec: the largest axis of the array that the fsdp devices divide."""

Spec = Sequence[str | None] | str
Rule = tuple[str, Spec]

TENSOR_RULES: tuple[Rule, ...] = (
    (r"attention/qkv/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/qkv/bias$", (None, "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/fc1/kernel$", ("fsdp", "tensor")),
    (r"mlp/fc1/bias$", ("tensor",)),
    (r"mlp/fc2/kernel$", ("tensor", "fsdp")),
)
"""Heads and hidden units over `tensor` (Megatron-LM, section 3), the other axis over `fsdp`."""

STRATEGIES: dict[str, tuple[Rule, ...]] = {
    "replicated": ((r".*", ()),),
    "fsdp": ((r".*", LARGEST),),
    "fsdp+tensor": (*TENSOR_RULES, (r".*", LARGEST)),
}
"""Rules by strategy: the first pattern that is found in a path decides."""


def make_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, or over the given ones.

    Args:
        config: `config.mesh`, the number of devices along each axis; one of them may be -1.
        devices: devices to use.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [int(config[axis]) for axis in AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known:
        raise ValueError(
            f"mesh {text} does not fit {len(devices)} devices: the sizes must be positive, at "
            "most one may be -1, and their product must divide the number of devices."
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {text} uses {math.prod(sizes)} of {len(devices)} devices; set one size to -1 "
            "to take what is left."
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises `ValueError` if a batch cannot be cut into equal pieces."""
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch_size % (accumulate * pieces):
        unit = max(accumulate, 1) * pieces
        raise ValueError(
            f"batch_size {batch_size} is not divisible by accumulate ({accumulate}) x data x fsdp "
            f"devices ({mesh.shape['data']} x {mesh.shape['fsdp']}); the nearest size that fits "
            f"is {max(1, round(batch_size / unit)) * unit}."
        )


def rules_of(config: ml_collections.ConfigDict) -> tuple[Rule, ...]:
    """The user's rules, then those of the strategy.

    Args:
        config: `config.sharding`.

    Raises:
        ValueError: for an unknown strategy.
    """
    if config.strategy not in STRATEGIES:
        raise ValueError(
            f"sharding.strategy is {config.strategy!r}; known are {', '.join(STRATEGIES)}."
        )
    return (*((pattern, spec) for pattern, spec in config.rules), *STRATEGIES[config.strategy])


def partition_spec(
    path: str, shape: Sequence[int], rules: Sequence[Rule], mesh: Mesh
) -> PartitionSpec:
    """The spec of one array.

    A spec is aligned to the last axes, so that one rule serves a block and a stack of blocks. An
    axis that the mesh does not divide stays whole.
    """
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), ())
    if spec == LARGEST:
        fsdp = mesh.shape["fsdp"]
        candidates = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
        if fsdp == 1 or not candidates:
            return PartitionSpec()
        largest = max(candidates, key=lambda axis: shape[axis])
        return PartitionSpec(*("fsdp" if axis == largest else None for axis in range(len(shape))))
    if isinstance(spec, str) or len(spec) > len(shape):
        return PartitionSpec()  # for example a counter beside a matrix in the optimizer state
    aligned = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return PartitionSpec(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(aligned, shape)
        )
    )


def state_shardings(state: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """A `NamedSharding` for every array of a state (or of its shapes).

    Optimizer moments carry the path of their parameter, so the same rule finds them.
    """
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf.shape, rules, mesh)), state
    )


def bytes_per_device(leaf: Any, sharding: NamedSharding) -> int:
    """Bytes of an array that one device holds."""
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
