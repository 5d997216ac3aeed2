"""Scans as NIfTI files, by nibabel: turned to RAS, resampled, windowed, and read in parts.

A file is opened when an example is asked for, and of it only the part that a crop needs is read and
resampled. Compressed files cannot be read in parts, so they are unpacked once into a folder of the
cache.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import parse_qsl

import nibabel as nib
import numpy as np

from mim_jax.data.samples import UnreadableImage
from mim_jax.data.splits import SPLIT_SPELLINGS
from mim_jax.data.volumes import Box

SUFFIXES = (".nii", ".nii.gz")
CACHE_VARIABLE = "MIM_JAX_VOLUME_CACHE"
"""Names the folder of unpacked files; an empty text keeps none, and such files are read whole."""

MAPS = "segmentation"
_NNUNET = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
_NNUNET_CHANNEL = "_0000"
_LARGEST = np.iinfo(np.uint16).max


@dataclasses.dataclass(frozen=True)
class NiftiOptions:
    """How scans are read; written behind the folder, `nifti:FOLDER?spacing=1,1,2&window=0,500`.

    Attributes:
        spacing: of the voxels in millimetres, to the right, to the front, and up; 0 keeps that of
            the file.
        window: values that become 0 and 1; what lies beyond is cut off.
        exclude: files in whose path below the folder one of these texts is found are left out.
        assume_ras: take files without orientation as RAS, rather than refuse them.
    """

    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
    window: tuple[float, float] = (-175.0, 250.0)
    exclude: tuple[str, ...] = ()
    assume_ras: bool = False

    def __post_init__(self) -> None:
        if len(self.spacing) != 3 or min(self.spacing) < 0:
            raise ValueError(f"spacing={self.spacing} must be three numbers, none negative")
        if len(self.window) != 2 or not self.window[0] < self.window[1]:
            raise ValueError(f"window={self.window} must be two numbers, the smaller first")

    @classmethod
    def from_text(cls, text: str) -> "NiftiOptions":
        """The options as written behind the question mark.

        Raises:
            ValueError: an unknown option or a bad value; lists the known ones.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for name, value in parse_qsl(text, keep_blank_values=True):
            if name not in known:
                raise ValueError(f"unknown option {name!r} of nifti:; known are {', '.join(known)}")
            try:
                if name == "exclude":
                    values[name] = tuple(part for part in value.split(",") if part)
                elif name == "assume_ras":
                    values[name] = {"1": True, "true": True, "0": False, "false": False}[
                        value.lower()
                    ]
                else:
                    values[name] = tuple(float(part) for part in value.split(","))
            except (KeyError, ValueError):
                raise ValueError(f"{name}={value} of nifti: is not understood") from None
        return cls(**values)


class NiftiVolume:
    """A scan, or the classes of its voxels, on the grid of the wanted spacing.

    Voxel k of an axis lies at k times the wanted spacing from the first voxel of the file, so the
    first voxels of both grids are one; there are `round((n - 1) * ratio) + 1` of them (MONAI's
    `Spacing`). Samples are interpolated linearly along each axis, classes are those of the
    closest voxel.

    Attributes: as for `Volume`, and
        spacing: of the voxels in millimetres, as it is now.
    """

    def __init__(
        self, path: pathlib.Path, options: NiftiOptions = NiftiOptions(), *, classes: bool = False
    ) -> None:
        """Open a file.

        Args:
            path: of the file.
            options: see `NiftiOptions`.
            classes: the voxels are numbers of classes, at most 255, rather than samples.

        Raises:
            UnreadableImage: a broken file, one of other than three axes, or without orientation;
                names it.
        """
        self._path, self._options, self._classes = path, options, classes
        with _named(path):
            image: Any = nib.load(unpacked(path))
            file_shape = image.shape
            while len(file_shape) > 3 and file_shape[-1] == 1:
                file_shape = file_shape[:-1]
            if len(file_shape) != 3:
                raise UnreadableImage(
                    f"it has {len(file_shape)} axes, {file_shape}, where three are expected; of a "
                    "series, write each volume to a file of its own (nibabel.four_to_three)"
                )
            orientation = _orientation(image, options.assume_ras)
            self._proxy = image.dataobj
        self._extra = len(image.shape) - 3
        self._axes = [int(axis) for axis in np.argsort(orientation[:, 0])]  # of the file, by ours
        self._flipped = [bool(orientation[axis, 1] < 0) for axis in self._axes]
        sizes = nib.affines.voxel_sizes(image.affine)[self._axes]
        self._file_shape = [file_shape[axis] for axis in self._axes]
        self._steps = [  # in voxels of the file
            wanted / size if wanted else 1.0
            for wanted, size in zip(options.spacing, sizes, strict=True)
        ]
        self.spacing = tuple(float(s * step) for s, step in zip(sizes, self._steps, strict=True))
        height, width, depth = (
            round(float((count - 1) / step)) + 1
            for count, step in zip(self._file_shape, self._steps, strict=True)
        )
        self.shape = (height, width, depth)

    def read(self, box: Box) -> np.ndarray:
        """Return a box: samples uint16 (0..65535 over the window), or classes uint8.

        Raises:
            UnreadableImage: a broken file, or classes that are no whole numbers up to 255.
        """
        places = [
            np.minimum(np.arange(part.start, part.stop) * step, count - 1)
            for part, step, count in zip(box, self._steps, self._file_shape, strict=True)
        ]
        if self._classes:
            places = [np.rint(place) for place in places]
        # With its first axis of places, each axis of the file's block is read from `low` on.
        low = [int(place[0]) for place in places]
        high = [int(np.ceil(place[-1])) + 1 for place in places]
        block = self._block([slice(a, b) for a, b in zip(low, high, strict=True)])
        for axis, (place, first) in enumerate(zip(places, low, strict=True)):
            block = _interpolated(block, place - first, axis)
        return self._converted(block)

    def at(self, points: np.ndarray) -> np.ndarray:
        """See `Volume`; the values of the closest voxels of the file."""
        inside = np.rint(np.minimum(points * self._steps, np.array(self._file_shape) - 1))
        index = [
            self._of_file(axis, inside[:, axis].astype(np.int64)) for axis in range(3)
        ]  # by our axes
        by_file = [index[self._axes.index(axis)] for axis in range(3)]
        with _named(self._path):
            raw = self._proxy.get_unscaled()
            values = np.asarray(raw[(*by_file, *(0,) * self._extra)], np.float32)
        return self._converted(values * self._proxy.slope + self._proxy.inter)

    def _of_file(self, axis: int, places: np.ndarray) -> np.ndarray:
        return self._file_shape[axis] - 1 - places if self._flipped[axis] else places

    def _block(self, parts: list[slice]) -> np.ndarray:
        """A part of the file along our axes, float32, or as stored for classes."""
        in_file: list[Any] = [None] * 3
        for axis, part in enumerate(parts):
            if self._flipped[axis]:
                count = self._file_shape[axis]
                part = slice(count - part.stop, count - part.start)
            in_file[self._axes[axis]] = part
        with _named(self._path):
            block = np.asarray(self._proxy[(*in_file, *(0,) * self._extra)], np.float32)
        block = block.transpose(self._axes)
        return np.flip(block, tuple(axis for axis in range(3) if self._flipped[axis]))

    def _converted(self, values: np.ndarray) -> np.ndarray:
        if self._classes:
            whole = np.rint(values)
            if np.any(np.abs(values - whole) > 1e-3) or whole.min() < 0 or whole.max() > 255:
                raise UnreadableImage(
                    f"{self._path}: a segmentation holds whole numbers from 0 to 255, but it has "
                    f"values from {values.min():g} to {values.max():g}"
                )
            return whole.astype(np.uint8)
        low, high = self._options.window
        shares = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0, 1)
        return np.rint(shares * _LARGEST).astype(np.uint16)


class NiftiSource:
    """Scans of a folder; an example has `image` and perhaps `segmentation`, both read in parts.

    Attributes: as for `Source`.
    """

    kind: ClassVar[str] = "volume"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(
        self,
        name: str,
        images: list[pathlib.Path],
        maps: list[pathlib.Path] | None,
        options: NiftiOptions,
    ) -> None:
        """Make a source of these files; `maps` are the segmentations in the same order."""
        self.name = name
        self._images, self._maps, self._options = images, maps, options

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` and, where there are segmentations, `segmentation`: `NiftiVolume`s."""
        path = self._images[index]
        example = {"name": str(path), "image": NiftiVolume(path, self._options)}
        if self._maps is not None:
            example["segmentation"] = NiftiVolume(self._maps[index], self._options, classes=True)
        return example


def open_nifti(text: str, split: str) -> NiftiSource:
    """Open the scans of a folder.

    Splits and segmentations are found in one of three ways:

    - `imagesTr`, `imagesTs` of nnU-Net, with `labelsTr`, `labelsTs` (`case.nii.gz` for
      `case_0000.nii.gz` or `case.nii.gz`);
    - sub-folders `train`, `val`, `test`, with `segmentation/train/...` mirroring them;
    - else all files below the folder are `train`, with `segmentation/...` mirroring them.

    Where one file has a segmentation, all must have one.

    Args:
        text: the folder, and options behind a question mark, see `NiftiOptions`.
        split: name of a split, without slice.

    Raises:
        FileNotFoundError: no folder, or no file in it.
        ValueError: a bad option; a missing segmentation; or a first file that cannot be used.
    """
    folder_text, _, options_text = text.partition("?")
    options = NiftiOptions.from_text(options_text)
    root = pathlib.Path(folder_text).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {folder_text!r} of NIfTI files")
    folder, maps_folder = _folders(root, split)
    images = [
        path
        for path in _files(folder)
        if not (path.is_relative_to(root / MAPS) and folder != root / MAPS)
        and not any(part in str(path.relative_to(root)) for part in options.exclude)
    ]
    if not images:
        raise FileNotFoundError(f"{folder} holds no file {' or '.join(SUFFIXES)}")
    NiftiVolume(images[0], options)  # what is wrong with all is said at once
    maps = _maps(images, folder, maps_folder) if maps_folder.is_dir() else None
    return NiftiSource(f"nifti:{folder_text}:{split}", images, maps, options)


def _folders(root: pathlib.Path, split: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The folder of a split's images, and that of their segmentations."""
    spellings = next((names for names in SPLIT_SPELLINGS if split in names), (split,))
    images, labels = _NNUNET.get(spellings[0], ("", ""))
    if images and (root / images).is_dir():
        return root / images, root / labels
    for name in spellings:
        if (root / name).is_dir():
            return root / name, root / MAPS / name
    if spellings[0] == "train":
        return root, root / MAPS
    raise FileNotFoundError(
        f"{root} has no sub-folder for the split {split!r}; make one, or take a slice of train, "
        "such as 'train[80%:]'"
    )


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = (pathlib.Path(top) / name for top, _, names in os.walk(folder) for name in names)
    return sorted(
        path for path in found if path.name.endswith(SUFFIXES) and not path.name.startswith(".")
    )


def _maps(
    images: list[pathlib.Path], folder: pathlib.Path, maps_folder: pathlib.Path
) -> list[pathlib.Path]:
    maps, missing = [], []
    for image in images:
        stem = str(image.relative_to(folder)).removesuffix(".gz").removesuffix(".nii")
        stems = (stem, stem.removesuffix(_NNUNET_CHANNEL))
        choices = [maps_folder / f"{name}{suffix}" for name in stems for suffix in SUFFIXES]
        found = next((path for path in choices if path.is_file()), None)
        maps.append(found or image)
        missing += [] if found else [image.name]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} volumes have no segmentation in {maps_folder}, such "
            f"as {', '.join(missing[:3])}; add them, or move the folder away"
        )
    return maps


def _orientation(image: Any, assume_ras: bool) -> np.ndarray:
    """Nibabel's orientation of the axes of a file, `[3, 2]`.

    Raises:
        UnreadableImage: if the file does not tell, or its affine is singular.
    """
    affine = image.affine
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UnreadableImage("its affine is missing, not finite or singular; write a proper one")
    codes = [int(image.header[name]) for name in ("sform_code", "qform_code")]
    if not any(codes):
        if not assume_ras:
            raise UnreadableImage(
                "it has no affine (sform_code and qform_code are 0), so its orientation is not "
                "known; write one, or add assume_ras=1 to the source to take its axes as they are"
            )
        return np.array([[0, 1], [1, 1], [2, 1]])
    orientation = nib.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise UnreadableImage("its affine gives no orientation for one of its axes")
    return orientation


def _interpolated(block: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Values at places between the slices of one axis, linearly."""
    low = np.floor(places).astype(np.int64)
    share = (places - low).astype(np.float32)
    if not share.any():
        return np.take(block, low, axis)
    high = np.minimum(low + 1, block.shape[axis] - 1)
    share = share.reshape([-1 if other == axis else 1 for other in range(3)])
    return np.take(block, low, axis) * (1 - share) + np.take(block, high, axis) * share


def unpacked(path: pathlib.Path) -> pathlib.Path:
    """A file that can be read in parts: the file itself, or its unpacked copy in the cache.

    Raises:
        OSError: if it cannot be read, or the copy not be written.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if path.suffix != ".gz" or folder == "":
        return path
    cache = pathlib.Path(folder or _default_cache())
    about = path.stat()
    name = f"{path.resolve()}\0{about.st_size}\0{about.st_mtime_ns}"
    copy = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.nii"
    if copy.is_file():
        return copy
    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache, suffix=".tmp")
    try:
        with gzip.open(path) as packed, os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        os.replace(temporary, copy)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
    return copy


def _default_cache() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "mim_jax" / "volumes"


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Turn any error of reading into `UnreadableImage` that names the file."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UnreadableImage(f"{path}: {reason}") from error
