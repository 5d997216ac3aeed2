"""Labels of the images in a folder: of class sub-folders, or of a table `labels.csv`."""

import csv
import dataclasses
import os
import pathlib
import unicodedata

import numpy as np

from mim_jax.data.folder_index import FolderIndex, first_few

LABEL_TABLE = "labels.csv"
_COLUMNS = ("file", "label")
_SEPARATOR = ";"

Table = dict[str, tuple[str, ...]]
"""The labels of each file, whose path is relative to a folder."""


@dataclasses.dataclass(frozen=True)
class FolderLabels:
    """The labels of all images of a source.

    Attributes:
        class_names: in the order of the labels.
        values: int32, the labels of all images one after another.
        ends: int64 `[n]`, where the labels of each image end in `values`; None if each has one.
    """

    class_names: tuple[str, ...]
    values: np.ndarray
    ends: np.ndarray | None = None

    def __getitem__(self, index: int) -> int | list[int]:
        """Return the label of one image, a list if images may have several."""
        if self.ends is None:
            return int(self.values[index])
        return self.values[self.ends[index - 1] if index else 0 : self.ends[index]].tolist()

    def as_array(self) -> np.ndarray:
        """Return int32 `[n]`, or uint8 `[n, classes]` of 0 and 1 if images may have several."""
        if self.ends is None:
            return self.values
        vectors = np.zeros((len(self.ends), len(self.class_names)), np.uint8)
        rows = np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))
        vectors[rows, self.values] = 1
        return vectors


def labels_of_sub_folders(index: FolderIndex, class_names: tuple[str, ...]) -> FolderLabels:
    """Return the labels of images that all lie in the sub-folders `class_names`."""
    label_of = {os.fsencode(name): label for label, name in enumerate(class_names)}
    separator = os.fsencode(os.sep)
    # The first folder is that of the sub-folders, and holds no image.
    labels = [0] + [
        label_of[index.folders[number].split(separator, 1)[0]]
        for number in range(1, len(index.folders))
    ]
    return FolderLabels(class_names, np.repeat(np.array(labels, np.int32), np.diff(index.first)))


def labels_of_tables(
    index: FolderIndex, folder: pathlib.Path, split_folders: list[pathlib.Path]
) -> FolderLabels | None:
    """Return the labels that `labels.csv` gives, None if there is none.

    The table lies in `folder`, or else in its parent if `folder` is one of the split folders.
    Classes, and whether images may have several, are those of the tables of all splits together,
    so that a label means the same in each.

    Raises:
        ValueError: a table that cannot be understood, images without a row, or rows without image.
    """
    splits = split_folders if folder in split_folders else [folder]
    tables = {split: read_label_table(split / LABEL_TABLE) for split in splits
              if (split / LABEL_TABLE).is_file()}  # fmt: skip
    place = folder / LABEL_TABLE
    if folder not in tables and folder in split_folders:
        place = folder.parent / LABEL_TABLE
        tables = {folder.parent: read_label_table(place)} if place.is_file() else {}
    if place.parent not in tables:
        return None
    rows = [labels for table in tables.values() for labels in table.values()]
    class_names = tuple(sorted({name for labels in rows for name in labels}))
    if not class_names:
        raise ValueError(f"{place} gives no label to any file")
    multi_label = any(len(labels) != 1 for labels in rows)
    prefix = "" if place.parent == folder else os.path.join(folder.name, "")
    of_files = _matched(index, tables[place.parent], place, prefix)
    label_of = {name: label for label, name in enumerate(class_names)}
    values = np.array([label_of[name] for labels in of_files for name in labels], np.int32)
    ends = np.cumsum([len(labels) for labels in of_files], dtype=np.int64)
    return FolderLabels(class_names, values, ends if multi_label else None)


def read_label_table(path: pathlib.Path) -> Table:
    """Return the labels of each file in a table with the columns `file` and `label`.

    Several labels are separated by ";"; an empty field means none. Other columns are passed over.

    Raises:
        ValueError: another header, a row without these fields, or a file in two rows.
    """
    table: Table = {}
    # Names are bytes to the file system; what is not UTF-8 is kept as Python keeps it in paths.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file)
        header = [field.strip() for field in next(rows, [])]
        if not set(_COLUMNS) <= set(header):
            raise ValueError(
                f"{path} must begin with the line {','.join(_COLUMNS)!r}, got {','.join(header)!r}"
            )
        file_column, label_column = (header.index(name) for name in _COLUMNS)
        for row in rows:
            if not row:
                continue
            if len(row) <= max(file_column, label_column):
                raise ValueError(f"{path}, line {rows.line_num}: {','.join(row)!r} has no label")
            name = os.path.normpath(row[file_column])
            if name in table:
                raise ValueError(
                    f"{path}, line {rows.line_num}: {name!r} has a row already; give "
                    f"several labels in one, separated by {_SEPARATOR!r}"
                )
            fields = {field.strip() for field in row[label_column].split(_SEPARATOR)}
            table[name] = tuple(sorted(fields - {""}))
    return table


def _matched(index: FolderIndex, table: Table, place: pathlib.Path, prefix: str) -> list:
    """Return the labels of each file of the index, found in the table under `prefix`."""
    rows = {name: labels for name, labels in table.items() if name.startswith(prefix)}
    paths = [prefix + path for path in index.paths()]
    labels = [rows.pop(path, None) for path in paths]
    if rows and None in labels:
        # A letter with an accent is one character or two, by which system wrote the name.
        rows = {unicodedata.normalize("NFC", name): labels for name, labels in rows.items()}
        for i in range(len(labels)):
            if labels[i] is None:
                labels[i] = rows.pop(unicodedata.normalize("NFC", paths[i]), None)
    missing = [path for path, found in zip(paths, labels) if found is None]
    if missing:
        raise ValueError(
            f"{place} has no row for {len(missing)} of {len(paths)} images, such as "
            f"{first_few(missing)}; add rows (with an empty label for none), or move them away"
        )
    if rows:
        raise ValueError(
            f"{place} has rows for {len(rows)} files that are not there, such as "
            f"{first_few(list(rows))}; take them out, or bring the files back"
        )
    return labels
