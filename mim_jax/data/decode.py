"""Image bytes to 8- or 16-bit samples, by OpenCV (fast), Pillow (the referee) and tifffile."""

import importlib.util
import io
import re
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mim_jax.data.samples import (
    NPY_START,
    ORIENTATION_TAG,
    TIFF_RGB,
    TIFF_STARTS,
    MissingDecoder,
    UnreadableImage,
    broken_is_unreadable,
    has_alpha,
    is_interleaved,
    is_picture,
    open_tiff_page,
    read_npy,
    read_tiff_page,
    turned,
)

__all__ = [
    "BACKENDS",
    "UnreadableImage",
    "check_bits",
    "check_channels",
    "choose_backend",
    "decode_image",
    "has_sixteen_bit_colour",
    "has_sixteen_bit_grey",
    "is_png_of_grey_and_alpha",
    "natural_mode",
    "suits_opencv",
]

BACKENDS = ("opencv", "pillow")

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_2000_START = b"\0\0\0\x0cjP  "
_SIXTEEN_BIT_PPM_START = re.compile(rb"P6(?:\s|#[^\n]*\n)+\d+\s+\d+\s+65535\s")
_WEBP_ANIMATION_FLAG, _WEBP_EXIF_FLAG = 0x02, 0x08
# Pillow modes with more than 8 bits a sample whose samples are unsigned 16-bit integers.
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# Of these formats Pillow opens 16-bit grey as mode I, some versions or all.
_FORMATS_WITHOUT_32_BITS = ("PNG", "PPM")
_FULL_RANGE_16_OVER_8 = 257  # 65535 / 255

# `[height, width, channels]` as stored, and whether the last channel is alpha.
_Stored = tuple[np.ndarray, bool]


def choose_backend(backend: str = "auto") -> str:
    """Return `opencv` or `pillow`; `auto` is OpenCV where it is installed, else Pillow.

    Raises:
        ValueError: unknown name, or `opencv` asked for and not installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown image backend {backend!r}; use 'auto', 'opencv' or 'pillow'")
    try:
        has_opencv = importlib.util.find_spec("cv2") is not None
    except ValueError:  # it has no spec while another thread is importing it
        has_opencv = True
    if backend == "auto":
        return "opencv" if has_opencv else "pillow"
    if backend == "opencv" and not has_opencv:
        raise ValueError(
            "the image backend 'opencv' needs the package opencv-python-headless, which is not "
            "installed; install it or use backend='pillow'"
        )
    return backend


def check_channels(channels: int) -> None:
    """Raise `ValueError` unless `channels` is at least 1."""
    if channels < 1:
        raise ValueError(
            f"channels must be 1 (grey), 3 (RGB), or the number of bands in the files, "
            f"got {channels}"
        )


def check_bits(bits: int) -> None:
    """Raise `ValueError` unless `bits` is 8 or 16."""
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 (uint8 samples) or 16 (uint16 samples), got {bits}")


def decode_image(
    data: bytes, channels: int = 3, backend: str = "pillow", bits: int = 8
) -> np.ndarray:
    """Decode the bytes of an image file into `[height, width, channels]`, uint8 or uint16.

    Formats: JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, PGM, JPEG 2000, and `.npy` files with an array
    `[height, width]` or `[height, width, channels]` of uint8 or uint16. EXIF orientation is
    applied. Of a file with several frames or pages the first is read.

    Channels: colour turns to grey by ITU-R 601 luma, grey is repeated over three channels, and
    alpha is dropped, where 1 or 3 are asked for. Palette, CMYK and YCbCr files are RGB; of an RGB
    TIFF with four samples the fourth counts as alpha. In all other cases the file must have the
    number that is asked for, and gives its samples as they are stored, such as the bands of a
    multi-band TIFF.

    Bits: samples are scaled by the range of their type, not by the values in the image, so that
    the brightness of a series stays comparable: `round(value * 255 / 65535)` from 16 to 8 bits
    (for 16-bit colour Pillow keeps the high byte, which differs by at most 1), `value * 257` from
    8 to 16. Pillow has no 16-bit colour; with `bits=16` OpenCV or tifffile read it for both back
    ends.

    Args:
        data: the bytes of one image file.
        channels: of the result, 1 or more.
        backend: `opencv` or `pillow` (see `choose_backend`).
        bits: 8 for uint8, 16 for uint16.

    Raises:
        UnreadableImage: empty, corrupt or truncated data, another number of channels, samples
            without a fixed range (float, signed, 32 bits), or a compression whose decoder is not
            installed.
    """
    check_channels(channels)
    check_bits(bits)
    if not data:
        raise UnreadableImage("the file is empty")
    if data.startswith(NPY_START):
        stored = read_npy(data), False
    elif data.startswith(TIFF_STARTS):
        stored = _decode_tiff(data, channels, backend, bits)
    else:
        keep_depth = bits == 16 and has_sixteen_bit_colour(data)
        stored = _decode_picture(data, channels, backend, keep_depth)
    return _with_bits(_with_channels(*stored, channels), bits)


def suits_opencv(data: bytes) -> bool:
    """Return whether every supported version of OpenCV reads these bytes as Pillow does.

    JPEG, PNG, WebP and TIFF do, but for: a JPEG without its end marker, of which many versions of
    OpenCV fill the missing part with grey and report nothing, where Pillow refuses a truncated
    file (and reads the odd complete one with bytes behind its marker); a WebP with EXIF, whose
    orientation OpenCV 4 passes over, or with animation, which it does not read.
    """
    if data.startswith(_JPEG_START):
        return data.rstrip(b"\0").endswith(_JPEG_END)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        flags = data[20] if data[12:16] == b"VP8X" and len(data) > 20 else 0
        return not flags & (_WEBP_EXIF_FLAG | _WEBP_ANIMATION_FLAG)
    return data.startswith((_PNG_START, *TIFF_STARTS))


def is_png_of_grey_and_alpha(data: bytes) -> bool:
    """Return whether this is a PNG with two channels."""
    return data.startswith(_PNG_START) and data[25:26] == b"\4"  # colour type


def has_sixteen_bit_colour(data: bytes) -> bool:
    """Return whether this is a PNG, JPEG 2000 or PPM with several samples of 16 bits a pixel."""
    if data.startswith(_PNG_START):
        return data[24:25] == b"\x10" and data[25:26] != b"\0"  # bit depth, colour type
    if data.startswith(_JPEG_2000_START):
        start = data.find(b"ihdr", 0, 256) + 4  # of height, width, components, bits - 1
        return data[start + 8 : start + 10] > b"\0\1" and data[start + 10 : start + 11] == b"\x0f"
    return _SIXTEEN_BIT_PPM_START.match(data) is not None


def natural_mode(image: Image.Image) -> str:
    """Return the Pillow mode with the channels of a file: `L`, `LA`, `RGB` or `RGBA`."""
    grey = image.mode in ("1", "L", "LA", "La") or has_sixteen_bit_grey(image)
    return ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")


def has_sixteen_bit_grey(image: Image.Image) -> bool:
    """Return whether this opened image is grey of 16 bits.

    Raises:
        UnreadableImage: its samples are floats or 32-bit integers.
    """
    if image.mode in ("F", "I") and image.format not in _FORMATS_WITHOUT_32_BITS:
        raise UnreadableImage(
            f"its samples are of Pillow mode {image.mode!r} (float or 32-bit integers), "
            "which have no fixed range; convert it to 8 or 16 bits a sample"
        )
    return image.mode in (*_SIXTEEN_BIT_MODES, "I")


def _decode_tiff(data: bytes, channels: int, backend: str, bits: int) -> _Stored:
    page = open_tiff_page(data)
    if page is None:  # perhaps the others forgive what tifffile does not
        return _decode_picture(data, channels, backend, keep_depth=False)
    if is_picture(page):
        has_sixteen_bit_colour = page.photometric == TIFF_RGB and page.dtype == np.uint16
        return _decode_picture(data, channels, backend, bits == 16 and has_sixteen_bit_colour)
    try:
        return read_tiff_page(page), has_alpha(page)
    except MissingDecoder:
        image = _decode_pictured_tiff(page, data, channels)
        if image is None:
            raise
        return image


def _decode_pictured_tiff(page: Any, data: bytes, channels: int) -> _Stored | None:
    """Return RGB or an image with alpha where a picture decoder reads it rightly, else None."""
    if page.dtype == np.uint16:
        if page.photometric != TIFF_RGB or page.samplesperpixel > 4 or not is_interleaved(page):
            return None
        image = _decode_unchanged_with_opencv(data)
        return None if image is None else (image, has_alpha(page))
    colour = page.photometric == TIFF_RGB and page.samplesperpixel == 3
    pictured = channels in (1, 3) and (colour or has_alpha(page))
    return _decode_with_pillow(data, channels) if pictured else None


def _decode_picture(data: bytes, channels: int, backend: str, keep_depth: bool) -> _Stored:
    image = None
    if channels in (1, 3) and backend == "opencv" and suits_opencv(data):
        image = _decode_with_opencv(data, channels)
    elif keep_depth:
        image = _decode_unchanged_with_opencv(data)
    # What OpenCV refuses gets a second opinion: Pillow reads more kinds and gives a reason.
    if image is None:
        return _decode_with_pillow(data, channels)
    return image, image.shape[2] in (2, 4)


def _decode_with_opencv(data: bytes, channels: int) -> np.ndarray | None:
    """Return the image in 1 or 3 channels, or None where OpenCV cannot read it."""
    import cv2

    flags = cv2.IMREAD_COLOR if channels == 3 else cv2.IMREAD_GRAYSCALE
    # ANYDEPTH keeps 16 bits, so that they are rounded here and not cut by the decoder.
    image = _read_with_opencv(data, flags | cv2.IMREAD_ANYDEPTH)
    if image is None:
        return None
    return image[..., None] if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_unchanged_with_opencv(data: bytes) -> np.ndarray | None:
    """Return RGB, or colour or grey with alpha, as stored; None where OpenCV cannot read it."""
    choose_backend("opencv")  # says what is missing where it is not installed
    import cv2

    image = _read_with_opencv(data, cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3:
        return None
    image = image[..., [2, 1, 0, 3][: image.shape[2]]]
    if is_png_of_grey_and_alpha(data):  # OpenCV repeats the grey
        image = image[..., [0, 3]]
    with Image.open(io.BytesIO(data)) as header:
        return turned(image, header.getexif().get(ORIENTATION_TAG, 1))


def _read_with_opencv(data: bytes, flags: int) -> np.ndarray | None:
    import cv2

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return image if image is not None and image.dtype in (np.uint8, np.uint16) else None


def _decode_with_pillow(data: bytes, channels: int) -> _Stored:
    with broken_is_unreadable(), Image.open(io.BytesIO(data)) as opened:
        sixteen_bit_grey = has_sixteen_bit_grey(opened)
        image: Image.Image = ImageOps.exif_transpose(opened)
        if sixteen_bit_grey:
            return np.asarray(image).astype(np.uint16)[..., None], False
        mode = {1: "L", 3: "RGB"}.get(channels) or natural_mode(image)
        pixels = np.array(image.convert(mode))
        return pixels.reshape(*pixels.shape[:2], -1), mode.endswith("A")


def _with_channels(image: np.ndarray, alpha: bool, channels: int) -> np.ndarray:
    """Return `image` with the asked number of channels, see `decode_image`."""
    stored = image.shape[2]
    if alpha and channels in (1, 3):
        image = image[..., :-1]
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=-1)
    if image.shape[2] == 3 and channels == 1:
        return _luma(image)
    raise UnreadableImage(f"it has {stored} channels, but {channels} are asked for")


def _luma(image: np.ndarray) -> np.ndarray:
    """Return ITU-R 601 luma `[height, width, 1]` of RGB, rounded as Pillow does."""
    red, green, blue = (image[..., i : i + 1].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(image.dtype)


def _with_bits(image: np.ndarray, bits: int) -> np.ndarray:
    """Return uint8 or uint16, scaled by the ranges of the types."""
    if image.dtype.itemsize * 8 == bits:
        return image
    if bits == 16:
        return image.astype(np.uint16) * np.uint16(_FULL_RANGE_16_OVER_8)
    return np.rint(image.astype(np.float32) / _FULL_RANGE_16_OVER_8).astype(np.uint8)
