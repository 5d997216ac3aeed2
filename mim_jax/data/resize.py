"""Resizing of uint8 and uint16 images by OpenCV or Pillow, never with aliasing.

The two differ. Pillow widens its kernel when it shrinks (antialiasing) and its cubic has
a = -0.5; it is what torchvision does to a PIL image, so `pillow` reproduces published pipelines
to the pixel. OpenCV's cubic has a = -0.75 and a kernel that always covers 4 pixels, so it aliases
when it shrinks. With `opencv`, an axis that shrinks by more than `AREA_ABOVE` is therefore
averaged over areas (INTER_AREA); the other axes, up to any enlargement, use the asked kernel. At
that factor both ways are equally far from Pillow's result on photographs (mean difference about 1
of 255); below it the kernel is nearer, above it the area average. OpenCV is several times faster.

Any number of channels is resized, each by itself: the result does not depend on the others.
"""

import functools

import numpy as np
from PIL import Image

from mim_jax.data.decode import choose_backend

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")
AREA_ABOVE = 1.1
# Some of OpenCV's kernels refuse more.
_OPENCV_CHANNELS = 4


def resized(
    image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic", backend: str = "auto"
) -> np.ndarray:
    """Return `image` resized; the image itself where it has that size already.

    Args:
        image: uint8 or uint16 `[height, width, channels]`.
        size: height and width of the result in pixels.
        interpolation: `bicubic`, `bilinear` or `lanczos`.
        backend: `opencv`, `pillow` or `auto`.

    Returns:
        `[size[0], size[1], channels]` of the same type.
    """
    if image.shape[:2] == tuple(size):
        return image
    if _backend(backend) == "pillow":
        return _resized_by_pillow(image, size, interpolation)
    if image.shape[2] <= _OPENCV_CHANNELS:
        return _resized_by_opencv(image, size, interpolation)
    parts = [
        np.ascontiguousarray(image[..., first : first + _OPENCV_CHANNELS])
        for first in range(0, image.shape[2], _OPENCV_CHANNELS)
    ]
    return np.concatenate([_resized_by_opencv(x, size, interpolation) for x in parts], axis=-1)


def resized_to_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `[height, width]` of `size`, each the value whose place is nearest.

    For what cannot be averaged, such as classes. Of both back ends alike, and as Pillow does it.
    """
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(values.shape, size, strict=True)
    )
    return values[rows[:, None], columns]


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

    def resize(samples: np.ndarray, height: int, width: int) -> np.ndarray:
        pixels = Image.fromarray(np.ascontiguousarray(samples))
        return np.asarray(pixels.resize((width, height), kernel))

    height, width = size
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return resize(image, height, width)
    by_channel = np.moveaxis(image, -1, 0)
    if image.dtype == np.uint8:
        return np.stack([resize(samples, height, width) for samples in by_channel], axis=-1)
    # Not every version of Pillow resizes 16-bit samples, so they are floats here. Pillow resizes
    # along rows, then along columns; where the kernel overshoots, it clips bytes after each, and
    # floats never.
    white = np.iinfo(image.dtype).max
    result = np.empty((height, width, image.shape[2]), image.dtype)
    for channel, samples in enumerate(by_channel):
        rows = resize(samples.astype(np.float32), image.shape[0], width).clip(0, white)
        result[..., channel] = np.rint(resize(rows, height, width).clip(0, white))
    return result
