"""The images of the small experiments: Fashion-MNIST, and scenes composed of it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from mim_jax.data import open_source
from mim_jax.data.sources import ArraySource

GROUPS = np.array([0, 1, 2, 3, 2, 4, 0, 4, 5, 4], np.int32)
"""What the teacher is told of the ten classes: shirts, trousers, pullovers and coats, dresses,
shoes, bags."""


class Images(NamedTuple):
    """Images and what is known of them.

    Attributes:
        images: uint8 `[n, side, side, 1]`.
        labels: int32 `[n]`, or int8 `[n, classes]` of 0 and 1.
        patches: int32 `[n, tokens]`, the class of every patch; -1 for none. Empty if not known.
    """

    images: np.ndarray
    labels: np.ndarray
    patches: np.ndarray = np.zeros((0, 0), np.int32)

    def part(self, first: int, last: int) -> "Images":
        """Some of them."""
        return Images(*(array[first:last] for array in self))

    def source(self) -> ArraySource:
        """The images alone."""
        return ArraySource("toy images", self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Images for each purpose.

    Attributes:
        name: for messages and file names.
        unlabelled: for pre-training.
        few: labelled, for fine-tuning and the probe of few labels; the first of `probe`.
        probe: labelled, for probes and k-NN.
        test: what accuracies are measured on.
        teaching: what the teacher is trained on; its labels are the teacher's.
        classes: number of classes.
        patch: side of a patch in pixels.
        crop_area: of the training crops.
        batch_size: of pre-training.
    """

    name: str
    unlabelled: Images
    few: Images
    probe: Images
    test: Images
    teaching: Images
    classes: int
    patch: int
    crop_area: tuple[float, float] = (0.5, 1.0)
    batch_size: int = 64

    @property
    def side(self) -> int:
        """Of the images in pixels."""
        return int(self.test.images.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.side, self.side, 1


@functools.cache
def fashion(full: bool = True) -> Task:
    """Fashion-MNIST with an empty border, 32 x 32 pixels in 4 x 4 patches.

    The full set, or the part that comes with the package. Half of it teaches the teacher, which is
    told six groups of classes; the other half is there for all else.
    """
    name = "fashion_mnist" if full else "embedded"
    train, test = (_padded(open_source(name, split)) for split in ("train", "test"))
    few, probe, teaching = (500, 3000, 30_000) if full else (100, 400, 2000)
    told = train.part(teaching, len(train.images))
    return Task(
        name,
        unlabelled=train.part(probe, teaching),
        few=train.part(0, few),
        probe=train.part(0, probe),
        test=test.part(0, 2000),
        teaching=Images(told.images, GROUPS[told.labels]),
        classes=10,
        patch=8,
    )


def _padded(source: Any) -> Images:
    rows = [source[i] for i in range(len(source))]
    images = np.stack([row["image"] for row in rows])
    labels = np.array([row["label"] for row in rows], np.int32)
    return Images(np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), labels)


SCENE_CLASSES = (0, 1, 3, 5, 8, 9)
"""T-shirt, trousers, dress, sandal, bag and ankle boot: what the scenes are made of."""

CELL, CELLS, PATCH = 16, 3, 8
"""Pixels of a cell; cells along a side; pixels of a patch."""


@functools.cache
def scenes(full: bool = True) -> Task:
    """Scenes of 2 to 4 objects of 6 classes, 48 x 48 pixels in 6 x 6 patches, see `draw_scenes`."""
    name = "fashion_mnist" if full else "embedded"
    sizes = (8000, 1500, 1500, 12_000) if full else (200, 60, 60, 200)
    unlabelled, probe, test, teaching = sizes
    objects = [_padded(open_source(name, split)) for split in ("train", "test")]
    return Task(
        "scenes" if full else "scenes_embedded",
        unlabelled=draw_scenes(objects[0], unlabelled, 1),
        few=draw_scenes(objects[0], probe, 3).part(0, 500),
        probe=draw_scenes(objects[0], probe, 3),
        test=draw_scenes(objects[1], test, 4),
        teaching=draw_scenes(objects[0], teaching, 5),
        classes=len(SCENE_CLASSES),
        patch=PATCH,
    )


def draw_scenes(objects: Images, count: int, seed: int) -> Images:
    """Scenes with the classes of images (several) and of patches.

    Small objects lie in some cells of a 3 x 3 grid, moved and dimmed at random, on a noisy ground
    with bright lines across. A patch has the class of an object that fills a quarter of it or more,
    the class after the last if no object touches it, and else none.
    """
    random = np.random.default_rng(seed)
    side, cells = CELL * CELLS, CELLS * CELLS
    pools = [np.flatnonzero(objects.labels == label) for label in SCENE_CLASSES]
    images = random.normal(random.uniform(5, 40, (count, 1, 1)), 10, (count, side, side))
    labels = np.zeros((count, len(SCENE_CLASSES)), np.int8)
    owner = np.full((count, side, side), -1, np.int8)
    steps = np.arange(4 * side) / (4 * side)
    for i in range(count):
        for _ in range(3):
            (a, b), (c, d) = random.uniform(0, side, (2, 2))
            rows, columns = (a + (c - a) * steps).astype(int), (b + (d - b) * steps).astype(int)
            images[i, rows, columns] = random.uniform(60, 200)
        for cell in random.permutation(cells)[: random.integers(2, 5)]:
            label = random.integers(len(SCENE_CLASSES))
            picture = objects.images[random.choice(pools[label]), 2:-2, 2:-2, 0].astype(float)
            small = picture.reshape(14, 2, 14, 2).mean(axis=(1, 3))
            top, left = CELL * np.array(divmod(int(cell), CELLS)) + random.integers(0, 3, 2)
            place = (i, slice(top, top + 14), slice(left, left + 14))
            images[place] = np.where(small > 20, small * random.uniform(0.6, 1), images[place])
            owner[place] = np.where(small > 20, label, -1)
            labels[i, label] = 1
    pixels = np.clip(images, 0, 255).astype(np.uint8)
    return Images(pixels[..., None], labels, _patch_classes(owner))


def _patch_classes(owner: np.ndarray) -> np.ndarray:
    """Classes of patches `[n, tokens]` from those of pixels `[n, side, side]`, -1 for none."""
    grid = owner.shape[1] // PATCH
    cut = owner.reshape(-1, grid, PATCH, grid, PATCH).swapaxes(2, 3)
    cut = cut.reshape(len(owner), grid * grid, PATCH * PATCH)
    shares = np.stack([(cut == k).mean(axis=2) for k in range(len(SCENE_CLASSES))], axis=2)
    classes = np.where(shares.max(axis=2) >= 0.25, shares.argmax(axis=2), -1)
    return np.where(shares.sum(axis=2) == 0, len(SCENE_CLASSES), classes).astype(np.int32)
