"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from xcit.report.style import BLUE, GREY, GROUND, INK, RED, drawable, new_figure, shorten

MAX_NUMBERED = 25
"""Above so many classes the cells get too small for numbers."""
MAX_NAME = 22
"""Characters of a class's name beside the matrix."""


def confusion_figure(
    confusion: Sequence[Sequence[int]] | np.ndarray, class_names: Sequence[str], totals: Sequence[int] | None = None
) -> Figure:
    """Draw how many images of each class (rows) were taken for which (columns); mistakes are red.

    Args:
        confusion: ``confusion[i][j]`` images of class i were taken for class j.
        class_names: one a class.
        totals: images of each class, where the matrix is a part of a larger one; None for the sums of its rows.
    """
    counts = np.asarray(confusion)
    n = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1) if totals is None else np.asarray(totals), 1)[:, None]
    right = np.eye(n, dtype=bool)
    names = [shorten(drawable(name, f"class {i}"), MAX_NAME) for i, name in enumerate(class_names)]
    longest = max(map(len, names))
    upright = longest > max(1, 24 // n)  # names that would run into each other
    side = float(np.clip(0.5 * n, 2.0, 8.0 if n > 16 else 5.0))
    figure = new_figure(side + 0.5 + 0.075 * longest, side + 0.4 + (0.075 * longest if upright else 0.1))
    axes = figure.subplots()
    blues = LinearSegmentedColormap.from_list("right", ["white", BLUE])
    reds = LinearSegmentedColormap.from_list("wrong", ["white", RED])
    # A single mistake among hundreds must be seen: mistakes have a scale of their own, which starts well off white.
    worst = max(shares[~right].max(initial=0), 1e-9)
    tints = np.where(shares > 0, 0.2 + 0.6 * shares / worst, 0)
    picture = np.where(right[..., None], blues(0.85 * shares), reds(np.clip(tints, 0, 1)))
    picture[counts == 0] = to_rgba(GROUND)
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks(np.arange(n), names, rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(np.arange(n), names, parse_math=False)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=10 if n <= 16 else 8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=GREY)
    axes.set_ylabel("true", color=GREY)
    if n <= MAX_NUMBERED:
        for i, j in zip(*np.nonzero(counts), strict=True):
            light = right[i, j] and shares[i, j] > 0.5
            size = 10 if n <= 12 and counts.max() < 1000 else 7
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=size, color="white" if light else INK)
    return figure


def most_confused(mistakes: Iterable[tuple[int, int, int]], limit: int) -> list[int]:
    """Return the classes that are most often taken for each other, in the order of the classes.

    Args:
        mistakes: (class, what it was taken for, images), most frequent first.
        limit: classes at most.
    """
    chosen: set[int] = set()
    for i, j, _ in mistakes:
        if len(chosen | {i, j}) > limit:
            break
        chosen |= {i, j}
    return sorted(chosen)
