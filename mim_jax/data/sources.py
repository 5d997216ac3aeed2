"""Sources: random access to images with labels, opened by name."""

import difflib
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mim_jax.data.decode import check_channels
from mim_jax.data.embedded import read_embedded
from mim_jax.data.fashion_mnist import CLASS_NAMES, read_fashion_mnist
from mim_jax.data.folder import open_folder
from mim_jax.data.order import permuted_indices
from mim_jax.data.splits import slice_of, split_name_and_bounds
from mim_jax.data.tfds_source import open_tfds

# Slices of a folder are taken of this order, the same in every run.
_FOLDER_SLICE_SEED = 0

_VALID_NAMES = (
    "'embedded' (the sample set in the package), 'fashion_mnist' (the full set), "
    "'tfds:NAME[/CONFIG][:VERSION]', 'folder:PATH', or the path of an existing image folder"
)


class Source(Protocol):
    """Random access to examples. It can be pickled, and reads an example only when asked for it.

    Attributes:
        name: for messages and logs.
        num_classes: None if the examples have no label.
        class_names: in the order of the labels; None if unlabelled or unknown.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` uint8 `[height, width, channels]` (0..255) and, if labelled, `label` int.

        Raises:
            UnreadableImage: (`mim_jax.data.decode`) this example cannot be read; names it.
        """
        ...


class ArraySource:
    """Images in memory.

    Attributes: as for `Source`.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        """Wrap arrays.

        Args:
            name: for messages.
            images: uint8 `[n, height, width, channels]`.
            labels: integers `[n]`, or None.
            class_names: in the order of the labels; without them, `num_classes` is the largest
                label plus one.

        Raises:
            ValueError: arrays of another type or shape, or of different lengths.
        """
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{name}: images must be uint8 [n, height, width, channels], got {images.dtype} "
                f"{images.shape}"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(
                f"{name}: labels of shape {labels.shape} do not match {len(images)} images"
            )
        self.name = name
        self.class_names = class_names if labels is not None else None
        self.num_classes: int | None = None
        if labels is not None:
            self.num_classes = len(class_names) if class_names else int(labels.max()) + 1
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` uint8 `[height, width, channels]` and, if labelled, `label`."""
        if self._labels is None:
            return {"image": self._images[index]}
        return {"image": self._images[index], "label": int(self._labels[index])}


class SubsetSource:
    """Some examples of another source.

    Attributes: as for `Source`.
    """

    def __init__(self, source: Source, name: str, indices: range | np.ndarray) -> None:
        """Select `indices` of `source`, in their order, under a new name."""
        self.name = name
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example at one position of the subset."""
        return self._source[int(self._indices[index])]


def open_source(
    name: str, split: str = "train", *, channels: int | None = None, backend: str = "auto"
) -> Source:
    """Open a data set by name.

    Names:
        embedded: 4,000 train and 1,000 test images of Fashion-MNIST, in the package.
        fashion_mnist: the full set, from the Debian package `dataset-fashion-mnist` or from the
            folder in the environment variable `MIM_JAX_FASHION_MNIST`.
        tfds:NAME[/CONFIG][:VERSION][?data_dir=FOLDER]: a TFDS data set prepared as ArrayRecord.
        folder:PATH, or the path of an existing folder: images in a folder, see
            `mim_jax.data.folder.open_folder` for splits and labels.

    A split is a name with an optional slice as in TFDS: `train`, `test`, `train[:90%]`,
    `train[100:200]`, `train[-10%:]`. A folder is sorted by class, so its slices are taken of a
    shuffled order that is the same in every run: each class is found on both sides of a cut.

    Args:
        name: see above.
        split: see above.
        channels: 1 or 3. None keeps the number of the data set (1 for Fashion-MNIST) and means 3
            for a folder.
        backend: decoder of image files: `opencv`, `pillow`, or `auto` for OpenCV where installed.

    Raises:
        ValueError: an unknown name (lists the valid ones and the nearest), or a bad split.
        FileNotFoundError: the data are not there; says how to get or find them.
    """
    if name in _IN_MEMORY:
        return _open_in_memory(name, split, channels)
    if name.startswith("tfds:"):
        return open_tfds(name.removeprefix("tfds:"), split, channels=channels, backend=backend)
    if name.startswith("folder:") or (name and pathlib.Path(name).expanduser().exists()):
        return _open_folder_split(name.removeprefix("folder:"), split, channels, backend)
    nearest = difflib.get_close_matches(name, (*_IN_MEMORY, "tfds:", "folder:"), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown data source {name!r}; use {_VALID_NAMES}.{hint}")


_IN_MEMORY: dict[str, Callable[[str], tuple[np.ndarray, np.ndarray]]] = {
    "embedded": read_embedded,
    "fashion_mnist": read_fashion_mnist,
}


def _open_in_memory(name: str, split: str, channels: int | None) -> Source:
    split_name, bounds = split_name_and_bounds(split)
    images, labels = _IN_MEMORY[name](split_name)
    if channels is not None:
        check_channels(channels)
        images = np.repeat(images, channels, axis=-1)  # the data are grey
    if bounds is not None:
        selected = slice_of(split, bounds, len(images))
        images, labels = (x[selected.start : selected.stop] for x in (images, labels))
    return ArraySource(f"{name}:{split}", images, labels, CLASS_NAMES)


def _open_folder_split(path: str, split: str, channels: int | None, backend: str) -> Source:
    split_name, bounds = split_name_and_bounds(split)
    source = open_folder(path, split_name, channels=channels, backend=backend)
    if bounds is None:
        return source
    selected = slice_of(split, bounds, len(source))
    positions = np.arange(selected.start, selected.stop, dtype=np.int64)
    shuffled = permuted_indices(positions, len(source), _FOLDER_SLICE_SEED, epoch=0)
    return SubsetSource(source, f"{source.name}:{split}", np.sort(shuffled))
