"""The labelled data that a config names for evaluation."""

import contextlib
import math
from collections.abc import Generator, Iterator

import ml_collections
import numpy as np

from mim_jax.data import (
    EvaluationCrop,
    RandomResizedCrop,
    Source,
    evaluation_batches,
    train_batches,
)
from mim_jax.data.configured import evaluation_source
from mim_jax.data.domains import DomainSource, domains_of
from mim_jax.data.pipeline import EvaluationTransform
from mim_jax.data.segmentation import IGNORED_PATCH, patch_classes, segmentation_of
from mim_jax.data.table import TableSource
from mim_jax.data.table_views import table_evaluation
from mim_jax.data.volumes import volume_centre

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
    source = evaluation_source(config, split)
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
    source, _ = labelled_source(config, split)
    crop = evaluation_transform(config, source, largest_side=largest_side)
    return _with_labels(_all_examples(config, source, crop), source, split)


def domain_source(config: ml_collections.ConfigDict, split: str) -> DomainSource:
    """The source of `config.evaluate`, or else of `config.data`, as domains.

    Args:
        config: a complete config.
        split: such as `config.evaluate.test_split`.

    Raises:
        ValueError: no labels, or a domain without real or without fake examples, see
            `DomainSource`.
        FileNotFoundError: if the data are not there.
    """
    source, _ = labelled_source(config, split)
    return domains_of(source, config.evaluate.source or config.data.source)


def domain_crops(config: ml_collections.ConfigDict, split: str) -> tuple[Batches, tuple[str, ...]]:
    """`centre_crops` of every example of all domains once, and the names of the domains.

    The batches also have `domain`, int32 `[batch]`, which counts the names; 0 in empty rows.

    Args:
        config: a complete config.
        split: such as `config.evaluate.test_split`.

    Raises:
        ValueError: as for `domain_source`.
        FileNotFoundError: if the data are not there.
    """
    source = domain_source(config, split)
    batches = _all_examples(config, source, evaluation_transform(config, source))
    return _with_domains(batches, source), source.names


def evaluation_transform(
    config: ml_collections.ConfigDict, source: Source, *, largest_side: int | None = None
) -> EvaluationTransform:
    """What `config.evaluate` makes of the examples of a source.

    Args:
        config: a complete config.
        source: tells by its `kind` what its examples are.
        largest_side: as for `centre_crops`.
    """
    if isinstance(source, TableSource):
        return table_evaluation(config.data)
    if getattr(source, "kind", "image") == "volume":
        return volume_centre(config.data)
    return evaluation_crop(config, largest_side=largest_side)


def evaluation_crop(
    config: ml_collections.ConfigDict, *, largest_side: int | None = None
) -> EvaluationCrop:
    """What `config.evaluate` does to an image.

    Args:
        config: a complete config.
        largest_side: as for `centre_crops`.
    """
    height, width = config.data.image_size
    if largest_side is not None and max(height, width) > largest_side:
        scale = largest_side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return EvaluationCrop(
        (height, width), crop_ratio=config.evaluate.crop_ratio, backend=config.data.backend
    )


def knows_patches(config: ml_collections.ConfigDict, split: str) -> bool:
    """Whether the data tell the class of every pixel, and so `patch_crops` is possible.

    Args:
        config: a complete config.
        split: such as `config.evaluate.train_split`.

    Raises:
        ValueError: if the source is not known, or the first map is broken.
        FileNotFoundError: if the data are not there.
    """
    return segmentation_of(evaluation_source(config, split), 0) is not None


def patch_crops(config: ml_collections.ConfigDict, split: str, grid: tuple[int, int]) -> Batches:
    """`centre_crops` whose `label` is the class of every patch, int32 `[batch, patches]`.

    The map of an image goes the way of the image, by nearest neighbours; see
    `mim_jax.data.segmentation.patch_classes` for what counts as the class of a patch. Labels of
    the images are not needed.

    Args:
        config: a complete config.
        split: such as `config.evaluate.test_split`.
        grid: patches along height and width.

    Raises:
        ValueError: if the source does not know the class of every pixel, and (while reading) for
            a map that does not fit its image.
        FileNotFoundError: if the data are not there.
    """
    source = evaluation_source(config, split)
    if not knows_patches(config, split):
        raise ValueError(
            f"the data source {source.name!r} (split {split!r}) has no labels of patches, "
            "which the protocol 'patch_local' needs. Put segmentation maps beside the images of a "
            "folder (segmentation/NAME.png for NAME.jpg), or call "
            "mim_jax.evaluation.patch_local_recall with labels of your own."
        )
    crop = evaluation_crop(config)
    return _with_patch_labels(_all_examples(config, source, crop), source, crop, grid)


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


def _all_examples(
    config: ml_collections.ConfigDict, source: Source, crop: EvaluationTransform
) -> Generator:
    return evaluation_batches(
        source, crop, batch_size=config.evaluate.batch_size, workers=config.data.workers
    )


def _with_patch_labels(
    batches: Generator, source: Source, crop: EvaluationCrop, grid: tuple[int, int]
) -> Batches:
    """The batches with a label for each patch, `IGNORED_PATCH` in rows that are not valid."""
    with contextlib.closing(batches):
        for batch in batches:
            labels = np.full((len(batch["index"]), math.prod(grid)), IGNORED_PATCH, np.int32)
            for row in np.flatnonzero(batch["valid"]):
                classes = segmentation_of(source, int(batch["index"][row]))
                assert classes is not None, "a source knows the pixels of all examples or none"
                labels[row] = patch_classes(crop.of_classes(classes), grid)
            yield {**batch, "label": labels}


def _with_domains(batches: Generator, source: DomainSource) -> Batches:
    """The batches with the number of the domain of each row."""
    with contextlib.closing(batches):
        for batch in batches:
            domains = [source.group(max(index, 0)) // 2 for index in batch["index"].tolist()]
            yield {**batch, "domain": np.array(domains, np.int32)}


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
