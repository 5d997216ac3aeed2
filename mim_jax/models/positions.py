"""Position tables: fixed sine-cosine ones in 2-D and 3-D, and any table resized to another grid."""

import math
from collections.abc import Sequence

import numpy as np


def sincos_positions(
    grid: Sequence[int], width: int, leading_tokens: int = 0, *, row_first: bool = False
) -> np.ndarray:
    """The 2-D sine-cosine table of the MAE code, float32 `[leading_tokens + tokens, width]`.

    The first half of the channels encodes the column and the second half the row (the other way
    round with `row_first`, as in the CAE code); inside a half
    all sines come before all cosines, with frequencies `10000^(-k / (width / 4))`. Computed in
    float64. Leading tokens (a class token) get zeros.

    A grid of three axes has the table of `sincos_positions_3d`.

    Raises:
        ValueError: if `width` is not divisible by 4, or by 6 for three axes.
    """
    if len(grid) == 3:
        return sincos_positions_3d(grid, width, leading_tokens)
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}.")
    rows, columns = grid
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    column, row = np.meshgrid(np.arange(columns), np.arange(rows))  # each [rows, columns]
    halves = []
    for position in (row, column) if row_first else (column, row):
        angles = position.reshape(-1, 1).astype(np.float64) * frequencies  # [L, width / 4]
        halves += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(halves, axis=1).astype(np.float32)
    assert table.shape == (math.prod(grid), width)
    return np.concatenate([np.zeros((leading_tokens, width), np.float32), table])


def sincos_positions_3d(grid: Sequence[int], width: int, leading_tokens: int = 0) -> np.ndarray:
    """The 3-D sine-cosine table of Hi-End-MAE, float32 `[leading_tokens + tokens, width]`.

    Each third of the channels encodes one axis, in the order of the grid; inside a third all
    sines come before all cosines, with frequencies `10000^(-k / (width / 6))`. Leading tokens get
    zeros.

    Raises:
        ValueError: if `width` is not divisible by 6.
    """
    if width % 6:
        raise ValueError(f"3-D sine-cosine positions need a width divisible by 6, got {width}.")
    frequencies = 10000.0 ** (-np.arange(width // 6, dtype=np.float64) / (width // 6))
    thirds = []
    for position in np.meshgrid(*(np.arange(side) for side in grid), indexing="ij"):
        angles = position.reshape(-1, 1).astype(np.float64) * frequencies  # [L, width / 6]
        thirds += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(thirds, axis=1).astype(np.float32)
    return np.concatenate([np.zeros((leading_tokens, width), np.float32), table])


CUBIC = -0.75
"""The free parameter of PyTorch's bicubic kernel; `jax.image` and Pillow have -0.5."""


def resize_positions(table: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """A table of one grid for another: bicubic over the grid, leading tokens as they are.

    PyTorch's `interpolate(mode="bicubic", align_corners=False)`, which does not widen its kernel
    when it shrinks (MAE code, `util/pos_embed.py`).

    Args:
        table: `[leading_tokens + tokens, width]`, tokens in row-major order.
        old: the table's grid, of two or three axes.
        new: the wanted grid, of as many.

    Returns:
        float32 `[leading_tokens + new tokens, width]`; the table itself for an equal grid.

    Raises:
        ValueError: if the table has fewer rows than the old grid has tokens, or the grids have
            different numbers of axes.
    """
    if tuple(old) == tuple(new):
        return table
    leading = len(table) - math.prod(old)
    if leading < 0:
        raise ValueError(f"a position table of {len(table)} rows has no grid of {tuple(old)}.")
    image = np.asarray(table[leading:], np.float64).reshape(*old, -1)
    image = along_axes([bicubic_matrix(*sides) for sides in _paired(old, new)], image)
    patches = image.reshape(math.prod(new), -1).astype(np.float32)
    return np.concatenate([np.asarray(table[:leading], np.float32), patches])


def along_axes(matrices: Sequence[np.ndarray], array: np.ndarray, first: int = 0) -> np.ndarray:
    """Applies matrices `[new, old]` to as many axes of an array, from the axis `first` on."""
    for axis, matrix in enumerate(matrices, first):
        array = np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
    return array


def _paired(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    if len(old) != len(new):
        raise ValueError(
            f"positions of a grid with {len(old)} axes {tuple(old)} cannot be resized to one with "
            f"{len(new)} {tuple(new)}."
        )
    return list(zip(old, new))


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """PyTorch's bicubic interpolation from `old` to `new` samples as a matrix `[new, old]`."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(centre - (first + offset))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        source = np.clip(first + offset, 0, old - 1)  # the border is repeated
        np.add.at(matrix, (np.arange(new), source), np.where(distance <= 1, near, far))
    return matrix
