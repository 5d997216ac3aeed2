"""What a config would train, without data: parameters, sharding, bytes, FLOPs."""

import jax
import ml_collections
from rich.table import Table

from mim_jax.training.experiment import Experiment
from mim_jax.training.sharding import bytes_per_device
from mim_jax.training.state import TrainState, split_trainable
from mim_jax.training.tree import flatten, path_string


def inspection(config: ml_collections.ConfigDict) -> tuple[Table, str]:
    """A table of all parameters with spec and bytes per device, and a summary.

    Args:
        config: a complete config; its data are not read.

    Raises:
        ValueError: for anything in the config that does not fit together.
    """
    experiment = Experiment.without_data(config)
    shapes = experiment.batch_shapes()
    state = experiment.abstract_state(shapes)
    trainable = flatten(split_trainable(experiment.method, state.params)[0])
    table = Table(title=f"{config.method}: parameters")
    for column in ("path", "shape", "spec"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes per device", justify="right")
    table.add_column("trained")
    for path, leaf in flatten(state.params).items():
        table.add_row(
            path,
            str(tuple(leaf.shape)),
            str(tuple(leaf.sharding.spec)),
            f"{bytes_per_device(leaf, leaf.sharding):,}",
            "yes" if path in trainable else "no",
        )
    return table, _summary(experiment, state, sum(leaf.size for leaf in trainable.values()))


def _summary(experiment: Experiment, state: TrainState, trained: int) -> str:
    config, mesh = experiment.config, experiment.mesh
    sizes: dict[str, int] = {}
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        part = path_string(path).split("/")[0]
        sizes[part] = sizes.get(part, 0) + bytes_per_device(leaf, leaf.sharding)
        total += leaf.size if part == "params" else 0
    flops = experiment.flops_per_step(experiment.batch_shapes())
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"parameters:  {total:,}, of which {trained:,} are trained",
        f"mesh:        {axes}; strategy {config.sharding.strategy}",
        f"per device:  parameters {sizes['params'] / 2**20:,.1f} MiB, optimizer state "
        f"{sizes['opt_state'] / 2**20:,.1f} MiB (activations and gradients come on top)",
        f"model FLOPs: {flops / config.batch_size / 1e9:,.2f} GFLOP per image, "
        f"{flops / 1e12:,.3f} TFLOP per step of {config.batch_size} (forward and backward)",
    ]
    return "\n".join(lines)
