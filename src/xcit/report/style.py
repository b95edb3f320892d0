"""The look that all pictures share, and their way into a PNG."""

from __future__ import annotations

import functools
import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from xcit.report.colours import BLUE, GREEN, GREY, GRID, GROUND, INK, ORANGE, RED  # noqa: F401 (the look)

DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, sizes in inches; it belongs to no window and to no global list."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def drawable(text: str, instead: str = "?") -> str:
    """Return a text if the pictures' font has all its characters, else another one.

    A page shows any script by the reader's own fonts; in a picture what the font lacks would be empty boxes.

    Args:
        text: one line.
        instead: in plain letters.
    """
    return text if text.isprintable() and all(map(_has_glyph, text)) else instead


@functools.lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    return get_font(findfont("DejaVu Sans")).get_char_index(ord(character)) != 0


def shorten(text: str, length: int) -> str:
    """Return a text of at most so many characters, with dots for what is left out at its end."""
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}\u2026"
