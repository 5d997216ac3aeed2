"""The full Fashion-MNIST from its gzip IDX files (H. Xiao, K. Rasul, R. Vollgraf, 2017)."""

import gzip
import os
import pathlib
import zlib

import numpy as np

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FOLDER_VARIABLE = "MIM_JAX_FASHION_MNIST"
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"

_FILE_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08


def fashion_mnist_folder() -> pathlib.Path:
    """Return the folder of the files: `$MIM_JAX_FASHION_MNIST`, else that of the Debian package."""
    return pathlib.Path(os.environ.get(FOLDER_VARIABLE) or DEBIAN_FOLDER)


def read_fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 `[n, 28, 28, 1]` (0..255) and labels int32 `[n]` of `train` or `test`.

    Raises:
        ValueError: another split name, or a damaged file.
        FileNotFoundError: the files are not there; says how to get them or point to them.
    """
    if split not in _FILE_PREFIX:
        raise ValueError(f"Fashion-MNIST has the splits 'train' and 'test', not {split!r}")
    prefix = _FILE_PREFIX[split]
    folder = fashion_mnist_folder()
    images = read_idx(_existing(folder / f"{prefix}-images-idx3-ubyte.gz"))
    labels = read_idx(_existing(folder / f"{prefix}-labels-idx1-ubyte.gz"))
    if images.ndim != 3 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: images of shape {images.shape} and labels of shape {labels.shape} do not "
            "belong together; get the four files again"
        )
    return images[..., None], labels.astype(np.int32)


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Return the uint8 array of a gzip IDX file, in the shape that its header states.

    Raises:
        ValueError: not gzip, not IDX of unsigned bytes, or cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}); get it again") from error
    if len(data) < 4 or data[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes; get it again")
    rank = data[3]
    shape = tuple(np.frombuffer(data, ">u4", count=rank, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise ValueError(
            f"{path}: {values.size} values do not fill the shape {shape}; get it again"
        )
    return values.reshape(shape)


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Install the full Fashion-MNIST with 'apt install "
            f"dataset-fashion-mnist', or set the environment variable {FOLDER_VARIABLE} to a "
            "folder that holds the four *-ubyte.gz files. The sample in this package needs "
            "neither: use the source 'embedded'"
        )
    return path
