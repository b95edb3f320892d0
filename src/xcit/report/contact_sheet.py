"""Contact sheets: rows of small pictures with captions, such as a query and what a search found for it.

Drawn with Pillow alone, so that it is fast with hundreds of pictures and needs nothing beyond the base installation.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from xcit.data.images import open_image
from xcit.errors import DataError
from xcit.report.colours import BLUE, GREEN, GREY, GRID, GROUND, INK, RED
from xcit.report.lettering import drawable, font, shortened

BOX = 184
"""Side in pixels of the square that each picture fits into."""
GAP, MARGIN, LINE, TEXT = 16, 24, 20, 13
"""Between pictures; around the sheet; height of a line of text; size of its letters, all in pixels."""
FOLD = 8
"""Cells a row of the sheet; longer rows go on below."""
MAX_ROWS = 60
"""Lines of pictures on a sheet; more would be larger than most programs show."""
LONGEST_SIDE_RATIO = 24
"""A picture that is longer than so many times its breadth is drawn a little broader, to be seen at all."""


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        source: its file, or the picture itself; a file that cannot be read is drawn as an empty frame that says so.
        caption: stands first below it, in colour, such as "1   0.987".
        name: stands below that; what is too long is shortened in its middle.
        right: colours the name: green for True, red for False, grey for None.
    """

    source: Path | Image.Image
    caption: str
    name: str
    right: bool | None = None


@dataclass(frozen=True)
class Row:
    """What stands side by side.

    Attributes:
        lead: stands first, on a ground of its own; None for rows without.
        cells: the others, in order.
    """

    lead: Cell | None
    cells: Sequence[Cell]


def contact_sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """Draw a sheet.

    Args:
        rows: at least one. What does not fit into ``MAX_ROWS`` lines is left out, and a line at the end says so.
        title: stands above; one line.

    Returns:
        An RGB picture.
    """
    lines = [(row, line) for row in rows for line in range(_num_lines(row))][:MAX_ROWS]
    left_out = len(rows) - len({id(row) for row, _ in lines})
    leads = any(row.lead for row in rows)
    columns = max(min(FOLD, len(row.cells)) for row in rows)
    step, height = BOX + GAP, BOX + 3 * LINE + GAP
    inset = step + GAP if leads else 0
    width = max(2 * MARGIN + inset + columns * step - GAP, 2 * MARGIN + 400)
    sheet = Image.new("RGB", (width, 2 * MARGIN + 2 * LINE + len(lines) * height + LINE * bool(left_out)), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN - 4), title, INK, width - 2 * MARGIN, size=TEXT + 3)
    y = MARGIN + 2 * LINE
    if leads:
        draw.rectangle((MARGIN - 10, y - 10, MARGIN + BOX + 10, y + len(lines) * height - 6), fill=GROUND)
    for number, (row, line) in enumerate(lines):
        if line == 0 and number:
            draw.line((MARGIN, y - GAP // 2, width - MARGIN, y - GAP // 2), fill=GRID)
        if line == 0 and row.lead:
            _draw(sheet, draw, row.lead, MARGIN, y, INK)
        for i, cell in enumerate(row.cells[line * FOLD : (line + 1) * FOLD]):
            _draw(sheet, draw, cell, MARGIN + inset + i * step, y, BLUE)
        y += height
    if left_out:
        _write(draw, (MARGIN, y), f"... and {left_out} more rows, which do not fit here.", GREY, width - 2 * MARGIN)
    return sheet


def sheet_png(sheet: Image.Image) -> bytes:
    """Return a sheet as a PNG file; the same sheet gives the same bytes."""
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def _num_lines(row: Row) -> int:
    return max(1, -(-len(row.cells) // FOLD))


def _draw(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int, colour: str) -> None:
    try:
        picture = _fitted(open_image(cell.source) if isinstance(cell.source, Path) else cell.source)
    except (DataError, MemoryError):
        draw.rectangle((x, y, x + BOX - 1, y + BOX - 1), outline=GREY, fill=GRID)
        word = "cannot be read" if isinstance(cell.source, Path) and cell.source.exists() else "is not there"
        _write(draw, (x + 10, y + BOX // 2 - LINE // 2), f"({word})", GREY, BOX - 20)
    else:
        at = x + (BOX - picture.width) // 2, y + (BOX - picture.height) // 2
        sheet.paste(picture, at)
        draw.rectangle((at[0], at[1], at[0] + picture.width - 1, at[1] + picture.height - 1), outline=GRID)
    _write(draw, (x, y + BOX + 5), cell.caption, colour, BOX)
    quiet = GREY if cell.right is None else GREEN if cell.right else RED
    for number, text in enumerate(_two_lines(cell.name)):
        _write(draw, (x, y + BOX + 5 + (number + 1) * (LINE - 2)), text, quiet, BOX, size=TEXT - 1)


def _fitted(picture: Image.Image) -> Image.Image:
    """Return a picture scaled to fit the box, small ones enlarged in whole pixels so that they stay what they are."""
    scale = BOX / max(picture.size)
    if scale >= 2:
        scale = int(scale)
        method = Image.Resampling.NEAREST
    else:
        method = Image.Resampling.LANCZOS
    least = max(1, BOX // LONGEST_SIDE_RATIO)
    size = [min(BOX, max(least, round(side * scale))) for side in picture.size]
    return picture.resize((size[0], size[1]), method, reducing_gap=3.0)


# --- text -------------------------------------------------------------------------------------------------------------


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: str, width: int, *, size: int = TEXT
) -> None:
    draw.text(at, shortened(drawable(text), width, size), fill=colour, font=font(size))


def _two_lines(name: str) -> list[str]:
    """Break a name that is too long for one line, at a separator if there is one; the second line is shortened."""
    name = drawable(name)
    size = TEXT - 1
    if font(size).getlength(name) <= BOX:
        return [name]
    fits = next(n for n in range(len(name) - 1, -1, -1) if font(size).getlength(name[:n]) <= BOX)
    breaks = [i + 1 for i in range(fits // 2, fits) if name[i] in "/_- ."]
    cut = breaks[-1] if breaks else fits
    return [name[:cut], shortened(name[cut:], BOX, size)]
