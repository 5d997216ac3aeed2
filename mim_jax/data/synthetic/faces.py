"""Procedural faces: identities and what changes between the pictures of one, drawn by formulas.

No person is behind them. A face is told by eight numbers that make its identity and four that
differ from picture to picture, each in [-1, 1]. Pictures of an identity share the first eight.
"""

from typing import Any

import numpy as np

SIDE = 28
"""Pixels along an image, unless the option says otherwise."""

IDENTITY_FACTORS = (
    *("head_width", "eye_distance", "eye_height", "nose_length"),
    *("mouth_width", "skin", "hair", "hairline"),
)
"""What makes an identity, in the order of its vector."""

NUISANCE_FACTORS = ("yaw", "light", "mouth", "background")
"""What differs between pictures of one identity: the turn of the head (positive to the right), the
side the light comes from, how far the mouth is open, the colour behind."""

IDENTITIES = {"train": 200, "test": 50}
"""By split; nobody is in both."""

IMAGES_PER_IDENTITY = 30
"""Consecutive examples."""

MIN_SIDE = 8

# Of the random numbers of identities and of pictures.
_IDENTITY_SEED, _NUISANCE_SEED = 1, 2

# Ends of the range of each factor, and colours in [0, 1]. The image reaches from -1 to 1.
_RANGES = {
    "head_width": (0.48, 0.76),
    "eye_distance": (0.17, 0.34),
    "eye_height": (-0.22, 0.06),
    "nose_length": (0.14, 0.42),
    "mouth_width": (0.13, 0.34),
    "hairline": (-0.66, -0.32),
}
_SKIN = np.array([(0.42, 0.27, 0.18), (0.98, 0.84, 0.74)])
_HAIR = np.array([(0.08, 0.06, 0.06), (0.85, 0.55, 0.2)])
_BACKGROUND = np.array([(0.25, 0.35, 0.6), (0.6, 0.6, 0.4)])
_WHITE, _DARK, _LIPS = np.array([(0.95, 0.95, 0.95), (0.1, 0.08, 0.1), (0.7, 0.25, 0.25)])
_HEAD_HEIGHT, _HEAD_MIDDLE = 0.78, 0.12
_EYE_SIZE = (0.075, 0.11)  # half axes: down, across
_BROW_ABOVE = 0.17
_MOUTH_ROW = 0.56
# How far a part moves when the head turns: what lies nearer to the camera moves farther.
_HEAD_SHIFT, _EYE_SHIFT, _NOSE_SHIFT = 0.05, 0.17, 0.26
_SHADE = 0.5  # share of the brightness that the light takes from the far side


class FaceSource:
    """Faces in the order of their identities; example i is a pure function of the split and i.

    Attributes: as for `mim_jax.data.sources.Source`. The label is the number of the identity; that
    of the first test identity follows that of the last training identity.
    """

    class_names = None
    multi_label = False

    def __init__(self, split: str, side: int = SIDE) -> None:
        """Open a split of `IDENTITIES` with images of `side` x `side` pixels."""
        self.name = f"synthetic:faces{'' if side == SIDE else f':{side}'}:{split}"
        self.num_classes = _first_label(split) + IDENTITIES[split]
        self._split = split
        self._side = side

    def __len__(self) -> int:
        return IDENTITIES[self._split] * IMAGES_PER_IDENTITY

    @property
    def labels(self) -> np.ndarray:
        """Of all examples, int32 `[n]`."""
        numbers = np.arange(len(self), dtype=np.int32) // IMAGES_PER_IDENTITY
        return _first_label(self._split) + numbers

    def factors(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the identity `[8]` and the nuisance `[4]` of one example, in [-1, 1]."""
        label = self._label(index)
        return identity_factors(label), nuisance_factors(label, index % IMAGES_PER_IDENTITY)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` uint8 `[side, side, 3]` and `label`."""
        return {"image": draw_face(*self.factors(index), self._side), "label": self._label(index)}

    def _label(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        return _first_label(self._split) + index // IMAGES_PER_IDENTITY


def open_split(split: str, option: str) -> FaceSource:
    """Open a split.

    Args:
        split: `train` (200 identities with 30 images each) or `test` (50 others).
        option: pixels along an image, such as "112"; "" for 28.

    Raises:
        ValueError: another option or split.
    """
    if option and not (option.isdecimal() and int(option) >= MIN_SIDE):
        raise ValueError(
            f"synthetic:faces:{option} is not understood; give the pixels along an image, at least "
            f"{MIN_SIDE}, as in 'synthetic:faces:112', or nothing for {SIDE}"
        )
    if split not in IDENTITIES:
        raise ValueError(f"synthetic:faces has the splits {', '.join(IDENTITIES)}, not {split!r}")
    return FaceSource(split, int(option or SIDE))


def identity_factors(number: int) -> np.ndarray:
    """Return what makes the identity of a number: `[8]` in [-1, 1], see `IDENTITY_FACTORS`."""
    rng = np.random.default_rng((_IDENTITY_SEED, number))
    return rng.uniform(-1, 1, len(IDENTITY_FACTORS))


def nuisance_factors(number: int, picture: int) -> np.ndarray:
    """Return what one picture of an identity is like: `[4]` in [-1, 1], see `NUISANCE_FACTORS`."""
    rng = np.random.default_rng((_NUISANCE_SEED, number, picture))
    return rng.uniform(-1, 1, len(NUISANCE_FACTORS))


def draw_face(identity: np.ndarray, nuisance: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Return a face, uint8 `[side, side, 3]`.

    Args:
        identity: `[8]` in [-1, 1], see `IDENTITY_FACTORS`.
        nuisance: `[4]` in [-1, 1], see `NUISANCE_FACTORS`.
        side: pixels along the image.

    Raises:
        ValueError: vectors of another length.
    """
    if np.shape(identity) != (len(IDENTITY_FACTORS),) or np.shape(nuisance) != (4,):
        raise ValueError(
            f"a face needs {len(IDENTITY_FACTORS)} factors of identity and 4 of nuisance, got "
            f"{np.shape(identity)} and {np.shape(nuisance)}"
        )
    of = dict(zip(IDENTITY_FACTORS, map(float, identity)))
    yaw, light, mouth, background = map(float, nuisance)
    size = {name: _between(ends, of[name]) for name, ends in _RANGES.items()}
    skin, hair = _between(_SKIN, of["skin"]), _between(_HAIR, of["hair"])
    places = (np.arange(side) + 0.5) * 2 / side - 1
    down, across = places[:, None], places[None, :]

    def ellipse(row: float, column: float, height: float, width: float) -> np.ndarray:
        """Mask in [0, 1] whose edge is about a pixel wide."""
        distance = np.hypot((down - row) / height, (across - column) / width)
        return np.clip(0.5 + (1 - distance) * min(height, width) * side / 2, 0, 1)

    head = _HEAD_MIDDLE, yaw * _HEAD_SHIFT
    face = yaw * _EYE_SHIFT
    eye_row, mouth_open = size["eye_height"], 0.05 + 0.06 * (1 + mouth)
    head_mask = ellipse(*head, _HEAD_HEIGHT, size["head_width"])
    fringe = np.clip(0.5 + (size["hairline"] - down) * side / 2, 0, 1)
    image = np.broadcast_to(_between(_BACKGROUND, background), (side, side, 3))
    image = _laid_on(
        image, hair, ellipse(head[0] - 0.1, head[1], _HEAD_HEIGHT + 0.04, size["head_width"] + 0.1)
    )
    image = _laid_on(image, skin, head_mask * (1 - fringe))
    for direction in (-1, 1):
        column = face + direction * size["eye_distance"]
        image = _laid_on(image, _WHITE, ellipse(eye_row, column, *_EYE_SIZE))
        image = _laid_on(image, _DARK, ellipse(eye_row, column + 0.03 * yaw, 0.065, 0.055))
        image = _laid_on(image, 0.6 * hair, ellipse(eye_row - _BROW_ABOVE, column, 0.04, 0.13))
    nose_row = eye_row + 0.08 + size["nose_length"] / 2
    nose = ellipse(nose_row, yaw * _NOSE_SHIFT, size["nose_length"] / 2, 0.06)
    image = _laid_on(image, 0.6 * skin, nose)
    lips = ellipse(_MOUTH_ROW, face, mouth_open + 0.05, size["mouth_width"])
    image = _laid_on(image, _LIPS, lips)
    opening = ellipse(_MOUTH_ROW, face, max(mouth_open - 0.03, 0.03), 0.8 * size["mouth_width"])
    image = _laid_on(image, _DARK, (mouth + 1) / 2 * opening)
    shade = 1 - _SHADE * (1 - light * across) / 2
    return np.round(255 * np.clip(image * shade[..., None], 0, 1)).astype(np.uint8)


def _first_label(split: str) -> int:
    return 0 if split == "train" else IDENTITIES["train"]


def _between(ends: Any, factor: float) -> Any:
    """Return the value at a factor in [-1, 1] between those at its ends."""
    first, last = ends
    return first + (factor + 1) / 2 * (last - first)


def _laid_on(ground: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `colour` where `mask` is 1, and the ground where it is 0."""
    return ground + mask[..., None] * (colour - ground)
