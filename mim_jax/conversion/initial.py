"""Starts a run from given weights: `config.init_from`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mim_jax.conversion.files import read_state_dict
from mim_jax.method import Method
from mim_jax.training.checkpoints import FOLDER, read_variables
from mim_jax.training.state import TrainState, start_ema
from mim_jax.training.tree import differences, flatten, unflatten


def initialize_from(path: str, method: Method, state: TrainState) -> tuple[TrainState, list[str]]:
    """Puts weights from a file, or from a run of ours, into a new state.

    Args:
        path: an official checkpoint file, or the folder of a run.
        method: the method that will be trained.
        state: at step 0; parameters that the weights lack stay as they are.

    Returns:
        The state, laid out as before, and notes for the user.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the weights do not fit; everything that does not is listed.
    """
    if Path(path).is_dir():
        if not (Path(path) / FOLDER).is_dir():
            raise FileNotFoundError(f"init_from: {path} is a folder, but no run of ours.")
        given = read_variables(Path(path))[0]
        problems = differences(flatten(given), flatten(state.variables), "the run")
        if problems:
            raise ValueError(f"the run {path} holds another model:\n  " + "\n  ".join(problems))
    else:
        given = {"params": read_official(path, method, state.params)}
    old = flatten(state.variables)
    new = {
        name: jax.device_put(value, old[name].sharding) for name, value in flatten(given).items()
    }
    kept = sorted(name.removeprefix("params/") for name in set(old) - set(new))
    notes = [f"initialized {len(new)} of {len(old)} arrays from {path}"]
    if kept:
        notes.append(f"not in the file, so at their initial values: {', '.join(kept)}")
    variables = unflatten({**old, **new})
    # An EMA target that the weights lack starts from its source, as in a new run.
    absent = [e for e in method.ema if any(name.startswith(f"{e.target}/") for name in kept)]
    params = start_ema(absent, variables.pop("params"))
    return dataclasses.replace(state, params=params, mutable=variables), notes


def read_official(path: str, method: Method, like: Any) -> dict[str, Any]:
    """Parameters from an official checkpoint, through the method's layout.

    Args:
        path: the file.
        method: the method whose layout reads it.
        like: the method's parameters, or their shapes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the method has no layout, or the file does not fit.
    """
    layout = method.layout()
    if layout is None:
        raise ValueError(f"{type(method).__name__} has no official checkpoint to read {path} by.")
    try:
        return layout.load(read_state_dict(path), like)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
