"""Weights by a formula, for frozen networks that are too large to be stored in a golden case."""

import numpy as np


def formula_weights(shapes: dict[str, tuple[int, ...]], constants=()) -> dict[str, np.ndarray]:
    """A state dict of given shapes by official key; `constants` are arrays that stay as given."""
    constants = dict(constants)
    return {
        key: constants.get(key, _weight(k, key, shapes[key]))
        for k, key in enumerate(sorted(shapes))
    }


def _weight(k: int, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    i = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64)
    u = np.sin(i * 12.9898 + (k + 1) * 78.233) * 43758.5453
    u = (u - np.floor(u)).reshape(shape)
    if key.endswith("running_var"):
        value = 0.5 + u
    elif key.endswith("running_mean"):
        value = 0.4 * (u - 0.5)
    elif key.startswith("lin"):
        value = 2 * u / shape[1]
    elif len(shape) == 1 and "prelu" in key:
        value = 0.1 + 0.3 * u
    elif len(shape) == 1 and key.endswith("weight"):
        value = 0.8 + 0.4 * u
    elif len(shape) == 1:
        value = 0.2 * (u - 0.5)
    else:
        value = (u - 0.5) * np.sqrt(12) * np.sqrt(2 / np.prod(shape[1:]))
    return value.astype(np.float32)
