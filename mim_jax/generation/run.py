"""A data set of generated faces from the folder of a run."""

import dataclasses
import pathlib

import ml_collections
import numpy as np
from rich.console import Console

from mim_jax import config as configs
from mim_jax.evaluation.labelled_data import centre_crops
from mim_jax.generation.dataset import (
    FaceGenerator,
    Plan,
    Variables,
    check_generator,
    generate_dataset,
    mean_vectors,
)
from mim_jax.training.checkpoints import checkpoint_steps, read_variables
from mim_jax.training.experiment import Experiment

NONE = "none"
"""In place of a source of known people."""


def generate_run(
    run: pathlib.Path,
    folder: pathlib.Path,
    plan: Plan,
    *,
    step: int | None = None,
    known: str = "",
    console: Console | None = None,
) -> float | None:
    """Generates a data set with a run's model, see `mim_jax.generation.dataset`.

    Args:
        run: folder of the run.
        folder: of the data set.
        plan: what to generate; its `model` and `known` are filled in.
        step: which checkpoint; the newest by default.
        known: labelled source of real people; "" for the run's training data, "none" for none.
        console: shows a progress bar.

    Returns:
        The largest cosine of a generated person to a known one; None without known ones.

    Raises:
        FileNotFoundError: if the folder holds no such checkpoint, or the known people are not
            there.
        ValueError: for a method that cannot generate, known people without labels, a bad plan, or
            an output folder with something else.
    """
    variables, about = read_variables(run, step)
    config = configs.from_json(about["config"])
    method = check_generator(Experiment.on_one_device(config).method)
    step = checkpoint_steps(run)[-1] if step is None else step
    known = known or config.data.source
    people = None if known == NONE else _known(method, variables, config, known)
    plan = dataclasses.replace(
        plan,
        model=f"{config.method}, run {run.resolve().name}, step {step}",
        known="" if known == NONE else known,
    )
    return generate_dataset(
        method,
        variables,
        folder,
        plan,
        known=people,
        size=config.model.face_model.outputs,
        console=console,
    )


def _known(
    method: FaceGenerator, variables: Variables, config: ml_collections.ConfigDict, source: str
) -> np.ndarray:
    """Mean vectors of the people of a source, cut as the config evaluates."""
    config = config.copy_and_resolve_references()
    config.evaluate.source = source
    try:
        batches = centre_crops(config, config.data.split)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error} Known people are what new ones are drawn like and compared with: name a "
            f"labelled source by --known, or set it to {NONE!r}."
        ) from error
    return mean_vectors(method, variables, batches)
