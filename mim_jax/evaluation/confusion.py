"""Which class is taken for which: the confusion matrix of a classifier, and a picture of it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import confusion_matrix

from mim_jax.training.pictures import FRAME, GAP, MARGIN, line_height, load_font, wrapped

MOST_WRITTEN = 20
"""Up to so many classes, the numbers stand in the cells; above, there is room for colour only."""

COLOURS = {0.0: (255, 255, 255), 0.1: (198, 219, 239), 0.5: (66, 146, 198), 1.0: (8, 48, 107)}
"""By share, with straight lines between; steep at first, since most mistakes are small shares."""

LONGEST_NAME = 160  # pixels; longer class names end in an ellipsis
SIDE = 560  # pixels along the matrix, if the cells have enough room then
BAR = 14  # pixels across the scale of colours


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Examples by true class (row) and predicted class (column), int64 `[classes, classes]`.

    Args:
        logits: `[examples, classes]`.
        labels: integers `[examples]`.
    """
    predicted, classes = np.argmax(logits, axis=1), np.arange(logits.shape[1])
    return confusion_matrix(labels, predicted, labels=classes)


def confusion_picture(
    counts: np.ndarray, class_names: Sequence[str] | None = None, caption: str = ""
) -> np.ndarray:
    """A picture of a confusion matrix, with the colour of a cell by its share of the row.

    Args:
        counts: integers `[classes, classes]`; rows are true classes, columns predicted ones.
        class_names: in the order of the labels; None writes the labels themselves.
        caption: written below, above a line that tells the accuracy.

    Returns:
        uint8 `[height, width, 3]`.

    Raises:
        ValueError: counts that are not a square of whole numbers from 0 on, or another number of
            names.
    """
    names = _checked_names(counts, class_names)
    classes = len(counts)
    room = load_font(13).getlength(f"{counts.max():,}") + 10 if classes <= MOST_WRITTEN else 12
    cell = int(min(max(SIDE // classes, room), max(64, room)))
    font = load_font(min(13, cell - 2))
    names = [_shortened(name, font) for name in names]
    side = classes * cell

    title_font = load_font(14)
    title = line_height(title_font) + GAP
    name_room = int(max(font.getlength(name) for name in names)) + GAP
    left, top = MARGIN + title + name_room, MARGIN
    bar_left = left + side + 2 * GAP
    width = bar_left + BAR + GAP + int(title_font.getlength("100 %")) + MARGIN
    # Upright where a column's name does not fit into its cell.
    upright = max(font.getlength(name) for name in names) > cell - 4
    below = top + side + GAP + (name_room if upright else line_height(font) + GAP)
    correct, total = int(np.trace(counts)), int(counts.sum())
    told = f"{caption}\n{correct:,} of {total:,} correct; colour: share of the true class".strip()
    note_font = load_font(13)
    notes = wrapped(told, note_font, width - 2 * MARGIN)
    height = below + title + len(notes) * line_height(note_font) + MARGIN

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    _draw_cells(canvas, (left, top), cell, shares)
    if classes <= MOST_WRITTEN:
        _draw_counts(draw, (left, top), cell, counts, shares)
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell
        draw.text((left - GAP, top + middle), name, "black", font, "rm")
        if upright:
            _draw_upright(canvas, (left + middle, top + side + GAP), name, font, "top")
        else:
            draw.text((left + middle, top + side + GAP), name, "black", font, "ma")
    draw.text((left + side / 2, below), "predicted", "black", title_font, "ma")
    _draw_upright(canvas, (MARGIN + title / 2, top + side / 2), "true", title_font, "middle")
    _draw_scale(canvas, (bar_left, top), side, title_font)
    for index, line in enumerate(notes):
        place = (MARGIN, below + title + index * line_height(note_font))
        draw.text(place, line, "black", note_font)
    return np.array(canvas)


def colours_of(shares: np.ndarray) -> np.ndarray:
    """uint8 `[..., 3]` of shares `[...]` in [0, 1]."""
    at, colours = list(COLOURS), zip(*COLOURS.values(), strict=True)
    channels = [np.interp(shares, at, channel) for channel in colours]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def _draw_cells(
    canvas: Image.Image, corner: tuple[int, int], cell: int, shares: np.ndarray
) -> None:
    """Squares in the colours of their shares, with a frame, and lines where there is room."""
    (left, top), side = corner, len(shares) * cell
    squares = colours_of(shares).repeat(cell, axis=0).repeat(cell, axis=1)
    canvas.paste(Image.fromarray(squares), (left, top))
    draw = ImageDraw.Draw(canvas)
    for line in range(0, side + 1, cell if cell >= 16 else side):
        draw.line((left - 1, top + line - 1, left + side - 1, top + line - 1), FRAME)
        draw.line((left + line - 1, top - 1, left + line - 1, top + side - 1), FRAME)


def _draw_counts(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    cell: int,
    counts: np.ndarray,
    shares: np.ndarray,
) -> None:
    """The number of every cell but 0, light on dark."""
    font = load_font(13)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            place = corner[0] + (column + 0.5) * cell, corner[1] + (row + 0.5) * cell
            colour = "white" if shares[row, column] > 0.4 else "black"
            draw.text(place, f"{count:,}", colour, font, "mm")


def _draw_scale(
    canvas: Image.Image, corner: tuple[int, int], side: int, font: ImageFont.FreeTypeFont
) -> None:
    """The colours of all shares from 1 (top) to 0, beside the matrix."""
    left, top = corner
    column = colours_of(np.linspace(1, 0, side))[:, None].repeat(BAR, axis=1)
    canvas.paste(Image.fromarray(column), (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left - 1, top - 1, left + BAR, top + side), outline=FRAME)
    for share, anchor in ((1.0, "la"), (0.5, "lm"), (0.0, "ld")):
        place = (left + BAR + GAP, top + (1 - share) * side)
        draw.text(place, f"{share:.0%}", "black", font, anchor)


def _draw_upright(
    canvas: Image.Image,
    place: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    anchor: str,
) -> None:
    """Text that reads from bottom to top; `place` is the middle of its "top" or its "middle"."""
    size = int(font.getlength(text)) + 1, line_height(font)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text((0, 0), text, 255, font)
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    across, down = place[0] - mask.width / 2, place[1]
    if anchor == "middle":
        down -= mask.height / 2
    canvas.paste("black", (round(across), round(down)), mask)


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut off where it is longer than `LONGEST_NAME` pixels."""
    if font.getlength(text) <= LONGEST_NAME:
        return text
    while font.getlength(text + "…") > LONGEST_NAME:
        text = text[:-1]
    return text.rstrip() + "…"


def _checked_names(counts: np.ndarray, class_names: Sequence[str] | None) -> list[str]:
    square = counts.ndim == 2 and counts.shape[0] == counts.shape[1] and len(counts) > 0
    if not square or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(
            f"counts are {counts.dtype} {counts.shape}; expected integers [classes, classes] from "
            "0 on."
        )
    names = [str(i) for i in range(len(counts))] if class_names is None else list(class_names)
    if len(names) != len(counts):
        raise ValueError(f"there are {len(counts)} classes, but {len(names)} class names.")
    return names
