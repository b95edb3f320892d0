"""One case from start to row: compare the outputs, measure the memory, then time in turns.

Nothing is timed that does not compute the same: competitors whose outputs or gradients differ from the baseline's by
more than rounding raise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from xcit.bench import memory, results, timer
from xcit.bench.cases import Case, PyramidCase, Suite
from xcit.bench.contenders import OUTPUT, Contender, build
from xcit.errors import BackendError
from xcit.ops.xca import observe_forms

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.int8: 3e-1}
"""Largest accepted ‖ours − baseline‖ / ‖baseline‖ of an output or a gradient; see ``gradient_tolerance`` too."""


class OutputsDifferError(RuntimeError):
    """Two competitors do not compute the same function: a bug here, not a user's mistake."""


def run(
    suite: Suite,
    cases: Sequence[Case],
    *,
    results_dir: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    plan: timer.Plan,
    compiled: bool = False,
    report: Callable[[str], None] = print,
) -> list[dict[str, str]]:
    """Measure cases one after another; with a record, each one's rows are on disk before the next begins.

    Args:
        suite: competitors, baseline and columns.
        cases: which of its cases, or others of its type.
        results_dir: folder of the CSV files; None keeps no record.
        device: where to measure.
        dtype: of weights and inputs.
        plan: how long to time.
        compiled: time torch.compile'd competitors too.
        report: takes one line a case.

    Returns:
        All rows.

    Raises:
        OutputsDifferError: before any timing of the case.
        BackendError: the device is not there.
    """
    if device.type not in ("cpu", "cuda"):
        raise BackendError(
            f"The benchmarks measure on cpu and cuda; {device.type!r} has no way to measure memory here."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("There is no CUDA device that this torch can use; `xcit doctor` shows what it sees.")
    path = suite.path(results_dir) if results_dir else None
    if path:
        results.read(path, suite.columns)  # a file of other columns should fail now, not after the first measurement
    common = {"date": results.now(), "dtype": str(dtype).removeprefix("torch."), **results.environment(device.type)}
    all_rows = []
    for case in cases:
        rows = [common | row for row in measure(suite, case, device=device, dtype=dtype, plan=plan, compiled=compiled)]
        if path:
            results.append(path, rows, suite.columns)
        all_rows += rows
        report(_line(suite, case, rows))
    return all_rows


def measure(
    suite: Suite, case: Case, *, device: torch.device, dtype: torch.dtype, plan: timer.Plan, compiled: bool = False
) -> list[dict[str, str]]:
    """Measure one case.

    Returns:
        One row a competitor, the baseline first, without the columns of date, dtype and environment.
    """
    names = tuple(dict.fromkeys((suite.baseline, *suite.contenders)))
    contenders = build(case, names, device=device, dtype=dtype, compiled=compiled)
    differences = compare(contenders, case, TOLERANCES[dtype])
    rows = []
    for contender in contenders:
        gc.collect()
        row = {column: str(getattr(case, column)) for column in suite.case_columns}
        row |= {"competitor": contender.name, "max_rel_diff": f"{differences[contender.name]:.1e}"}
        row["peak_mib"] = f"{memory.peak_mib(contender.step, device.type):.2f}"
        contender.clear()
        watch: AbstractContextManager[list[str]] = observe_forms() if contender.shows_form else nullcontext([])
        with watch as forms:
            row["saved_mib"] = f"{memory.saved_mib(contender.step, contender.module.parameters()):.2f}"
        row["form"] = "+".join(sorted(set(forms)))
        contender.clear()
        rows.append(row)
    if suite.timed:
        samples = timer.time_interleaved({c.name: c.step for c in contenders}, plan, device.type)
        for row in rows:
            own = samples[row["competitor"]]
            spread = timer.spread(own)
            row |= {
                "median_ms": f"{spread.median:.3f}",
                "p25_ms": f"{spread.p25:.3f}",
                "p75_ms": f"{spread.p75:.3f}",
                suite.ratio_column: f"{timer.paired_ratio(samples[suite.baseline], own):.3f}",
                "rounds": str(len(own)),
            }
    return rows


def gradient_tolerance(case: Case, tolerance: float) -> float:
    """The largest accepted relative difference of a gradient, given that of an output.

    The same, but for a pyramid: its coarse levels are maxima. Where the two largest of a window are equal but for
    rounding, competitors may choose differently, and what arrives there goes elsewhere. Rounding of relative size t
    does so in a share of about t of the windows, which moves a gradient by about the root of t. The tests of the
    pyramid's bench hold all gradients to rounding in float64, where no window is that close.
    """
    return tolerance**0.5 if isinstance(case, PyramidCase) else tolerance


def compare(contenders: Sequence[Contender], case: Case, tolerance: float) -> dict[str, float]:
    """How far each competitor is from the first: the worst relative difference of output and shared gradients.

    Args:
        contenders: the first is the measure of the others.
        case: named in the error.
        tolerance: above which, or at a number that is not finite, it raises; see ``gradient_tolerance`` too.

    Returns:
        By name; 0 for the first.

    Raises:
        OutputsDifferError: naming the competitor and where it differs.
    """
    baseline = contenders[0].evidence()
    differences = {contenders[0].name: 0.0}
    for contender in contenders[1:]:
        evidence = contender.evidence()
        # timm names a few parameters of class attention otherwise; those are left to the parity tests
        shared = [key for key in evidence if key in baseline and evidence[key].shape == baseline[key].shape]
        by_key = {key: _relative_difference(evidence[key], baseline[key]) for key in shared}
        of_gradients = gradient_tolerance(case, tolerance)
        limits = {key: tolerance if key.startswith(OUTPUT) else of_gradients for key in by_key}
        worst = max(by_key, key=lambda key: by_key[key] / limits[key])
        if not by_key[worst] <= limits[worst]:
            raise OutputsDifferError(
                f"{case}: {contender.name!r} differs from {contenders[0].name!r} by {by_key[worst]:.1e} in {worst!r}; "
                f"at most {limits[worst]:.0e} is rounding. Nothing was timed."
            )
        differences[contender.name] = max(by_key.values())
    return differences


def _relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    difference, size = (a - b).norm().item(), b.norm().item()
    if difference != difference:
        return float("inf")
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _line(suite: Suite, case: Case, rows: list[dict[str, str]]) -> str:
    parts = []
    for row in rows:
        times = f"{float(row['median_ms']):.2f} ms ({float(row[suite.ratio_column]):.2f}×) " if suite.timed else ""
        parts.append(f"{row['competitor']} {times}peak {row['peak_mib']} saved {row['saved_mib']} MiB")
    return f"{case}: " + "; ".join(parts)
