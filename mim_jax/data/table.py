"""Tables with images: rows of a CSV or Parquet file, one column of which names image files."""

import dataclasses
import difflib
import logging
import os
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mim_jax.data.decode import UnreadableImage, check_bits, check_channels, choose_backend
from mim_jax.data.folder_index import PackedNames
from mim_jax.data.records import Record, decoded
from mim_jax.data.splits import SPLIT_SPELLINGS
from mim_jax.data.stages import stage
from mim_jax.data.table_schema import (
    UNSEEN,
    Schema,
    check_columns,
    encoded,
    encoded_labels,
    infer_schema,
    read_schema,
    write_schema,
)

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".parquet")
SPLIT_COLUMN = "split"
_IMAGE_COLUMN, _LABEL_COLUMN = "image", "label"
_TRAIN = ("train", "training", "all")

_log = logging.getLogger(__name__)


class Images(Protocol):
    """The images of a table by row; can be pickled."""

    def __getitem__(self, row: int) -> np.ndarray:
        """Return uint8 or uint16 `[height, width, channels]`; may raise `UnreadableImage`."""
        ...

    def record(self, row: int) -> Record | None:
        """Return the image undecoded, see `mim_jax.data.records`; None if it has no file."""
        ...


class TableSource:
    """Examples that are an image and a row of a table. The table is in memory.

    Attributes:
        name: for messages.
        split: name of the split, without a slice.
        schema: of the columns, categorical ones first.
        table: float32 `[rows, columns]`: codes and standardized numbers, 0 where missing.
        missing: bool `[rows, columns]`.
        labels: int32 `[rows]`, None if unlabelled.
        num_classes: None if unlabelled.
        class_names: in the order of the labels; None if unlabelled.
    """

    kind = "table"
    multi_label = False

    def __init__(
        self,
        name: str,
        split: str,
        schema: Schema,
        table: np.ndarray,
        missing: np.ndarray,
        labels: np.ndarray | None,
        images: Images,
        rows: np.ndarray | None = None,
    ) -> None:
        """Put table and images together.

        Args:
            name: see above.
            split: see above.
            schema: see above.
            table: see above.
            missing: see above.
            labels: see above.
            images: of all rows of the file.
            rows: int64, where each row of the table has its image; None for the same order.
        """
        self.name = name
        self.split = split
        self.schema = schema
        self.table = table
        self.missing = missing
        self.labels = labels
        self.class_names: tuple[str, ...] | None = None
        if schema.label is not None and labels is not None:
            self.class_names = tuple(map(str, schema.label.values))
        self.num_classes = None if self.class_names is None else len(self.class_names)
        self._images = images
        self._rows = np.arange(len(table)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image`, `table` `[columns]`, `missing` `[columns]` and, if labelled, `label`.

        Raises:
            UnreadableImage: the image cannot be read; names it.
        """
        example = {
            "image": self._images[int(self._rows[index])],
            "table": self.table[index],
            "missing": self.missing[index],
        }
        if self.labels is not None:
            example["label"] = int(self.labels[index])
        return example

    def record(self, index: int) -> Record | None:
        """Return the image and label undecoded, see `mim_jax.data.records`."""
        record = self._images.record(int(self._rows[index]))
        if record is not None and self.labels is not None:
            record["label"] = int(self.labels[index])
        return record

    def subset(self, indices: np.ndarray, name: str) -> "TableSource":
        """Return some of the rows under a new name."""
        labels = None if self.labels is None else self.labels[indices]
        parts = self.table[indices], self.missing[indices], labels
        return TableSource(name, self.split, self.schema, *parts, self._images, self._rows[indices])

    def without(self, cells: np.ndarray, name: str) -> "TableSource":
        """Return the same rows, in which more cells are missing: bool `[rows, columns]`."""
        missing = self.missing | cells
        table = np.where(missing, np.float32(0), self.table)
        parts = self.schema, table, missing, self.labels, self._images, self._rows
        return TableSource(name, self.split, *parts)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files by row.

    Attributes:
        place: of the table, for messages.
        folder: that the names of the files are relative to.
        names: of the files, as the table gives them; empty where it gives none.
        channels: of the decoded images.
        bits: of their samples, 8 or 16.
        backend: `opencv` or `pillow`.
    """

    place: str
    folder: str
    names: PackedNames
    channels: int
    bits: int
    backend: str

    def __getitem__(self, row: int) -> np.ndarray:
        """Return `[height, width, channels]`, uint8 or uint16.

        Raises:
            UnreadableImage: the file cannot be read or decoded; names it.
        """
        record = self.record(row)
        with stage("decode"):
            element = decoded(record, record["name"], None, self.channels, self.bits, self.backend)
        return element["image"]

    def record(self, row: int) -> Record:
        """Return the bytes of a file.

        Raises:
            UnreadableImage: the file cannot be read; names it.
        """
        name = os.fsdecode(self.names[row])
        if not name:
            raise UnreadableImage(f"{self.place}: row {row + 1} of the split names no image")
        path = os.path.join(self.folder, name)
        try:
            with stage("read"):
                return {"image": pathlib.Path(path).read_bytes(), "name": path}
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror or error}") from error


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """What may follow the path of a table, as in `table:cars.csv?label=model&ignore=advert,town`.

    Attributes:
        image: the column with the paths of the images.
        label: the column with the classes; "" for `label` if there is such a column, else none.
        images: the folder that the paths are relative to; "" for that of the table.
        schema: the schema's file; "" for one beside the table.
        unseen: "error", or "missing" to take an unseen category for a missing value.
        ignore: columns to leave out, with commas between them.
    """

    image: str = _IMAGE_COLUMN
    label: str = ""
    images: str = ""
    schema: str = ""
    unseen: str = "error"
    ignore: str = ""

    def __post_init__(self) -> None:
        if self.unseen not in UNSEEN:
            raise ValueError(f"unseen must be 'error' or 'missing', got {self.unseen!r}")

    @classmethod
    def from_text(cls, text: str) -> "TableOptions":
        """Read `NAME=VALUE&NAME=VALUE`; %26 stands for & in a name.

        Raises:
            ValueError: an option that is not known, with the nearest.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        values = {}
        for part in filter(None, text.split("&")):
            name, equals, value = part.partition("=")
            if name not in known or not equals:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"a table has no option {part!r}; write NAME=VALUE with one of "
                    f"{', '.join(known)}.{hint}"
                )
            values[name] = urllib.parse.unquote(value)
        return cls(**values)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The names of `ignore`."""
        return tuple(filter(None, self.ignore.split(",")))


def open_table(
    text: str,
    split: str,
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> TableSource:
    """Open one split of a table.

    A table is a CSV file (UTF-8, with a header) or a Parquet file. One column, `image`, names image
    files; one, `label`, may name classes; all others are features, but for those that are ignored.
    Empty cells, and what else pandas takes for such (NA, NaN, null), are missing values.

    The split: the rows whose column `split` says so, if there is one; for a folder, its file
    `train.csv`, `test.csv` or the like. Otherwise the whole file is the split `train`, of which a
    part can be held out by a slice such as `train[:90%]`. Splits may also be spelled as in
    `SPLIT_SPELLINGS`.

    The schema: see `mim_jax.data.table_schema`. The first time it is inferred from the split
    `train`, a slice of it or not, and kept beside the table (`cars.schema.json` for `cars.csv`,
    `schema.json` in a folder), or in the file that the option `schema` names. Afterwards it is read
    from there, and says which columns are features: others of the table are left out.

    Args:
        text: path of a file or a folder, with options behind a question mark, see `TableOptions`.
        split: a split name without slice.
        channels: 1 or more, see `mim_jax.data.decode.decode_image`; None for 3.
        bits: 8 for uint8 images, 16 for uint16.
        backend: `opencv`, `pillow` or `auto`.

    Raises:
        FileNotFoundError: no such file, or no such split.
        ValueError: a table, an option or a schema that is not understood, or a table that does not
            fit the schema; names file, row, column and value.
    """
    path_text, _, options_text = text.partition("?")
    options = TableOptions.from_text(options_text)
    path = pathlib.Path(path_text).expanduser()
    channels = 3 if channels is None else channels
    check_channels(channels)
    check_bits(bits)
    frame, place = _read_split(path, split)
    mend = "Name the column with the paths of the images by ?image=COLUMN"
    check_columns(frame, (options.image,), str(place), mend)
    file = _schema_file(path, options)
    is_kept = file.is_file()
    if is_kept:
        schema = read_schema(file)
        _check_fits(schema, options, file)
    else:
        schema = _inferred(path, options, frame, place, split)
    table, missing = encoded(frame, schema, str(place), options.unseen)
    labels = None if schema.label is None else encoded_labels(frame, schema.label, str(place))
    if not is_kept:
        _keep(schema, file, options)
    folder = pathlib.Path(options.images).expanduser() if options.images else place.parent
    names = _packed(frame[options.image], place)
    images = ImageFiles(str(place), str(folder), names, channels, bits, choose_backend(backend))
    return TableSource(f"table:{path_text}", split, schema, table, missing, labels, images)


def _packed(column: "pd.Series", place: pathlib.Path) -> PackedNames:
    """The names of the image files, empty where missing; a text for each would take 100 bytes."""
    texts = column.fillna("").astype(str)
    names = PackedNames(b"".join(os.fsencode(text) + b"\0" for text in texts))
    if len(names) != len(column):
        raise ValueError(
            f"{place}: the column {column.name!r} has zero bytes in the names of files"
        )
    return names


def _schema_file(path: pathlib.Path, options: TableOptions) -> pathlib.Path:
    if options.schema:
        return pathlib.Path(options.schema).expanduser()
    return path / "schema.json" if path.is_dir() else path.with_suffix(".schema.json")


def _inferred(
    path: pathlib.Path,
    options: TableOptions,
    frame: "pd.DataFrame",
    place: pathlib.Path,
    split: str,
) -> Schema:
    """The schema of the training rows; `frame` are those of `split`."""
    if split not in _TRAIN:
        frame, place = _read_split(path, "train")
    label = options.label
    if not label and _LABEL_COLUMN in frame.columns and _LABEL_COLUMN not in options.ignored:
        label = _LABEL_COLUMN
    named = (options.image, *options.ignored, *filter(None, (label,)))
    check_columns(frame, named, str(place), "Correct the options behind the question mark")
    others = {options.image, label, SPLIT_COLUMN, *options.ignored}
    features = [name for name in frame.columns if name not in others]
    if not features:
        raise ValueError(f"{place} has no column beside {', '.join(sorted(filter(None, others)))}")
    return infer_schema(frame, features, label or None, str(place))


def _keep(schema: Schema, file: pathlib.Path, options: TableOptions) -> None:
    try:
        write_schema(schema, file)
    except OSError as error:
        if options.schema:
            raise
        _log.warning("cannot write %s: %s; name another file by ?schema=FILE", file, error)


def _check_fits(schema: Schema, options: TableOptions, file: pathlib.Path) -> None:
    """Raise `ValueError` if options contradict a kept schema."""
    label = None if schema.label is None else schema.label.name
    if options.label and options.label != label:
        raise ValueError(
            f"{file} was made for the label {label!r}, not for {options.label!r}; delete it, or "
            "name another file by ?schema=FILE"
        )
    used = [name for name in options.ignored if name in (*schema.names, label)]
    if used:
        raise ValueError(
            f"{file} has the column {used[0]!r}, which is to be ignored; take it out of the file, "
            "or delete the file to have it made again"
        )


def _read_split(path: pathlib.Path, split: str) -> tuple["pd.DataFrame", pathlib.Path]:
    """The rows of a split, and the file that they are in."""
    if not path.exists():
        raise FileNotFoundError(f"the table {str(path)!r} does not exist")
    spellings: Sequence[str] = next((s for s in SPLIT_SPELLINGS if split in s), (split,))
    if path.is_dir():
        files = [path / f"{name}{suffix}" for name in spellings for suffix in TABLE_SUFFIXES]
        found = [file for file in files if file.is_file()]
        if not found:
            raise FileNotFoundError(
                f"the folder {path} has no table of the split {split!r}, such as {files[0].name}"
            )
        return _read(found[0]), found[0]
    frame = _read(path)
    if SPLIT_COLUMN in frame.columns:
        rows = frame[SPLIT_COLUMN].astype(str).isin(spellings)
        if not rows.any():
            names = ", ".join(map(repr, sorted(set(frame[SPLIT_COLUMN].astype(str)))))
            raise FileNotFoundError(f"{path} has no row of the split {split!r}; it has {names}")
        frame = frame[rows]
    elif split not in _TRAIN:
        raise FileNotFoundError(
            f"{path} has no column {SPLIT_COLUMN!r}, so that all of it is the split 'train', and "
            f"there is no {split!r}. Add the column, or hold out a part by a slice: 'train[:90%]' "
            "for training and 'train[90%:]' for the rest"
        )
    return frame, path


def _read(path: pathlib.Path) -> "pd.DataFrame":
    """A table; the row numbers of the file are its index.

    Raises:
        ValueError: a file that is not understood, or has no rows.
    """
    import pandas as pd

    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(TABLE_SUFFIXES)}")
    try:
        if path.suffix == ".csv":
            # As text: what a column is, the schema says, and not the values of one split.
            frame = pd.read_csv(path, dtype=str)
        else:
            frame = pd.read_parquet(path).reset_index(drop=True)
    except (ValueError, OSError) as error:  # pandas' and Arrow's own errors are ValueErrors
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if not len(frame):
        raise ValueError(f"{path} has no rows")
    frame.columns = [str(name) for name in frame.columns]
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].astype(frame[name].cat.categories.dtype)
    return frame
