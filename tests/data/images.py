"""Small image files for the tests."""

import io
import pathlib
import struct
import zlib

import cv2
import numpy as np
import tifffile
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


def write_maps(images: pathlib.Path, maps: pathlib.Path) -> None:
    """Write a map for each image that `write_images` wrote below a folder.

    Image i, counted in its own folder, has the class i, but for its first row, which has none.
    """
    for path in sorted(images.rglob("*.*")):
        place = (maps / path.relative_to(images)).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            classes = np.full(image.size[::-1], int(path.stem), np.uint8)
        classes[0] = 255
        Image.fromarray(classes).save(place)


def random_samples(height: int, width: int, channels: int, dtype: type = np.uint8) -> np.ndarray:
    """Return `[height, width, channels]` over the whole range of an unsigned type."""
    shape = (height, width, channels)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def encoded_bands(samples: np.ndarray, planar: bool = False, **options: object) -> bytes:
    """Return a TIFF of `[height, width, bands]`, interleaved or in separate planes."""
    buffer = io.BytesIO()
    stored = np.ascontiguousarray(np.moveaxis(samples, -1, 0)) if planar else samples
    layout = {"planarconfig": "separate" if planar else "contig", "photometric": "minisblack"}
    tifffile.imwrite(buffer, stored, **{**layout, **options})
    return buffer.getvalue()


def encoded_by_opencv(samples: np.ndarray, suffix: str) -> bytes:
    """Return 16-bit colour, which Pillow cannot write."""
    order = [2, 1, 0, 3][: samples.shape[2]] if samples.shape[2] > 1 else [0]
    return cv2.imencode(suffix, samples[..., order])[1].tobytes()


def encoded_pgm(samples: np.ndarray, white: int = 65535) -> bytes:
    """Return 16-bit grey `[height, width]`, which old versions of Pillow cannot write."""
    header = f"P5 {samples.shape[1]} {samples.shape[0]} {white}\n".encode()
    return header + samples.astype(">u2").tobytes()


def encoded_array(array: np.ndarray) -> bytes:
    """Return a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encoded_png(
    samples: np.ndarray, colour_type: int, size: tuple[int, int] | None = None
) -> bytes:
    """Return a PNG written out, for what no library writes.

    Args:
        samples: uint8 or uint16 `[height, width, channels]`.
        colour_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
        size: height and width that the header promises; those of the samples if not given.
    """
    height, width = size or samples.shape[:2]
    bits = samples.dtype.itemsize * 8
    rows = samples.astype(samples.dtype.newbyteorder(">"))
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)  # filter type 0 before each row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
