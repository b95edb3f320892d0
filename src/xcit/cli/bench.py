"""`xcit bench`: how fast models are on this machine, in each runtime, beside what else one would take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.errors import ConfigError, UnknownNameError


def bench(
    cases: Annotated[
        tuple[str, ...], Positional, arg(metavar="CASE", help_behavior_hint="(default: see --quick)")
    ] = (),
    *,
    list: Annotated[bool, FlagCreatePairsOff] = False,
    quick: Annotated[bool, FlagCreatePairsOff] = False,
    runtimes: Annotated[str | None, arg(metavar="NAME,NAME", help_behavior_hint="(default: all there are)")] = None,
    dtypes: Annotated[str, arg(metavar="NAME,NAME")] = "float32",
    device: Annotated[str, arg(metavar="cpu|cuda")] = "cpu",
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as many as torch takes)")] = None,
    budget_s: Annotated[float, arg(metavar="SECONDS")] = 10.0,
    memory: bool = True,
    out: Annotated[Path | None, arg(metavar="CSV", help_behavior_hint="(default: printed only)")] = None,
    plot: Annotated[Path | None, arg(metavar="PNG", help_behavior_hint="")] = None,
) -> int:
    """Measure models on this machine: XCiT as it is and folded, in each runtime, against timm's and other models.

    Examples: `xcit bench --quick`, `xcit bench "xcit/*p8*" --dtypes float32,bfloat16 --out mine.csv`, or
    `xcit bench xcit/xcit_tiny_12_p8/640/4 --runtimes eager,openvino`.

    A CASE is GROUP/MODEL/SIZE/BATCH, or a quoted pattern over what --list shows; other models, sizes (pixels a side)
    and batches than those listed can be named too. Groups:

    xcit: our model, as it is and folded, against timm's with the same random weights.

    peers: our folded model against models of like ImageNet accuracy from timm.

    precisions: our folded model in float32, bfloat16 and int8 in OpenVINO and onnxruntime, all in one run.

    linear: one model over many sizes, which take turns; the growth of time and memory with the number of tokens is
    fitted and printed.

    training, training-peers: a training step, against timm's XCiT and against those models.

    Before anything is timed, all outputs (in training, all gradients) are compared. Then competitors take turns;
    medians over the rounds are shown, and ratios within a round: how many times faster each is than the case's first
    model in the same runtime. Peak memory is that of one call, in a process of its own, above what it held before.
    GFLOP/s count two operations a multiply-add; "of peak" is their share of what a product of large matrices reaches
    here. Let nothing else run meanwhile.

    Args:
        cases: What to measure; see above.
        list: Print the listed cases and end.
        quick: A first look: at most a second of timing a case; without a CASE, a single small one.
        runtimes: Of eager, compile, onnxruntime and openvino. A training step has eager and compile.
        dtypes: Of float32, bfloat16, int8 (onnxruntime and openvino) and, on CUDA, float16. Competitors are compared
            within one; the group precisions compares its own.
        device: Where to measure; the second card is chosen by CUDA_VISIBLE_DEVICES=1.
        threads: Of the CPU, for every runtime.
        budget_s: Seconds of timing a case, beyond the least number of rounds.
        memory: Measure memory too, which starts every competitor once more.
        out: A file that the rows are added to.
        plot: Draw time and memory of the file's linear cases (of --out, or of what was measured now).

    Returns:
        The exit code.
    """
    from xcit.bench.deploy_cases import CASES, GROUPS, QUICK_CASES, RUNTIMES, select

    if list:
        for group, text in GROUPS.items():
            print(f"{group}: {text}", *(f"  {case}" for case in CASES if case.group == group), "", sep="\n")
        return 0
    chosen = select(cases) if cases else [*QUICK_CASES] if quick else None
    if chosen is None and not (plot and out):
        raise ConfigError(
            "Name a case, such as xcit/xcit_small_12_p16/224/1; --list shows some, and --quick takes a small one."
        )
    named = _names(runtimes, "runtime", RUNTIMES)
    types = _names(dtypes, "dtype", ("float32", "bfloat16", "float16", "int8")) or ("float32",)
    _names(device, "device", ("cpu", "cuda"))
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads is {threads}; it must be 1 or more.")
    if not budget_s > 0:
        raise ConfigError(f"--budget-s is {budget_s:g}; it must be more than 0.")
    if plot and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot is {plot}; the picture is a PNG, name it so.")

    import torch

    from xcit.bench import deploy, timer
    from xcit.cli.bench_tables import print_case, print_growth

    rows: Sequence[dict[str, str]] = ()
    if chosen is not None:
        plan = timer.Plan(
            warmup=0,  # each has run once, for its output
            min_rounds=3 if quick else 5,
            budget_s=min(budget_s, 1.0) if quick else budget_s,
            rest_ms=0.0 if device == "cuda" else 60.0,
        )
        options = deploy.Options(
            runtimes=named,
            dtypes=types,
            device=device,
            threads=torch.get_num_threads() if threads is None else threads,
            plan=plan,
            memory=memory,
            peak_budget_s=min(budget_s, 2.0),
        )
        rows = deploy.run(chosen, options, out=out, report=print_case, say=_say)
        print_growth(rows)
    if plot:
        _draw(plot, out, rows, named, types)
    return 0


def _names(text: str | None, kind: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names in a text with commas between, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known, f"There are {', '.join(known)}.")
    return names


def _say(line: str) -> None:
    print(f"xcit: {line}", file=sys.stderr)


def _draw(
    png: Path, csv: Path | None, rows: Sequence[dict[str, str]], runtimes: tuple[str, ...], dtypes: tuple[str, ...]
) -> None:
    from xcit.bench.plots import linear_figure, write_linear
    from xcit.files import write_atomic

    look = {"runtime": runtimes[0] if runtimes else "eager", "dtype": dtypes[0]}
    if csv:
        write_linear(csv, png, **look)
    else:
        figure = linear_figure(rows, **look)
        from xcit.report.style import png as png_of

        write_atomic(png, png_of(figure))
    print(f"{png}: written")
