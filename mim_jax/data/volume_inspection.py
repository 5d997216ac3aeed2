"""What a data set of volumes holds: sizes, spacings, statistics, classes, and a picture."""

import dataclasses
from typing import Any

import numpy as np
from rich.table import Table

from mim_jax.data.contact_sheet import contact_sheet
from mim_jax.data.inspection import sample_indices, spread, table_of, unreadable_rows
from mim_jax.data.samples import UnreadableImage
from mim_jax.data.sources import Source
from mim_jax.data.volumes import Volume, segmentation_in

_POINTS = 4096
_LARGEST = np.iinfo(np.uint16).max
_SHEET_VOLUMES = 16
_AXES = "height, width, depth"


@dataclasses.dataclass(frozen=True)
class VolumeFacts:
    """What `inspect_volumes` found.

    Attributes:
        count: number of volumes.
        sampled: number of volumes that were looked at, each in the same number of random voxels.
        sizes: smallest, median and largest along each axis, in voxels.
        spacings: likewise in millimetres; None if the source does not know.
        mean: of the samples, in [0, 1].
        std: likewise.
        at_ends: shares of the samples at 0 and at 1, which the window cut off (or which are so).
        class_shares: share of the voxels of each class, None without segmentations.
        unreadable: why, for each volume of the sample that cannot be read; names it.
    """

    count: int
    sampled: int
    sizes: tuple[tuple[int, int, int], ...]
    spacings: tuple[tuple[float, float, float], ...] | None
    mean: float
    std: float
    at_ends: tuple[float, float]
    class_shares: tuple[float, ...] | None
    unreadable: tuple[str, ...]


def inspect_volumes(source: Source, sample: int | None = 64) -> VolumeFacts:
    """Return facts about a source of volumes, from a sample that is the same in every run.

    Args:
        source: of kind "volume".
        sample: number of volumes to look at; None for all.

    Raises:
        ValueError: an empty source, a sample below 1, no readable volume in the sample, or a
            segmentation of another shape than its volume.
    """
    rng = np.random.default_rng(0)
    sizes, spacings, samples, classes, unreadable = [], [], [], [], []
    indices = sample_indices(source, sample)
    for index in indices:
        try:
            example = source[index]
            volume: Volume = example["image"]
            points = (rng.random((_POINTS, 3)) * volume.shape).astype(np.int64)
            values = volume.at(points)
            found = None
            if "segmentation" in example:
                found = segmentation_in(example).at(points)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        sizes.append(volume.shape)
        spacings.append(getattr(volume, "spacing", None))
        samples.append(values)
        if found is not None:
            classes.append(found)
    if not samples:
        raise ValueError(
            f"none of {len(indices)} volumes of {source.name} can be read; the first: "
            f"{unreadable[0]}"
        )
    values = np.concatenate(samples)
    shares = np.bincount(np.concatenate(classes)) / (_POINTS * len(classes)) if classes else None
    return VolumeFacts(
        count=len(source),
        sampled=len(samples),
        sizes=tuple(spread(axis) for axis in zip(*sizes, strict=True)),
        spacings=None
        if None in spacings
        else tuple((min(x), float(np.median(x)), max(x)) for x in zip(*spacings, strict=True)),
        mean=float(values.mean() / _LARGEST),
        std=float(values.std() / _LARGEST),
        at_ends=(float((values == 0).mean()), float((values == _LARGEST).mean())),
        class_shares=None if shares is None else tuple(shares.tolist()),
        unreadable=tuple(unreadable),
    )


def volume_facts_table(facts: VolumeFacts) -> Table:
    """Return the facts as lines for a person."""
    return table_of(_rows(facts))


def volume_sheet(source: Source, limit: int = _SHEET_VOLUMES) -> np.ndarray:
    """Return three planes through the middle of each volume of a sample: uint8 `[h, w, 3]`.

    Raises:
        ValueError: an empty source, or no readable volume in the sample.
    """
    images, captions = [], []
    indices = sample_indices(source, limit)
    for index in indices:
        try:
            planes = middle_planes(source[index]["image"])
        except UnreadableImage:
            continue
        for name, plane in planes.items():
            images.append(plane[..., None])
            captions.append(f"{index} {name}")
    if not images:
        raise ValueError(f"none of {len(indices)} volumes of {source.name} can be read")
    return contact_sheet(images, captions, columns=6)


def middle_planes(volume: Volume) -> dict[str, np.ndarray]:
    """Three planes through the middle, each read by itself; front or head are at the top.

    Returns:
        By name, `[rows, columns]`.
    """
    found = {}
    for axis, name in ((2, "axial"), (1, "coronal"), (0, "sagittal")):
        box: Any = [slice(0, side) for side in volume.shape]
        middle = volume.shape[axis] // 2
        box[axis] = slice(middle, middle + 1)
        found[name] = volume.read(tuple(box)).squeeze(axis).T[::-1]
    return found


def _rows(facts: VolumeFacts) -> list[tuple[str, str]]:
    rows = [
        ("volumes", f"{facts.count:,}"),
        ("looked at", f"{facts.sampled:,}" + (", all" if facts.sampled == facts.count else "")),
    ]
    rows += [
        (f"{name}, min / median / max", " / ".join(map(str, values)))
        for name, values in zip(_AXES.split(", "), facts.sizes, strict=True)
    ]
    if facts.spacings is not None:
        rows += [
            (f"mm a voxel along {name}", " / ".join(f"{x:.3g}" for x in values))
            for name, values in zip(_AXES.split(", "), facts.spacings, strict=True)
        ]
    rows += [
        ("mean, of 1", f"{facts.mean:.4f}"),
        ("standard deviation", f"{facts.std:.4f}"),
        ("at the lower end of the window", f"{facts.at_ends[0]:.1%}"),
        ("at its upper end", f"{facts.at_ends[1]:.1%}"),
    ]
    if facts.class_shares is None:
        rows.append(("segmentations", "none"))
    else:
        rows.append(("segmentations", "share of the voxels of each class"))
        rows += [
            (f"  {number}", f"{share:.2%}")
            for number, share in enumerate(facts.class_shares)
            if share > 0
        ]
    return rows + unreadable_rows(facts.unreadable)
