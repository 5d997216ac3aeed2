"""Fixed sine-cosine position tables."""

import math
from collections.abc import Sequence

import numpy as np


def sincos_positions(grid: Sequence[int], width: int, leading_tokens: int = 0) -> np.ndarray:
    """The 2-D sine-cosine table of the MAE code, float32 `[leading_tokens + tokens, width]`.

    The first half of the channels encodes the column and the second half the row; inside a half
    all sines come before all cosines, with frequencies `10000^(-k / (width / 4))`. Computed in
    float64. Leading tokens (a class token) get zeros.

    Raises:
        ValueError: if `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}.")
    rows, columns = grid
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    column, row = np.meshgrid(np.arange(columns), np.arange(rows))  # each [rows, columns]
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1).astype(np.float64) * frequencies  # [L, width / 4]
        halves += [np.sin(angles), np.cos(angles)]
    table = np.concatenate(halves, axis=1).astype(np.float32)
    assert table.shape == (math.prod(grid), width)
    return np.concatenate([np.zeros((leading_tokens, width), np.float32), table])
