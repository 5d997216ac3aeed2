"""Segmentation: the class of every pixel of an image, and of every patch."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mim_jax.data.samples import broken_is_unreadable

IGNORED_PIXEL = 255
"""Of a pixel that has no class; smaller numbers are classes."""

IGNORED_PATCH = -1
"""Of a patch that has no class."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_BITS, _COLOUR = 24, 25  # where a PNG's header says them
_GREY, _PALETTE = 0, 3


def segmentation_of(source: Any, index: int) -> np.ndarray | None:
    """Return the class of every pixel of an example, None if the source does not know them.

    Returns:
        uint8 `[height, width]`, of the size of the example's image; `IGNORED_PIXEL` for none.

    Raises:
        ValueError: a map that cannot be read or does not fit its image; names it.
    """
    read = getattr(source, "segmentation", None)
    return None if read is None else read(index)


def decode_map(data: bytes) -> np.ndarray:
    """Return the classes in the bytes of a PNG: its grey values, or the numbers of its palette.

    Returns:
        uint8 `[height, width]`.

    Raises:
        ValueError: no PNG, a broken one, or one of another kind, whose values are no classes.
    """
    if not data.startswith(_PNG_START) or len(data) <= _COLOUR:
        raise ValueError("it is not a PNG")
    # A decoder stretches grey of fewer bits to 0..255, and turns colour into anything.
    if data[_COLOUR] != _PALETTE and (data[_COLOUR], data[_BITS]) != (_GREY, 8):
        raise ValueError(
            f"it is a PNG with {data[_BITS]} bits a sample and colour type {data[_COLOUR]}; a map "
            "of classes has one channel: grey with 8 bits, or a palette"
        )
    with broken_is_unreadable(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.array(image, np.uint8)


def patch_classes(classes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the class that most pixels of a patch have, for each patch of a grid.

    Pixels without a class do not count, but a patch in which they are more than half has none
    itself. Of classes with equally many pixels the smallest number is taken.

    Args:
        classes: uint8 `[height, width]`, `IGNORED_PIXEL` for none.
        grid: patches along height and width, which they divide.

    Returns:
        int32 `[patches]`, row by row; `IGNORED_PATCH` for none.

    Raises:
        ValueError: a grid that does not divide the map.
    """
    height, width = classes.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise ValueError(f"a grid of {rows} x {columns} patches does not divide {height} x {width}")
    cells = classes.reshape(rows, height // rows, columns, width // columns).swapaxes(1, 2)
    pixels = cells.reshape(rows * columns, -1).astype(np.int64)
    place = np.arange(len(pixels))[:, None] * (IGNORED_PIXEL + 1)
    size = len(pixels) * (IGNORED_PIXEL + 1)
    counts = np.bincount((pixels + place).ravel(), minlength=size).reshape(len(pixels), -1)
    ignored = 2 * counts[:, IGNORED_PIXEL] > pixels.shape[1]
    return np.where(ignored, IGNORED_PATCH, counts[:, :IGNORED_PIXEL].argmax(1)).astype(np.int32)
