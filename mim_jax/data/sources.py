"""Sources: random access to images with labels, opened by name."""

import difflib
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mim_jax import object_store
from mim_jax.data.array_record import (
    MANIFEST,
    array_record_copy,
    is_shard_name,
    open_array_record,
)
from mim_jax.data.decode import check_bits
from mim_jax.data.embedded import read_embedded
from mim_jax.data.fashion_mnist import CLASS_NAMES, read_fashion_mnist
from mim_jax.data.folder import open_folder
from mim_jax.data.local_copy import local_copy
from mim_jax.data.mixture import open_mixture
from mim_jax.data.nifti import open_nifti
from mim_jax.data.order import permuted_indices
from mim_jax.data.records import Record, record_of
from mim_jax.data.segmentation import segmentation_of
from mim_jax.data.splits import slice_of, split_name_and_bounds
from mim_jax.data.synthetic import open_synthetic
from mim_jax.data.table import TABLE_SUFFIXES, TableSource, open_table
from mim_jax.data.tar_shards import open_tar
from mim_jax.data.tfds_source import open_tfds

# Slices of files are taken of this order, the same in every run.
_SLICE_SEED = 0
_AT_ONCE = 2**18
_FULL_RANGE_16_OVER_8 = 257  # 65535 / 255

_VALID_NAMES = (
    "'embedded' (the sample set in the package), 'fashion_mnist' (the full set), "
    "'synthetic:NAME' (drawn by formulas), "
    "'tfds:NAME[/CONFIG][:VERSION]', 'folder:PATH', 'array_record:PATTERN', 'tar:PATTERN', "
    "'nifti:FOLDER' (volumes), 'table:FILE' (CSV or Parquet with images), "
    "'mix:SHARE*SOURCE+SHARE*SOURCE', or the path of an existing image folder"
)


class Source(Protocol):
    """Random access to examples. It can be pickled, and reads an example only when asked for it.

    Attributes:
        name: for messages and logs.
        num_classes: None if the examples have no label.
        class_names: in the order of the labels; None if unlabelled or unknown.

    A source may have, and is asked for by `getattr`:
        kind: "image", which is meant without it, "volume" or "table": what transforms its examples
            need.
        multi_label: True if an example may have several labels; without it, False.
        labels: of all examples as an array, where they are known without reading an example.
        record: a method that gives an example with its image still encoded, see
            `mim_jax.data.records.record_of`.
        segmentation: a method that gives the class of every pixel of an example, see
            `mim_jax.data.segmentation.segmentation_of`.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` and, if labelled, `label`; of a table its row as well.

        A volume is a `mim_jax.data.volumes.Volume`. Any other image is uint8 (0..255) or uint16
        (0..65535) `[height, width, channels]`; the label is an int, or a uint8 vector
        `[num_classes]` of 0 and 1 if the source is multi-label.

        Raises:
            UnreadableImage: (`mim_jax.data.decode`) this example cannot be read; names it.
        """
        ...


class ArraySource:
    """Images in memory.

    Attributes: as for `Source`.
    """

    multi_label = False

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
            images: uint8 or uint16 `[n, height, width, channels]`.
            labels: integers `[n]`, or None.
            class_names: in the order of the labels; without them, `num_classes` is the largest
                label plus one.

        Raises:
            ValueError: arrays of another type or shape, or of different lengths.
        """
        if images.dtype not in (np.uint8, np.uint16) or images.ndim != 4:
            raise ValueError(
                f"{name}: images must be uint8 or uint16 [n, height, width, channels], got "
                f"{images.dtype} {images.shape}"
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
        self.labels = labels
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` `[height, width, channels]` and, if labelled, `label`."""
        if self.labels is None:
            return {"image": self._images[index]}
        return {"image": self._images[index], "label": int(self.labels[index])}


class SubsetSource:
    """Some examples of another source.

    Attributes: as for `Source`.
    """

    def __init__(self, source: Source, name: str, indices: range | np.ndarray) -> None:
        """Select `indices` of `source`, in their order, under a new name."""
        self.name = name
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.multi_label = getattr(source, "multi_label", False)
        self.kind = getattr(source, "kind", "image")
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example at one position of the subset."""
        return self._source[int(self._indices[index])]

    def record(self, index: int) -> Record | None:
        """Return the example at one position undecoded; None if the source holds no files."""
        return record_of(self._source, int(self._indices[index]))

    def segmentation(self, index: int) -> np.ndarray | None:
        """Return the class of every pixel of one example; None if the source does not know."""
        return segmentation_of(self._source, int(self._indices[index]))

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of the subset, None if they are not known without reading examples."""
        labels = getattr(self._source, "labels", None)
        return None if labels is None else labels[self._indices]


def open_source(
    name: str,
    split: str = "train",
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> Source:
    """Open a data set by name.

    Names:
        embedded: 4,000 train and 1,000 test images of Fashion-MNIST, in the package.
        fashion_mnist: the full set, from the Debian package `dataset-fashion-mnist` or from the
            folder in the environment variable `MIM_JAX_FASHION_MNIST`.
        synthetic:NAME[:OPTION]: examples drawn by formulas, see `mim_jax.data.synthetic`. They
            have the channels and bits of their kind.
        tfds:NAME[/CONFIG][:VERSION][?data_dir=FOLDER]: a TFDS data set prepared as ArrayRecord.
        folder:PATH, or the path of an existing folder: images in a folder, see
            `mim_jax.data.folder.open_folder` for splits, labels and segmentation maps.
        array_record:PATTERN, or the path of a shard or of a folder with `dataset.json`: what
            `mim-jax data convert` wrote, see `mim_jax.data.array_record`.
        tar:PATTERN, or the path of a tar file: shards in the WebDataset layout, see
            `mim_jax.data.tar_shards`.
        table:FILE[?OPTION=VALUE&...], or the path of a .csv or .parquet file: rows of a table that
            name image files, see `mim_jax.data.table.open_table`.
        nifti:FOLDER[?OPTION=VALUE&...]: volumes, see `mim_jax.data.nifti.open_nifti`.
        mix:SHARE*SOURCE+SHARE*SOURCE, or mix:FILE.json: several sources with fixed shares, see
            `mim_jax.data.mixture`.

    PATH, PATTERN and FOLDER may begin with `gs://` or `s3://`. Tar shards, and ArrayRecord shards
    at gs://, are read where they are; other files are copied first, see `mim_jax.data.local_copy`.

    A PATTERN is a folder, a glob, `name-{000..127}.tar`, `name@8` or a text file that lists shards,
    see `mim_jax.data.shards.shard_paths`.

    A split is a name with an optional slice as in TFDS: `train`, `test`, `train[:90%]`,
    `train[100:200]`, `train[-10%:]`. Files are often sorted by class, so slices of folders and
    shards are taken of a shuffled order that is the same in every run: each class is found on both
    sides of a cut.

    Args:
        name: see above.
        split: see above.
        channels: of the images. None keeps the number of the data set (1 for Fashion-MNIST) and
            means 3 for image files.
        bits: 8 gives uint8 images, 16 gives uint16; samples are scaled by the range of their type.
        backend: decoder of image files: `opencv`, `pillow`, or `auto` for OpenCV where installed.

    Raises:
        ValueError: an unknown name (lists the valid ones and the nearest), or a bad split.
        FileNotFoundError: the data are not there; says how to get or find them.
    """
    check_bits(bits)
    if name in _IN_MEMORY:
        return _open_in_memory(name, split, channels, bits)
    options: dict[str, Any] = {"channels": channels, "bits": bits, "backend": backend}
    kind, text = _kind_and_text(name)
    if kind == "tfds":
        return open_tfds(text, split, **options)
    if kind == "mix":
        return open_mixture(text, split, functools.partial(open_source, **options))
    split_name, bounds = split_name_and_bounds(split)
    if object_store.object_url(text):
        text = _readable(kind, text, split_name)
    if kind in _OF_ONE_FORM:
        source = _OF_ONE_FORM[kind](text, split_name)
    else:
        source = _FILES[kind](text, split_name, **options)
    return source if bounds is None else _slice(source, split, bounds)


_IN_MEMORY: dict[str, Callable[[str], tuple[np.ndarray, np.ndarray]]] = {
    "embedded": read_embedded,
    "fashion_mnist": read_fashion_mnist,
}
_FILES: dict[str, Callable[..., Source]] = {
    "folder": open_folder,
    "array_record": open_array_record,
    "tar": open_tar,
    "table": open_table,
}
_OF_ONE_FORM: dict[str, Callable[[str, str], Source]] = {
    "synthetic": open_synthetic,
    "nifti": open_nifti,
}
_KINDS = ("tfds", "mix", *_OF_ONE_FORM, *_FILES)


def _kind_and_text(name: str) -> tuple[str, str]:
    """Return what kind of source a name asks for, and what follows the colon.

    Raises:
        ValueError: an unknown name; lists the valid ones and the nearest.
    """
    kind, colon, text = name.partition(":")
    if colon and kind in _KINDS:
        return kind, text
    path = pathlib.Path(name).expanduser()
    if object_store.object_url(name) and path.suffix != ".tar" and not is_shard_name(path.name):
        raise ValueError(f"say what is in {name}: 'tar:URL', 'array_record:URL' or 'folder:URL'")
    if is_shard_name(path.name) or (path / MANIFEST).is_file():
        return "array_record", name
    if path.suffix == ".tar":
        return "tar", name
    if path.suffix in TABLE_SUFFIXES and not path.is_dir():
        return "table", name
    if name and path.exists():
        return "folder", name
    nearest = difflib.get_close_matches(name, (*_IN_MEMORY, *(f"{k}:" for k in _KINDS)), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown data source {name!r}; use {_VALID_NAMES}.{hint}")


def _readable(kind: str, url: str, split: str) -> str:
    """Return what a source in an object store is to be opened by: its URL, or that of a copy.

    Raises:
        ValueError: a source that is read from files of this machine only.
    """
    if kind == "tar" or (kind == "array_record" and url.startswith("gs:")):
        return url
    if kind == "folder":
        return local_copy([url])[0]
    if kind == "nifti":
        folder, mark, options = url.partition("?")
        return local_copy([folder])[0] + mark + options
    if kind == "array_record":  # its library knows gs:// alone
        return array_record_copy(url, split)
    raise ValueError(
        f"{kind}:{url} must be a file of this machine: copy it by 'gcloud storage cp -r' or 'aws "
        "s3 cp --recursive', or mount the bucket by gcsfuse or mount-s3"
    )


def _open_in_memory(name: str, split: str, channels: int | None, bits: int) -> Source:
    split_name, bounds = split_name_and_bounds(split)
    images, labels = _IN_MEMORY[name](split_name)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB) for {name!r}, got {channels}")
    if bounds is not None:
        selected = slice_of(split, bounds, len(images))
        images, labels = (x[selected.start : selected.stop] for x in (images, labels))
    if bits == 16:
        images = images.astype(np.uint16) * _FULL_RANGE_16_OVER_8
    if channels is not None:
        images = np.repeat(images, channels, axis=-1)  # the data are grey
    return ArraySource(f"{name}:{split}", images, labels, CLASS_NAMES)


def _slice(source: Source, split: str, bounds: tuple[str, str]) -> Source:
    """Return a slice of a source of files, of its shuffled order but sorted for reading."""
    selected = slice_of(split, bounds, len(source))
    is_in = np.zeros(len(source), bool)
    for start in range(selected.start, selected.stop, _AT_ONCE):  # of millions, a few at a time
        positions = np.arange(start, min(start + _AT_ONCE, selected.stop), dtype=np.int64)
        is_in[permuted_indices(positions, len(source), _SLICE_SEED, epoch=0)] = True
    name, indices = f"{source.name}:{split}", np.flatnonzero(is_in)
    if isinstance(source, TableSource):
        return source.subset(indices, name)
    return SubsetSource(source, name, indices)
