"""The verbs of ``python -m xcit.bench`` that measure a GPU; ``register`` adds them to the others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from tyro.extras import SubcommandApp

    from xcit.bench.gpu_budget import Budget

Device = Literal["cpu", "cuda"]
RESULTS = Path("benchmarks/results")

Names = Annotated[tuple[str, ...], tyro.conf.Positional]


def register(app: SubcommandApp) -> None:
    """Add the verbs to a command line."""
    app.command(name="gpu")(gpu)
    app.command(name="gpu-profile")(gpu_profile)
    app.command(name="gpu-largest")(gpu_largest)
    app.command(name="gpu-calibrate")(gpu_calibrate)


def gpu(
    cases: Names = (),
    full: bool = False,
    minutes: float | None = None,
    batch: int | None = None,
    competitors: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    again: bool = False,
    quick: bool = False,
    list: bool = False,
    budget_s: float = 4.0,
    device: Device = "cuda",
    results: Path = RESULTS,
) -> None:
    """Time inference and training steps on a GPU: timm's XCiT, ours, ours folded, and models of like cost.

    What the file has already from this device and these versions is left out: the same command goes on.

    Args:
        cases: GROUP/MODEL/SIZE/BATCH/PRECISION, or patterns such as "training/*"; none: the headline, with --full all.
        full: every precision and every competitor, not only the headline's.
        minutes: of the whole run; what is missed most comes first, and what is left is said.
        batch: takes the place of every throughput batch.
        competitors: only those that fit one of these patterns, such as "timm *"; timm eager is always there.
        skip: not those that fit one of these patterns, such as "*triton".
        again: measure what the file has, too.
        quick: a small model, printed only.
        list: print the cases and who competes in each.
        budget_s: seconds of timing a round, beyond the least number of turns.
        device: where to measure.
        results: folder of the CSV file that grows.
    """
    budget = _budget(minutes)
    from xcit.bench.gpu_cases import CASES, QUICK, entries, path, select

    chosen = [*QUICK] if quick else [*CASES] if full and not cases else select(cases)
    if batch is not None:
        chosen = select([str(case) for case in chosen], batch=batch)
    if list:
        for case in chosen:
            print(f"{case}: {', '.join(map(str, entries(case, keep=competitors, skip=skip)))}")
        return
    from xcit.bench.gpu import PLAN, Options, run

    plan = replace(PLAN, budget_s=budget_s)
    options = Options(device, budget.seconds, full, competitors, skip, again, plan)
    outcome = run(chosen, options, out=None if quick else path(results), budget=budget)
    if outcome.failed:
        print(f"{len(outcome.failed)} competitors were refused or broke; see above.", file=sys.stderr)
        sys.exit(1)


def gpu_profile(
    case: Annotated[str, tyro.conf.Positional],
    competitors: tuple[str, ...] = ("timm eager", "ours eager"),
    top: int = 25,
    device: Device = "cuda",
    results: Path = RESULTS,
    dry: bool = False,
) -> None:
    """Show where a competitor's time goes, kernel by kernel.

    Args:
        case: GROUP/MODEL/SIZE/BATCH/PRECISION.
        competitors: of the case, by name.
        top: kernels to show and keep.
        device: where to measure.
        results: folder of the CSV file that grows.
        dry: print the figures and keep none.
    """
    from xcit.bench import gpu_profile
    from xcit.bench.gpu import open_device
    from xcit.bench.gpu_cases import parse

    out = None if dry else gpu_profile.path(results)
    gpu_profile.run(parse(case), [*competitors], open_device(device), out=out, top=top)


def gpu_largest(
    models: Names = (),
    most: int | None = None,
    tries: int = 14,
    minutes: float | None = None,
    again: bool = False,
    device: Device = "cuda",
    results: Path = RESULTS,
    dry: bool = False,
) -> None:
    """Find the largest square image that the device takes whole: timm's model, and ours folded, in bfloat16.

    Args:
        models: architectures; none: S12/16, S12/8 and L24/8.
        most: the largest side to try, in pixels; needed on a CPU.
        tries: at most, of each competitor.
        minutes: of the whole run; the last try may pass them.
        again: measure what the file has, too.
        device: where.
        results: folder of the CSV file that grows.
        dry: print the figures and keep none.
    """
    budget = _budget(minutes)
    from xcit.bench import gpu_largest
    from xcit.bench.gpu import open_device

    out = None if dry else gpu_largest.path(results)
    gpu_largest.run(
        models or gpu_largest.MODELS,
        open_device(device),
        out=out,
        most=most,
        tries=tries,
        budget=budget,
        again=again,
    )


def gpu_calibrate(
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    minutes: float | None = None,
    quick: bool = False,
    again: bool = False,
    fit: Path | None = None,
    device: Device = "cuda",
    results: Path = RESULTS,
) -> None:
    """Time both forms of XCA over a grid on a GPU, with and without kernels, and fit what a choice would go by.

    Args:
        dtype: of weights and tokens.
        minutes: of the whole run; what decides most comes first.
        quick: a few small sizes, printed only.
        again: measure what the file has, too.
        fit: also write what was fitted to all rows, as JSON.
        device: where.
        results: folder of the CSV file that grows.
    """
    budget = _budget(minutes)
    from xcit.bench import gpu_calibrate
    from xcit.bench import results as files
    from xcit.bench.gpu import open_device

    grid = gpu_calibrate.QUICK if quick else gpu_calibrate.GRID
    out = None if quick else gpu_calibrate.path(results)
    rows = gpu_calibrate.run(grid, open_device(device), dtype=dtype, out=out, budget=budget, again=again)
    if fit is not None:
        gpu_calibrate.write_fit(files.read(out, gpu_calibrate.COLUMNS) if out else rows, fit)


def _budget(minutes: float | None) -> Budget:
    """Start the clock, before the imports that take seconds."""
    from xcit.bench.gpu_budget import Budget
    from xcit.errors import ConfigError

    if minutes is not None and minutes <= 0:
        raise ConfigError(f"--minutes is {minutes:g}; it must be more than 0.")
    return Budget(None if minutes is None else 60 * minutes)
