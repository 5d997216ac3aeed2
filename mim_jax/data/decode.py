"""Image bytes to uint8 arrays, by OpenCV (fast) or Pillow (the referee)."""

import importlib.util
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

BACKENDS = ("opencv", "pillow")

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_WEBP_EXIF_FLAG = 0x08
# Pillow modes with more than 8 bits a sample whose samples are unsigned 16-bit integers.
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_FULL_RANGE_16_OVER_8 = 257.0  # 65535 / 255


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it and says why.

    A source raises it for one bad example. The pipeline replaces that example and counts it.
    """


def choose_backend(backend: str = "auto") -> str:
    """Return `opencv` or `pillow`; `auto` is OpenCV where it is installed, else Pillow.

    Raises:
        ValueError: unknown name, or `opencv` asked for and not installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown image backend {backend!r}; use 'auto', 'opencv' or 'pillow'")
    has_opencv = importlib.util.find_spec("cv2") is not None
    if backend == "auto":
        return "opencv" if has_opencv else "pillow"
    if backend == "opencv" and not has_opencv:
        raise ValueError(
            "the image backend 'opencv' needs the package opencv-python-headless, which is not "
            "installed; install it or use backend='pillow'"
        )
    return backend


def decode_image(data: bytes, channels: int = 3, backend: str = "pillow") -> np.ndarray:
    """Decode JPEG, PNG, WebP or TIFF bytes into `[height, width, channels]` uint8 in 0..255.

    Grey, RGB, RGBA, palette, CMYK and 16-bit images all come out the same way: alpha is dropped,
    colour turns to grey by ITU-R 601 luma, grey is repeated over three channels. 16-bit samples
    are scaled by the range of their type, `round(value * 255 / 65535)`, not by the values in the
    image, so that the brightness of a series stays comparable (for 16-bit colour Pillow keeps the
    high byte, which differs by at most 1). EXIF orientation is applied. Of a file with several
    frames the first is read.

    Args:
        data: the bytes of one image file.
        channels: 1 (grey) or 3 (RGB).
        backend: `opencv` or `pillow` (see `choose_backend`).

    Raises:
        UnreadableImage: empty, corrupt or truncated data, or samples without a fixed range
            (float, 32-bit integers).
    """
    check_channels(channels)
    if not data:
        raise UnreadableImage("the file is empty")
    if backend == "opencv" and suits_opencv(data):
        image = _decode_with_opencv(data, channels)
        if image is not None:
            return image
    # What OpenCV refuses gets a second opinion: Pillow reads more kinds and gives a reason.
    return _decode_with_pillow(data, channels)


def check_channels(channels: int) -> None:
    """Raise `ValueError` unless `channels` is 1 or 3."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")


def suits_opencv(data: bytes) -> bool:
    """Return whether every supported version of OpenCV reads these bytes as Pillow does.

    Two kinds are left to Pillow. A JPEG without its end marker: many versions of OpenCV fill the
    missing part with grey and report nothing, where Pillow refuses a truncated file (and reads
    the odd complete one with bytes behind its marker). A WebP with EXIF: OpenCV 4 passes over its
    orientation.
    """
    if data.startswith(_JPEG_START):
        return data.rstrip(b"\0").endswith(_JPEG_END)
    has_webp_flags = data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8X" and len(data) > 20
    return not (has_webp_flags and data[20] & _WEBP_EXIF_FLAG)


def _decode_with_opencv(data: bytes, channels: int) -> np.ndarray | None:
    """Return the image, or None where OpenCV cannot read it."""
    import cv2

    flags = cv2.IMREAD_COLOR if channels == 3 else cv2.IMREAD_GRAYSCALE
    try:
        # ANYDEPTH keeps 16 bits, so that they are rounded here and not cut by the decoder.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_ANYDEPTH)
        if image is None or image.dtype not in (np.uint8, np.uint16):
            return None
        if channels == 3:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    except cv2.error:
        return None
    image = _eight_bits(image)
    return image[..., None] if channels == 1 else image


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode in ("F", "I") and not _is_sixteen_bit_png(opened):
                raise UnreadableImage(
                    f"its samples are of Pillow mode {opened.mode!r} (float or 32-bit integers), "
                    "which have no fixed range; convert it to 8 or 16 bits a sample"
                )
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode in (*_SIXTEEN_BIT_MODES, "I"):
                grey = _eight_bits(np.asarray(image).astype(np.uint16))[..., None]
                return np.repeat(grey, channels, axis=-1)
            if channels == 1:
                return np.array(image.convert("L"))[..., None]
            return np.array(image.convert("RGB"))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise all of these on broken files.
        raise UnreadableImage(str(error) or type(error).__name__) from error


def _is_sixteen_bit_png(image: Image.Image) -> bool:
    """Return whether this is a 16-bit grey PNG, which older versions of Pillow open as mode I."""
    return image.format == "PNG" and image.mode == "I"


def _eight_bits(image: np.ndarray) -> np.ndarray:
    """Return uint8 from uint8 (as is) or uint16 (scaled by the range of the type)."""
    if image.dtype == np.uint8:
        return image
    return np.rint(image.astype(np.float32) / _FULL_RANGE_16_OVER_8).astype(np.uint8)
