"""What a config would train, without data: parameters, sharding, bytes, FLOPs."""

import collections
import re

import jax
import ml_collections
from rich.table import Table

from mim_jax.training.derived import complete_without_data
from mim_jax.training.experiment import Experiment
from mim_jax.training.sharding import bytes_per_device
from mim_jax.training.state import TrainState, split_trainable
from mim_jax.training.tree import flatten, path_string


def inspection(config: ml_collections.ConfigDict) -> tuple[Table, str]:
    """A table of all parameters with spec and bytes per device, and a summary.

    Args:
        config: a complete config; its data are not read. The weights of towers tell their sizes.

    Raises:
        FileNotFoundError: if there is nothing at the path of a tower.
        ValueError: for anything in the config that does not fit together.
    """
    experiment = Experiment.without_data(complete_without_data(config))
    state = experiment.abstract_state(experiment.batch_shapes())
    table = Table(title=f"{config.method}: parameters")
    for column in ("path", "shape", "spec"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes per device", justify="right")
    table.add_column("trained")
    kinds = parameter_kinds(experiment, state)
    for path, leaf in flatten(state.params).items():
        table.add_row(
            path,
            str(tuple(leaf.shape)),
            str(tuple(leaf.sharding.spec)),
            f"{bytes_per_device(leaf, leaf.sharding):,}",
            "yes" if kinds[path] == "trained" else kinds[path],
        )
    return table, _summary(experiment, state, kinds)


def parameter_kinds(experiment: Experiment, state: TrainState) -> dict[str, str]:
    """For each parameter by path: "trained", "frozen", or "EMA" where it follows another."""
    trainable, fixed = map(flatten, split_trainable(experiment.method, state.params))
    frozen = {p for p in fixed if any(re.match(f, p) for f in experiment.method.frozen)}
    return {
        **dict.fromkeys(trainable, "trained"),
        **dict.fromkeys(frozen, "frozen"),
        **dict.fromkeys(set(fixed) - frozen, "EMA"),
    }


def _summary(experiment: Experiment, state: TrainState, kinds: dict[str, str]) -> str:
    config, mesh = experiment.config, experiment.mesh
    counts, shares = collections.Counter[str](), collections.Counter[str]()
    for path, leaf in flatten(state.params).items():
        counts[kinds[path]] += leaf.size
        shares[kinds[path]] += bytes_per_device(leaf, leaf.sharding)
    optimizer = sum(
        bytes_per_device(leaf, leaf.sharding)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        if path_string(path).startswith("opt_state/")
    )
    others = [kind for kind in ("frozen", "EMA") if kind in counts]
    flops = experiment.flops_per_step(experiment.batch_shapes())
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"parameters:  {counts.total():,}, of which {counts['trained']:,} are trained"
        + "".join(f", {counts[kind]:,} {kind}" for kind in others),
        f"mesh:        {axes}; strategy {config.sharding.strategy}",
        f"per device:  parameters {_mib(shares.total())}"
        + "".join(f" ({kind} {_mib(shares[kind])})" for kind in others)
        + f", optimizer state {_mib(optimizer)} (activations and gradients come on top)",
        f"model FLOPs: {flops / config.batch_size / 1e9:,.2f} GFLOP per image, "
        f"{flops / 1e12:,.3f} TFLOP per step of {config.batch_size} (forward and backward)",
    ]
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
