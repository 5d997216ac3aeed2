"""What a data set holds: counts, sizes, channels, statistics, unreadable files, and a picture."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mim_jax.data.contact_sheet import contact_sheet
from mim_jax.data.decode import UnreadableImage, choose_backend, decode_image
from mim_jax.data.order import permuted_indices
from mim_jax.data.probe import ImageFacts, probe_image
from mim_jax.data.records import place_of, record_of
from mim_jax.data.sources import Source
from mim_jax.data.table import TableSource
from mim_jax.data.table_schema import CATEGORICAL

_SAMPLE_SEED = 0
_MAX_THREADS = 16
_SHEET_IMAGES = 64
_CLASSES_SHOWN = 40
_UNREADABLE_SHOWN = 20
_VALUES_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class SourceFacts:
    """What `inspect_source` found.

    Attributes:
        name: of the source.
        count: number of examples.
        sampled: number of examples that were looked at, and whose header could be read; sizes,
            channels, bits and bytes are theirs, and mean and std of those that could be decoded.
        num_classes: None if unlabelled.
        class_names: in the order of the labels, None if unlabelled or unknown.
        multi_label: whether an example may have several labels.
        class_counts: examples of each class, None if unlabelled.
        counted: number of examples in which the classes were counted: all of them where labels
            are known without reading images, else the sample.
        heights: smallest, median and largest, in pixels.
        widths: smallest, median and largest, in pixels.
        channels: the most common number, without alpha.
        channel_counts: how many files have each number of channels, alpha included.
        bits: 16 if any file has more than 8 bits a sample, else 8.
        mean: of each of `channels`, between 0 and 1, every image counting the same.
        std: likewise.
        unreadable: why, for each image of the sample that cannot be read; names it.
        bytes_per_image: mean size of the encoded images; None for images in memory.
    """

    name: str
    count: int
    sampled: int
    num_classes: int | None
    class_names: tuple[str, ...] | None
    multi_label: bool
    class_counts: tuple[int, ...] | None
    counted: int
    heights: tuple[int, int, int]
    widths: tuple[int, int, int]
    channels: int
    channel_counts: dict[int, int]
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: tuple[str, ...]
    bytes_per_image: int | None


def inspect_source(
    source: Source, sample: int | None = 512, *, channels: int | None = None
) -> SourceFacts:
    """Return facts about a source, from a sample that is the same in every run.

    Files are looked at as they are, in their own channels and bits, not as the source would
    convert them. Images with another number of channels than the most common one are converted
    for the statistics as `decode_image` does; where it refuses, they are named as unreadable.

    Args:
        source: see `open_source`.
        sample: number of examples to look at; None for all.
        channels: for the statistics; None for the most common number in the files.

    Raises:
        ValueError: an empty source, a sample below 1, or no readable image in the sample.
    """
    indices = sample_indices(source, sample)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        looks, unreadable = _readable(pool.map(_caught(lambda i: _look(source, i)), indices))
        if not looks:
            raise ValueError(
                f"none of {len(indices)} images of {source.name} can be read; the first: "
                f"{unreadable[0]}"
            )
        stored = collections.Counter(look.facts.channels for look in looks)
        bits = max(look.facts.bits for look in looks)
        if channels is None:
            channels = _usual_channels(source, looks, stored)
        moments, unsuitable = _readable(
            pool.map(_caught(lambda look: _moments(source, look.index, channels, bits)), looks)
        )
    mean, std = _mean_and_std(moments, channels)
    class_counts, counted = _class_counts(source, looks)
    sizes = [look.size for look in looks if look.size is not None]
    return SourceFacts(
        name=source.name,
        count=len(source),
        sampled=len(moments),
        num_classes=source.num_classes,
        class_names=source.class_names,
        multi_label=bool(getattr(source, "multi_label", False)),
        class_counts=class_counts,
        counted=counted,
        heights=spread([look.facts.height for look in looks]),
        widths=spread([look.facts.width for look in looks]),
        channels=channels,
        channel_counts=dict(sorted(stored.items())),
        bits=bits,
        mean=mean,
        std=std,
        unreadable=tuple(unreadable + unsuitable),
        bytes_per_image=round(sum(sizes) / len(sizes)) if sizes else None,
    )


def sample_indices(source: Source, sample: int | None) -> list[int]:
    """Return the sorted indices of a random sample, the same in every run; all for None.

    Raises:
        ValueError: an empty source, or a sample below 1.
    """
    if not len(source):
        raise ValueError(f"{source.name} has no examples to look at")
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, or None for all examples, got {sample}")
    if sample is None or sample >= len(source):
        return list(range(len(source)))
    positions = np.arange(sample, dtype=np.int64)
    return np.sort(permuted_indices(positions, len(source), _SAMPLE_SEED, epoch=0)).tolist()


def source_sheet(source: Source, limit: int = _SHEET_IMAGES) -> np.ndarray:
    """Return a contact sheet of a sample of a source, with its labels: uint8 `[h, w, 3]`.

    Raises:
        ValueError: an empty source, or no readable image in the sample.
    """
    images, captions = [], []
    indices = sample_indices(source, limit)
    for index in indices:
        try:
            element = source[index]
        except UnreadableImage:
            continue
        images.append(element["image"])
        captions.append(_caption(element.get("label"), source.class_names))
    if not images:
        raise ValueError(f"none of {len(indices)} images of {source.name} can be read")
    return contact_sheet(images, captions)


def facts_table(facts: SourceFacts) -> Table:
    """Return the facts as lines for a person."""
    return table_of(_rows(facts))


def table_of(rows: Iterable[tuple[str, str]]) -> Table:
    """Return lines of a name and a value as a table."""
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a file may be called [bold].png
    return table


def schema_table(source: TableSource) -> Table:
    """Return the columns of a table for a person, with the share of cells missing in this split."""
    table = Table("column", "kind", "values, or mean and standard deviation", "missing")
    for column, missing in zip(source.schema.columns, source.missing.mean(axis=0), strict=True):
        content = f"{column.mean:.6g} ± {column.std:.6g}"
        if column.kind == CATEGORICAL:
            shown = ", ".join(map(str, column.values[:_VALUES_SHOWN]))
            more = ", ..." if len(column.values) > _VALUES_SHOWN else ""
            content = f"{len(column.values)}: {shown}{more}"
        table.add_row(*map(Text, (column.name, column.kind, content, f"{missing:.1%}")))
    return table


@dataclasses.dataclass(frozen=True)
class _Look:
    """One example without its pixels: `size` in bytes, None if it has no file."""

    index: int
    facts: ImageFacts
    label: Any
    size: int | None


def _look(source: Source, index: int) -> _Look:
    record = record_of(source, index)
    if record is None:
        element = source[index]
        image = element["image"]
        height, width, channels = image.shape
        return _Look(
            index,
            ImageFacts(height, width, channels, 8 * image.itemsize),
            element.get("label"),
            None,
        )
    try:
        facts = probe_image(record["image"])
    except UnreadableImage as error:
        raise UnreadableImage(f"{place_of(source, index, record)}: {error}") from error
    return _Look(index, facts, record.get("label"), len(record["image"]))


def _moments(source: Source, index: int, channels: int, bits: int) -> np.ndarray:
    """Return the means of the samples and of their squares of one image, float64 `[2, channels]`.

    Raises:
        UnreadableImage: it cannot be decoded into this number of channels; names it.
    """
    record = record_of(source, index)
    if record is None:
        image = source[index]["image"]
    else:
        try:
            image = decode_image(record["image"], channels, choose_backend(), bits)
        except UnreadableImage as error:
            raise UnreadableImage(f"{place_of(source, index, record)}: {error}") from error
    values = np.arange(np.iinfo(image.dtype).max + 1) / np.iinfo(image.dtype).max
    moments = np.empty((2, image.shape[2]))
    for channel in range(image.shape[2]):
        # A histogram is exact, and quicker than floating-point numbers of every pixel.
        counts = np.bincount(image[..., channel].ravel(), minlength=len(values))
        moments[:, channel] = counts @ values, counts @ values**2
    return moments / image[..., 0].size


def _mean_and_std(
    moments: Sequence[np.ndarray], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation over all images from the moments of each."""
    mean, square = np.mean(moments, axis=0) if moments else np.full((2, channels), np.nan)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return tuple(mean.tolist()), tuple(std.tolist())


def _usual_channels(
    source: Source, looks: Sequence[_Look], stored: "collections.Counter[int]"
) -> int:
    """Return the most common number of channels, without alpha where these are pictures."""
    usual = max(stored, key=lambda channels: (stored[channels], channels))
    if usual not in (2, 4):
        return usual
    record = record_of(source, next(look.index for look in looks if look.facts.channels == usual))
    try:
        # Bands of measurements are refused here; of a picture, alpha is dropped.
        decode_image(record["image"] if record else b"", usual - 1, choose_backend())
    except UnreadableImage:
        return usual
    return usual - 1


def _class_counts(source: Source, looks: Sequence[_Look]) -> tuple[tuple[int, ...] | None, int]:
    """Return the examples of each class, and in how many examples they were counted."""
    if source.num_classes is None:
        return None, 0
    known = getattr(source, "class_counts", None)
    if known is not None:
        return tuple(known), len(source)
    labels = getattr(source, "labels", None)
    if labels is None:
        labels = [look.label for look in looks]
    counts = np.zeros(source.num_classes, np.int64)
    for label in labels:
        if isinstance(label, np.ndarray) and label.ndim:
            counts += label
        else:
            counts[label] += 1
    return tuple(counts.tolist()), len(labels)


def _caught(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that gives an `UnreadableImage` back as its result."""

    def call(argument: Any) -> Any:
        try:
            return function(argument)
        except UnreadableImage as error:
            return error

    return call


def _readable(results: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Return the results, and apart from them the messages of what was unreadable."""
    found, errors = [], []
    for result in results:
        if isinstance(result, UnreadableImage):
            errors.append(str(result))
        else:
            found.append(result)
    return found, errors


def spread(values: Sequence[int]) -> tuple[int, int, int]:
    """Return the smallest, median and largest of some sizes."""
    return min(values), int(np.median(values)), max(values)


def _caption(label: Any, class_names: Sequence[str] | None) -> str:
    if label is None:
        return ""
    labels = np.flatnonzero(label).tolist() if isinstance(label, np.ndarray) else [label]
    return ", ".join(class_names[i] if class_names else str(i) for i in labels)


def _rows(facts: SourceFacts) -> list[tuple[str, str]]:
    heights, widths = (" / ".join(map(str, s)) for s in (facts.heights, facts.widths))
    stored = ", ".join(f"{n} with {c}" for c, n in facts.channel_counts.items())
    rows = [
        ("examples", f"{facts.count:,}"),
        ("looked at", f"{facts.sampled:,}" + (", all" if facts.sampled == facts.count else "")),
        ("height, min / median / max", heights),
        ("width, min / median / max", widths),
        ("channels", f"{facts.channels} (files: {stored})"),
        ("bits a sample", str(facts.bits)),
        ("mean, of 1", ", ".join(f"{x:.4f}" for x in facts.mean)),
        ("standard deviation", ", ".join(f"{x:.4f}" for x in facts.std)),
    ]
    if facts.bytes_per_image is not None:
        total = facts.bytes_per_image * facts.count / 1e6
        exact = "" if facts.sampled == facts.count else "about "
        rows.append(("size", f"{facts.bytes_per_image:,} bytes an image, {exact}{total:,.1f} MB"))
    return rows + unreadable_rows(facts.unreadable) + _class_rows(facts)


def unreadable_rows(unreadable: Sequence[str]) -> list[tuple[str, str]]:
    """Return lines of a table: how many are unreadable, and why the first of them are."""
    rows = [("unreadable", str(len(unreadable)))]
    rows += [("", line) for line in unreadable[:_UNREADABLE_SHOWN]]
    if len(unreadable) > _UNREADABLE_SHOWN:
        rows.append(("", f"and {len(unreadable) - _UNREADABLE_SHOWN} more"))
    return rows


def _class_rows(facts: SourceFacts) -> list[tuple[str, str]]:
    if facts.class_counts is None:
        return [("labels", "none")]
    where = "all examples" if facts.counted == facts.count else f"{facts.counted:,} examples"
    kind = "classes, several an example" if facts.multi_label else "classes"
    rows = [(kind, f"{facts.num_classes}, counted in {where}")]
    names = facts.class_names or tuple(map(str, range(len(facts.class_counts))))
    by_count = sorted(zip(facts.class_counts, names), key=lambda pair: -pair[0])
    shown = by_count[:_CLASSES_SHOWN]
    rows += [(f"  {name}", f"{count:,}") for count, name in shown]
    if len(by_count) > len(shown):
        rows.append(("", f"and {len(by_count) - len(shown)} more, down to {by_count[-1][0]:,}"))
    return rows
