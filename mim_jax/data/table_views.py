"""What TIP sees of an image and its row of a table: augmented, corrupted, or as they are.

TIP (Du et al., 2024), sections 3.2 and 4; numbers as in its code.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import ml_collections
import numpy as np

from mim_jax.data.color_jitter import ColorJitter
from mim_jax.data.photometric import RandomBlur, RandomFlip, RandomGrey, RandomRotation
from mim_jax.data.rand_augment import Composed
from mim_jax.data.resize import resized
from mim_jax.data.table import TableSource
from mim_jax.data.transforms import RandomResizedCrop, Size

_INTERPOLATION = "bilinear"  # of the crops and of plain resizing


class Marginals:
    """Draws values of single columns from the rows of a training table."""

    def __init__(self, table: np.ndarray, missing: np.ndarray) -> None:
        """Take float32 `[rows, columns]`, and what is missing of it, bool of the same shape."""
        self._table = table
        # Rows whose value is there come first in each column.
        self._rows = np.argsort(missing, axis=0, kind="stable")
        self._present = (~missing).sum(axis=0)

    def corrupted(self, row: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        """A row of which some cells hold the value of the same column in another row.

        Args:
            row: float32 `[columns]`.
            rate: `int(columns * rate)` distinct columns are replaced, each from a row of its own,
                uniform over those with a value there; a column without any stays as it is.
            rng: gives all the randomness.
        """
        columns = rng.permutation(len(row))[: int(len(row) * rate)]
        columns = columns[self._present[columns] > 0]
        drawn = (rng.random(len(columns)) * self._present[columns]).astype(np.int64)
        result = row.copy()
        result[columns] = self._table[self._rows[drawn, columns], columns]
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class TableViews:
    """Training examples: an augmented image, the row, and the row corrupted.

    Attributes:
        augment: `(image, rng) -> image` of `size`.
        size: height and width of an image that is not augmented but resized.
        marginals: of the training table.
        corruption: share of the columns that is replaced, in [0, 1].
        probability: how often an image is augmented.
        corrupt_input: for fine-tuning: it is the entry `table` itself that is corrupted, and only
            where the image is augmented; there is no entry `table_corrupted`.
        backend: that resizes images.
    """

    whole_examples: ClassVar[bool] = True

    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    size: Size
    marginals: Marginals
    corruption: float = 0.3
    probability: float = 0.95
    corrupt_input: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("corruption", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return the views of an example.

        Args:
            example: of a `TableSource`.
            rng: gives all the randomness.

        Returns:
            image: as the source gives it, `[size[0], size[1], channels]`.
            table: float32 `[columns]`.
            table_corrupted: float32 `[columns]`, unless `corrupt_input`.
            table_missing: int32 `[columns]`, 1 where the value is missing.
        """
        result = {"table": example["table"], "table_missing": _flags(example)}
        augmented = rng.random() < self.probability
        if augmented:
            result["image"] = self.augment(example["image"], rng)
        else:
            result["image"] = resized(example["image"], self.size, _INTERPOLATION, self.backend)
        if augmented or not self.corrupt_input:
            name = "table" if self.corrupt_input else "table_corrupted"
            result[name] = self.marginals.corrupted(example["table"], self.corruption, rng)
        return result


@dataclasses.dataclass(frozen=True)
class TableEvaluation:
    """Examples as they are, with the image resized to one size whatever its shape.

    Attributes:
        size: height and width of the image.
        backend: that resizes it.
    """

    whole_examples: ClassVar[bool] = True

    size: Size
    backend: str = "auto"

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """Return the entries of `TableViews`, of which `table_corrupted` is not; draws nothing."""
        del rng
        return {
            "image": resized(example["image"], self.size, _INTERPOLATION, self.backend),
            "table": example["table"],
            "table_corrupted": example["table"],
            "table_missing": _flags(example),
        }


def table_views(data: ml_collections.ConfigDict, source: TableSource) -> TableViews:
    """The training views that `config.data` describes.

    Args:
        data: `config.data`.
        source: the training data, from which the values of corrupted cells are drawn.
    """
    table, size = data.table, tuple(data.image_size)
    crop = RandomResizedCrop(
        size,
        area=tuple(data.crop_area),
        aspect=tuple(data.crop_aspect),
        interpolation=_INTERPOLATION,
        backend=data.backend,
    )
    steps: list[Callable[[np.ndarray, np.random.Generator], np.ndarray]] = []
    if table.rotation and table.rotation_probability:
        steps.append(RandomRotation(table.rotation, table.rotation_probability))
    if any(data.color_jitter):
        steps.append(ColorJitter(*data.color_jitter, probability=table.jitter_probability))
    if table.grey_probability:
        steps.append(RandomGrey(table.grey_probability))
    if table.blur_probability:
        steps.append(RandomBlur(table.blur_probability, tuple(table.blur_sigma)))
    steps.append(crop)
    if table.flip_probability:
        steps.append(RandomFlip(table.flip_probability))
    return TableViews(
        augment=Composed(tuple(steps)),
        size=size,
        marginals=Marginals(source.table, source.missing),
        corruption=table.corruption,
        probability=table.augment_probability,
        corrupt_input=table.corrupt_input,
        backend=data.backend,
    )


def table_evaluation(data: ml_collections.ConfigDict) -> TableEvaluation:
    """What evaluation sees by `config.data`."""
    return TableEvaluation(tuple(data.image_size), data.backend)


def _flags(example: Mapping[str, Any]) -> np.ndarray:
    return example["missing"].astype(np.int32)
