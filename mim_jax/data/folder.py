"""A folder of anything as a source: listed once, decoded on access.

Every file with one of the suffixes `IMAGE_SUFFIXES`, at any depth, in upper or lower case, is an
example. What becomes of the kinds that folders are full of:

- grey, colour, palette, CMYK, alpha, 8 or 16 bits, any size, 1 x 4000 too: read, in the channels
  and bits that are asked for (`mim_jax.data.decode.decode_image`); alpha is dropped, not blended;
- turned by EXIF: turned upright; animated GIF, WebP or TIFF of many pages: the first frame;
- bands of a TIFF, arrays in `.npy`: read if their number is the one asked for;
- an empty, corrupt or truncated file, no image under its suffix, samples without a fixed range
  (float, signed, 32 bits), a header that promises more pixels than memory holds, a link to
  nowhere, a file that may not be read: `UnreadableImage`, which names it and says why; the
  pipeline replaces it, counts it and warns;
- names in any script and encoding, such as those that differ in nothing but the form of an
  accent: each is the file that it is;
- a folder called `x.jpg`: a folder; links to folders: followed, but never in a circle; a folder
  that may not be listed: left out with a warning;
- pipes, sockets, other suffixes and names that begin with a dot: passed over.
"""

import difflib
import os
import pathlib
from typing import Any

import numpy as np

from mim_jax.data.decode import UnreadableImage, check_bits, check_channels, choose_backend
from mim_jax.data.folder_index import (
    IMAGE_SUFFIXES,
    FolderIndex,
    image_folders,
    index_folder,
    list_folder,
    printable,
)
from mim_jax.data.folder_labels import FolderLabels, labels_of_sub_folders, labels_of_tables
from mim_jax.data.folder_maps import FolderMaps, maps_of_folder
from mim_jax.data.probe import probe_image
from mim_jax.data.records import Record, decoded
from mim_jax.data.splits import SPLIT_SPELLINGS
from mim_jax.data.stages import stage

_WHOLE_FOLDER = ("train", "all")


class FolderSource:
    """Images below a folder, in the order of `FolderIndex`.

    Attributes:
        name: `folder:` and the path.
        num_classes: number of classes, None if unlabelled.
        class_names: their names in the order of the labels, None if unlabelled.
        multi_label: whether an image may have several labels.
        channels: of the decoded images.
        bits: of their samples, 8 or 16.
    """

    def __init__(
        self,
        root: pathlib.Path,
        index: FolderIndex,
        labels: FolderLabels | None,
        maps: FolderMaps | None,
        channels: int,
        bits: int,
        backend: str,
    ) -> None:
        self.name = f"folder:{printable(str(root))}"
        self.num_classes = None if labels is None else len(labels.class_names)
        self.class_names = None if labels is None else labels.class_names
        self.multi_label = labels is not None and labels.ends is not None
        self.channels = channels
        self.bits = bits
        self._root = str(root)
        self._index = index
        self._labels = labels
        self._maps = maps
        self._backend = backend

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` `[height, width, channels]` and, if labelled, `label`.

        The image is uint8 or uint16, as `bits` says; the label an int, or if `multi_label` a uint8
        vector `[num_classes]` of 0 and 1.

        Raises:
            UnreadableImage: the file cannot be read or decoded; names it.
        """
        record = self.record(index)
        place = printable(self.path(index))
        with stage("decode"):
            return decoded(record, place, self.num_classes, self.channels, self.bits, self._backend)

    def record(self, index: int) -> Record:
        """Return the example with the bytes of its file, see `mim_jax.data.records`.

        Raises:
            UnreadableImage: the file cannot be read; names it.
        """
        path = self.path(index)
        try:
            with stage("read"):
                data = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{printable(path)}: {error.strerror or error}") from error
        record: Record = {"image": data, "name": printable(self._index.path(index))}
        if self._labels is not None:
            record["label"] = self._labels[index]
        return record

    def segmentation(self, index: int) -> np.ndarray | None:
        """Return the class of every pixel, uint8 `[height, width]`; None if there are no maps.

        255 marks pixels without a class.

        Raises:
            ValueError: a map that cannot be read or does not fit its image; names it.
            UnreadableImage: the image cannot be read; names it.
        """
        if self._maps is None:
            return None
        record = self.record(index)
        try:
            facts = probe_image(record["image"])
        except UnreadableImage as error:
            raise UnreadableImage(f"{printable(self.path(index))}: {error}") from error
        return self._maps.read(self._index.path(index), (facts.height, facts.width))

    def path(self, index: int) -> str:
        """Return the path of one image file."""
        return os.path.join(self._root, self._index.path(index))

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all images: int32 `[n]`, or uint8 `[n, num_classes]` if `multi_label`."""
        return None if self._labels is None else self._labels.as_array()


def open_folder(
    path: str,
    split: str,
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> FolderSource:
    """Return the images of one split of a folder.

    The split: if the folder has sub-folders named like splits (`train`, `val`, `test`, also
    spelled `training`, `validation`, `valid`, `testing`), the one asked for is read. If it has
    none, the whole folder is the split `train` (or `all`); hold out a part with a slice such as
    `train[:90%]` and `train[90%:]`.

    The labels: a table `labels.csv` in the folder of the split, or beside the split folders, with
    the header `file,label` and a row for each image: its path relative to the table, and the name
    of its class, or several separated by ";", or none. If any row has not exactly one, the source
    is multi-label. Without a table, if no image lies directly in the folder, each sub-folder is a
    class; the names of all split folders are put together, so that a label means the same in each.
    Otherwise the images are unlabelled. Labels count in the sorted names of the classes.

    The segmentation: if the folder of the split has a sub-folder `segmentation`, that holds a map
    for each image under the image's own path, ending in `.png`: 8-bit grey or palette, of the
    image's size as it is shown, with the class of every pixel from 0 on, 255 for none. For split
    folders, `segmentation/train` beside them does as well. `segmentation/classes.txt` may name the
    classes, one a line. Maps are not images of the source.

    Args:
        path: the folder.
        split: a split name without slice.
        channels: 1 or more, see `mim_jax.data.decode.decode_image`; None for 3.
        bits: 8 for uint8 images, 16 for uint16.
        backend: `opencv`, `pillow` or `auto`.

    Raises:
        FileNotFoundError: no such folder, no such split, or no image in it.
        NotADirectoryError: the path is a file.
        ValueError: a label table or segmentation maps that do not fit the files.
    """
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"image folder {path!r} does not exist{_nearest_sibling(root)}")
    if not root.is_dir():
        raise NotADirectoryError(f"{path!r} is a file; give the folder that holds the images")
    channels = 3 if channels is None else channels
    check_channels(channels)
    check_bits(bits)
    split_folders = _split_folders(root)
    folder = _folder_of_split(root, split, split_folders)
    index = index_folder(folder)
    if not len(index):
        raise FileNotFoundError(_no_images_message(folder))
    splits = list(split_folders.values())
    labels = _labels(folder, index, splits)
    maps = maps_of_folder(index, folder, splits)
    return FolderSource(folder, index, labels, maps, channels, bits, choose_backend(backend))


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the split folders of `root` by their first spelling (`train`, `val`, `test`)."""
    found: dict[str, pathlib.Path] = {}
    for spellings in SPLIT_SPELLINGS:
        for spelling in spellings:
            if (root / spelling).is_dir():
                found.setdefault(spellings[0], root / spelling)
    return found


def _folder_of_split(
    root: pathlib.Path, split: str, split_folders: dict[str, pathlib.Path]
) -> pathlib.Path:
    if (root / split).is_dir():
        return root / split
    for spellings in SPLIT_SPELLINGS:
        if split in spellings and spellings[0] in split_folders:
            return split_folders[spellings[0]]
    if split_folders:
        names = ", ".join(repr(folder.name) for folder in split_folders.values())
        raise FileNotFoundError(f"{root} has no split {split!r}; it has {names}")
    if split in _WHOLE_FOLDER:
        return root
    raise FileNotFoundError(
        f"{root} has no sub-folder {split!r}. Make one, or hold out a part of the folder with a "
        "slice: 'train[:90%]' for training and 'train[90%:]' for the rest"
    )


def _labels(
    folder: pathlib.Path, index: FolderIndex, split_folders: list[pathlib.Path]
) -> FolderLabels | None:
    labels = labels_of_tables(index, folder, split_folders)
    if labels is not None:
        return labels
    if index.first[1]:  # images lie directly in the folder
        return None
    names = set(_class_folders(folder))
    if folder in split_folders:
        for other in split_folders:
            names.update(_class_folders(other))
    return labels_of_sub_folders(index, tuple(sorted(names)))


def _class_folders(folder: pathlib.Path) -> list[str]:
    """Return the names of the sub-folders, none if an image lies directly in `folder`."""
    files, folders, _ = list_folder(os.fsencode(folder))
    return [] if files else [os.fsdecode(name) for name in image_folders(folders)]


def _no_images_message(folder: pathlib.Path) -> str:
    files = [name for _, _, names in os.walk(folder) for name in names]
    if not files:
        return f"image folder {folder} is empty"
    suffixes = sorted({os.path.splitext(name)[1] or "(none)" for name in files})[:8]
    return (
        f"image folder {folder} holds no image: {len(files)} files with the suffixes "
        f"{', '.join(suffixes)}, but only {', '.join(IMAGE_SUFFIXES)} are read"
    )


def _nearest_sibling(path: pathlib.Path) -> str:
    """Return a hint that names the most similar folder beside a missing one, or an empty text."""
    if not path.parent.is_dir():
        return ""
    siblings = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    nearest = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {str(path.parent / nearest[0])!r}?" if nearest else ""
