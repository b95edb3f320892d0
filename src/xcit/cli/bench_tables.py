"""What `xcit bench` prints: a table a case, and the growth with the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from xcit.cli.output import print_table

if TYPE_CHECKING:
    from xcit.bench.deploy_cases import DeployCase

Row = Mapping[str, str]


def print_case(case: DeployCase, rows: Sequence[Row]) -> None:
    """Print a case's competitors in one precision; "-" is what was not measured."""
    if not rows:
        return
    first = rows[0]
    baseline = first["model"] if case.group.endswith("peers") or not case.is_xcit else first["source"]
    together = len({row["dtype"] for row in rows}) > 1
    if together:
        baseline = f"{first['runtime']} {first['dtype']}"
    columns = [
        *("model", "runtime", ">median ms", ">p90 ms", ">images/s", f">times {baseline}'s speed"),
        *(">peak MiB", ">GMACs", ">GFLOP/s", ">of peak", ">difference"),
    ]
    lines = [
        (
            row["model"] if row["source"] == "peer" or not case.is_xcit else row["source"],
            f"{row['runtime']} {row['dtype']}" if together else row["runtime"],
            f"{float(row['median_ms']):.2f}",
            f"{float(row['p90_ms']):.2f}",
            f"{float(row['images_per_second']):.1f}",
            _or_dash(row[f"ratio_vs_{(first if together else row)['runtime']}"], "{:.2f}x"),
            _or_dash(row["peak_mib"], "{:,.0f}"),
            f"{int(row['multiply_adds']) / 1e9:.2f}",
            f"{float(row['gflops']):.0f}",
            f"{100 * float(row['gflops']) / float(row['matrix_gflops']):.0f} %",
            row["max_rel_diff"],
        )
        for row in rows
    ]
    pixels = f"{case.image_size} px, batch {case.batch_size}, {case.mode}"
    where = first["hardware"] if first["device"] == "cuda" else f"{first['hardware']}, {first['threads']} threads"
    precision = "several precisions" if together else first["dtype"]
    print_table(f"{case.model}, {pixels}, {precision} ({where})", columns, lines)


def print_growth(rows: Sequence[Row]) -> None:
    """Print how time and memory of the linear cases grow, where there are sizes enough."""
    from xcit.bench.linear_cost import COSTS, fit_growth, series_of

    units = {"median_ms": "ms", "peak_mib": "MiB"}
    lines = []
    for column, cost in COSTS.items():
        for series in series_of(rows, column):
            growth = fit_growth(series.num_tokens, series.costs)
            sizes = f"{series.image_sizes[0]} to {series.image_sizes[-1]}"
            lines.append(
                (
                    series.name,
                    series.runtime,
                    series.dtype,
                    cost,
                    sizes,
                    f"{growth.exponent:.3f}",
                    f"{growth.intercept:.1f} {units[column]}",
                    f"{1000 * growth.at(1) - 1000 * growth.intercept:.3g} {units[column]}",
                    f"{100 * growth.worst:.1f} %",
                )
            )
    if lines:
        columns = (
            *("model", "runtime", "dtype", "cost", "px", ">exponent p", ">intercept a", ">1000 b", ">worst point"),
        )
        print_table("Growth with the number of tokens: a + b tokens^p", columns, lines)


def _or_dash(text: str, form: str) -> str:
    return form.format(float(text)) if text else "-"
