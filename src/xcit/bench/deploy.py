"""`xcit bench`: one case from start to rows. Outputs are compared, all take turns, then memory is measured apart."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from xcit.bench import deploy_memory, deploy_peak, deploy_runtimes, results, timer
from xcit.bench.deploy_cases import (
    COLUMNS,
    PRECISIONS,
    PRECISIONS_OF,
    RATIOS,
    RUNTIMES,
    TORCH,
    DeployCase,
    Entry,
    Runtime,
    entries,
)
from xcit.bench.deploy_contenders import prepare
from xcit.errors import BackendError

PASSES = {"inference": 1, "training": 3}
"""Forward passes' worth of arithmetic: backward takes twice as much."""

Row = dict[str, str]


class Options(NamedTuple):
    """How to measure."""

    runtimes: tuple[str, ...] = ()
    """Of ``RUNTIMES``; none means all that can run a precision here."""
    dtypes: tuple[str, ...] = ("float32",)
    """Of float32, bfloat16, float16, int8; competitors meet others of the same only (but in the group precisions,
    which has its own)."""
    device: str = "cpu"
    """Or "cuda"."""
    threads: int = 1
    """Of the CPU, for every runtime."""
    plan: timer.Plan = timer.Plan()
    """How long to time."""
    memory: bool = True
    """Measure each competitor's peak in a process of its own."""
    peak_budget_s: float = 2.0
    """Seconds for the matrix products that the machine's peak is taken from."""


def run(
    cases: Sequence[DeployCase],
    options: Options,
    *,
    out: Path | None = None,
    report: Callable[[DeployCase, list[Row]], None] = lambda case, rows: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure cases one after another, each in every precision; a case's rows are on disk before the next begins.

    Args:
        cases: which.
        options: how.
        out: the CSV file that grows; None keeps no record.
        report: takes each case's rows of one precision.
        say: takes a line on what could not be measured.

    Returns:
        All rows, with ``COLUMNS`` as keys; a figure that was not measured is "".

    Raises:
        OutputsDifferError: two competitors do not compute the same; before any timing of the case.
        BackendError: a device or a runtime is not there.
        DataError: the file has other columns.
        XCiTError: a model that cannot be built, folded or written in a format.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("There is no CUDA device that this torch can use; `xcit doctor` shows what it sees.")
    of_one = [case for case in cases if case.group != PRECISIONS]
    wanted = options.dtypes if of_one else ()
    chosen = {d: deploy_runtimes.choose_runtimes(options.runtimes, d, options.device) for d in wanted}
    several = _runtimes_of_precisions(options) if len(of_one) < len(cases) else {}
    if any(case.mode == "training" for case in cases):
        _check_training(chosen)
    if out:
        results.read(out, COLUMNS)  # a file of other columns should fail now, not after the first measurement
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        common = {"date": results.now(), **results.environment(options.device), **deploy_runtimes.versions()}
        peaks = {
            dtype: deploy_peak.matrix_gflops(
                deploy_runtimes.DTYPES[dtype], torch.device(options.device), budget_s=options.peak_budget_s
            )
            for dtype in dict.fromkeys((*chosen, *(dtype for dtypes in several.values() for dtype in dtypes)))
        }
        all_rows: list[Row] = []
        for case in cases:
            together = case.group == PRECISIONS
            for dtype, runtimes in {"": [*several]}.items() if together else chosen.items():
                rows = measure(case, dtype, runtimes, options, say=say)
                rows = [row | common | {"matrix_gflops": f"{peaks[row['dtype']]:.1f}"} for row in rows]
                if out and rows:
                    results.append(out, rows, COLUMNS)
                all_rows += rows
                report(case, rows)
        return all_rows
    finally:
        torch.set_num_threads(before)


def measure(
    case: DeployCase,
    dtype: str,
    runtimes: Sequence[Runtime],
    options: Options,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure one case in one precision.

    Returns:
        One row a competitor that fits into memory; what a whole run shares is "" in it.
    """
    wanted = entries(case, runtimes)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="xcit-bench-") as folder:
        runners = prepare(
            case,
            wanted,
            dtype=dtype,
            device=torch.device(options.device),
            threads=options.threads,
            folder=Path(folder),
            say=say,
        )
        if not runners:
            return []
        samples = timer.time_interleaved({str(r.entry): r.step for r in runners}, options.plan, options.device)
        requests = []
        for runner in runners:
            entry = runner.entry
            measured = {
                "multiply_adds": str(runner.multiply_adds),
                "gflops": f"{_gflops(case, runner.multiply_adds, samples[str(entry)]):.1f}",
                "max_rel_diff": f"{runner.difference:.1e}",
            }
            named = {
                "case": str(case),
                "model": entry.model,
                "source": entry.source,
                "runtime": entry.runtime,
                "dtype": entry.dtype or dtype,
                "mode": case.mode,
                "image_size": str(entry.image_size),
                "batch_size": str(case.batch_size),
            }
            ratios = ratios_of(entry, wanted, samples)
            rows.append(
                dict.fromkeys(COLUMNS, "") | named | times_of(samples[str(entry)], case.batch_size) | ratios | measured
            )
            path = "" if runner.file is None else str(runner.file)
            requests.append(
                deploy_memory.Request(case, entry, entry.dtype or dtype, options.device, options.threads, path)
            )
        del runner, runners
        gc.collect()  # of large cases both processes would not fit
        if options.memory:
            for row, request in zip(rows, requests, strict=True):
                row |= _memory(request, say)
    return rows


def times_of(samples: list[float], batch_size: int) -> Row:
    """Return the columns of a competitor's times, given its milliseconds a call, one sample a round."""
    median = statistics.median(samples)
    return {
        "median_ms": f"{median:.3f}",
        "p90_ms": f"{p90(samples):.3f}",
        "images_per_second": f"{1000 * batch_size / median:.2f}",
        "rounds": str(len(samples)),
    }


def p90(samples: Sequence[float]) -> float:
    """Return the smallest sample that at least nine tenths of all do not exceed."""
    return sorted(samples)[math.ceil(0.9 * len(samples)) - 1]


def ratios_of(entry: Entry, wanted: Sequence[Entry], samples: Mapping[str, list[float]]) -> Row:
    """Return how many times faster a competitor is than the case's baseline, by the baseline's runtime."""
    found = {}
    for runtime, column in zip(RUNTIMES, RATIOS, strict=True):
        baseline = next((str(each) for each in wanted if each.runtime == runtime), "")
        if baseline in samples:
            found[column] = f"{timer.paired_ratio(samples[baseline], samples[str(entry)]):.3f}"
    return found


def _gflops(case: DeployCase, multiply_adds: int, samples: Sequence[float]) -> float:
    operations = 2 * multiply_adds * case.batch_size * PASSES[case.mode]
    return operations / statistics.median(samples) / 1e6


def _memory(request: deploy_memory.Request, say: Callable[[str], None]) -> Row:
    found = deploy_memory.measure_apart(request)
    if found is None:
        say(f"{request.case}: {request.entry} did not fit into memory when it ran alone.")
        return {}
    return {"peak_mib": f"{found.step_mib:.1f}", "process_mib": f"{found.process_mib:.1f}"}


def _runtimes_of_precisions(options: Options) -> dict[Runtime, tuple[str, ...]]:
    """Return what runs a case of several precisions, and in which.

    Raises:
        BackendError: a runtime cannot run one of them here, or none was named.
    """
    several = {
        runtime: dtypes
        for runtime, dtypes in PRECISIONS_OF.items()
        if not options.runtimes or runtime in options.runtimes
    }
    if not several:
        raise BackendError(f"Cases of {PRECISIONS} run in {' and '.join(PRECISIONS_OF)}; name one of them.")
    for runtime, dtypes in several.items():
        for dtype in dtypes:
            reason = deploy_runtimes.refusal(runtime, dtype, options.device)
            if reason is not None:
                raise BackendError(reason)
    return several


def _check_training(chosen: Mapping[str, Sequence[Runtime]]) -> None:
    for dtype, runtimes in chosen.items():
        if dtype == "int8":
            raise BackendError("A training step has no int8; take float32 or bfloat16.")
        if not set(runtimes) & set(TORCH):
            raise BackendError("A training step runs in eager and compile; name one of them in --runtimes.")
        if dtype == "float16":
            raise BackendError("A training step in float16 needs a scaled loss, which is not measured; take bfloat16.")
