"""Pairs of an image and a row of a table, of which both tell the class: a small stand-in for TIP.

An image shows one object on a noisy ground: one of 3 shapes in one of 4 hues, small or large, at a
random place. The class is shape and hue. The row has shape, hue and size, each wrong in one of ten
rows, a category that means nothing, the noisy place, and two numbers that mean nothing.
"""

import colorsys
from typing import Any

import numpy as np

from mim_jax.data.records import Record
from mim_jax.data.table import TableSource
from mim_jax.data.table_schema import Column, Schema

SIDE = 64
"""Pixels along an image."""

EXAMPLES = {"train": 1620, "test": 400}
"""By split."""

HUES = ("red", "green", "cyan", "violet")  # equally far from each other on the circle
SHAPES = ("disc", "square", "triangle")
SIZES = ("small", "large")
LOTS = ("a", "b", "c", "d", "e")

WRONG = 0.1
"""How often the row names another hue, shape or size than a look at the image would; the random one
that stands there may be right by chance."""

_RADII = (9.0, 15.0)  # half the side of an object's box by size, in pixels
_PLACE_NOISE = 4.0  # pixels
_PLACE_STD = 11.8  # of a true place with its noise, roughly; what the row's places are divided by

CLASSES = tuple(f"{hue} {shape}" for hue in HUES for shape in SHAPES)
"""Names in the order of the labels."""

SCHEMA = Schema(
    columns=(
        Column("hue", "categorical", HUES),
        Column("shape", "categorical", SHAPES),
        Column("size", "categorical", SIZES),
        Column("lot", "categorical", LOTS),
        Column("x", "numerical", (), SIDE / 2, _PLACE_STD),
        Column("y", "numerical", (), SIDE / 2, _PLACE_STD),
        Column("first", "numerical"),
        Column("second", "numerical"),
    ),
    label=Column("class", "categorical", CLASSES),
)


def open_split(split: str, option: str) -> TableSource:
    """Open a split.

    Args:
        split: `train` (1,620 pairs) or `test` (400).
        option: none is known.

    Raises:
        ValueError: an option, or another split.
    """
    if option:
        raise ValueError(f"synthetic:pairs has no options, got {option!r}")
    if split not in EXAMPLES:
        raise ValueError(f"synthetic:pairs has the splits {', '.join(EXAMPLES)}, not {split!r}")
    rows = [_drawn(split, index) for index in range(EXAMPLES[split])]
    table = np.array([row["table"] for row in rows], np.float32)
    labels = np.array([row["label"] for row in rows], np.int32)
    missing = np.zeros(table.shape, bool)
    name = f"synthetic:pairs:{split}"
    return TableSource(name, split, SCHEMA, table, missing, labels, PairImages(split))


class PairImages:
    """The images of a split, each drawn when it is asked for."""

    def __init__(self, split: str) -> None:
        self._split = split

    def __getitem__(self, row: int) -> np.ndarray:
        """Return uint8 `[64, 64, 3]`."""
        drawn = _drawn(self._split, row)
        rng = drawn["rng"]
        mask = _mask(drawn["shape"], drawn["place"], drawn["radius"])[..., None]
        hue = drawn["hue"] / len(HUES) + rng.uniform(-0.03, 0.03)
        colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1.0), rng.uniform(0.5, 1.0))
        ground = rng.uniform(0.2, 0.8) + rng.uniform(-0.1, 0.1, 3)
        slope = rng.uniform(-0.15, 0.15, 2)
        ground = ground + (slope[0] * _DOWN + slope[1] * _ACROSS)[..., None] / SIDE
        image = ground + mask * (np.array(colour) - ground)
        image += 0.06 * rng.standard_normal((SIDE, SIDE, 3), np.float32)
        return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)

    def record(self, row: int) -> Record | None:
        """Return None: there are no files."""
        return None


def _drawn(split: str, index: int) -> dict[str, Any]:
    """What an example is, as a pure function of (split, index), and what is left of its rng."""
    rng = np.random.default_rng((list(EXAMPLES).index(split), index))
    counts = (len(HUES), len(SHAPES), len(SIZES))
    true = [int(rng.integers(count)) for count in counts]
    wrong = rng.random(len(counts)) < WRONG
    others = [int(rng.integers(count)) for count in counts]
    told = np.where(wrong, others, true)
    radius = _RADII[true[2]]
    place = rng.uniform(radius + 1, SIDE - radius - 1, 2)  # x, y
    noisy = place + _PLACE_NOISE * rng.standard_normal(2)
    places = (noisy - SIDE / 2) / _PLACE_STD
    hue, shape, _ = true
    return {
        "table": (*told, rng.integers(len(LOTS)), *places, *rng.standard_normal(2)),
        "label": hue * len(SHAPES) + shape,
        "hue": hue,
        "shape": shape,
        "place": place,
        "radius": radius,
        "rng": rng,
    }


def _mask(shape: int, place: np.ndarray, radius: float) -> np.ndarray:
    """Where an object is, in [0, 1], `[64, 64]`, with an edge one pixel wide."""
    across, down = _ACROSS - place[0], _DOWN - place[1]
    if SHAPES[shape] == "disc":
        inside = radius - np.hypot(across, down)
    elif SHAPES[shape] == "square":
        inside = 0.88 * radius - np.maximum(np.abs(across), np.abs(down))  # about a disc's area
    else:
        # Below the two sides that meet in the top, and above the bottom.
        sides = (down + radius - 2 * np.abs(across)) / 5**0.5
        inside = np.minimum(sides, radius - down)
    return np.clip(0.5 + inside, 0, 1)


_DOWN, _ACROSS = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5
