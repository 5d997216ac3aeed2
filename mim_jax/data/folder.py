"""An image folder as a source: listed once, decoded on access."""

import difflib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mim_jax.data.decode import UnreadableImage, check_channels, choose_backend, decode_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".tif", ".tiff")
# Names that a split folder goes by; names on one line mean the same.
_SPLIT_FOLDERS = (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))
_WHOLE_FOLDER = ("train", "all")


class FolderSource:
    """Images below a folder, in the order of their paths.

    Attributes:
        name: `folder:` and the path.
        num_classes: number of class folders, None if unlabelled.
        class_names: their names in the order of the labels, None if unlabelled.
        channels: of the decoded images, 1 or 3.
    """

    def __init__(
        self,
        root: pathlib.Path,
        paths: list[str],
        labels: list[int] | None,
        class_names: tuple[str, ...] | None,
        channels: int,
        backend: str,
    ) -> None:
        self.name = f"folder:{root}"
        self.num_classes = None if class_names is None else len(class_names)
        self.class_names = class_names
        self.channels = channels
        self._root = str(root)
        self._backend = backend
        self._labels = None if labels is None else np.asarray(labels, np.int32)
        # One buffer, not a million strings: it is small to send to a worker process.
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._path_bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` uint8 `[height, width, channels]` and, if labelled, `label`.

        Raises:
            UnreadableImage: the file cannot be read or decoded; names it.
        """
        path = self.path(index)
        try:
            data = pathlib.Path(path).read_bytes()
            element: dict[str, Any] = {"image": decode_image(data, self.channels, self._backend)}
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror or error}") from error
        except UnreadableImage as error:
            raise UnreadableImage(f"{path}: {error}") from error
        if self._labels is not None:
            element["label"] = int(self._labels[index])
        return element

    def path(self, index: int) -> str:
        """Return the path of one image file."""
        start = int(self._ends[index - 1]) if index else 0
        relative = os.fsdecode(self._path_bytes[start : int(self._ends[index])])
        return os.path.join(self._root, relative)


def open_folder(
    path: str, split: str, *, channels: int | None = None, backend: str = "auto"
) -> FolderSource:
    """Return the images of one split of a folder.

    The split: if the folder has sub-folders named like splits (`train`, `val`, `test`, also
    spelled `training`, `validation`, `valid`, `testing`), the one asked for is read. If it has
    none, the whole folder is the split `train` (or `all`); hold out a part with a slice such as
    `train[:90%]` and `train[90%:]`.

    The labels: if no image lies directly in the folder and its images lie in sub-folders, each
    sub-folder is a class, labelled by its place in the sorted names; the names of all split
    folders are put together, so that a label means the same in each. Otherwise it is unlabelled.
    Images are found at any depth. Links to folders are followed, but never in a circle; names
    that start with a dot are passed over.

    Args:
        path: the folder.
        split: a split name without slice.
        channels: 1 or 3; None for 3.
        backend: `opencv`, `pillow` or `auto`.

    Raises:
        FileNotFoundError: no such folder, no such split, or no image in it.
        NotADirectoryError: the path is a file.
    """
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"image folder {path!r} does not exist{_nearest_sibling(root)}")
    if not root.is_dir():
        raise NotADirectoryError(f"{path!r} is a file; give the folder that holds the images")
    channels = 3 if channels is None else channels
    check_channels(channels)
    split_folders = _split_folders(root)
    folder = _folder_of_split(root, split, split_folders)
    paths = sorted(_image_paths(folder))
    if not paths:
        raise FileNotFoundError(_no_images_message(folder))
    labels, class_names = _labels(folder, paths, split_folders)
    return FolderSource(folder, paths, labels, class_names, channels, choose_backend(backend))


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the split folders of `root` by their first spelling (`train`, `val`, `test`)."""
    found: dict[str, pathlib.Path] = {}
    for spellings in _SPLIT_FOLDERS:
        for spelling in spellings:
            if (root / spelling).is_dir():
                found.setdefault(spellings[0], root / spelling)
    return found


def _folder_of_split(
    root: pathlib.Path, split: str, split_folders: dict[str, pathlib.Path]
) -> pathlib.Path:
    if (root / split).is_dir():
        return root / split
    for spellings in _SPLIT_FOLDERS:
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


def _image_paths(folder: pathlib.Path) -> Iterator[str]:
    """Yield the paths of all images below `folder`, relative to it, in no fixed order."""
    # With each folder goes the chain of folders it was reached through: meeting one of them
    # again means that a link points upwards.
    pending: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(str(folder), "", ())]
    while pending:
        absolute, relative, chain = pending.pop()
        status = os.stat(absolute)
        identity = (status.st_dev, status.st_ino)
        if identity in chain:
            continue
        with os.scandir(absolute) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = os.path.join(relative, entry.name)
                if entry.is_dir():
                    pending.append((entry.path, below, (*chain, identity)))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield below


def _labels(
    folder: pathlib.Path, paths: list[str], split_folders: dict[str, pathlib.Path]
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Return the label of each path and the class names, or None and None if unlabelled."""
    if not all(os.sep in path for path in paths):
        return None, None
    names = set(_class_folders(folder))
    if folder in split_folders.values():
        for other in split_folders.values():
            names.update(_class_folders(other))
    class_names = tuple(sorted(names))
    label_of = {name: label for label, name in enumerate(class_names)}
    return [label_of[path.split(os.sep, 1)[0]] for path in paths], class_names


def _class_folders(folder: pathlib.Path) -> list[str]:
    """Return the names of the sub-folders, none if an image lies directly in `folder`."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                return []
    return names


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
