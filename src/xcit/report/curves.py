"""Training curves: loss and accuracy over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from xcit.report.style import BLUE, GREEN, GREY, GRID, INK, ORANGE, new_figure


def curves_figure(history: Sequence[Mapping[str, float]], best_epoch: int) -> Figure:
    """Draw the losses on the left and the validation accuracy on the right.

    Args:
        history: a row an epoch with ``epoch``, ``train_loss``, ``val_loss`` and ``val_accuracy`` (0 to 1).
        best_epoch: the epoch whose weights are kept; it is marked.
    """
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes in (left, right):
        _dress(axes, epochs)
        axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    marker = "o" if len(epochs) < 3 else None  # a line needs two points to be seen
    left.plot(epochs, [r["train_loss"] for r in history], ORANGE, marker=marker, label="training (augmented, smoothed)")
    left.plot(epochs, [r["val_loss"] for r in history], BLUE, marker=marker, label="validation")
    left.set_title("cross-entropy loss", loc="left", color=INK, fontsize=11)
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=9, labelcolor=INK)

    accuracies = [row["val_accuracy"] for row in history]
    right.plot(epochs, accuracies, GREEN, marker=marker)
    right.set_title("validation accuracy", loc="left", color=INK, fontsize=11)
    right.set_ylim(max(0.0, min(accuracies) - 0.03), 1.01)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    kept = next(row for row in history if row["epoch"] == best_epoch)
    right.plot([best_epoch], [kept["val_accuracy"]], "o", color=GREEN, markersize=6)
    early = best_epoch < (epochs[0] + epochs[-1]) / 2
    right.annotate(
        f"epoch {best_epoch}, kept: {100 * kept['val_accuracy']:.1f} %",
        (best_epoch, kept["val_accuracy"]),
        xytext=(8 if early else -8, -22),
        textcoords="offset points",
        ha="left" if early else "right",
        fontsize=9,
        color=INK,
    )
    return figure


def _dress(axes: Axes, epochs: Sequence[float]) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.set_xlabel("epoch", color=GREY, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
