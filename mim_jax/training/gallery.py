"""Pictures that show what a method does, on the same few examples every time."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from mim_jax import config as configs
from mim_jax.data import Source, evaluation_batches
from mim_jax.data.configured import evaluation_source, training_source
from mim_jax.data.on_device import denormalize
from mim_jax.data.sources import SubsetSource
from mim_jax.evaluation.labelled_data import evaluation_transform
from mim_jax.method import Picture, Variables
from mim_jax.training.checkpoints import read_variables
from mim_jax.training.experiment import Experiment
from mim_jax.training.feed import HostBatch
from mim_jax.training.pictures import picture_grid
from mim_jax.training.step import stream_keys

PICTURE_ROWS = 8

PictureFunction = Callable[[Variables], dict[str, Picture]]


def picture_source(config: ml_collections.ConfigDict) -> Source:
    """The data that pictures show: the test split if the config evaluates, else the training's."""
    if config.evaluate.protocols:
        return evaluation_source(config, config.evaluate.test_split)
    return training_source(config)


def picture_batch(
    config: ml_collections.ConfigDict, source: Source, rows: int = PICTURE_ROWS
) -> HostBatch:
    """A few examples of a source, as evaluation sees them."""
    rows = min(rows, len(source))
    # Evenly spread: a folder is sorted by class.
    few = SubsetSource(source, source.name, np.linspace(0, len(source) - 1, rows).astype(int))
    transform = evaluation_transform(config, source)
    with contextlib.closing(evaluation_batches(few, transform, batch_size=rows)) as batches:
        batch = next(batches)
    return {
        name: array for name, array in batch.items() if name not in ("index", "unreadable", "valid")
    }


def picture_function(experiment: Experiment, batch: HostBatch) -> PictureFunction:
    """The method's pictures of one batch, with the same masks at every call."""
    method = experiment.method
    prepared = experiment.normalized({name: jax.numpy.asarray(x) for name, x in batch.items()})
    rngs = stream_keys(jax.random.key(experiment.config.seed), method.streams)
    compiled = jax.jit(lambda variables, batch: method.pictures(variables, batch, rngs))
    return lambda variables: compiled(variables, prepared)


def drawn(picture: Picture, config: ml_collections.ConfigDict) -> np.ndarray:
    """A picture as uint8 `[height, width, 3]`, its images out of normalized space."""
    data = config.data
    columns = {
        title: np.asarray(denormalize(images, *_statistics(images, data.mean, data.std)))
        for title, images in picture.columns.items()
    }
    return picture_grid(columns, picture.caption)


def _statistics(images: Any, mean: tuple, std: tuple) -> tuple[tuple, tuple]:
    """Those of the data; a drawing of another number of channels is in [0, 1] as it is."""
    return (mean, std) if images.shape[-1] == len(mean) else ((0.0,), (1.0,))


def visualize(
    run: Path,
    output: Path,
    *,
    step: int | None = None,
    data: str | None = None,
    split: str | None = None,
    rows: int = PICTURE_ROWS,
) -> list[Path]:
    """Draws the pictures of a run's checkpoint.

    Args:
        run: folder of the run.
        output: folder for `NAME.png` of each picture.
        step: which checkpoint; the newest by default.
        data: source in place of the run's.
        split: of the source in place of the run's.
        rows: examples to show, spread evenly over the source.

    Returns:
        The files.

    Raises:
        FileNotFoundError: if the folder holds no such checkpoint.
        ValueError: if the method draws nothing, or the data do not fit it.
    """
    variables, about = read_variables(run, step)
    config = configs.from_json(about["config"])
    if data:
        config.data.source = config.evaluate.source = data
    if split:
        config.data.split = config.evaluate.test_split = split
    experiment = Experiment.on_one_device(config)
    batch = picture_batch(config, picture_source(config), rows)
    pictures = picture_function(experiment, batch)(variables)
    if not pictures:
        raise ValueError(f"the method {config.method!r} draws no pictures.")
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        files.append(output / f"{name}.png")
        Image.fromarray(drawn(picture, config)).save(files[-1])
    return files
