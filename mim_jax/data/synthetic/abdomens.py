"""Procedural abdomens: a body and four organs, all of them ellipsoids, two of one brightness.

Organs two and three look alike, so that only their place tells them apart.
"""

import numpy as np

from mim_jax.data.volumes import ArrayVolume

EXAMPLES = {"train": 256, "test": 72}
SIDE = 24

_SEEDS = {"train": 0, "test": 1}
_OFFSETS = ((-0.17, -0.10, 0.12), (0.17, -0.10, 0.12), (-0.12, 0.14, -0.14), (0.14, 0.12, -0.12))
_GREY = (0.5, 0.6, 0.6, 0.8)
_LARGEST = np.iinfo(np.uint16).max


class Abdomens:
    """Volumes of one side; an example has `image` uint16 and `segmentation` uint8.

    Class 0 is all that is no organ; classes 1 to 4 are the organs.

    Attributes: as for `mim_jax.data.sources.Source`.
    """

    kind = "volume"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, split: str, side: int = SIDE) -> None:
        """Make a split of volumes of `side` voxels along each axis."""
        self.name = f"synthetic:abdomens:{side}:{split}"
        self._split, self._side = split, side

    def __len__(self) -> int:
        return EXAMPLES[self._split]

    def __getitem__(self, index: int) -> dict[str, ArrayVolume]:
        """Return the volume of one index."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        rng = np.random.default_rng((_SEEDS[self._split], index))
        places = (np.arange(self._side, dtype=np.float32) + 0.5) / self._side
        body = rng.uniform(0.45, 0.55, 3)
        voxels = np.zeros((self._side,) * 3, np.float32)
        classes = np.zeros(voxels.shape, np.uint8)
        voxels[_inside(places, body, rng.uniform(0.40, 0.46, 3))] = 0.35
        for number, (offset, grey) in enumerate(zip(_OFFSETS, _GREY, strict=True), 1):
            centre = body + offset + rng.uniform(-0.02, 0.02, 3)
            radii = rng.uniform(0.08, 0.12) * rng.uniform(0.8, 1.2, 3)
            organ = _inside(places, centre, radii)
            voxels[organ] = grey * rng.uniform(0.9, 1.1)
            classes[organ] = number
        voxels += 0.04 * rng.standard_normal(voxels.shape, np.float32)
        samples = np.rint(np.clip(voxels, 0, 1) * _LARGEST).astype(np.uint16)
        return {"image": ArrayVolume(samples), "segmentation": ArrayVolume(classes)}


def open_split(split: str, option: str) -> Abdomens:
    """The abdomens of a split.

    Args:
        split: `train` or `test`.
        option: voxels along each axis; 24 if empty.

    Raises:
        ValueError: an option that is no number of at least 12.
    """
    if option and not (option.isdecimal() and int(option) >= 12):
        raise ValueError(f"synthetic:abdomens:{option}: give a side of at least 12 voxels")
    return Abdomens(split, int(option or SIDE))


def _inside(places: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Which voxels lie in an ellipsoid, bool `[side, side, side]`."""
    x, y, z = (((places - middle) / radius) ** 2 for middle, radius in zip(centre, radii))
    return x[:, None, None] + y[:, None] + z < 1
