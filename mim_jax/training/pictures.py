"""Pictures that a person looks at: images in columns with titles, and a caption below."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 96  # pixels; below this, details and titles are hard to read
MARGIN = 8  # pixels around the whole picture
GAP = 6  # pixels between tiles
FRAME = (208, 208, 208)


def picture_grid(
    columns: Mapping[str, np.ndarray], caption: str = "", *, scale: int | None = None
) -> np.ndarray:
    """One picture of images side by side, black text on white.

    Every column has its title on top; every sample is a row. Titles and caption wrap at word
    boundaries, and a column is never narrower than the longest word of its title, so texts never
    overlap. Columns may differ in image size, for example a map of patches beside an image.

    Args:
        columns: by title, uint8 `[rows, height, width, channels]` (0..255). One or two channels
            are shown as grey levels of the first; of more than three, the first three are shown.
        caption: what a reader must know; line breaks are kept.
        scale: each pixel becomes a square of this many pixels. None: as many as make the longer
            side of a tile at least 96 pixels, and about as long as in the largest column.

    Returns:
        uint8 `[height, width, 3]`. The pixels of the images are unchanged, or repeated.

    Raises:
        ValueError: no columns or rows, another type or rank, or unequal numbers of rows.
    """
    _check_columns(columns)
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be at least 1, not {scale}.")
    longest = max(max(images.shape[1:3]) for images in columns.values())
    tiles = [
        enlarged(rgb(images), scale or automatic_scale(images, longest))
        for images in columns.values()
    ]  # of [rows, tile height, tile width, 3]
    size = _font_size(max(tile.shape[2] for tile in tiles))
    font, small_font = load_font(size), load_font(size - 2)
    cells = [
        max(tile.shape[2], _longest_word(title, font))
        for title, tile in zip(columns, tiles, strict=True)
    ]  # widths of the columns
    lefts = [MARGIN + sum(cells[:index]) + index * GAP for index in range(len(cells))]
    width = max(sum(cells) + GAP * (len(cells) - 1), _longest_word(caption, small_font))
    titles = [wrapped(title, font, cell) for title, cell in zip(columns, cells, strict=True)]
    notes = wrapped(caption, small_font, width)

    first_row = MARGIN + max(map(len, titles)) * line_height(font) + GAP // 2
    row_height = max(tile.shape[1] for tile in tiles)
    end = first_row + len(tiles[0]) * (row_height + GAP)
    height = end + len(notes) * line_height(small_font) + MARGIN
    canvas = Image.new("RGB", (width + 2 * MARGIN, height), "white")
    draw = ImageDraw.Draw(canvas)
    for left, cell, lines, tile in zip(lefts, cells, titles, tiles, strict=True):
        _draw_title(draw, left + cell / 2, first_row - GAP // 2, lines, font)
        across = left + (cell - tile.shape[2]) // 2
        for row, image in enumerate(tile):
            down = first_row + row * (row_height + GAP) + (row_height - image.shape[0]) // 2
            _draw_tile(canvas, across, down, image)
    for index, text in enumerate(notes):
        draw.text((MARGIN, end + index * line_height(small_font)), text, "black", small_font)
    return np.array(canvas)


def rgb(images: np.ndarray) -> np.ndarray:
    """Three channels from any number: `[rows, height, width, channels]` -> `[..., 3]`.

    One or two channels become grey levels of the first; of more than three, the first three stay.
    """
    if images.shape[-1] < 3:
        return np.repeat(images[..., :1], 3, axis=-1)
    return images[..., :3]


def enlarged(images: np.ndarray, scale: int) -> np.ndarray:
    """Nearest neighbour: every pixel of `[rows, height, width, channels]` `scale` x `scale`."""
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def automatic_scale(images: np.ndarray, longest: int) -> int:
    """The factor that makes `images` readable beside images whose longer side is `longest`."""
    side = max(images.shape[1:3])
    return max(math.ceil(SMALLEST_TILE / side), longest // side)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a longer word stands alone.

    Line breaks in the text are kept; an empty text has no lines.
    """
    lines = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def _draw_title(
    draw: ImageDraw.ImageDraw,
    middle: float,
    foot: int,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Centred on `middle`, the last line standing on `foot`."""
    for index, text in enumerate(reversed(lines)):
        draw.text((middle, foot - index * line_height(font)), text, "black", font, "md")


def _draw_tile(canvas: Image.Image, left: int, top: int, image: np.ndarray) -> None:
    """With a thin frame in the gap, so that a white image ends somewhere."""
    height, width = image.shape[:2]
    frame = (left - 1, top - 1, left + width, top + height)
    ImageDraw.Draw(canvas).rectangle(frame, outline=FRAME)
    canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (left, top))


def _longest_word(text: str, font: ImageFont.FreeTypeFont) -> int:
    return max((math.ceil(font.getlength(word)) for word in text.split()), default=0)


def _font_size(tile_width: int) -> int:
    """In proportion to the tiles, for a reader who zooms the picture to the page."""
    return min(max(tile_width // 8, 13), 18)


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which is on every machine."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; install it from its wheels.")
    return font


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line of text to the next."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def _check_columns(columns: Mapping[str, np.ndarray]) -> None:
    if not columns:
        raise ValueError("a picture needs at least one column of images.")
    rows = {title: len(images) if images.ndim else 0 for title, images in columns.items()}
    for title, images in columns.items():
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"column {title!r} is {images.dtype} {list(images.shape)}; expected uint8 "
                "[rows, height, width, channels], none of them zero."
            )
    if len(set(rows.values())) > 1:
        raise ValueError(f"columns differ in their number of rows: {rows}.")
