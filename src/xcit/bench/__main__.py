"""``python -m xcit.bench VERB``: measure, or write the tables of what was measured. Run it in the repository's root."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

# read when torch loads: its profiler, which measures the CPU's memory, would print a banner each time, and a warning
# of each tensor of a former step that this one frees
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import tyro

from xcit.bench import cases, gpu_verbs, tables
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


@app.command(name="training")
def _training(
    quick: bool = False,
    device: Device = "cpu",
    compile: bool = False,
    budget_s: float = 20.0,
    results: Path = RESULTS,
) -> None:
    """Time the whole step of a training run, and measure its memory: our model and timm's in the same task.

    Args:
        quick: a first look: a small case, printed only.
        device: where to measure.
        compile: time torch.compile'd competitors too.
        budget_s: seconds of timing a case, beyond the least number of rounds.
        results: folder of the CSV file that grows.
    """
    _measure(cases.TRAINING, quick, device, "float32", compile, budget_s, results)


@app.command(name="pyramid")
def _pyramid(
    quick: bool = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    compile: bool = False,
    budget_s: float = 20.0,
    results: Path = RESULTS,
) -> None:
    """Time the pyramid of features of 800 x 1333 px, and measure its memory, against the same on timm's XCiT.

    Args:
        quick: a first look: a small image, printed only.
        device: where to measure.
        dtype: of weights and images.
        compile: time torch.compile'd competitors too.
        budget_s: seconds of timing a case, beyond the least number of rounds.
        results: folder of the CSV file that grows.
    """
    _measure(cases.PYRAMID, quick, device, dtype, compile, budget_s, results)


@app.command(name="loading")
def _loading(
    quick: bool = False,
    budget_s: float = 20.0,
    results: Path = RESULTS,
) -> None:
    """Time how JPEG files become training batches: our loader and timm's with the same folder and distortions.

    Args:
        quick: a first look at a few images, printed only.
        budget_s: seconds of timing a case, beyond the least number of rounds.
        results: folder of the CSV file that grows.
    """
    from xcit.bench.loading import run
    from xcit.bench.timer import Plan

    plan = Plan(min_rounds=3 if quick else 5, budget_s=0.0 if quick else budget_s, min_sample_ms=0.0)
    chosen = [cases.LoadingCase(16, 224, 8, 0)] if quick else cases.LOADING_CASES
    run(chosen, results_dir=None if quick else results, plan=plan)


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


@app.command(name="ablations")
def _ablations(
    recipes: tuple[str, ...] = (),
    seeds: int = 3,
    device: Device = "cpu",
    runs: Path = Path("runs/ablations"),
    results: Path = RESULTS,
) -> None:
    """Train XCiT without each of its parts, and its peers, on the digits; what was trained already is left out.

    Args:
        recipes: only these; none named: all of the comparison.
        seeds: runs of each, with the seeds from 0.
        device: where to train.
        runs: folder of the run folders.
        results: folder of the CSV file that grows.
    """
    from xcit.bench import ablations
    from xcit.recipes.interrupts import StoppedError

    try:
        ablations.run(recipes or ablations.RECIPES, seeds=seeds, results_dir=results, runs_dir=runs, device=device)
    except StoppedError as stop:
        print(f"Stopped by {stop}; the same command goes on where it stopped.", file=sys.stderr)
        sys.exit(stop.exit_code)


@app.command(name="self-supervision")
def _self_supervision(
    seeds: int = 3,
    device: Device = "cpu",
    runs: Path = Path("runs/self_supervision"),
    results: Path = RESULTS,
) -> None:
    """Learn the digits without their labels, and probe what was learned beside random weights and raw pixels.

    Args:
        seeds: runs, with the seeds from 0; what was measured already is left out.
        device: where to train.
        runs: folder of the run folders.
        results: folder of the CSV file that grows.
    """
    from xcit.bench import self_supervision
    from xcit.recipes.interrupts import StoppedError

    try:
        self_supervision.run(seeds=seeds, results_dir=results, runs_dir=runs, device=device)
    except StoppedError as stop:
        print(f"Stopped by {stop}; the same command goes on where it stopped.", file=sys.stderr)
        sys.exit(stop.exit_code)


@app.command(name="giant")
def _giant(
    case: str = "*",
    results: Path = RESULTS,
    dry: bool = False,
) -> None:
    """Measure memory and time of giant images, each in a process of its own.

    Args:
        case: which; a pattern such as "area/*". They are acceptance/..., area/... and speed/...
        results: folder of the CSV file that grows.
        dry: print the figures and keep none.
    """
    from fnmatch import fnmatch

    from xcit.bench import giant
    from xcit.errors import ConfigError

    chosen = [each for each in giant.CASES if fnmatch(each.name, case)]
    if not chosen:
        raise ConfigError(f"No case is called {case}; there are {', '.join(each.name for each in giant.CASES)}.")
    giant.run(chosen, results_dir=None if dry else results)


@app.command(name="tiling")
def _tiling(
    steps: int = 800,
    images: int = 200,
    results: Path = RESULTS,
    dry: bool = False,
) -> None:
    """Train a small model to find a digit, and test it on growing images: whole, and tile by tile.

    Args:
        steps: of training.
        images: of each size.
        results: folder of the CSV file that grows.
        dry: print the figures and keep none.
    """
    from xcit.bench import tiling

    tiling.run(steps=steps, images=images, results_dir=None if dry else results)


@app.command(name="plots")
def _plots(
    runtime: Literal["eager", "compile", "onnxruntime", "openvino"] = "eager",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    results: Path = RESULTS,
    out: Path = Path("docs/images/linear_cost.png"),
) -> None:
    """Draw time and memory against the number of tokens, and giant images' memory, from what was measured.

    Args:
        runtime: whose figures.
        dtype: in which precision.
        results: folder of the CSV files.
        out: the picture.
    """
    from xcit.bench.deploy_tables import path
    from xcit.bench.plots import write_linear

    write_linear(path(results), out, runtime=runtime, dtype=dtype)
    print(f"{out}: written")
    if (results / "giant.csv").exists():
        from xcit.bench.giant import write_figure

        write_figure(results, out.with_name("giant_memory.png"))
        print(f"{out.with_name('giant_memory.png')}: written")


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


gpu_verbs.register(app)


def main() -> None:
    """Run a verb; a user's mistake prints one message and exits with 2."""
    try:
        app.cli(prog="python -m xcit.bench", description=__doc__)
    except XCiTError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
