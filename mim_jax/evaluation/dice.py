"""Dice coefficients of segmented volumes, by the rules of MONAI's `DiceMetric` (Hi-End-MAE)."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np

from mim_jax.data.configured import evaluation_source
from mim_jax.data.on_device import normalize
from mim_jax.data.volumes import segmentation_in
from mim_jax.evaluation.sliding_window import Window, predicted_classes
from mim_jax.method import Batch, Method, Variables


@runtime_checkable
class Segmenter(Protocol):
    """A method that tells the class of every voxel.

    Attributes:
        num_classes: with the background, which is class 0.
    """

    @property
    def num_classes(self) -> int:
        """See the attributes."""
        ...

    def logits(self, variables: Variables, batch: Batch) -> jax.Array:
        """Logits float32 `[batch, height, width, depth, classes]` of `image`."""
        ...


def check_segmenter(method: Method) -> None:
    """Raises `ValueError` if a method cannot be scored by the protocol "dice"."""
    if not isinstance(method, Segmenter) or len(method.inputs["image"].shape) != 4:
        raise ValueError(
            f"the protocol 'dice' needs a method that segments volumes, such as unetr, not "
            f"{type(method).__name__}."
        )


def dice_coefficients(predicted: np.ndarray, true: np.ndarray, num_classes: int) -> np.ndarray:
    """`2 |A and B| / (|A| + |B|)` of each class, float64 `[classes]`; NaN where `true` has none.

    Args:
        predicted: classes, any shape.
        true: likewise.
        num_classes: with the background.
    """
    pairs = np.bincount(
        true.ravel().astype(np.int64) * num_classes + predicted.ravel(), minlength=num_classes**2
    ).reshape(num_classes, num_classes)
    truly, said = pairs.sum(axis=1), pairs.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(truly > 0, 2 * pairs.diagonal() / (truly + said), np.nan)


def dice_scores(cases: Iterable[np.ndarray]) -> dict[str, float]:
    """Means of the coefficients `[classes]` of all cases.

    A class that a case does not have is left out of that case's mean. Of every case the mean over
    its classes is taken, then the mean over cases.

    Returns:
        `mean` with the background, `organs` without it, and `class_1`, `class_2`, ... of each
        class that any case has.
    """
    table = np.stack(list(cases))
    scores = {
        "mean": float(np.mean(np.nanmean(table, axis=1))),
        "organs": _mean_of_cases(table[:, 1:]),
    }
    for number in range(1, table.shape[1]):
        if not np.isnan(table[:, number]).all():
            scores[f"class_{number}"] = float(np.nanmean(table[:, number]))
    return scores


def _mean_of_cases(table: np.ndarray) -> float:
    with_any = table[~np.isnan(table).all(axis=1)]
    return float(np.mean(np.nanmean(with_any, axis=1))) if len(with_any) else float("nan")


def dice(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """The protocol "dice": whole volumes of the test split, by overlapping windows.

    Args:
        method: a `Segmenter`.
        variables: of the method.
        config: a complete config; read are `evaluate` and `data`.

    Raises:
        ValueError: if the data are no volumes with segmentations, or have more classes.
        FileNotFoundError: if the data are not there.
    """
    check_segmenter(method)
    assert isinstance(method, Segmenter)
    segmenter: Segmenter = method
    source = evaluation_source(config, config.evaluate.test_split)
    if getattr(source, "kind", "image") != "volume":
        raise ValueError(f"the protocol 'dice' needs volumes, but {source.name} holds none.")
    height, width, depth = config.data.image_size
    window: Window = (height, width, depth)
    mean, std = tuple(config.data.mean), tuple(config.data.std)

    @jax.jit
    def forward(variables: Variables, windows: jax.Array) -> jax.Array:
        return segmenter.logits(variables, {"image": normalize(windows, mean, std)})

    def predict(windows: np.ndarray) -> np.ndarray:
        return np.asarray(forward(variables, windows), np.float32)

    cases = []
    for index in range(len(source)):
        example: Any = source[index]
        classes = segmentation_in(example)
        found = predicted_classes(
            example["image"], predict, window, overlap=config.evaluate.overlap
        )
        rows, columns, slices = classes.shape
        true = classes.read((slice(0, rows), slice(0, columns), slice(0, slices)))
        if true.max() >= segmenter.num_classes:
            raise ValueError(
                f"{example.get('name', source.name)} has the class {true.max()}, but "
                f"model.num_classes is {segmenter.num_classes}, the background counted."
            )
        cases.append(dice_coefficients(found, true, segmenter.num_classes))
    return dice_scores(cases)
