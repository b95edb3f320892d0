"""``python -m xcit.bench VERB``: measure, or write the tables of what was measured. Run it in the repository's root."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

# read when torch loads: its profiler, which measures the CPU's memory, would print a banner each time
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import tyro

from xcit.bench import cases, tables
from xcit.errors import XCiTError

Device = Literal["cpu", "cuda"]
DType = Literal["float32", "float64", "bfloat16", "float16"]
RESULTS = Path("benchmarks/results")

app = tyro.extras.SubcommandApp()


@app.command(name="xca")
def _xca(
    quick: bool = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    compile: bool = False,
    budget_s: float = 6.0,
    results: Path = RESULTS,
) -> None:
    """Time one XCA layer: timm's, both of our forms, and the automatic choice.

    Args:
        quick: a first look: a few small cases, printed only.
        device: where to measure.
        dtype: of weights and input.
        compile: time torch.compile'd competitors too.
        budget_s: seconds of timing a case, beyond the least number of rounds.
        results: folder of the CSV file that grows.
    """
    _measure(cases.XCA, quick, device, dtype, compile, budget_s, results)


@app.command(name="backbone")
def _backbone(
    quick: bool = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    compile: bool = False,
    budget_s: float = 6.0,
    results: Path = RESULTS,
) -> None:
    """Time whole models, in inference and in a training step, against timm's with the same weights.

    Args:
        quick: a first look: a few small cases, printed only.
        device: where to measure.
        dtype: of weights and images.
        compile: time torch.compile'd competitors too.
        budget_s: seconds of timing a case, beyond the least number of rounds.
        results: folder of the CSV file that grows.
    """
    _measure(cases.BACKBONE, quick, device, dtype, compile, budget_s, results)


@app.command(name="memory")
def _memory(
    quick: bool = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    results: Path = RESULTS,
) -> None:
    """Measure what one XCA layer of each width keeps for the backward pass, and its peak.

    Args:
        quick: a first look: one small case, printed only.
        device: where to measure.
        dtype: of weights and input.
        results: folder of the CSV file that grows.
    """
    _measure(cases.XCA_MEMORY, quick, device, dtype, False, 0.0, results)


@app.command(name="calibrate")
def _calibrate(
    quick: bool = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    budget_s: float = 2.0,
    results: Path = RESULTS,
) -> None:
    """Time both forms of XCA over a grid of sizes: what the automatic choice is fitted to.

    Args:
        quick: a first look: a few small cases, printed only.
        device: where to measure.
        dtype: of weights and input.
        budget_s: seconds of timing a case, beyond the least number of rounds.
        results: folder of the CSV file that grows.
    """
    _measure(cases.XCA_FORMS, quick, device, dtype, False, budget_s, results)


@app.command(name="tables")
def _tables(
    check: Annotated[bool, tyro.conf.arg(help="write nothing; fail if a table is not up to date")] = False,
) -> None:
    """Write the marked tables of README.md and docs/ from the CSV files and the zoo."""
    stale = tables.rewrite(Path.cwd(), write=not check)
    for path in stale:
        print(f"{path}: {'not up to date' if check else 'written'}")
    if check and stale:
        sys.exit(1)


def _measure(
    suite: cases.Suite,
    quick: bool,
    device: str,
    dtype: str,
    compiled: bool,
    budget_s: float,
    results: Path,
) -> None:
    import torch

    from xcit.bench.runner import run
    from xcit.bench.timer import Plan

    plan = Plan(min_rounds=3, budget_s=min(budget_s, 1.0)) if quick else Plan(budget_s=budget_s)
    run(
        suite,
        suite.quick_cases if quick else suite.cases,
        results_dir=None if quick else results,
        device=torch.device(device),
        dtype=getattr(torch, dtype),
        plan=plan,
        compiled=compiled,
    )


def main() -> None:
    """Run a verb; a user's mistake prints one message and exits with 2."""
    try:
        app.cli(prog="python -m xcit.bench", description=__doc__)
    except XCiTError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
