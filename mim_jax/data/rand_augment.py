"""RandAugment (Cubuk et al., 2020) in the variant of timm, named by strings as in its recipes."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LARGEST_MAGNITUDE = 10.0
"""Magnitudes are clipped to [0, 10]; 10 is full strength."""

PROBABILITY = 0.5
"""An operation that was drawn is carried out so often, otherwise the image stays as it is."""

# Recipes that resize their crops bicubically hand that kernel on to RandAugment.
_RESAMPLE = Image.Resampling.BICUBIC

Fill = int | tuple[int, ...]
Matrix = tuple[float, float, float, float, float, float]
Operation = Callable[[Image.Image, float, Fill], Image.Image]

OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda picture, s, fill: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, s, fill: ImageOps.equalize(picture),
    "Invert": lambda picture, s, fill: ImageOps.invert(picture),
    "Rotate": lambda picture, s, fill: picture.rotate(30 * s, _RESAMPLE, fillcolor=fill),
    "PosterizeIncreasing": lambda picture, s, fill: _posterized(picture, 4 - int(4 * s)),
    "SolarizeIncreasing": lambda picture, s, fill: ImageOps.solarize(picture, 256 - int(256 * s)),
    "SolarizeAdd": lambda picture, s, fill: _dark_raised(picture, int(110 * s)),
    "ColorIncreasing": lambda picture, s, fill: ImageEnhance.Color(picture).enhance(1 + 0.9 * s),
    "ContrastIncreasing": lambda picture, s, fill: ImageEnhance.Contrast(picture).enhance(
        1 + 0.9 * s
    ),
    "BrightnessIncreasing": lambda picture, s, fill: ImageEnhance.Brightness(picture).enhance(
        1 + 0.9 * s
    ),
    "SharpnessIncreasing": lambda picture, s, fill: ImageEnhance.Sharpness(picture).enhance(
        1 + 0.9 * s
    ),
    "ShearX": lambda picture, s, fill: _warped(picture, (1, 0.3 * s, 0, 0, 1, 0), fill),
    "ShearY": lambda picture, s, fill: _warped(picture, (1, 0, 0, 0.3 * s, 1, 0), fill),
    "TranslateXRel": lambda picture, s, fill: _warped(
        picture, (1, 0, 0.45 * s * picture.width, 0, 1, 0), fill
    ),
    "TranslateYRel": lambda picture, s, fill: _warped(
        picture, (1, 0, 0, 0, 1, 0.45 * s * picture.height), fill
    ),
}
"""By timm's name, `(picture, strength, fill) -> picture`; strength 1 is magnitude 10."""

TWO_SIDED = frozenset(
    {
        "Rotate",
        "ColorIncreasing",
        "ContrastIncreasing",
        "BrightnessIncreasing",
        "SharpnessIncreasing",
        "ShearX",
        "ShearY",
        "TranslateXRel",
        "TranslateYRel",
    }
)
"""Operations whose strength is negative in half of the cases."""

_EXAMPLE = "rand-m9-mstd0.5-inc1"


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Apply a few random operations, each with probability one half and a random strength.

    The operations are timm's "increasing" set, every one stronger at a larger magnitude, drawn
    with replacement. The official recipes flip an image before this, while here it is flipped
    afterwards, on the device; the images are distributed as before, except that a vertical shear
    holds the left or the right edge instead of always the left.

    Attributes:
        fill: value 0..255 of each channel for what comes in from outside the image.
        magnitude: mean strength, in [0, 10].
        magnitude_std: its standard deviation; a draw is clipped to [0, 10].
        operations: how many are drawn for an image.
    """

    fill: tuple[int, ...]
    magnitude: float = LARGEST_MAGNITUDE
    magnitude_std: float = 0.0
    operations: int = 2

    def __post_init__(self) -> None:
        if len(self.fill) not in (1, 3):
            raise ValueError(
                f"RandAugment works on images of 1 or 3 channels, not {len(self.fill)}; "
                'set data.augment to "".'
            )
        if not all(0 <= value <= 255 for value in self.fill):
            raise ValueError(f"fill must be in 0..255, got {self.fill}")
        if not 0 <= self.magnitude <= LARGEST_MAGNITUDE:
            raise ValueError(f"magnitude must be in [0, 10], got {self.magnitude}")
        if self.magnitude_std < 0:
            raise ValueError(f"magnitude_std must not be negative, got {self.magnitude_std}")
        if self.operations < 1:
            raise ValueError(f"operations must be at least 1, got {self.operations}")

    @classmethod
    def from_string(cls, text: str, mean: Sequence[float]) -> "RandAugment":
        """Build what a timm string such as `rand-m9-mstd0.5-inc1` describes.

        Args:
            text: `rand`, then in any order `inc1`, `m` (magnitude, default 10), `n` (operations,
                default 2) and `mstd` (default 0), each with its number.
            mean: of each channel, for values in [0, 1]; what comes in from outside gets it.

        Raises:
            ValueError: a part that is not known, a number out of range, a string without `inc1`,
                or neither 1 nor 3 channels.
        """
        first, *parts = text.split("-")
        matches = [re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", part) for part in parts]
        if first != "rand" or None in matches:
            wrong = first if first != "rand" else parts[matches.index(None)]
            raise ValueError(
                f"data.augment is {text!r}, of which {wrong!r} is not known; expected rand, then "
                f"any of m, n, mstd and inc with a number, such as {_EXAMPLE!r}, or ''."
            )
        values = {match[1]: float(match[2]) for match in matches if match}
        if values.get("inc") != 1:
            raise ValueError(
                f"data.augment is {text!r}, which asks for timm's older operations, some of them "
                f"weaker at a larger magnitude; only the others are here: add -inc1, as in "
                f"{_EXAMPLE!r}."
            )
        operations = values.get("n", 2.0)
        if operations != int(operations):
            raise ValueError(f"data.augment is {text!r}, but n must be a whole number.")
        return cls(
            fill=tuple(round(255 * value) for value in mean),
            magnitude=values.get("m", LARGEST_MAGNITUDE),
            magnitude_std=values.get("mstd", 0.0),
            operations=int(operations),
        )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return an augmented image.

        Args:
            image: uint8 `[height, width, channels]`, with as many channels as `fill`.
            rng: gives all the randomness.

        Returns:
            uint8 of the same shape; the image itself where no operation was carried out.

        Raises:
            ValueError: an image of another type or number of channels.
        """
        if image.dtype != np.uint8 or image.shape[2] != len(self.fill):
            raise ValueError(
                f"RandAugment was set up for uint8 images of {len(self.fill)} channels, got "
                f'{image.dtype} {image.shape}; set data.augment to "" for such images.'
            )
        drawn = self.drawn(rng)
        if not drawn:
            return image
        grey = len(self.fill) == 1
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
        for name, strength in drawn:
            picture = OPERATIONS[name](picture, strength, self.fill[0] if grey else self.fill)
        return np.asarray(picture).reshape(image.shape)

    def drawn(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Return the operations to carry out, each with its strength in [-1, 1]."""
        names = tuple(OPERATIONS)
        carried_out = []
        for _ in range(self.operations):
            name = names[int(rng.random() * len(names))]
            magnitude = rng.normal(self.magnitude, self.magnitude_std)
            strength = min(max(magnitude, 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
            if name in TWO_SIDED and rng.random() < 0.5:
                strength = -strength
            if rng.random() < PROBABILITY:
                carried_out.append((name, strength))
        return carried_out


@dataclasses.dataclass(frozen=True)
class Composed:
    """Transforms one after the other, such as a crop and then RandAugment.

    Attributes:
        steps: each `(image, rng) -> image`.
    """

    steps: tuple[Callable[[np.ndarray, np.random.Generator], Any], ...]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Any:
        """Return what the last step gives; every step draws from the same `rng`."""
        for step in self.steps:
            image = step(image, rng)
        return image


def _warped(picture: Image.Image, matrix: Matrix, fill: Fill) -> Image.Image:
    """The affine map of result to source coordinates (x, y): `(a x + b y + c, d x + e y + f)`."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=_RESAMPLE, fillcolor=fill
    )


def _posterized(picture: Image.Image, bits: int) -> Image.Image:
    """The highest 0 to 8 bits of every value; Pillow's own function refuses 0, which is black."""
    mask = 256 - 2 ** (8 - bits)
    return _looked_up(picture, [value & mask for value in range(256)])


def _dark_raised(picture: Image.Image, amount: int) -> Image.Image:
    """Values below 128 raised by an amount, up to 255."""
    return _looked_up(picture, [v if v >= 128 else min(255, v + amount) for v in range(256)])


def _looked_up(picture: Image.Image, table: list[int]) -> Image.Image:
    return picture.point(table * len(picture.getbands()))
