"""The labelled data that a config names for evaluation."""

import contextlib
from collections.abc import Generator, Iterator, Sequence

import ml_collections
import numpy as np

from mim_jax.data import (
    EvaluationCrop,
    RandomResizedCrop,
    Source,
    evaluation_batches,
    open_source,
    train_batches,
)

PROBE_AREA = (0.08, 1.0)
"""Share of the image in a linear probe's training crops (MAE's `main_linprobe.py`)."""

Batches = Iterator[dict[str, np.ndarray]]


def labelled_source(config: ml_collections.ConfigDict, split: str) -> tuple[Source, int]:
    """The source of `config.evaluate`, or else of `config.data`, and its number of classes.

    Args:
        config: a complete config.
        split: such as `config.evaluate.train_split`.

    Raises:
        ValueError: if the examples have no labels, or the source is not known.
        FileNotFoundError: if the data are not there.
    """
    source = open_source(
        config.evaluate.source or config.data.source,
        split,
        channels=config.data.channels,
        bits=config.data.bits,
        backend=config.data.backend,
    )
    if source.num_classes is None:
        raise ValueError(_without_labels(source, split))
    return source, source.num_classes


def centre_crops(
    config: ml_collections.ConfigDict, split: str, *, largest_side: int | None = None
) -> Batches:
    """Batches of every example of a split, resized and cut as `config.evaluate` says.

    Args:
        config: a complete config.
        split: such as `config.evaluate.test_split`.
        largest_side: shrinks the crop until neither side is longer; None keeps the size.

    Raises:
        ValueError: as for `labelled_source`, and (while reading) for an example without a label.
        FileNotFoundError: as for `labelled_source`.
    """
    height, width = config.data.image_size
    if largest_side is not None and max(height, width) > largest_side:
        scale = largest_side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
    source, _ = labelled_source(config, split)
    batches = evaluation_batches(
        source,
        EvaluationCrop(
            (height, width), crop_ratio=config.evaluate.crop_ratio, backend=config.data.backend
        ),
        batch_size=config.evaluate.batch_size,
        workers=config.data.workers,
    )
    return _with_labels(batches, source, split)


def patch_labels(config: ml_collections.ConfigDict, split: str, grid: Sequence[int]) -> np.ndarray:
    """The class of every patch of every example, int `[examples, patches]`, row by row.

    A source that knows them has a method `patch_labels(grid)`, which gives them for whole images
    cut into a grid of patches, -1 for a patch without a class. It is asked for by `getattr`.

    Args:
        config: a complete config.
        split: such as `config.evaluate.train_split`.
        grid: patches along height and width.

    Raises:
        ValueError: if the source knows labels of whole images alone, or the evaluation crop cuts
            images, so that patches lie elsewhere.
        FileNotFoundError: as for `labelled_source`.
    """
    source, _ = labelled_source(config, split)
    labels_of = getattr(source, "patch_labels", None)
    if labels_of is None:
        raise ValueError(
            f"the data source {source.name!r} (split {split!r}) has a label for each image, but "
            "none for each patch, which the protocol 'patch_local' needs. Take 'patch_global', or "
            "call mim_jax.evaluation.patch_local_recall with labels of your own."
        )
    if config.evaluate.crop_ratio != 1.0:
        raise ValueError(
            f"evaluate.crop_ratio is {config.evaluate.crop_ratio}, which cuts the images that "
            "patch labels are for; set it to 1.0."
        )
    labels = np.asarray(labels_of(tuple(grid)))
    wanted = (len(source), int(np.prod(grid)))
    if labels.shape != wanted:
        raise ValueError(f"{source.name!r} gives patch labels {labels.shape}; expected {wanted}.")
    return labels


def random_crops(
    config: ml_collections.ConfigDict, split: str, *, batch_size: int, seed: int, num_steps: int
) -> Batches:
    """Training batches with the crops of MAE's linear probe: one draw of area and aspect.

    Args:
        config: a complete config.
        split: such as `config.evaluate.train_split`.
        batch_size: rows of a batch.
        seed: of the order and the crops.
        num_steps: number of batches.

    Raises:
        ValueError: as for `centre_crops`.
        FileNotFoundError: as for `labelled_source`.
    """
    source, _ = labelled_source(config, split)
    batches = train_batches(
        source,
        RandomResizedCrop(
            tuple(config.data.image_size),
            area=PROBE_AREA,
            backend=config.data.backend,
            single_draw=True,
        ),
        batch_size=batch_size,
        seed=seed,
        num_steps=num_steps,
        workers=config.data.workers,
    )
    return _with_labels(batches, source, split)


def _with_labels(batches: Generator, source: Source, split: str) -> Batches:
    """The batches themselves, as long as every valid example has a label."""
    with contextlib.closing(batches):
        for batch in batches:
            labels = batch["label"][batch.get("valid", slice(None))]
            if len(labels) and labels.min() < 0:
                raise ValueError(_without_labels(source, split))
            yield batch


def _without_labels(source: Source, split: str) -> str:
    return (
        f"the data source {source.name!r} (split {split!r}) has no labels, but every evaluation "
        "protocol needs them. Set evaluate.source, evaluate.train_split and evaluate.test_split "
        "to labelled data, or evaluate.protocols to () to train without evaluation."
    )
