import numpy as np
import pytest
from PIL import Image

from mim_jax.data.decode import UnreadableImage, decode_image
from mim_jax.data.probe import ImageFacts, probe_image
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

COLOUR = Image.fromarray(smooth_image())
GREY_16 = Image.fromarray(random_samples(40, 60, 1, np.uint16)[..., 0])
RGB_16 = random_samples(80, 70, 3, np.uint16)


@pytest.mark.parametrize(
    ("data", "channels", "bits"),
    [
        (encoded(COLOUR, "JPEG"), 3, 8),
        (encoded(COLOUR.convert("L"), "JPEG"), 1, 8),
        (encoded(COLOUR.convert("CMYK"), "JPEG"), 3, 8),
        (encoded(COLOUR.convert("LA"), "PNG"), 2, 8),
        (encoded(Image.fromarray(random_samples(40, 60, 4)), "WEBP"), 4, 8),
        (encoded(COLOUR.convert("P"), "PNG"), 3, 8),
        (encoded(COLOUR.convert("P"), "PNG", transparency=0), 4, 8),
        (encoded(COLOUR.convert("P"), "TIFF"), 3, 8),
        (encoded(COLOUR.convert("1"), "TIFF"), 1, 8),
        (encoded(COLOUR.convert("P"), "GIF"), 3, 8),
        (encoded(GREY_16, "PNG"), 1, 16),
        (encoded(GREY_16, "TIFF"), 1, 16),
        (encoded_pgm(np.asarray(GREY_16)), 1, 16),
        (encoded_png(random_samples(40, 60, 2, np.uint16), 4), 2, 16),
        *((encoded_by_opencv(RGB_16, s), 3, 16) for s in (".png", ".tiff", ".jp2", ".ppm")),
        (encoded_bands(random_samples(40, 60, 5)), 5, 8),
        (encoded_bands(random_samples(40, 60, 12, np.uint16), planar=True), 12, 16),
        (encoded_array(random_samples(40, 60, 7, np.uint16)), 7, 16),
        (encoded_array(random_samples(40, 60, 7)[..., 0]), 1, 8),
    ],
)
def test_facts_are_those_of_the_decoded_image(data: bytes, channels: int, bits: int) -> None:
    facts = probe_image(data)
    assert (facts.channels, facts.bits) == (channels, bits)
    for backend in ("opencv", "pillow"):
        image = decode_image(data, facts.channels, backend, facts.bits)
        assert image.shape == (facts.height, facts.width, facts.channels)
        assert image.dtype.itemsize * 8 == facts.bits


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_is_that_of_the_upright_image(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(COLOUR, image_format, exif=exif)
    assert probe_image(data) == ImageFacts(height=60, width=40, channels=3, bits=8)
    assert decode_image(data).shape == (60, 40, 3)


def test_the_header_alone_is_enough() -> None:
    assert probe_image(encoded(COLOUR, "PNG")[:100]) == ImageFacts(40, 60, 3, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image", "not an image of a known format"),
        (encoded(COLOUR.convert("F"), "TIFF"), "no fixed range"),
        (encoded_bands(random_samples(8, 9, 5).astype(np.int16)), "no fixed range"),
        (encoded_array(np.zeros((4, 4))), "no fixed range"),
        (encoded_png(random_samples(1, 1, 3), 2, (100_000, 100_000)), "exceeds limit"),
    ],
)
def test_no_image_is_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        probe_image(data)
