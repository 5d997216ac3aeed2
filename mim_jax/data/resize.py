"""Resizing of uint8 images by OpenCV or Pillow, never with aliasing.

The two differ. Pillow widens its kernel when it shrinks (antialiasing) and its cubic has
a = -0.5; it is what torchvision does to a PIL image, so `pillow` reproduces published pipelines
to the pixel. OpenCV's cubic has a = -0.75 and a kernel that always covers 4 pixels, so it aliases
when it shrinks. With `opencv`, an axis that shrinks by more than `AREA_ABOVE` is therefore
averaged over areas (INTER_AREA); the other axes, up to any enlargement, use the asked kernel. At
that factor both ways are equally far from Pillow's result on photographs (mean difference about 1
of 255); below it the kernel is nearer, above it the area average. OpenCV is several times faster.
"""

import functools

import numpy as np
from PIL import Image

from mim_jax.data.decode import choose_backend

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")
AREA_ABOVE = 1.1


def resized(
    image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic", backend: str = "auto"
) -> np.ndarray:
    """Return `image` resized; the image itself where it has that size already.

    Args:
        image: uint8 `[height, width, channels]`, 1 or 3 channels.
        size: height and width of the result in pixels.
        interpolation: `bicubic`, `bilinear` or `lanczos`.
        backend: `opencv`, `pillow` or `auto`.

    Returns:
        uint8 `[size[0], size[1], channels]`.
    """
    if image.shape[:2] == tuple(size):
        return image
    if _backend(backend) == "opencv":
        return _resized_by_opencv(image, size, interpolation)
    return _resized_by_pillow(image, size, interpolation)


@functools.cache
def _backend(backend: str) -> str:
    # Looking for an installed package takes longer than resizing a small image.
    return choose_backend(backend)


def _resized_by_opencv(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    import cv2

    kernel = {
        "bicubic": cv2.INTER_CUBIC,
        "bilinear": cv2.INTER_LINEAR,
        "lanczos": cv2.INTER_LANCZOS4,
    }[interpolation]
    height, width = size
    average_rows = image.shape[0] > AREA_ABOVE * height
    average_columns = image.shape[1] > AREA_ABOVE * width
    result: np.ndarray = image
    if average_rows or average_columns:
        area_size = (
            width if average_columns else image.shape[1],
            height if average_rows else image.shape[0],
        )
        result = cv2.resize(result, area_size, interpolation=cv2.INTER_AREA)
    if not (average_rows and average_columns):
        result = cv2.resize(result, (width, height), interpolation=kernel)
    # OpenCV drops a channel axis of length 1.
    return result.reshape(height, width, image.shape[2])


def _resized_by_pillow(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    kernel = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "lanczos": Image.Resampling.LANCZOS,
    }[interpolation]
    grey = image.shape[2] == 1
    pixels = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    result = np.asarray(pixels.resize((size[1], size[0]), kernel))
    return result[..., None] if grey else result
