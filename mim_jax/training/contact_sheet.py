"""A batch as one picture: all its images, with a caption below each."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mim_jax.training.pictures import GAP, MARGIN, enlarged, rgb

SMALLEST_TILE = 96  # pixels; smaller images are enlarged to it, by whole factors
LARGEST_TILE = 224
LONGEST_SIDE = 6000  # pixels of the whole sheet, which many tiles must shrink for
FONT_SIZE = 11


def contact_sheet(images: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Draws images in rows from the top left, as nearly a square as they fill.

    Args:
        images: uint8 `[n, height, width, channels]` (0..255).
        captions: for each image its lines, each cut at the width of a tile; a line that is too
            long keeps its end, where file names differ.

    Returns:
        uint8 `[height, width, 3]`.

    Raises:
        ValueError: no images, another type or rank, or another number of captions.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; expected uint8 "
            "[n, height, width, channels], none of them zero."
        )
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images have {len(captions)} captions.")
    columns = math.ceil(math.sqrt(len(images)))
    tiles = _tiles(rgb(images), min(LARGEST_TILE, LONGEST_SIDE // columns - GAP))
    font = ImageFont.load_default(FONT_SIZE)
    line_height = FONT_SIZE + 3
    text_height = line_height * max(len(lines) for lines in captions)
    cell = (tiles[0].width + GAP, tiles[0].height + text_height + GAP)
    rows = math.ceil(len(tiles) / columns)
    size = (2 * MARGIN + columns * cell[0] - GAP, 2 * MARGIN + rows * cell[1] - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (tile, lines) in enumerate(zip(tiles, captions)):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * cell[0], MARGIN + row * cell[1]
        sheet.paste(tile, (left, top))
        for number, line in enumerate(lines):
            where = (left, top + tile.height + number * line_height)
            draw.text(where, _cut(line, font, tile.width), "black", font)
    return np.asarray(sheet)


def _tiles(images: np.ndarray, largest: int) -> list[Image.Image]:
    """Images whose longer side lies between the smallest and the largest, where possible."""
    scale = max(1, min(math.ceil(SMALLEST_TILE / max(images.shape[1:3])), largest))
    tiles = [Image.fromarray(np.ascontiguousarray(image)) for image in enlarged(images, scale)]
    for tile in tiles:
        tile.thumbnail((largest, largest))  # does nothing if the tile is small enough
    return tiles


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
