"""Records: examples whose image is still the bytes of its file."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mim_jax.data.decode import UnreadableImage, decode_image

Record = dict[str, Any]
"""`image` bytes of an image file; optional `label`, an int or a list of ints; optional `name`."""


def record_of(source: Any, index: int) -> Record | None:
    """Return the record of one example, None if the source holds no files (arrays in memory).

    Raises:
        UnreadableImage: the file cannot be read; names it.
    """
    read = getattr(source, "record", None)
    return None if read is None else read(index)


def place_of(source: Any, index: int, record: Record) -> str:
    """Return where an example comes from, for messages."""
    return record.get("name") or f"{source.name}, example {index}"


def decoded(
    record: Record,
    place: str,
    num_classes: int | None,
    channels: int,
    bits: int,
    backend: str,
) -> dict[str, Any]:
    """Return the element of a record, as `Source` promises it.

    Args:
        record: its image and label.
        place: where the record lies, for messages.
        num_classes: length of the label vector where the label is a list.
        channels: of the decoded image.
        bits: 8 or 16, of the decoded image.
        backend: `opencv` or `pillow`.

    Raises:
        UnreadableImage: the image cannot be decoded; names `place`.
        ValueError: a label that the classes do not have.
    """
    try:
        image = decode_image(record["image"], channels, backend, bits)
    except UnreadableImage as error:
        raise UnreadableImage(f"{place}: {error}") from error
    element: dict[str, Any] = {"image": image}
    label = record.get("label")
    if isinstance(label, list | tuple):
        element["label"] = multi_hot(label, num_classes, place)
    elif label is not None:
        element["label"] = int(label)
    return element


def multi_hot(labels: Sequence[int], num_classes: int | None, place: str) -> np.ndarray:
    """Return uint8 `[num_classes]`, 1 at each of `labels`.

    Raises:
        ValueError: the number of classes is not known, or a label lies beyond it.
    """
    if num_classes is None or not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"{place}: the labels {list(labels)} do not fit {num_classes} classes")
    vector = np.zeros(num_classes, np.uint8)
    vector[list(labels)] = 1
    return vector
