"""Sheets of pictures with captions: attention laid over images, or whatever else belongs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from xcit.report.style import GREEN, INK, RED, new_figure

NARROW = 17
"""Characters of a caption that fit above one picture; titles stand above longer ones."""


@dataclass(frozen=True)
class Example:
    """One image and what goes with it, a row of a sheet.

    Attributes:
        pictures: side by side, of one size.
        caption: stands above the first; one line or two, in characters that the font has (``drawable``).
        right: colours the caption: green for True, red for False, neutral for None.
    """

    pictures: Sequence[Image.Image]
    caption: str
    right: bool | None = None


def examples_figure(examples: Sequence[Example], titles: Sequence[str], columns: int = 2) -> Figure:
    """Draw a sheet of examples.

    Args:
        examples: at least one, each with as many pictures as there are titles.
        titles: of the pictures, above the first row.
        columns: how many examples stand side by side.
    """
    width = len(titles)
    columns = min(columns, len(examples))
    rows = -(-len(examples) // columns)
    gap = 0.35  # between examples that stand side by side, in widths of a picture
    lines = max(example.caption.count("\n") + 1 for example in examples)
    raised = len(titles) > 1 and max(len(example.caption) for example in examples[:columns]) > NARROW
    above = max(example.caption.count("\n") + 1 for example in examples[:columns]) * raised  # lines below the titles
    height = (1.22 + 0.14 * lines) * rows + 0.14 * raised
    figure = new_figure(1.15 * (columns * (width + gap) - gap), height)
    ratios = ([1.0] * width + [gap]) * columns
    figure.set_layout_engine(
        "constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0.06, rect=(0, 0, 1, 1 - 0.14 * raised / height)
    )
    grid = figure.subplots(rows, len(ratios) - 1, squeeze=False, gridspec_kw={"width_ratios": ratios[:-1]})
    for axes in grid.flat:
        axes.axis("off")
    for i, example in enumerate(examples):
        row, first = i // columns, (i % columns) * (width + 1)
        colour = INK if example.right is None else GREEN if example.right else RED
        for j, picture in enumerate(example.pictures):
            axes = grid[row, first + j]
            axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
            if j == 0:
                axes.set_title(example.caption, fontsize=8.5, color=colour, loc="left", pad=3, parse_math=False)
            elif row == 0:
                axes.set_title(titles[j], fontsize=8.5, color=INK, pad=3 + 11 * above)
    return figure
