"""Some steps of a run, without its log, checkpoints and evaluation."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from mim_jax.conversion.initial import initialize_from
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.data import Source
from mim_jax.training.experiment import Experiment, HostShapes, training_batches
from mim_jax.training.feed import DeviceFeed, HostBatch
from mim_jax.training.sharding import batch_sharding
from mim_jax.training.state import TrainState

HOST_ENTRIES = ("index", "unreadable")
"""Entries of a batch that tell about its rows, and that no step sees."""


def first_state(
    experiment: Experiment, source: Source, shapes: HostShapes
) -> tuple[TrainState, list[str]]:
    """The state of a new run, and notes for the user on where its values come from.

    Initial values; over them the weights that the method starts from (`Method.pretrained`), and
    those of `init_from`; then the method's calibration on the first training batches.

    Args:
        experiment: the run.
        source: its training data.
        shapes: arrays (or shapes) of one host batch.

    Raises:
        FileNotFoundError: if weights are not there.
        ValueError: if they do not fit.
    """
    method, path = experiment.method, experiment.config.init_from
    state, notes = load_pretrained(method, experiment.initial_state(shapes))
    if path:
        state, more = initialize_from(path, method, state)
        notes += more
    count = method.calibration_batches
    if count:
        batches = training_batches(experiment.config, source, 0, count)
        with contextlib.closing(batches):
            state = experiment.calibrated(state, map(without_host_entries, batches))
        notes.append(f"calibrated on {count} batches")
    return state, notes


def take_steps(
    experiment: Experiment, source: Source, state: TrainState, last_step: int
) -> Iterator[tuple[TrainState, dict[str, jax.Array]]]:
    """Takes the steps after those of `state`, and gives state and metrics after each.

    Args:
        experiment: the run.
        source: its training data.
        state: where to start; used up by the first step, as each state is by the next one.
        last_step: number of steps taken at the end.
    """
    first_step = int(state.step)
    if first_step >= last_step:
        return
    batches = training_batches(experiment.config, source, first_step, last_step - first_step)
    with contextlib.closing(batches):
        for_device = map(without_host_entries, batches)
        first = next(for_device)
        step_function = experiment.compiled_step(first)
        feed = DeviceFeed(itertools.chain([first], for_device), batch_sharding(experiment.mesh))
        for batch in feed:
            state, metrics = step_function(state, batch)
            yield state, metrics


def without_host_entries(batch: HostBatch) -> dict[str, Any]:
    """What the step sees of a batch."""
    return {name: array for name, array in batch.items() if name not in HOST_ENTRIES}
