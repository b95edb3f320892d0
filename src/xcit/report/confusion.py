"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from xcit.report.style import BLUE, GREY, GROUND, INK, RED, new_figure

MAX_NUMBERED = 20
"""Above so many classes the cells get too small for numbers."""


def confusion_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draw how many images of each class (rows) were taken for which (columns); mistakes are red.

    Args:
        confusion: ``confusion[i][j]`` images of class i were taken for class j.
        class_names: one a class.
    """
    counts = np.asarray(confusion)
    n = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = np.eye(n, dtype=bool)
    figure = new_figure(5.6, 5.4)
    axes = figure.subplots()
    blues = LinearSegmentedColormap.from_list("right", ["white", BLUE])
    reds = LinearSegmentedColormap.from_list("wrong", ["white", RED])
    # A single mistake among hundreds must be seen: mistakes have a scale of their own, which starts well off white.
    worst = max(shares[~right].max(initial=0), 1e-9)
    tints = np.where(shares > 0, 0.2 + 0.6 * shares / worst, 0)
    picture = np.where(right[..., None], blues(0.85 * shares), reds(np.clip(tints, 0, 1)))
    picture[counts == 0] = to_rgba(GROUND)
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks(np.arange(n), class_names)
    axes.set_yticks(np.arange(n), class_names)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=GREY)
    axes.set_ylabel("true", color=GREY)
    if n <= MAX_NUMBERED:
        for i, j in zip(*np.nonzero(counts), strict=True):
            light = right[i, j] and shares[i, j] > 0.5
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=10, color="white" if light else INK)
    return figure
