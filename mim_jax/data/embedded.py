"""The sample set in the package: 5,000 images of Fashion-MNIST, balanced over its 10 classes.

400 images a class of the official training split and 100 a class of the official test split,
28 x 28 grey. Licence and attribution are in `assets/FASHION_MNIST_LICENSE.txt`;
`mim_jax/data/make_embedded.py` made the files.
"""

import importlib.resources
import lzma

import numpy as np

from mim_jax.data.fashion_mnist import CLASS_NAMES

NUM_CLASSES = len(CLASS_NAMES)
IMAGES_PER_CLASS = {"train": 400, "test": 100}
IMAGE_SIZE = 28
# The classes of one file: two files a split keep each below 1 MB.
CLASSES_PER_FILE = 5


def read_embedded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 `[n, 28, 28, 1]` (0..255) and labels int32 `[n]` of `train` or `test`.

    The classes alternate: example `i` has label `i % 10`, so a slice of the split is balanced.
    n is 4,000 for `train` and 1,000 for `test`.

    Raises:
        ValueError: another split name.
    """
    if split not in IMAGES_PER_CLASS:
        raise ValueError(f"the embedded set has the splits 'train' and 'test', not {split!r}")
    assets = importlib.resources.files("mim_jax.data") / "assets"
    data = b"".join(lzma.decompress((assets / name).read_bytes()) for name in file_names(split))
    by_class = np.frombuffer(data, np.uint8).reshape(
        NUM_CLASSES, IMAGES_PER_CLASS[split], IMAGE_SIZE, IMAGE_SIZE, 1
    )
    images = by_class.swapaxes(0, 1).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    labels = np.arange(len(images), dtype=np.int32) % NUM_CLASSES
    return images, labels


def file_names(split: str) -> list[str]:
    """Return the names of the files of a split in `assets/`, in the order of their classes."""
    return [
        f"fashion_mnist_{split}_classes_{first}_to_{first + CLASSES_PER_FILE - 1}.xz"
        for first in range(0, NUM_CLASSES, CLASSES_PER_FILE)
    ]
