"""Split strings: `train`, `train[:90%]`, `test[100:200]`, `train[-10%:]`."""

import re

SPLIT_SPELLINGS = (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))
"""What splits are called in folders and files; names on one line mean the same."""

_SPLIT = re.compile(r"^\s*([A-Za-z_][\w\-]*)\s*(?:\[([^\[\]:]*):([^\[\]:]*)\])?\s*$")
_BOUND = re.compile(r"^\s*(-?\d+)\s*(%?)\s*$")


def split_name_and_bounds(split: str) -> tuple[str, tuple[str, str] | None]:
    """Return the name of a split string and its two bounds as written (None without brackets).

    Raises:
        ValueError: not a split string.
    """
    match = _SPLIT.match(split)
    if match is None:
        raise ValueError(
            f"split {split!r} is not understood; write a name with an optional slice, such as "
            "'train', 'train[:90%]' or 'test[100:200]'"
        )
    name, start, stop = match.groups()
    return name, None if start is None else (start, stop)


def slice_of(split: str, bounds: tuple[str, str], length: int) -> range:
    """Return the positions that a slice of `length` examples selects.

    A percentage is rounded to the closest example, as in TFDS, so `[:90%]` and `[90%:]` never
    overlap. Negative bounds count from the end. Bounds beyond the end are cut.

    Args:
        split: the whole split string, for messages.
        bounds: start and stop as written, each empty, an integer or a percentage.
        length: number of examples in the split.

    Raises:
        ValueError: a bound that is not understood, or a slice that selects nothing.
    """
    start, stop = (_position(split, text, length) for text in bounds)
    selected = range(length)[slice(start, stop)]
    if not selected:
        raise ValueError(f"split {split!r} selects none of the {length} examples")
    return selected


def _position(split: str, text: str, length: int) -> int | None:
    if not text.strip():
        return None
    match = _BOUND.match(text)
    if match is None:
        raise ValueError(
            f"split {split!r}: the bound {text!r} is neither an integer nor a percentage; "
            "write for example 'train[:90%]' or 'train[100:200]'"
        )
    value = int(match.group(1))
    if not match.group(2):
        return value
    if abs(value) > 100:
        raise ValueError(f"split {split!r}: {value}% is not between -100% and 100%")
    return round(value * length / 100)
