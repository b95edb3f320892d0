"""Accuracy and cost against the size of the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from xcit.report.style import BLUE, GREEN, GREY, GRID, INK, ORANGE, new_figure

PADDING = 0.08
"""Of the axis, on either side of the smallest and the largest size."""


@dataclass(frozen=True)
class SweepPoint:
    """A model at one size of image.

    Attributes:
        image_size: side in pixels.
        score: what is drawn as accuracy, 0 to 1.
        interval: its 95 % confidence interval, where there is one.
        multiply_adds: of one image.
        images_per_second: measured; None where it was not.
    """

    image_size: int
    score: float
    interval: tuple[float, float] | None
    multiply_adds: int
    images_per_second: float | None


def sweep_figure(points: Sequence[SweepPoint], *, score: str, trained_size: int | None = None) -> Figure:
    """Draw accuracy with its interval, multiply-adds and throughput over the size, side by side.

    Args:
        points: in ascending order of their size.
        score: what the accuracy is called, such as "top-1 accuracy".
        trained_size: the size that the weights expect; it is marked where it lies among the others.
    """
    timed = [p for p in points if p.images_per_second is not None]
    sizes = [p.image_size for p in points]
    figure = new_figure(4.2 * (3 if timed else 2), 3.6)
    left, middle, *right = figure.subplots(1, 3 if timed else 2)

    scores = [100 * p.score for p in points]
    bounds = [(100 * low, 100 * high) for p in points for low, high in [p.interval or (p.score, p.score)]]
    if any(p.interval for p in points):
        left.fill_between(
            sizes, [b[0] for b in bounds], [b[1] for b in bounds], color=GREEN, alpha=0.15, linewidth=0,
            label="95 % interval",
        )  # fmt: skip
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    room = 0.22 * max(high - low, 1.0)
    left.set_ylim(max(0.0, low - room), high + room)
    _line(left, sizes, scores, GREEN, [f"{value:.1f}" for value in scores])

    costs = [p.multiply_adds / 1e9 for p in points]
    unit, scale = ("G", 1.0) if max(costs) >= 1 else ("M", 1e3)
    costs = [scale * cost for cost in costs]
    _line(middle, sizes, costs, ORANGE, [_short(cost) for cost in costs])
    middle.set_ylim(0, 1.15 * max(costs))
    titles = [score, f"multiply-adds an image ({unit})"]

    if timed:
        speeds = [p.images_per_second or 0.0 for p in timed]
        _line(right[0], [p.image_size for p in timed], speeds, BLUE, [_short(speed) for speed in speeds])
        right[0].set_ylim(0, 1.15 * max(speeds))
        titles.append("images per second")
    for axes in (middle, *right):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if value <= 100 else ""))
    for axes, title in zip((left, middle, *right), titles, strict=True):
        _dress(axes, sizes, title)
        if trained_size is not None and sizes[0] <= trained_size <= sizes[-1]:
            label = f"the weights' own size, {trained_size}"
            axes.axvline(trained_size, color=GREY, linewidth=1, linestyle=(0, (2, 3)), zorder=0, label=label)
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")
    return figure


def _line(axes: Axes, sizes: Sequence[int], values: Sequence[float], color: str, texts: Sequence[str]) -> None:
    axes.plot(sizes, values, color, marker="o", markersize=5)
    for size, value, text in zip(sizes, values, texts, strict=True):
        axes.annotate(
            text,
            (size, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
            path_effects=[withStroke(linewidth=3, foreground="white")],  # readable where the line passes
        )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _dress(axes: Axes, sizes: Sequence[int], title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("side of the test images (px)", color=GREY, fontsize=9)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    pad = PADDING * (sizes[-1] - sizes[0]) or 1
    axes.set_xlim(sizes[0] - pad, sizes[-1] + pad)
