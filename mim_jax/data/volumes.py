"""Volumes that are read in parts: what a source of scans gives in place of an image."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import ml_collections
import numpy as np

from mim_jax.data.stages import stage

Box = tuple[slice, slice, slice]

_PROBES = 512
_ROUNDS = 8
_LARGEST = np.iinfo(np.uint16).max

CENTRES = ("image", "segmentation")
"""What tells foreground from background when the centre of a crop is drawn."""


class Volume(Protocol):
    """A volume of samples or classes that is read in parts.

    Attributes:
        shape: height, width and depth in voxels; of scans, to the right, to the front, and up.
    """

    shape: tuple[int, int, int]

    def read(self, box: Box) -> np.ndarray:
        """Return the voxels of a box inside the volume, `[height, width, depth]`."""
        ...

    def at(self, points: np.ndarray) -> np.ndarray:
        """Return the values `[points]` at (or closest to) whole voxels, int `[points, 3]`."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayVolume:
    """A volume in memory.

    Attributes:
        voxels: uint16 samples or uint8 classes, `[height, width, depth]`.
    """

    voxels: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Volume`."""
        height, width, depth = self.voxels.shape
        return height, width, depth

    def read(self, box: Box) -> np.ndarray:
        """See `Volume`."""
        return self.voxels[box]

    def at(self, points: np.ndarray) -> np.ndarray:
        """See `Volume`."""
        return self.voxels[tuple(points.T)]


@dataclasses.dataclass(frozen=True)
class VolumeCrops:
    """Several random crops of one volume, each augmented on its own (Hi-End-MAE; MONAI's names).

    The centre of a crop is a voxel of the foreground with the probability `foreground`, else one
    of the background, each drawn uniformly (`RandCropByPosNegLabelD`); it is moved so that the
    crop lies in the volume. A voxel is foreground if its value, or its class, is above 0. It is
    found by trying random voxels, so that no volume is read as a whole; where 4,096 tries find
    none, any voxel serves. A volume that is smaller than the crop is filled up with 0 at its ends.

    Then come flips of each axis, a turn by 90, 180 or 270 degrees in the plane of the first two
    axes, and of the samples v, which are in [0, 1], `v * (1 + u)` and `v + u`.

    Attributes:
        size: height, width and depth of a crop.
        views: crops of a volume.
        foreground: probability of a centre in the foreground.
        centre: one of `CENTRES`; with "segmentation" the crops of the classes come as well.
        flip: probability of a flip, for each axis.
        rotate: probability of a turn; needs equal height and width.
        scale: largest u of `v * (1 + u)`.
        scale_probability: how often it is drawn.
        shift: largest u of `v + u`.
        shift_probability: how often it is drawn.
    """

    size: tuple[int, int, int]
    views: int = 8
    foreground: float = 0.75
    centre: str = "image"
    flip: float = 0.5
    rotate: float = 0.3
    scale: float = 0.1
    scale_probability: float = 0.1
    shift: float = 0.1
    shift_probability: float = 0.1

    whole_examples = True

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.views < 1:
            raise ValueError(f"data.volume.views is {self.views}; it must be at least 1.")
        if self.centre not in CENTRES:
            raise ValueError(
                f"data.volume.centre is {self.centre!r}; known are {', '.join(CENTRES)}."
            )
        if self.rotate and self.size[0] != self.size[1]:
            raise ValueError(
                f"crops of {self.size} voxels cannot be turned in the plane of the first two axes; "
                "set data.volume.rotate to 0, or two equal sides in data.image_size."
            )
        for name in ("foreground", "flip", "rotate", "scale_probability", "shift_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"data.volume.{name} is {getattr(self, name)}; it is a probability."
                )

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return `image` uint16 `[views, height, width, depth, 1]`, perhaps `segmentation` uint8.

        Args:
            example: `image`, and `segmentation` if the centres are drawn by it: `Volume`s.
            rng: gives all the randomness.

        Raises:
            ValueError: a segmentation that is not there, or of another shape than its image.
        """
        volume, classes = example["image"], None
        if self.centre == "segmentation":
            classes = segmentation_in(example)
        views = [self._view(volume, classes, rng) for _ in range(self.views)]
        return {name: np.stack([view[name] for view in views]) for name in views[0]}

    def _view(
        self, volume: Volume, classes: Volume | None, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        wanted = rng.random() < self.foreground
        centre = drawn_voxel(volume if classes is None else classes, wanted, rng)
        start = [
            min(max(int(middle) - side // 2, 0), max(whole - side, 0))
            for middle, side, whole in zip(centre, self.size, volume.shape, strict=True)
        ]
        with stage("read"):
            arrays = {"image": read_filled(volume, start, self.size)}
            if classes is not None:
                arrays["segmentation"] = read_filled(classes, start, self.size)
        flips = tuple(axis for axis in range(3) if rng.random() < self.flip)
        turns = int(rng.integers(1, 4)) if rng.random() < self.rotate else 0
        arrays = {name: np.rot90(np.flip(x, flips), turns) for name, x in arrays.items()}
        arrays["image"] = self._shaded(arrays["image"], rng)[..., None]
        return arrays

    def _shaded(self, voxels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        factor, offset = 1.0, 0.0
        if rng.random() < self.scale_probability:
            factor += rng.uniform(-self.scale, self.scale)
        if rng.random() < self.shift_probability:
            offset = rng.uniform(-self.shift, self.shift)
        if factor == 1.0 and offset == 0.0:
            return voxels
        shaded = voxels.astype(np.float32) * factor + offset * _LARGEST
        return np.clip(np.rint(shaded), 0, _LARGEST).astype(np.uint16)


@dataclasses.dataclass(frozen=True)
class VolumeCentre:
    """The middle of a volume, filled up with 0 where the volume is smaller.

    Attributes:
        size: height, width and depth.
        segmentation: give the classes of the voxels as well.
    """

    size: tuple[int, int, int]
    segmentation: bool = False

    whole_examples = True

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """Return `image` uint16 `[height, width, depth, 1]`, perhaps `segmentation` uint8.

        Raises:
            ValueError: a segmentation that is not there, or of another shape than its image.
        """
        del rng
        volume = example["image"]
        start = [
            max(whole - side, 0) // 2 for side, whole in zip(self.size, volume.shape, strict=True)
        ]
        arrays = {"image": read_filled(volume, start, self.size)[..., None]}
        if self.segmentation:
            arrays["segmentation"] = read_filled(segmentation_in(example), start, self.size)
        return arrays


def volume_crops(data: ml_collections.ConfigDict) -> VolumeCrops:
    """The training crops that `config.data` describes."""
    return VolumeCrops(tuple(data.image_size), **data.volume)


def volume_centre(data: ml_collections.ConfigDict) -> VolumeCentre:
    """What evaluation sees by `config.data`."""
    return VolumeCentre(tuple(data.image_size), data.volume.centre == "segmentation")


def segmentation_in(example: Mapping[str, Any]) -> Volume:
    """The segmentation of an example.

    Raises:
        ValueError: if there is none, or it has another shape than the image.
    """
    volume, classes = example["image"], example.get("segmentation")
    name = example.get("name", "a volume")
    if classes is None:
        raise ValueError(
            f"{name} has no segmentation, which data.volume.centre=segmentation asks for; see "
            "mim_jax.data.nifti for where it is looked for."
        )
    if tuple(classes.shape) != tuple(volume.shape):
        raise ValueError(
            f"the segmentation of {name} has {classes.shape} voxels, but its image "
            f"{volume.shape}; both must have the same grid"
        )
    return classes


def drawn_voxel(volume: Volume, foreground: bool, rng: np.random.Generator) -> np.ndarray:
    """A random voxel above 0 (foreground) or of the others, int64 `[3]`; see `VolumeCrops`."""
    for _ in range(_ROUNDS):
        points = (rng.random((_PROBES, 3)) * volume.shape).astype(np.int64)
        found = np.flatnonzero((volume.at(points) > 0) == foreground)
        if len(found):
            return points[found[0]]
    return points[0]


def read_filled(volume: Volume, start: list[int], size: tuple[int, int, int]) -> np.ndarray:
    """A box of `size` voxels from `start` on, with 0 behind the end of the volume."""
    ends = [min(a + side, whole) for a, side, whole in zip(start, size, volume.shape, strict=True)]
    top, left, front = (slice(a, b) for a, b in zip(start, ends, strict=True))
    voxels = volume.read((top, left, front))
    lack = [(0, side - have) for side, have in zip(size, voxels.shape, strict=True)]
    return np.pad(voxels, lack) if any(behind for _, behind in lack) else voxels


def _check_size(size: tuple[int, ...]) -> None:
    if len(size) != 3 or min(size) < 1:
        raise ValueError(
            f"data.image_size is {tuple(size)}; for volumes give height, width and depth in voxels."
        )
