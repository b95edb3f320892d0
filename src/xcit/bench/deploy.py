"""`xcit bench`: one case from start to rows. Outputs are compared, all take turns, then memory is measured apart."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from xcit.bench.deploy_contenders import Runner, prepare
from xcit.bench.linear_cost import GROUP
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

    The sizes of one model in the group linear take turns, and are one case in that.

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
        for group in _taking_turns(cases):
            together = group[0].group == PRECISIONS
            for dtype, runtimes in {"": [*several]}.items() if together else chosen.items():
                rows = measure(group, dtype, runtimes, options, say=say)
                rows = [row | common | {"matrix_gflops": f"{peaks[row['dtype']]:.1f}"} for row in rows]
                if out and rows:
                    results.append(out, rows, COLUMNS)
                all_rows += rows
                for case in group:
                    report(case, [row for row in rows if row["case"] == str(case)])
        return all_rows
    finally:
        torch.set_num_threads(before)


def measure(
    cases: Sequence[DeployCase],
    dtype: str,
    runtimes: Sequence[Runtime],
    options: Options,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure cases in one precision, the competitors of all in turns.

    Returns:
        One row a case and competitor that fits into memory, in the cases' order; what a whole run shares is "" in it.
    """
    with tempfile.TemporaryDirectory(prefix="xcit-bench-") as folder:
        runners = {}
        for i, case in enumerate(cases):
            (place := Path(folder) / str(i)).mkdir()
            for runner in prepare(
                case,
                entries(case, runtimes),
                dtype=dtype,
                device=torch.device(options.device),
                threads=options.threads,
                folder=place,
                say=say,
            ):
                runners[case, str(runner.entry)] = runner
        if not runners:
            return []
        plan = replace(options.plan, budget_s=options.plan.budget_s * len(cases))
        steps = {f"{case} {name}": runner.step for (case, name), runner in runners.items()}
        samples = timer.time_interleaved(steps, plan, options.device)
        rows, requests = [], []
        for (case, _), runner in runners.items():
            own = {each: samples[f"{case} {each}"] for of, each in runners if of == case}
            rows.append(_row(case, runner, dtype, own, entries(case, runtimes)))
            entry, path = runner.entry, "" if runner.file is None else str(runner.file)
            requests.append(
                deploy_memory.Request(case, entry, entry.dtype or dtype, options.device, options.threads, path)
            )
        del runner, runners, steps
        gc.collect()  # of large cases both processes would not fit
        if options.memory:
            for row, request in zip(rows, requests, strict=True):
                row |= _memory(request, say)
    return rows


def _row(
    case: DeployCase, runner: Runner, dtype: str, samples: Mapping[str, list[float]], wanted: Sequence[Entry]
) -> Row:
    entry = runner.entry
    own = samples[str(entry)]
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
    measured = {
        "multiply_adds": str(runner.multiply_adds),
        "gflops": f"{_gflops(case, runner.multiply_adds, own):.1f}",
        "max_rel_diff": f"{runner.difference:.1e}",
    }
    return (
        dict.fromkeys(COLUMNS, "")
        | named
        | times_of(own, case.batch_size)
        | ratios_of(entry, wanted, samples)
        | measured
    )


def _taking_turns(cases: Sequence[DeployCase]) -> list[list[DeployCase]]:
    """Group cases that are measured in turns: the sizes of a growth, which a machine that slows down would bend."""
    groups: dict[tuple[object, ...], list[DeployCase]] = {}
    for case in cases:
        key = (case.group, case.model, case.batch_size) if case.group == GROUP else (case,)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


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
