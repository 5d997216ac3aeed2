import importlib.util

import numpy as np
import pytest
from PIL import Image

from mim_jax.data.decode import UnreadableImage, choose_backend, decode_image, suits_opencv
from tests.data.images import encoded, smooth_image

BACKENDS = ["opencv", "pillow"]
FORMATS = [
    ("JPEG", {"quality": 95, "subsampling": 0}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
]
COLOUR = smooth_image()
GREY = np.asarray(Image.fromarray(COLOUR).convert("L"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("image_format", "options"), FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_format_gives_the_same_image(
    backend: str, image_format: str, options: dict[str, object], channels: int
) -> None:
    data = encoded(Image.fromarray(COLOUR), image_format, **options)
    image = decode_image(data, channels, backend)
    expected = COLOUR if channels == 3 else GREY[..., None]
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    tolerance = 20 if image_format == "JPEG" else 1
    assert np.abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_mode_gives_uint8_of_the_asked_channels(
    backend: str, image_format: str, mode: str, channels: int
) -> None:
    stored = Image.fromarray(COLOUR).convert(mode)
    image = decode_image(encoded(stored, image_format), channels, backend)
    expected = np.asarray(stored.convert("L" if channels == 1 else "RGB"))
    assert image.dtype == np.uint8
    assert image.shape == (*GREY.shape, channels)
    assert np.abs(image.astype(int) - expected.reshape(image.shape)).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_scaled_by_the_range_of_its_type(
    backend: str, image_format: str, channels: int
) -> None:
    values = np.array([[0, 100, 128, 129, 257, 32768, 65407, 65535]], np.uint16).repeat(3, 0)
    image = decode_image(encoded(Image.fromarray(values), image_format), channels, backend)
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], channels, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_colour_is_scaled_by_the_range_of_its_type(backend: str, suffix: str) -> None:
    cv2 = pytest.importorskip("cv2")
    values = np.clip(COLOUR.astype(int) * 257 + 100, 0, 65535).astype(np.uint16)
    data = cv2.imencode(suffix, values[..., ::-1])[1].tobytes()
    image = decode_image(data, 3, backend)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - COLOUR).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("image_format", "options"), FORMATS)
def test_exif_orientation_is_applied(
    backend: str, image_format: str, options: dict[str, object]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    data = encoded(Image.fromarray(COLOUR), image_format, exif=exif, **options)
    image = decode_image(data, 3, backend)
    assert image.shape == (60, 40, 3)
    assert np.abs(image.astype(int) - np.rot90(COLOUR, -1)).max() <= 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_cmyk_jpeg_becomes_rgb(backend: str) -> None:
    data = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG")
    assert decode_image(data, 3, backend).shape == COLOUR.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("image_format", "options"), FORMATS)
def test_truncated_file_is_unreadable(
    backend: str, image_format: str, options: dict[str, object]
) -> None:
    data = encoded(Image.fromarray(COLOUR), image_format, **options)
    with pytest.raises(UnreadableImage):
        decode_image(data[: len(data) // 2], 3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "the file is empty"), (b"not an image", "not an image of a known")]
)
def test_no_image_is_unreadable(backend: str, data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(data, 3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_a_fixed_range_are_refused(backend: str, dtype: type) -> None:
    data = encoded(Image.fromarray(GREY.astype(dtype)), "TIFF")
    with pytest.raises(UnreadableImage, match="no fixed range; convert it to 8 or 16 bits"):
        decode_image(data, 1, backend)


def test_jpeg_without_its_end_is_not_left_to_opencv() -> None:
    data = encoded(Image.fromarray(COLOUR), "JPEG")
    assert suits_opencv(data)
    assert suits_opencv(data + b"\0\0")
    assert not suits_opencv(data[:-2])
    # Complete, with other bytes behind: read by Pillow.
    assert decode_image(data + b"trailer", 3, "opencv").shape == COLOUR.shape


def test_wrong_channels_and_backend_are_errors() -> None:
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"):
        decode_image(b"", 4)
    with pytest.raises(ValueError, match="unknown image backend 'cv'; use 'auto', 'opencv' or"):
        choose_backend("cv")


def test_auto_falls_back_to_pillow_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto") == "pillow"
    with pytest.raises(ValueError, match="needs the package opencv-python-headless"):
        choose_backend("opencv")
