"""How the training of a detector went: its losses, and the average precision of its epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from xcit.report.colours import BLUE, GREEN, GREY, INK, ORANGE
from xcit.report.style import new_figure

PARTS = {
    "train_loss_classifier": ("class", BLUE),
    "train_loss_box_reg": ("box", GREEN),
    "train_loss_mask": ("mask", ORANGE),
    "train_loss_objectness": ("proposals, objectness", INK),
    "train_loss_rpn_box_reg": ("proposals, box", GREY),
}
"""Losses that the whole one is the sum of: what they are called, and their colours."""
FIGURES = {
    "box_ap50": ("boxes, AP50", BLUE, "--"),
    "box_ap": ("boxes, AP", BLUE, "-"),
    "mask_ap50": ("masks, AP50", ORANGE, "--"),
    "mask_ap": ("masks, AP", ORANGE, "-"),
}


def detection_figure(history: Sequence[Mapping[str, float]], best_epoch: int) -> Figure:
    """Draw the losses, and the average precision on the validation images.

    Args:
        history: a row an epoch with ``epoch``, the losses and the figures.
        best_epoch: whose weights were kept, from 1.
    """
    figure = new_figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 3 else None
    for name, (label, colour) in PARTS.items():
        if name in history[0]:
            left.plot(epochs, [row[name] for row in history], color=colour, marker=marker, label=label)
    left.set_title("training losses", loc="left", color=INK, fontsize=11)
    left.set_ylim(bottom=0)
    for name, (label, colour, style) in FIGURES.items():
        if name in history[0]:
            right.plot(epochs, [row[name] for row in history], style, color=colour, marker=marker, label=label)
    right.axvline(best_epoch, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    right.set_title("average precision; dotted: the epoch kept", loc="left", color=INK, fontsize=11)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
