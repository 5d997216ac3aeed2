"""Files that hold samples rather than a picture: multi-band TIFF (tifffile) and `.npy` (NumPy)."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

NPY_START = b"\x93NUMPY"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
ORIENTATION_TAG = 0x0112  # of TIFF and EXIF

# Values of TIFF tags.
TIFF_GREY, TIFF_RGB = (0, 1), 2  # PhotometricInterpretation
_INTERLEAVED = 1  # PlanarConfiguration
_ALPHA = {1, 2}  # ExtraSamples: associated, unassociated


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it and says why.

    A source raises it for one bad example. The pipeline replaces that example and counts it.
    """


class MissingDecoder(UnreadableImage):
    """An image that one more package would read; the message names it."""


@contextlib.contextmanager
def broken_is_unreadable() -> Iterator[None]:
    """Turn any error of a decoder into `UnreadableImage`: on broken data they raise all kinds."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from error


def read_npy(data: bytes) -> np.ndarray:
    """Return the array of a `.npy` file as `[height, width, channels]`, uint8 or uint16.

    Raises:
        UnreadableImage: a broken file, or an array of another shape or type.
    """
    with broken_is_unreadable():
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.ndim not in (2, 3) or not array.size:
        raise UnreadableImage(
            f"its array has the shape {array.shape}; it must be [height, width] or "
            "[height, width, channels]"
        )
    _check_sample_type(array.dtype)
    return _native(array if array.ndim == 3 else array[..., None])


def open_tiff_page(data: bytes) -> Any:
    """Return the first page of a TIFF as a `tifffile.TiffPage`, None if its header is broken.

    Raises:
        UnreadableImage: its samples have no fixed range, or it is a volume.
    """
    import tifffile  # here, because it takes 0.1 s and few data sets are of TIFF

    try:
        page = tifffile.TiffFile(io.BytesIO(data)).pages.first
    except Exception:  # a broken file raises nearly anything
        return None
    if page.dtype is not None:
        _check_sample_type(page.dtype)
    if page.imagedepth != 1:
        raise UnreadableImage(f"it is a volume of {page.imagedepth} slices, not an image")
    return page


def is_picture(page: Any) -> bool:
    """Return whether picture decoders read this TIFF page rightly.

    OpenCV and Pillow take the first of several bands for the whole picture, both make garbage of
    16-bit RGB in separate planes, and OpenCV multiplies colour by alpha.
    """
    if page.samplesperpixel > 1 and page.photometric == TIFF_RGB:
        return page.samplesperpixel == 3 and is_interleaved(page)
    return page.samplesperpixel == 1 or page.photometric not in TIFF_GREY


def is_interleaved(page: Any) -> bool:
    """Return whether the samples of a pixel lie together, not in planes of their own."""
    return page.planarconfig == _INTERLEAVED


def has_alpha(page: Any) -> bool:
    """Return whether the last sample of a TIFF page is alpha: the fourth of RGB in any case."""
    if page.photometric == TIFF_RGB:
        return page.samplesperpixel == 4
    return page.samplesperpixel == 2 and not _ALPHA.isdisjoint(page.extrasamples)


def read_tiff_page(page: Any) -> np.ndarray:
    """Return the samples of a TIFF page as stored, `[height, width, samples]`, uint8 or uint16.

    Raises:
        MissingDecoder: its compression needs another package.
        UnreadableImage: broken data, or too many pixels.
    """
    planes, _, height, width, samples = page.shaped
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:  # where Pillow stops, too
        raise UnreadableImage(f"it has {height} x {width} pixels; cut it into smaller tiles")
    with broken_is_unreadable():
        try:
            values = page.asarray(maxworkers=1)
        except (ImportError, NotImplementedError, ValueError) as error:
            if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                raise
            raise MissingDecoder(
                f"its compression ({page.compression.name}) needs 'pip install imagecodecs'"
            ) from error
    values = values.reshape(planes, height, width, samples)
    image = np.moveaxis(values, 0, -1).reshape(height, width, planes * samples)
    return _native(turned(image, page.tags.valueof(ORIENTATION_TAG, 1)))


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return `[height, width, channels]` as it is to be shown.

    Args:
        image: as it is stored.
        orientation: the value of the tag Orientation, 1 to 8; 1 for as stored.
    """
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def _check_sample_type(dtype: np.dtype) -> None:
    if dtype.kind not in "bu" or dtype.itemsize > 2:
        raise UnreadableImage(
            f"its samples are of type {dtype}, which has no fixed range; convert it to 8 or 16 "
            "bits a sample, unsigned"
        )


def _native(samples: np.ndarray) -> np.ndarray:
    """Return samples of 1 or 2 bytes as uint8 or uint16, contiguous, in the machine's order."""
    return np.ascontiguousarray(samples, np.uint16 if samples.dtype.itemsize == 2 else np.uint8)
