"""Classes of all voxels of a volume, from overlapping windows (MONAI's `SlidingWindowInferer`)."""

from collections.abc import Callable, Iterator

import numpy as np

from mim_jax.data.volumes import Volume, read_filled

Window = tuple[int, int, int]

Predict = Callable[[np.ndarray], np.ndarray]
"""From windows uint16 `[batch, height, width, depth, 1]` to logits `[..., classes]` float32."""


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows along one axis begin; the last one ends where the volume does.

    Args:
        side: voxels of the volume along the axis.
        window: voxels of the window.
        overlap: share of a window that the next one covers as well, in [0, 1).
    """
    step = max(1, int(window * (1 - overlap)))
    starts = list(range(0, max(side - window, 0) + 1, step))
    if starts[-1] < side - window:
        starts.append(side - window)
    return starts


def predicted_classes(
    volume: Volume, predict: Predict, window: Window, *, overlap: float = 0.5, batch_size: int = 4
) -> np.ndarray:
    """The class with the largest sum of logits over all windows around a voxel.

    Windows are taken in the order of their first axis, and rows that no later window covers are
    decided at once, so that logits are kept for one window's height of the volume, not for all.

    Args:
        volume: read in parts; a smaller one than the window is filled up with 0.
        predict: see `Predict`; always called with `batch_size` windows.
        window: height, width and depth.
        overlap: of neighbouring windows along each axis.
        batch_size: windows in one call.

    Returns:
        uint8 `[height, width, depth]` of the volume's shape.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), got {overlap}")
    shape = tuple(max(side, part) for side, part in zip(volume.shape, window, strict=True))
    rows, columns, depths = (
        window_starts(side, part, overlap) for side, part in zip(shape, window, strict=True)
    )
    classes = np.zeros(shape, np.uint8)
    sums: np.ndarray | None = None
    for number, row in enumerate(rows):
        places = [(column, depth) for column in columns for depth in depths]
        for (column, depth), logits in _logits(volume, predict, window, row, places, batch_size):
            if sums is None:
                sums = np.zeros((window[0], *shape[1:], logits.shape[-1]), np.float32)
            sums[:, column : column + window[1], depth : depth + window[2]] += logits
        assert sums is not None, "there is at least one window"
        last = number + 1 == len(rows)
        done = window[0] if last else rows[number + 1] - row
        classes[row : row + done] = sums[:done].argmax(axis=-1)
        sums[:-done] = sums[done:].copy()
        sums[-done:] = 0
    height, width, depth = volume.shape
    return classes[:height, :width, :depth]


def _logits(
    volume: Volume,
    predict: Predict,
    window: Window,
    row: int,
    places: list[tuple[int, int]],
    batch_size: int,
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """The logits of the windows that begin in one row, with their places along the other axes."""
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        windows = np.stack([read_filled(volume, [row, *place], window) for place in some])
        lack = batch_size - len(some)
        filled = np.pad(windows, [(0, lack), (0, 0), (0, 0), (0, 0)])[..., None]
        yield from zip(some, predict(filled), strict=False)
