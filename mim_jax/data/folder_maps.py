"""Segmentation maps beside the images of a folder."""

import dataclasses
import os
import pathlib

import numpy as np

from mim_jax.data.folder_index import MAPS_FOLDER, FolderIndex, first_few, index_folder, printable
from mim_jax.data.segmentation import IGNORED_PIXEL, decode_map

CLASS_LIST = "classes.txt"
_SUFFIX = ".png"


@dataclasses.dataclass(frozen=True)
class FolderMaps:
    """The maps of all images of a source.

    Attributes:
        root: the folder that mirrors the folder of the images.
        class_names: in the order of their numbers; None if unknown.
    """

    root: str
    class_names: tuple[str, ...] | None

    def read(self, image: str, size: tuple[int, int]) -> np.ndarray:
        """Return the class of every pixel of an image, uint8 `[height, width]`.

        Args:
            image: path relative to the folder of the images.
            size: height and width of the image.

        Raises:
            ValueError: a map that cannot be read, of another size, or with numbers that are no
                class; names it.
        """
        path = os.path.join(self.root, os.path.splitext(image)[0] + _SUFFIX)
        try:
            classes = decode_map(pathlib.Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"segmentation map {printable(path)}: {error}") from error
        if classes.shape != size:
            raise ValueError(
                f"segmentation map {printable(path)} has {classes.shape[0]} x {classes.shape[1]} "
                f"pixels, but its image {size[0]} x {size[1]}; it must have the image's size"
            )
        largest = int(classes[classes != IGNORED_PIXEL].max(initial=0))
        if self.class_names is not None and largest >= len(self.class_names):
            raise ValueError(
                f"segmentation map {printable(path)} has the class {largest}, but {CLASS_LIST} "
                f"names {len(self.class_names)}, 0 to {len(self.class_names) - 1}; add its name, "
                f"or use {IGNORED_PIXEL} for pixels without a class"
            )
        return classes


def maps_of_folder(
    index: FolderIndex, folder: pathlib.Path, split_folders: list[pathlib.Path]
) -> FolderMaps | None:
    """Return the maps of the images in `folder`, None if there are none.

    They lie in its sub-folder `segmentation`, or else in that of its parent, under its name, if
    `folder` is one of the split folders. The classes may be named in `classes.txt` in
    `segmentation`, one a line, from class 0 on.

    Raises:
        ValueError: images without map, maps without image, or more names than there are numbers.
    """
    root = top = folder / MAPS_FOLDER
    if folder in split_folders and not root.is_dir():
        top = folder.parent / MAPS_FOLDER
        root = top / folder.name
    if not root.is_dir():
        return None
    _check_pairs(index, root)
    names = top / CLASS_LIST
    return FolderMaps(str(root), _class_names(names) if names.is_file() else None)


def _check_pairs(index: FolderIndex, root: pathlib.Path) -> None:
    maps = set(index_folder(root).paths())
    map_of = {path: os.path.splitext(path)[0] + _SUFFIX for path in index.paths()}
    missing = [path for path, wanted in map_of.items() if wanted not in maps]
    if missing:
        raise ValueError(
            f"{root} has no map for {len(missing)} of {len(index)} images, such as "
            f"{first_few(missing)}; expected {first_few([map_of[path] for path in missing])}. Add "
            f"them (filled with {IGNORED_PIXEL} where no class is known), or move the images away"
        )
    alone = sorted(maps.difference(map_of.values()))
    if alone:
        raise ValueError(
            f"{root} has {len(alone)} files that are no map of an image, such as "
            f"{first_few(alone)}; take them out, or bring the images back. If the folder holds no "
            f"segmentation maps, give it another name than {MAPS_FOLDER!r}"
        )


def _class_names(path: pathlib.Path) -> tuple[str, ...]:
    names = tuple(path.read_text(encoding="utf-8-sig").splitlines())
    if not 1 <= len(names) <= IGNORED_PIXEL:
        raise ValueError(
            f"{path} names {len(names)} classes; give 1 to {IGNORED_PIXEL}, one a line"
        )
    return names
