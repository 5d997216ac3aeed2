"""Between a run of ours and a method's official checkpoint, both ways."""

import contextlib
from pathlib import Path

import jax
import ml_collections
import numpy as np

from mim_jax import config as configs
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.initial import initialize_from
from mim_jax.method import method_class
from mim_jax.training.checkpoints import Checkpoints, read_variables
from mim_jax.training.experiment import Experiment, image_shapes
from mim_jax.training.tree import flatten


def export_run(run: Path, output: Path, step: int | None = None) -> str:
    """Writes a run's parameters as the official checkpoint of its method.

    Args:
        run: folder of the run.
        output: a `.safetensors` or `.pth` file.
        step: which checkpoint; the newest by default.

    Returns:
        A note on what was written.

    Raises:
        FileNotFoundError: if the folder holds no complete checkpoint, or not that one.
        ValueError: if the method has no official checkpoint, its parameters do not fit it, or the
            output is of an unknown kind.
    """
    variables, about = read_variables(run, step)
    method = method_class(about["method"]).build(
        configs.resolve(configs.from_json(about["config"]), "cpu")
    )
    layout = method.layout()
    if layout is None:
        raise ValueError(f"method {about['method']!r} has no official checkpoint format.")
    state = layout.save(variables["params"])
    write_state_dict(output, state)
    again = flatten(layout.load(read_state_dict(output), variables["params"]))
    for path, value in flatten(variables["params"]).items():
        if not np.array_equal(again[path], value):
            raise ValueError(f"{output} does not give {path} back exactly; do not use the file.")
    return f"wrote {len(state)} arrays to {output}; read back exactly"


def import_checkpoint(config: ml_collections.ConfigDict, source: Path, run: Path) -> str:
    """Makes a run whose checkpoint of step 0 holds the weights of an official file.

    Args:
        config: a complete config whose model is that of the file.
        source: a `.safetensors` or `.pth` file.
        run: folder of the new run; must not hold checkpoints yet.

    Returns:
        Notes on what was read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not fit the model, or the run exists already.
    """
    experiment = Experiment.on_one_device(config)
    state = experiment.initial_state(image_shapes(experiment.config))
    state, notes = initialize_from(str(source), experiment.method, state)
    config = configs.resolve(config, jax.default_backend())
    # Opened last, since it creates the folder: a file that does not fit leaves nothing behind.
    with contextlib.closing(Checkpoints(run, config)) as checkpoints:
        if checkpoints.latest_step() is not None:
            raise ValueError(f"{run} holds checkpoints already; choose another --output.")
        checkpoints.save(state, 0)
        checkpoints.wait()
    (run / "config.json").write_text(configs.to_json(config))
    return "\n".join([*notes, f"wrote the run {run}"])
