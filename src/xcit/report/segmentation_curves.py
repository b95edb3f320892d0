"""How the training of a segmenter went: its losses, and the overlap of classes by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from xcit.report.colours import BLUE, GREEN, GREY, INK, ORANGE
from xcit.report.style import new_figure

LOSSES = {
    "train_loss": ("whole", BLUE),
    "train_loss_decode": ("head", GREEN),
    "train_loss_auxiliary": ("auxiliary head, before its weight", ORANGE),
}
"""What each loss is called, and its colour; with no auxiliary head there is the whole one alone."""
FIGURES = {
    "miou": ("mIoU", BLUE),
    "macc": ("mean accuracy", GREEN),
    "aacc": ("share of right pixels", ORANGE),
}


def segmentation_figure(history: Sequence[Mapping[str, float]], best_epoch: int) -> Figure:
    """Draw the losses, and the figures of the validation images.

    Args:
        history: a row an epoch with ``epoch``, the losses and the figures.
        best_epoch: whose weights were kept, from 1.
    """
    figure = new_figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 3 else None
    for axes, curves in ((left, LOSSES), (right, FIGURES)):
        for name, (label, colour) in curves.items():
            if name in history[0]:
                axes.plot(epochs, [row[name] for row in history], color=colour, marker=marker, label=label)
            if f"ema_{name}" in history[0]:
                values = [row[f"ema_{name}"] for row in history]
                axes.plot(epochs, values, "--", color=colour, marker=marker, label=f"{label}, averaged weights")
    left.set_title("training losses", loc="left", color=INK, fontsize=11)
    left.set_ylim(bottom=0)
    right.axvline(best_epoch, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    right.set_title("validation; dotted: the epoch kept", loc="left", color=INK, fontsize=11)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
