"""Many images on one page, to see at a glance what a data set holds."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 128  # pixels, the longer side of an image on the sheet
_GAP = 8
_TEXT_SIZE = 13
_TEXT_HEIGHT = 18
_FULL_RANGE_16_OVER_8 = 257  # 65535 / 255


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 8, tile: int = TILE
) -> np.ndarray:
    """Return a page of images in rows, each with a caption below, in black on white.

    Images keep their aspect: the longer side becomes `tile`. Small ones are enlarged without
    smoothing. 16 bits are shown as 8; one or two channels as grey levels of the first; of more
    than three, the first three. Captions are cut to the width of a tile.

    Args:
        images: each uint8 or uint16 `[height, width, channels]`.
        captions: one for each image; may be empty texts.
        columns: images in a row.
        tile: pixels.

    Returns:
        uint8 `[height, width, 3]`.

    Raises:
        ValueError: no images, or another number of captions.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"a sheet of {len(images)} images with {len(captions)} captions")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = tile + _GAP, tile + _TEXT_HEIGHT + _GAP  # width, height
    page = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(_TEXT_SIZE)
    for number, (image, caption) in enumerate(zip(images, captions)):
        left = _GAP + number % columns * cell[0]
        top = _GAP + number // columns * cell[1]
        small = _fitted(image, tile)
        page.paste(small, (left + (tile - small.width) // 2, top + (tile - small.height) // 2))
        text = _cut(caption, font, tile)
        draw.text((left + tile / 2, top + tile + _TEXT_HEIGHT / 2), text, "black", font, "mm")
    return np.array(page)


def _fitted(image: np.ndarray, tile: int) -> Image.Image:
    """Return an image in RGB whose longer side is `tile`."""
    if image.dtype == np.uint16:
        image = (image // _FULL_RANGE_16_OVER_8).astype(np.uint8)
    if image.shape[2] < 3:
        image = np.repeat(image[..., :1], 3, axis=-1)
    height, width = image.shape[:2]
    factor = tile / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    kernel = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    return Image.fromarray(np.ascontiguousarray(image[..., :3])).resize(size, kernel)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return as much of a text as fits into `width` pixels, with dots for the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
