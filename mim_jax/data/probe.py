"""Facts about an image file from its header, without decoding it."""

import dataclasses
import io
from typing import Any

from PIL import Image

from mim_jax.data.decode import (
    has_sixteen_bit_colour,
    has_sixteen_bit_grey,
    is_png_of_grey_and_alpha,
    natural_mode,
)
from mim_jax.data.samples import (
    NPY_START,
    ORIENTATION_TAG,
    TIFF_GREY,
    TIFF_RGB,
    TIFF_STARTS,
    UnreadableImage,
    broken_is_unreadable,
    open_tiff_page,
    read_npy,
)


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What the header of an image file says.

    Attributes:
        height: in pixels, as it is to be shown (EXIF orientation is applied).
        width: in pixels, likewise.
        channels: as stored, alpha included; palette, CMYK and YCbCr files count as RGB.
        bits: the smallest of 8 and 16 that keeps every sample.
    """

    height: int
    width: int
    channels: int
    bits: int


def probe_image(data: bytes) -> ImageFacts:
    """Return the facts about the bytes of an image file, whose pixels are not looked at.

    Raises:
        UnreadableImage: no image, a broken header, or samples without a fixed range.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    if data.startswith(NPY_START):
        array = read_npy(data)  # a copy of what is in memory anyway
        height, width, channels = array.shape
        return ImageFacts(height, width, channels, array.dtype.itemsize * 8)
    page = open_tiff_page(data) if data.startswith(TIFF_STARTS) else None
    return _picture_facts(data) if page is None else _tiff_facts(page)


def _tiff_facts(page: Any) -> ImageFacts:
    height, width = page.imagelength, page.imagewidth
    if page.tags.valueof(ORIENTATION_TAG, 1) >= 5:
        height, width = width, height
    stored = page.photometric in (*TIFF_GREY, TIFF_RGB)
    two_bytes = page.dtype is not None and page.dtype.itemsize == 2
    return ImageFacts(height, width, page.samplesperpixel if stored else 3, 16 if two_bytes else 8)


def _picture_facts(data: bytes) -> ImageFacts:
    with broken_is_unreadable(), Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        # That of the header: the own method of a PNG decodes it first, to look behind the pixels.
        if Image.Image.getexif(image).get(ORIENTATION_TAG, 1) >= 5:
            height, width = width, height
        channels = 2 if is_png_of_grey_and_alpha(data) else len(natural_mode(image))
        deep = has_sixteen_bit_grey(image) or has_sixteen_bit_colour(data)
        return ImageFacts(height, width, channels, 16 if deep else 8)
