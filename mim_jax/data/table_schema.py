"""Schema of a table: its columns, what their values are coded as, and how they are found.

A column is categorical (text, booleans, and whole numbers of few different values) or numerical.
Categories are coded from 0 on in sorted order; numbers become deviations from the mean of the
training rows, in their standard deviations. The schema is inferred once, kept as JSON and read
from then on, so that codes and means are the same for all splits and in resumed runs.
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

CATEGORICAL, NUMERICAL = "categorical", "numerical"

MAX_WHOLE_NUMBERS = 20
"""Whole numbers with at most so many different values are taken for categories."""

MAX_CATEGORIES = 1000
"""Text with more different values is taken for no category at all, but for names or remarks."""

UNSEEN = ("error", "missing")
"""What may become of a category that the schema does not have."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: in the header.
        kind: "categorical" or "numerical".
        values: of a categorical column, in the order of their codes: all text, or all int.
        mean: of a numerical column.
        std: of a numerical column, above 0.
    """

    name: str
    kind: str
    values: tuple[Any, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in (CATEGORICAL, NUMERICAL):
            raise ValueError(
                f"column {self.name!r} has the kind {self.kind!r}; known are 'categorical' and "
                "'numerical'"
            )
        types = {type(value) for value in self.values}
        if self.kind == CATEGORICAL and types not in ({str}, {int}):
            raise ValueError(
                f"the values of the categorical column {self.name!r} must be all text or all "
                f"whole numbers, and at least one, got {list(self.values)[:5]}"
            )
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"a value of the column {self.name!r} occurs twice")
        if self.kind == NUMERICAL and not (np.isfinite(self.mean) and 0 < self.std < np.inf):
            raise ValueError(
                f"the numerical column {self.name!r} needs a finite mean and a std above 0, got "
                f"{self.mean} and {self.std}"
            )


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a table.

    Attributes:
        columns: the features, categorical ones first.
        label: a categorical column with the classes; None if the rows have no label.
    """

    columns: tuple[Column, ...]
    label: Column | None = None

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not names:
            raise ValueError("a schema needs at least one column")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the schema has the column {twice[0]!r} twice")
        if self.label is not None and self.label.kind != CATEGORICAL:
            raise ValueError(f"the label {self.label.name!r} must be categorical")
        in_order = sorted(self.columns, key=lambda column: column.kind != CATEGORICAL)
        object.__setattr__(self, "columns", tuple(in_order))

    @property
    def category_counts(self) -> tuple[int, ...]:
        """The number of values of each categorical column."""
        return tuple(len(c.values) for c in self.columns if c.kind == CATEGORICAL)

    @property
    def num_continuous(self) -> int:
        """The number of numerical columns, which follow the categorical ones."""
        return len(self.columns) - len(self.category_counts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    def to_json(self) -> str:
        """The schema as JSON for people to read and change, see `Schema.from_json`."""
        label = json.dumps(self.label and _fields(self.label), ensure_ascii=False)
        rows = (f"    {json.dumps(_fields(column), ensure_ascii=False)}" for column in self.columns)
        columns = ",\n".join(rows)
        return f'{{\n  "label": {label},\n  "columns": [\n{columns}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, place: str = "the schema") -> "Schema":
        """A schema that `to_json` wrote, perhaps changed by hand since.

        Columns may be taken out, reordered, or made numerical (with `mean` and `std`) or
        categorical (with `values`).

        Raises:
            ValueError: no such JSON; names `place` and the field.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is no JSON: {error}") from error
        try:
            label = content.get("label")
            columns = tuple(_column(fields) for fields in content["columns"])
            return cls(columns, None if label is None else _column(label))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{place} is not understood ({type(error).__name__}: {error}); expected "
                '{"label": COLUMN or null, "columns": [COLUMN, ...]}, each column with name, '
                "kind, and values or mean and std"
            ) from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _fields(column: Column) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": column.name, "kind": column.kind}
    if column.kind == CATEGORICAL:
        return {**fields, "values": list(column.values)}
    return {**fields, "mean": column.mean, "std": column.std}


def _column(fields: Mapping[str, Any]) -> Column:
    return Column(**{**fields, "values": tuple(fields.get("values", ()))})


def infer_schema(
    frame: "pd.DataFrame", features: Sequence[str], label: str | None, place: str
) -> Schema:
    """The schema of a table of training rows.

    Text and booleans are categorical, and so are whole numbers of at most `MAX_WHOLE_NUMBERS`
    different values; other numbers are numerical. A column of text in which every value is a number
    counts as numbers.

    Args:
        frame: the training rows.
        features: names of the columns that are features.
        label: name of the column with the classes, text or whole numbers; None for none.
        place: of the table, for messages.

    Raises:
        ValueError: a column without any value, of another type than numbers and text, with some
            words among many numbers, or with too many different texts.
    """
    columns = tuple(_inferred(frame[name], place) for name in features)
    if label is None:
        return Schema(columns)
    numbers = _whole_numbers(_present(frame[label], place))
    classes = _texts(_present(frame[label], place)) if numbers is None else numbers.tolist()
    return Schema(columns, Column(label, CATEGORICAL, tuple(sorted(set(classes)))))


def encoded(
    frame: "pd.DataFrame", schema: Schema, place: str, unseen: str = "error"
) -> tuple[np.ndarray, np.ndarray]:
    """The features of a table as numbers.

    Args:
        frame: with at least the columns of the schema.
        schema: how they are coded.
        place: of the table, for messages.
        unseen: "error", or "missing" to take a category that the schema lacks for a missing value.

    Returns:
        table: float32 `[rows, columns]`, codes and standardized numbers; 0 where missing.
        missing: bool `[rows, columns]`.

    Raises:
        ValueError: a column that the table lacks, a category that the schema lacks, or a word
            where a number is expected; names row, column and value.
    """
    check_columns(frame, schema.names, place)
    table = np.zeros((len(frame), len(schema.columns)), np.float32)
    missing = np.zeros(table.shape, bool)
    for number, column in enumerate(schema.columns):
        series = frame[column.name]
        missing[:, number] = series.isna()
        rows = np.flatnonzero(~missing[:, number])
        if column.kind == CATEGORICAL:
            codes = _codes(series, rows, column, place, unseen)
            missing[rows[codes < 0], number] = True
            table[rows, number] = np.maximum(codes, 0)
        else:
            table[rows, number] = (_numbers(series, rows, place) - column.mean) / column.std
    return table, missing


def encoded_labels(frame: "pd.DataFrame", label: Column, place: str) -> np.ndarray:
    """The classes of all rows, int32 `[rows]`.

    Raises:
        ValueError: no such column, a row without label, or with a class that the schema lacks.
    """
    check_columns(frame, (label.name,), place)
    empty = np.flatnonzero(frame[label.name].isna())
    if len(empty):
        cell = _cell(place, frame.index[empty[0]], label.name)
        raise ValueError(
            f"{cell} is empty, but every row needs a label; fill it, take the row out, or leave "
            f"the labels aside by ?ignore={label.name}"
        )
    return _codes(frame[label.name], np.arange(len(frame)), label, place, "error").astype(np.int32)


_MEND_COLUMNS = (
    "Add what is lacking (empty cells count as missing values), or take it out of the schema"
)


def check_columns(
    frame: "pd.DataFrame", names: Sequence[str], place: str, mend: str = _MEND_COLUMNS
) -> None:
    """Raise `ValueError` for columns that a table lacks, with what to do about it."""
    lacking = [name for name in names if name not in frame.columns]
    if lacking:
        raise ValueError(
            f"{place} has no column {', '.join(map(repr, lacking))}; it has "
            f"{', '.join(map(repr, frame.columns))}. {mend}"
        )


def read_schema(path: pathlib.Path) -> Schema:
    """The schema in a file.

    Raises:
        ValueError: a file that is not understood.
        OSError: a file that cannot be read.
    """
    return Schema.from_json(path.read_text(encoding="utf-8"), str(path))


def write_schema(schema: Schema, path: pathlib.Path) -> None:
    """Write a schema; another process finds all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(schema.to_json(), encoding="utf-8")
    os.replace(draft, path)
    _log.info("wrote the schema of the table to %s", path)


def _cell(place: str, row: int, column: str) -> str:
    return f"{place}: row {row + 1} (without the header), column {column!r}"


def _inferred(series: "pd.Series", place: str) -> Column:
    present = _present(series, place)
    name = str(series.name)
    numbers = _parsed(present)
    if np.isnan(numbers).any():
        texts = _texts(present)
        values = sorted(set(texts))
        words = np.flatnonzero(np.isnan(numbers))
        if len(values) > MAX_WHOLE_NUMBERS and len(words) < len(texts) / 2:
            cell = _cell(place, present.index[words[0]], name)
            raise ValueError(
                f"{cell} is {texts[words[0]]!r}, but most values of this column are numbers; make "
                f"it a number or empty it, or leave the column out by ?ignore={name}"
            )
        if len(values) > MAX_CATEGORIES:
            raise ValueError(
                f"{place}: column {name!r} has {len(values)} different texts, too many for "
                f"categories (at most {MAX_CATEGORIES}); leave it out by ?ignore={name}"
            )
        return Column(name, CATEGORICAL, tuple(values))
    whole = _whole_numbers(present)
    if whole is not None and len(np.unique(whole)) <= MAX_WHOLE_NUMBERS:
        return Column(name, CATEGORICAL, tuple(np.unique(whole).tolist()))
    numbers = _numbers(series, np.flatnonzero(~series.isna()), place)
    is_constant = numbers.min() == numbers.max()
    std = 1.0 if is_constant else float(numbers.std())
    return Column(name, NUMERICAL, (), float(numbers.mean()), std)


def _present(series: "pd.Series", place: str) -> "pd.Series":
    """The values of a column that are not missing.

    Raises:
        ValueError: there is none, or they are neither numbers nor text.
    """
    import pandas as pd

    present = series.dropna().infer_objects()
    if not len(present):
        raise ValueError(
            f"{place}: column {series.name!r} has no value in any row; leave it out by "
            f"?ignore={series.name}"
        )
    types = pd.api.types
    is_text = present.map(lambda value: isinstance(value, str)).all()
    if not (is_text or types.is_numeric_dtype(present) or types.is_bool_dtype(present)):
        raise ValueError(
            f"{place}: column {series.name!r} is of the type {present.dtype}, such as "
            f"{present.iloc[0]!r}, neither numbers nor text; make numbers of it, or leave it out "
            f"by ?ignore={series.name}"
        )
    return present


def _texts(present: "pd.Series") -> list[str]:
    return [str(value) for value in present.tolist()]


def _parsed(present: "pd.Series") -> np.ndarray:
    """The values as float64, NaN for what is no number; a truth value is none."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(present):
        return np.full(len(present), np.nan)
    return pd.to_numeric(present, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _whole_numbers(present: "pd.Series") -> np.ndarray | None:
    """The values as int64, None if one of them is no whole number."""
    numbers = _parsed(present)
    is_whole = np.isfinite(numbers) & (np.abs(numbers) < 2**53)
    if not is_whole.all() or (numbers != np.rint(numbers)).any():
        return None
    return numbers.astype(np.int64)


def _numbers(series: "pd.Series", rows: np.ndarray, place: str) -> np.ndarray:
    """The numbers in some rows, float64.

    Raises:
        ValueError: one of them is no finite number.
    """
    present = series.iloc[rows]
    numbers = _parsed(present) if len(rows) else np.zeros(0)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        cell = _cell(place, present.index[wrong[0]], str(series.name))
        raise ValueError(
            f"{cell} is {present.iloc[wrong[0]]!r}, but the column is numerical; write a "
            "finite number, or leave the cell empty"
        )
    return numbers


def _codes(
    series: "pd.Series", rows: np.ndarray, column: Column, place: str, unseen: str
) -> np.ndarray:
    """The codes in some rows, int64; -1 for an unseen value if these count as missing.

    Raises:
        ValueError: an unseen value if these are errors.
    """
    if not len(rows):
        return np.zeros(0, np.int64)
    present = series.iloc[rows].infer_objects()
    code_of = {value: code for code, value in enumerate(column.values)}
    if isinstance(column.values[0], int):
        # NaN, of what is no number, is none of the values.
        codes = [code_of.get(value, -1) for value in _parsed(present).tolist()]
    else:
        codes = [code_of.get(value, -1) for value in _texts(present)]
    wrong = np.flatnonzero(np.array(codes) < 0)
    if len(wrong) and unseen == "error":
        few = ", ".join(map(repr, column.values[:10])) + (", ..." if len(code_of) > 10 else "")
        cell = _cell(place, present.index[wrong[0]], column.name)
        raise ValueError(
            f"{cell} is {present.iloc[wrong[0]]!r}, which is none of the {len(code_of)} values of "
            f"the schema: {few}. Correct the cell, add the value to the schema (a model trained "
            "before does not know it), or, for a feature, "
            "take such cells for missing by ?unseen=missing"
        )
    return np.array(codes)
