"""The look that all pictures share, and their way into a PNG."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GREY, GRID, GROUND = "#1f2430", "#6b7280", "#e5e7eb", "#f6f7f9"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea8a1f", "#15803d", "#c81e3a"

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
