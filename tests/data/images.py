"""Small image files for the tests."""

import io
import pathlib

import numpy as np
from PIL import Image


def smooth_image(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Return a smooth uint8 `[height, width, 3]`, on which decoders and kernels agree well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_images(folder: pathlib.Path, count: int, suffix: str = ".png") -> None:
    """Write `count` images of different sizes; image i is filled with the value 10 * i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        values = np.full((16 + i, 20, 3), 10 * i, np.uint8)
        Image.fromarray(values).save(folder / f"{i:03d}{suffix}")
