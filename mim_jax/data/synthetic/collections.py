"""Four collections of procedural faces, real and forged, for forgery detection across domains.

A face is a large soft ellipse with smaller ones on it, before a textured ground. A forged one has
an elliptic region of another face of its collection pasted into it, its mean colour moved some of
the way to that of what it hides. The collections differ as collections of photographs do, in colour
cast, contrast, noise and block compression, and in how the pasted region gives itself away:

    0: a sharp seam; warm, hardly any noise.
    1: a wide, blurred seam; cold, pale, with more noise.
    2: a colour that fits badly; greenish, high contrast.
    3: a resampled region, which has lost its fine detail; dark, strongly compressed.
"""

import dataclasses
from typing import Any

import numpy as np

SIDE = 32
"""Pixels along an image."""

CLASS_NAMES = ("real", "fake")
"""In the order of the labels."""

EXAMPLES = {"train": 2000, "test": 500}
"""Of each collection by split, half of them forged."""

_BLOCK = 8  # pixels along a block of the compression
_FEATURES = 4  # small ellipses on a face
_MATCHED = 0.3  # share of the difference in mean colour that a forger takes away


@dataclasses.dataclass(frozen=True)
class Collection:
    """How the images of one collection were taken, forged and stored.

    Attributes:
        seam: half the width of the transition around the pasted region, in pixels.
        shift: largest change of each colour of the pasted region, in shares of the range.
        resampled: whether the pasted region was scaled down by two and up again.
        cast: gain of red, green and blue.
        contrast: gain around the middle grey.
        noise: standard deviation, in shares of the range.
        step: of the quantization of the lowest frequency, in shares of the range.
    """

    seam: float
    shift: float
    resampled: bool
    cast: tuple[float, float, float]
    contrast: float
    noise: float
    step: float


COLLECTIONS = (
    Collection(0.25, 0.0, False, (1.10, 1.00, 0.85), 1.0, 0.010, 0.02),
    Collection(2.00, 0.0, False, (0.85, 0.98, 1.15), 0.75, 0.020, 0.02),
    Collection(1.00, 0.2, False, (0.92, 1.10, 0.92), 1.3, 0.020, 0.03),
    Collection(1.00, 0.0, True, (0.75, 0.72, 0.70), 0.9, 0.015, 0.04),
)


class CollectionSource:
    """One collection; example i is drawn when it is asked for, as a pure function of (split, i).

    Even examples are real, odd ones fake.

    Attributes: as for `mim_jax.data.sources.Source`.
    """

    class_names = CLASS_NAMES
    num_classes = len(CLASS_NAMES)
    multi_label = False

    def __init__(self, number: int, split: str) -> None:
        """Open a split of one of `COLLECTIONS`."""
        self.name = f"synthetic:collections:{number}:{split}"
        self._number = number
        self._split = split

    def __len__(self) -> int:
        return EXAMPLES[self._split]

    @property
    def labels(self) -> np.ndarray:
        """Of all examples, int32 `[n]`."""
        return np.arange(len(self), dtype=np.int32) % 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` uint8 `[32, 32, 3]` and `label`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        collection = COLLECTIONS[self._number]
        photograph, rng = self._photograph(index, collection)
        label = index % 2
        if label:
            other = int(rng.integers(len(self) - 1))
            donor, _ = self._photograph(other + (other >= index), collection)
            photograph = _forged(photograph, donor, collection, rng)
        photograph = photograph + collection.noise * rng.standard_normal(photograph.shape)
        return {"image": _stored(photograph, collection.step), "label": label}

    def _photograph(
        self, index: int, collection: Collection
    ) -> tuple[np.ndarray, np.random.Generator]:
        """Return the face of an example before any forgery, and what is left of its randomness."""
        part = list(EXAMPLES).index(self._split)
        rng = np.random.default_rng((self._number, part, index))
        scene = 0.5 + collection.contrast * (_face(rng) - 0.5)
        return scene * collection.cast, rng


def open_split(split: str, option: str) -> CollectionSource:
    """Open a collection.

    Args:
        split: `train` (2,000 images) or `test` (500).
        option: number of the collection, "0" to "3".

    Raises:
        ValueError: another option or split.
    """
    numbers = [str(number) for number in range(len(COLLECTIONS))]
    if option not in numbers:
        raise ValueError(
            f"synthetic:collections has no collection {option!r}; name one of "
            f"{', '.join(numbers)}, as in 'synthetic:collections:0'"
        )
    if split not in EXAMPLES:
        raise ValueError(f"synthetic:collections has the splits {', '.join(EXAMPLES)}, not {split}")
    return CollectionSource(int(option), split)


def _face(rng: np.random.Generator) -> np.ndarray:
    """Return a face before its ground, float64 `[32, 32, 3]` in about 0 to 1."""
    ground = 0.45 + _texture(rng, 5, 0.12) + _texture(rng, 16, 0.06)
    skin = rng.uniform((0.5, 0.4, 0.3), (0.9, 0.7, 0.6)) + _texture(rng, 16, 0.04)
    middle = rng.uniform(-0.15, 0.15, 2)
    axes = rng.uniform((0.6, 0.45), (0.8, 0.65))
    face = _laid_on(ground, skin, _ellipses(middle[None], axes[None], rng.uniform(-0.3, 0.3, 1))[0])
    # Each in a quarter of the face of its own.
    quarters = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)]) * 0.45 * axes
    places = middle + quarters + rng.uniform(-0.12, 0.12, (_FEATURES, 2))
    sizes = rng.uniform(0.07, 0.2, (_FEATURES, 2))
    masks = _ellipses(places, sizes, rng.uniform(0, np.pi, _FEATURES))
    for mask, colour in zip(masks, rng.uniform(0.05, 0.75, (_FEATURES, 3)), strict=True):
        face = _laid_on(face, colour, 0.8 * mask)
    return face


def _forged(
    photograph: np.ndarray, donor: np.ndarray, collection: Collection, rng: np.random.Generator
) -> np.ndarray:
    """Return a photograph with an elliptic region of another one."""
    middle = rng.uniform(-0.25, 0.25, 2)
    axes = rng.uniform(0.3, 0.5, 2)
    mask = _ellipses(middle[None], axes[None], rng.uniform(0, np.pi, 1), collection.seam)[0]
    if collection.resampled:
        half = donor.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean(axis=(1, 3))
        donor = _enlarged(half)
    weights = mask / mask.sum()
    difference = np.einsum("hwc,hw->c", photograph - donor, weights)
    shift = collection.shift * rng.choice((-1.0, 1.0), 3) * rng.uniform(0.5, 1.0, 3)
    return _laid_on(photograph, donor + _MATCHED * difference + shift, mask)


def _stored(photograph: np.ndarray, step: float) -> np.ndarray:
    """Return the uint8 image whose 8 x 8 blocks are quantized by frequency, as JPEG does it."""
    count = SIDE // _BLOCK
    blocks = photograph.reshape(count, _BLOCK, count, _BLOCK, 3).transpose(0, 2, 4, 1, 3)
    quantized = step * np.round(_COSINES @ blocks @ _COSINES.T / (step * _COARSER)) * _COARSER
    blocks = _COSINES.T @ quantized @ _COSINES
    image = blocks.transpose(0, 3, 1, 4, 2).reshape(SIDE, SIDE, 3)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _laid_on(ground: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `colour` where `mask` `[32, 32]` is 1, and the ground where it is 0."""
    return ground + mask[..., None] * (colour - ground)


def _ellipses(
    middles: np.ndarray, axes: np.ndarray, angles: np.ndarray, softness: float = 1.0
) -> np.ndarray:
    """Return masks of ellipses in [0, 1], `[n, 32, 32]`.

    Args:
        middles: row and column `[n, 2]`; the image reaches from -1 to 1.
        axes: half axes `[n, 2]`, in the same units.
        angles: in radians `[n]`.
        softness: half the width of the edge, in pixels.
    """
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    down = _PLACES[None, :, None] - middles[:, 0, None, None]
    across = _PLACES[None, None, :] - middles[:, 1, None, None]
    first = (cos * down + sin * across) / axes[:, 0, None, None]
    second = (cos * across - sin * down) / axes[:, 1, None, None]
    inside = 1 - np.hypot(first, second)  # in half axes; about a pixel's worth of their mean
    pixels = inside * axes.mean(axis=1)[:, None, None] * SIDE / 2
    return np.clip(0.5 + pixels / (2 * softness), 0, 1)


def _texture(rng: np.random.Generator, cells: int, strength: float) -> np.ndarray:
    """Return smooth noise with so many cells along the image, `[32, 32, 3]`."""
    return strength * _enlarged(rng.standard_normal((cells, cells, 3)))


def _enlarged(coarse: np.ndarray) -> np.ndarray:
    """Return `[cells, cells, 3]` at full size, `[32, 32, 3]`, by bilinear interpolation."""
    weights = _BILINEAR[len(coarse)]
    rows = np.tensordot(weights, coarse, 1)  # [32, cells, 3]
    return weights @ rows


def _bilinear(cells: int) -> np.ndarray:
    """Return the weights `[32, cells]` of bilinear interpolation along one axis."""
    places = np.clip((np.arange(SIDE) + 0.5) * cells / SIDE - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells)))


def _cosines() -> np.ndarray:
    """Return the orthonormal discrete cosine transform of a block's side, `[frequency, place]`."""
    frequency, place = np.arange(_BLOCK)[:, None], np.arange(_BLOCK) + 0.5
    waves = np.sqrt(2 / _BLOCK) * np.cos(np.pi * frequency * place / _BLOCK)
    waves[0] /= np.sqrt(2)
    return waves


_PLACES = (np.arange(SIDE) + 0.5) * 2 / SIDE - 1
_BILINEAR = {cells: _bilinear(cells) for cells in (5, SIDE // 2)}
_COSINES = _cosines()
_COARSER = 1 + (np.arange(_BLOCK)[:, None] + np.arange(_BLOCK)) / 2
"""Steps of the quantization, relative to that of the lowest frequency."""
