import importlib.util
import io
import sys
import types

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from mim_jax.data.decode import UnreadableImage, choose_backend, decode_image, suits_opencv
from tests.data.images import (
    encoded,
    encoded_array,
    encoded_bands,
    encoded_by_opencv,
    encoded_pgm,
    encoded_png,
    random_samples,
    smooth_image,
)

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


def test_wrong_channels_bits_and_backend_are_errors() -> None:
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\), 3 \(RGB\), or .*, got 0"):
        decode_image(b"", 0)
    with pytest.raises(ValueError, match=r"bits must be 8 \(uint8 samples\) or 16 .*, got 12"):
        decode_image(b"", bits=12)
    with pytest.raises(ValueError, match="unknown image backend 'cv'; use 'auto', 'opencv' or"):
        choose_backend("cv")


def test_auto_falls_back_to_pillow_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto") == "pillow"
    with pytest.raises(ValueError, match="needs the package opencv-python-headless"):
        choose_backend("opencv")


def test_opencv_counts_as_installed_while_another_thread_imports_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))  # its __spec__ is None
    assert choose_backend("auto") == "opencv"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_format", ["BMP", "GIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats_of_pillow_are_read(backend: str, image_format: str, channels: int) -> None:
    stored = Image.fromarray(COLOUR)
    if image_format == "GIF":
        stored = stored.convert("P")
    expected = np.asarray(stored.convert("L" if channels == 1 else "RGB"))
    image = decode_image(encoded(stored, image_format), channels, backend)
    assert np.abs(image.astype(int) - expected.reshape(image.shape)).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_is_read(backend: str, image_format: str) -> None:
    frames = [Image.fromarray(np.full((9, 8, 3), value, np.uint8)) for value in (0, 255)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode_image(data, 3, backend), np.zeros((9, 8, 3), np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_colour_of_a_palette_keeps_its_colour(backend: str, channels: int) -> None:
    palette = Image.fromarray(COLOUR).convert("P")
    expected = palette.convert("L" if channels == 1 else "RGB")
    image = decode_image(encoded(palette, "PNG", transparency=0), channels, backend)
    assert np.abs(image.squeeze().astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bands", [2, 3, 4, 5, 12])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": True}])
def test_bands_come_as_stored(
    backend: str, dtype: type, planar: bool, bands: int, options: dict[str, object]
) -> None:
    samples = random_samples(20, 30, bands, dtype)
    bits = 8 * samples.itemsize
    data = encoded_bands(samples, planar, **(options if bands == 5 else {}))
    image = decode_image(data, bands, backend, bits)
    assert image.dtype == dtype
    np.testing.assert_array_equal(image, samples)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("stored", [3, 4])
def test_rgb_tiff_is_read_in_either_layout_and_depth(
    backend: str, dtype: type, planar: bool, stored: int
) -> None:
    samples = random_samples(24, 30, stored, dtype)
    data = encoded_bands(samples, planar, photometric="rgb")
    for channels in {3, stored}:
        image = decode_image(data, channels, backend, 8 * samples.itemsize)
        np.testing.assert_array_equal(image, samples[..., :channels])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_as_pictures_are(orientation: int) -> None:
    samples = random_samples(4, 6, 5)
    tag = (0x0112, "H", 1, orientation, True)
    bands = decode_image(encoded_bands(samples, extratags=[tag]), 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_image(encoded(Image.fromarray(samples[..., :3]), "PNG", exif=exif), 3)
    np.testing.assert_array_equal(bands[..., :3], picture)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_number_of_channels_is_an_error(backend: str) -> None:
    five = encoded_bands(random_samples(8, 9, 5))
    for channels in (1, 2, 3, 4, 6):
        with pytest.raises(UnreadableImage, match=f"it has 5 channels, but {channels} are asked"):
            decode_image(five, channels, backend)
    colour = encoded(Image.fromarray(COLOUR), "JPEG")
    with pytest.raises(UnreadableImage, match="it has 3 channels, but 4 are asked for"):
        decode_image(colour, 4, backend)
    grey = encoded(Image.fromarray(GREY), "PNG")
    with pytest.raises(UnreadableImage, match="it has 1 channels, but 2 are asked for"):
        decode_image(grey, 2, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_alpha_is_kept_where_it_is_asked_for(backend: str, mode: str, channels: int) -> None:
    samples = random_samples(8, 9, channels)
    data = encoded(Image.fromarray(samples, mode), "PNG")
    np.testing.assert_array_equal(decode_image(data, channels, backend), samples)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_eight_bits_become_sixteen_with_white_as_white(backend: str, image_format: str) -> None:
    data = encoded(Image.fromarray(COLOUR), image_format)
    image = decode_image(data, 3, backend, bits=16)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, decode_image(data, 3, backend).astype(int) * 257)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_unchanged(backend: str, image_format: str, channels: int) -> None:
    samples = random_samples(40, 50, 1, np.uint16)
    grey = samples[..., 0]
    pgm = image_format == "PPM"
    data = encoded_pgm(grey) if pgm else encoded(Image.fromarray(grey), image_format)
    image = decode_image(data, channels, backend, bits=16)
    np.testing.assert_array_equal(image, np.repeat(samples, channels, -1))


def test_grey_of_pgm_is_scaled_by_the_white_in_its_header() -> None:
    data = encoded_pgm(np.array([[0, 1023]]), white=1023)
    assert decode_image(data, 1, bits=16).ravel().tolist() == [0, 65535]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("suffix", "stored"),
    [(".png", 3), (".png", 4), (".tiff", 3), (".tiff", 4), (".jp2", 3), (".jp2", 4), (".ppm", 3)],
)
def test_sixteen_bit_colour_is_unchanged(backend: str, suffix: str, stored: int) -> None:
    samples = random_samples(80, 70, stored, np.uint16)
    data = encoded_by_opencv(samples, suffix)
    if suffix == ".jp2":  # OpenCV writes it with a small loss
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        samples = expected[..., [2, 1, 0, 3][:stored]]
    for channels in {3, stored}:
        image = decode_image(data, channels, backend, bits=16)
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image, samples[..., :channels])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_grey_with_alpha_is_unchanged(backend: str) -> None:
    samples = random_samples(8, 9, 2, np.uint16)
    data = encoded_png(samples, colour_type=4)
    np.testing.assert_array_equal(decode_image(data, 2, backend, bits=16), samples)
    np.testing.assert_array_equal(decode_image(data, 1, backend, bits=16), samples[..., :1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_luma_is_that_of_pillow(dtype: type) -> None:
    samples = random_samples(50, 60, 3, dtype)
    data = encoded_array(samples)
    by_pillow = np.asarray(Image.fromarray(decode_image(data, 3)).convert("L"))
    image = decode_image(data, 1)
    assert np.abs(image[..., 0].astype(int) - by_pillow).max() <= (0 if dtype == np.uint8 else 1)
    white = encoded_array(np.full((1, 1, 3), np.iinfo(dtype).max, dtype))
    assert decode_image(white, 1, bits=16) == 65535


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2"])
@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 7)])
def test_array_file_is_an_image(dtype: type | str, shape: tuple[int, ...]) -> None:
    samples = random_samples(8, 9, 7, np.dtype(dtype).type).reshape(8, 9, 7)
    array = samples[..., : shape[2]] if len(shape) == 3 else samples[..., 0]
    channels = shape[2] if len(shape) == 3 else 1
    data = encoded_array(np.asfortranarray(array.astype(dtype)))
    image = decode_image(data, channels, bits=8 * np.dtype(dtype).itemsize)
    np.testing.assert_array_equal(image, samples[..., :channels])
    assert image.dtype.isnative


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4), np.float32), "type float32, which has no fixed range; convert it to 8"),
        (np.zeros((4, 4), np.int16), "type int16, which has no fixed range"),
        (np.zeros(4, np.uint8), r"the shape \(4,\); it must be \[height, width\] or"),
        (np.zeros((0, 4), np.uint8), r"the shape \(0, 4\)"),
        (np.array([{}, {}]), "allow_pickle"),
    ],
)
def test_array_that_is_no_image_is_refused(array: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(encoded_array(array))


def test_broken_array_and_bands_are_refused() -> None:
    array = encoded_array(np.zeros((40, 40), np.uint8))
    for data in (array[:500], array[:8], encoded_bands(random_samples(40, 50, 5))[:3000]):
        with pytest.raises(UnreadableImage):
            decode_image(data, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_bands_without_a_fixed_range_are_refused(dtype: type) -> None:
    data = encoded_bands(random_samples(8, 9, 5).astype(dtype))
    with pytest.raises(UnreadableImage, match="no fixed range; convert it to 8 or 16 bits"):
        decode_image(data, 5)


def test_missing_decoder_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_imagecodecs(page: tifffile.TiffPage, **options: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", without_imagecodecs)
    with pytest.raises(UnreadableImage, match=r"\(NONE\) needs 'pip install imagecodecs'"):
        decode_image(encoded_bands(random_samples(8, 9, 5)), 5)
    # A picture with alpha needs nothing else.
    data = encoded(Image.fromarray(COLOUR).convert("RGBA"), "TIFF", compression="tiff_lzw")
    np.testing.assert_array_equal(decode_image(data, 3, "opencv"), COLOUR)


def test_volume_and_more_pixels_than_memory_holds_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    volume = np.zeros((16, 16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, volume, photometric="rgb", volumetric=True, tile=(16, 16, 16))
    with pytest.raises(UnreadableImage, match="a volume of 16 slices"):
        decode_image(buffer.getvalue(), 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(UnreadableImage, match="8 x 9 pixels; cut it into smaller tiles"):
        decode_image(encoded_bands(random_samples(8, 9, 5)), 5)
