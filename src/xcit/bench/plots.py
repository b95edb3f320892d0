"""Pictures of what was measured: time and memory against the number of tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcit.bench import linear_cost, results
from xcit.bench.deploy_cases import COLUMNS
from xcit.bench.linear_cost import COSTS, Series, fit_growth
from xcit.errors import BackendError, DataError
from xcit.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"median_ms": "ms", "peak_mib": "MiB"}
TITLES = {"median_ms": "time of one image", "peak_mib": "peak memory of one image"}
MARKERS = "os^Dvx"
DASHES = ("-", "--", ":", "-.")


def linear_figure(rows: Iterable[Mapping[str, str]], *, runtime: str = "eager", dtype: str = "float32") -> Figure:
    """Draw time on the left and peak memory on the right, logarithmic both ways, each series with its fit.

    Args:
        rows: of one machine.
        runtime: which runtime's.
        dtype: which precision's.

    Raises:
        DataError: no series of four sizes or more.
        BackendError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError('Plots need matplotlib; `pip install "xcit[train]"` brings it.')
    from xcit.report.style import INK, new_figure

    rows = list(rows)
    chosen = {
        column: [s for s in linear_cost.series_of(rows, column) if (s.runtime, s.dtype) == (runtime, dtype)]
        for column in COSTS
    }
    if not chosen["median_ms"]:
        raise DataError(
            f"There is no growth to draw for {runtime} in {dtype}: measure four sizes or more of a model, such as with "
            '`xcit bench "linear/*"`.'
        )
    panels = [column for column in COSTS if chosen[column]]
    looks = _looks(chosen["median_ms"])
    figure = new_figure(5.4 * len(panels), 4.6)
    for axes, column in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for series in chosen[column]:
            _draw(axes, series, looks[series.name])
        _dress(axes, chosen[column], column)
    machine = rows[0]
    where = (
        machine["hardware"] if machine["device"] == "cuda" else f"{machine['hardware']}, {machine['threads']} threads"
    )
    figure.suptitle(f"{runtime}, {dtype}, batch 1; {where}", fontsize=9, color=INK, x=0.01, ha="left")
    return figure


def write_linear(csv: Path, png: Path, *, runtime: str = "eager", dtype: str = "float32") -> None:
    """Draw a CSV file's linear cases; of several machines the one measured last.

    Args:
        csv: what ``xcit bench --out`` wrote.
        png: where to.
        runtime: which runtime's.
        dtype: which precision's.

    Raises:
        DataError: no such file, other columns, or too few sizes in it.
        BackendError: matplotlib is not installed.
        ExportError: the picture cannot be written.
    """
    if not csv.exists():
        raise DataError(f"{csv} is not there; `xcit bench --out {csv}` writes it.")
    rows = [row for row in results.read(csv, COLUMNS) if row["case"].startswith(f"{linear_cost.GROUP}/")]
    if rows:
        machine = _machine(max(rows, key=lambda row: row["date"]))
        rows = [row for row in rows if _machine(row) == machine]
    figure = linear_figure(rows, runtime=runtime, dtype=dtype)
    from xcit.report.style import png as png_of

    write_atomic(png, png_of(figure))


def _machine(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["hardware"], row["device"], row["threads"]


def _looks(all_series: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """One colour a model, one dash and marker a source."""
    from xcit.report.style import BLUE, GREEN, GREY, ORANGE, RED

    models = list(dict.fromkeys(series.model for series in all_series))
    sources = list(dict.fromkeys(series.source for series in sorted(all_series, key=lambda s: s.source != "folded")))
    colours = (BLUE, ORANGE, GREEN, RED, GREY)
    return {
        series.name: {
            "color": colours[models.index(series.model) % len(colours)],
            "marker": MARKERS[sources.index(series.source) % len(MARKERS)],
            "linestyle": DASHES[sources.index(series.source) % len(DASHES)],
        }
        for series in all_series
    }


def _draw(axes: Any, series: Series, look: dict[str, Any]) -> None:
    growth = fit_growth(series.num_tokens, series.costs)
    first, last = series.num_tokens[0], series.num_tokens[-1]
    grid = [first * (last / first) ** (i / 60) for i in range(61)]
    axes.plot(grid, [growth.at(n) for n in grid], color=look["color"], linestyle=look["linestyle"], linewidth=1.2)
    axes.plot(series.num_tokens, series.costs, look["marker"], color=look["color"], markersize=4.5)
    label = f"{series.name}: p = {growth.exponent:.2f}"
    axes.plot([], [], label=label, linewidth=1.2, markersize=4.5, **look)


def _dress(axes: Any, all_series: Sequence[Series], column: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from xcit.report.style import GRID, INK

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = (pick(n for s in all_series for n in s.num_tokens) for pick in (min, max))
    axes.set_xticks([tick for tick in (4**i for i in range(12)) if low / 2 <= tick <= high * 2])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("tokens", color=INK)
    axes.set_title(f"{TITLES[column]}, {UNITS[column]}", loc="left", color=INK, fontsize=11)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    bottom, top = axes.get_ylim()
    # room for the legend, above the curves: they rise to the right, and it stands on the left
    axes.set_ylim(bottom, top * (top / bottom) ** (0.09 * len(all_series)))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", title="a + b·tokensᵖ", title_fontsize=8)
