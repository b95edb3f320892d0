"""Curves over the epochs: losses and accuracy, learning rate and pace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from xcit.report.style import BLUE, GREEN, GREY, GRID, INK, ORANGE, new_figure

WIDE_RANGE = 30.0
"""Losses that differ by more than this factor are drawn on a logarithmic axis."""

FIGURES = {"val_accuracy": "validation accuracy", "val_map": "validation mAP"}
"""What an epoch is judged by, as a row calls it and as people do."""


def figure_name(row: Mapping[str, float]) -> str:
    """Return what epochs are judged by: "val_map" where images have several labels, else "val_accuracy"."""
    return "val_map" if "val_map" in row else "val_accuracy"


def curves_figure(history: Sequence[Mapping[str, float]], best_epoch: int) -> Figure:
    """Draw the losses on the left and the validation accuracy on the right; those of averaged weights are dashed.

    Args:
        history: a row an epoch with ``epoch``, ``train_loss``, ``val_loss`` and ``val_accuracy`` (0 to 1; or
            ``val_map``); ``ema_val_loss`` and ``ema_val_accuracy`` (``ema_val_map``) where weights were averaged.
        best_epoch: the epoch whose weights are kept; it is marked.
    """
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes in (left, right):
        _dress(axes, epochs)
        axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    marker = "o" if len(epochs) < 3 else None  # a line needs two points to be seen
    losses = {
        "train_loss": (ORANGE, "-", "training (augmented)"),
        "val_loss": (BLUE, "-", "validation"),
        "ema_val_loss": (BLUE, "--", "validation, averaged weights"),
    }
    for name, (colour, style, label) in losses.items():
        if name in history[0]:
            left.plot(epochs, _finite(history, name), style, color=colour, marker=marker, label=label)
    drawn = [value for name in losses for value in _finite(history, name) if math.isfinite(value)]
    logarithmic = _wide_range(drawn)
    left.set_title("loss, logarithmic" if logarithmic else "loss", loc="left", color=INK, fontsize=11)
    if logarithmic:
        left.set_yscale("log")
    else:
        left.set_ylim(0, 1.06 * max(drawn, default=1.0))
    left.legend(frameon=False, fontsize=9, labelcolor=INK)

    name = figure_name(history[0])
    values = _finite(history, name)
    averaged = _finite(history, f"ema_{name}")
    right.plot(epochs, values, GREEN, marker=marker, label="weights as trained")
    if any(map(math.isfinite, averaged)):
        right.plot(epochs, averaged, "--", color=GREEN, marker=marker, label="averaged weights")
        right.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    right.set_title(FIGURES[name], loc="left", color=INK, fontsize=11)
    known = [value for value in (*values, *averaged) if math.isfinite(value)] or [0.0]
    right.set_ylim(max(0.0, min(known) - 0.03), 1.005 if max(known) > 0.9 else max(known) + 0.06)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    kept = next(row for row in history if row["epoch"] == best_epoch)[name]
    right.plot([best_epoch], [kept], "o", color=GREEN, markersize=6)
    early = best_epoch < (epochs[0] + epochs[-1]) / 2
    right.annotate(
        f"epoch {best_epoch}, kept: {100 * kept:.1f} %",
        (best_epoch, kept),
        xytext=(8 if early else -8, -22),
        textcoords="offset points",
        ha="left" if early else "right",
        fontsize=9,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0},
    )
    return figure


def distillation_figure(history: Sequence[Mapping[str, float]], largest_entropy: float) -> Figure:
    """Draw the loss, the entropies of student and teacher, and the k-NN accuracy where it was probed.

    Args:
        history: a row an epoch with ``epoch``, ``train_loss``, ``teacher_entropy``, ``student_entropy``,
            ``teacher_spread`` and, in some rows, ``knn_accuracy``.
        largest_entropy: of an output that is the same everywhere, in nats.
    """
    probed = [row for row in history if "knn_accuracy" in row]
    figure = new_figure(9.0, 3.2)
    panels = figure.subplots(1, 3 if probed else 2)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 3 else None
    for axes in panels:
        _dress(axes, epochs)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    left, middle = panels[:2]
    left.plot(epochs, _finite(history, "train_loss"), ORANGE, marker=marker)
    left.set_title("loss, nats", loc="left", color=INK, fontsize=11)
    entropies = {
        "teacher_spread": (GREEN, "-", "teacher, mean output"),
        "student_entropy": (ORANGE, "-", "student, each output"),
        "teacher_entropy": (BLUE, "-", "teacher, each output"),
    }
    for name, (colour, style, label) in entropies.items():
        middle.plot(epochs, _finite(history, name), style, color=colour, marker=marker, label=label)
    middle.axhline(largest_entropy, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    middle.set_ylim(0, 1.06 * largest_entropy)
    middle.set_title("entropy, nats; dotted: the largest", loc="left", color=INK, fontsize=11)
    middle.legend(frameon=False, fontsize=8, labelcolor=INK)
    if probed:
        values = [row["knn_accuracy"] for row in probed]
        panels[2].plot([row["epoch"] for row in probed], values, GREEN, marker="o" if len(probed) < 25 else None)
        panels[2].set_title("k-NN accuracy", loc="left", color=INK, fontsize=11)
        panels[2].set_ylim(max(0.0, min(values) - 0.05), min(1.005, max(values) + 0.05))
        panels[2].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def pace_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the learning rate, the images a second, and the share of the time that was spent waiting for images.

    Args:
        history: a row an epoch with ``epoch``, ``lr``, ``images_per_second`` and ``data_wait`` (0 to 1).
    """
    figure = new_figure(9.0, 2.4)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 3 else None
    panels = {"lr": ("learning rate", BLUE), "images_per_second": ("images a second", GREEN)}
    panels |= {"data_wait": ("time spent waiting for images", ORANGE)}
    for axes, (name, (title, colour)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        _dress(axes, epochs)
        values = _finite(history, name)
        axes.plot(epochs, values, colour, marker=marker)
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0)
        if name == "lr":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        if name == "data_wait":
            axes.set_ylim(0, max(0.1, 1.1 * max((v for v in values if math.isfinite(v)), default=0.0)))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def _finite(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """A column; gaps where it is not a number."""
    values = (float(row.get(name, math.nan)) for row in history)
    return [value if math.isfinite(value) else math.nan for value in values]


def _wide_range(values: Sequence[float]) -> bool:
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) > WIDE_RANGE * min(known)


def _dress(axes: Axes, epochs: Sequence[float]) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(which="both", colors=GREY, labelsize=9, length=0)
    axes.set_xlabel("epoch", color=GREY, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
