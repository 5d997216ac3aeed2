"""Make the files of the embedded sample set from the full Fashion-MNIST.

    python -m mim_jax.data.make_embedded [folder]

writes them to `folder` (default: `assets/` beside this file). It needs the full set, see
`mim_jax/data/fashion_mnist.py`. The choice is drawn with a fixed seed, so the files come out the
same each time.
"""

import lzma
import pathlib
import sys

import numpy as np

from mim_jax.data.embedded import CLASSES_PER_FILE, IMAGES_PER_CLASS, NUM_CLASSES, file_names
from mim_jax.data.fashion_mnist import read_fashion_mnist

SEED = 0
# Raw pixels, classes apart, under LZMA with a 4-bit literal context: the smallest of what needs
# only Python to read. On the train split 1.49 MB, against 1.53 MB as a lossless WebP mosaic,
# 1.57 MB as PNG, 1.59 MB by bzip2; differences between neighbouring pixels only cost bytes.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def chosen_images(split: str) -> np.ndarray:
    """Return the chosen images of a split, uint8 `[10, images per class, 28, 28]`.

    Within a class they are drawn without replacement and kept in the order of the full set.
    """
    images, labels = read_fashion_mnist(split)
    rng = np.random.Generator(np.random.Philox(key=SEED))
    chosen = []
    for label in range(NUM_CLASSES):
        of_class = np.flatnonzero(labels == label)
        # argsort of doubles: a choice that depends on the bit generator alone, which NumPy keeps.
        drawn = of_class[np.argsort(rng.random(len(of_class)), kind="stable")]
        chosen.append(images[np.sort(drawn[: IMAGES_PER_CLASS[split]]), ..., 0])
    return np.stack(chosen)


def files_of_split(split: str) -> dict[str, bytes]:
    """Return the content of each file of a split by its name."""
    images = chosen_images(split)
    parts = [
        images[first : first + CLASSES_PER_FILE].tobytes()
        for first in range(0, NUM_CLASSES, CLASSES_PER_FILE)
    ]
    return {
        name: lzma.compress(part, format=lzma.FORMAT_XZ, filters=_FILTERS)
        for name, part in zip(file_names(split), parts, strict=True)
    }


def main(arguments: list[str]) -> None:
    """Write the files of both splits and print their sizes."""
    folder = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).parent / "assets"
    folder.mkdir(parents=True, exist_ok=True)
    for split in IMAGES_PER_CLASS:
        for name, content in files_of_split(split).items():
            (folder / name).write_bytes(content)
            print(f"{folder / name}: {len(content):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
