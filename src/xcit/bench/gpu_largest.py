"""The largest square image that one device takes whole, in one forward pass: timm's XCiT, and ours folded."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from xcit.bench import results
from xcit.bench.gpu_budget import Budget
from xcit.bench.gpu_cases import Entry
from xcit.bench.gpu_contenders import NoKernelsError, build_module
from xcit.bench.gpu_rows import Row, environment
from xcit.bench.results import ENVIRONMENT
from xcit.errors import BackendError, ConfigError, UnknownNameError
from xcit.inference.devices import is_out_of_memory, synchronize
from xcit.models.zoo import ARCHITECTURES

COLUMNS = (
    *("date", "model", "source", "kernels", "precision", "side", "tokens", "peak_mib", "seconds", "refused_side"),
    *("refused_by", "memory_mib", "tries", *ENVIRONMENT, "triton", "code"),
)
"""Of ``gpu_largest.csv``. ``side`` in pixels was taken, ``refused_side`` is the smallest that was not;
``refused_by`` is memory, or what torch said. ``memory_mib`` is the device's."""
MODELS = ("xcit_small_12_p16", "xcit_small_12_p8", "xcit_large_24_p8")
MULTIPLE = 32
"""Of pixels: whole patches of both sizes."""
FIRST = 2048
TRIES = 14
PRECISION = "bfloat16"
MIB = 2**20


class Try(NamedTuple):
    """What became of one size."""

    fits: bool
    peak_mib: float = 0.0
    seconds: float = 0.0
    why: str = ""


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "gpu_largest.csv"


def search(
    attempt: Callable[[int], Try],
    *,
    first: int,
    most: int | None,
    multiple: int,
    tries: int,
    memory_mib: float | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, Try]:
    """Look for the largest side that is taken.

    Sides grow until one is refused: by what two measured peaks promise (they grow with the square of the side), else by
    half. Then the gap is halved, or looked at near its upper end where that was promised.

    Args:
        attempt: tries a side.
        first: to try.
        most: beyond which nothing is tried.
        multiple: of sides; the search ends when the gap is one of these.
        tries: at most.
        memory_mib: of the device, to guess from peaks.
        go_on: asked before every try.

    Returns:
        All tries by their side.
    """
    tried: dict[int, Try] = {}
    side: int | None = first if most is None else min(first, most)
    while side is not None and len(tried) < tries and go_on():
        tried[side] = attempt(side)
        side = _next_side(tried, most=most, multiple=multiple, memory_mib=memory_mib)
    return tried


def _next_side(tried: dict[int, Try], *, most: int | None, multiple: int, memory_mib: float | None) -> int | None:
    fit = [side for side, each in tried.items() if each.fits]
    refused = [side for side, each in tried.items() if not each.fits]
    low, high = max(fit, default=0), min(refused, default=0)
    if refused:
        middle = (low + high) // 2 // multiple * multiple
        if memory_mib is not None and high - low > high // 8:  # peaks promised high, which is thus not far off
            middle = max(middle, high * 15 // 16 // multiple * multiple)
        return middle if low < middle < high else None
    if most is not None and low >= most // multiple * multiple:
        return None
    wanted = low * 3 // 2
    guess = _promised(tried, memory_mib, multiple)
    if guess is not None and guess > low:
        wanted = guess
    wanted = max(wanted // multiple * multiple, low + multiple)
    return wanted if most is None else min(wanted, most // multiple * multiple)


def _promised(tried: dict[int, Try], memory_mib: float | None, multiple: int) -> int | None:
    """Return the side at which the line through the two largest peaks, over squares of sides, meets the memory."""
    fit = sorted(side for side, each in tried.items() if each.fits)[-2:]
    if memory_mib is None or len(fit) < 2:
        return None
    (a, b), (u, v) = fit, (tried[side].peak_mib for side in fit)
    slope = (v - u) / (b * b - a * a)
    if slope <= 0:
        return None
    return int(((memory_mib - v) / slope + b * b) ** 0.5) // multiple * multiple if memory_mib > v else None


def forward_once(module: torch.nn.Module, side: int, device: torch.device) -> Try:
    """Try one image of noise, (1, 3, side, side), and say what it took.

    Raises:
        BackendError: the device broke.
    """
    cuda = device.type == "cuda"
    _free(device)
    try:
        weight = next(module.parameters())
        image = torch.randn(1, 3, side, side, device=device, dtype=weight.dtype)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with torch.inference_mode():
            module(image)
        synchronize(device)
        peak = torch.cuda.max_memory_allocated() / MIB if cuda else 0.0
        return Try(True, peak, time.perf_counter() - began)
    except (RuntimeError, MemoryError) as error:
        why = "memory" if is_out_of_memory(error) else str(error).splitlines()[0]
    _free(device)
    try:  # a size that is no question of memory may have broken the device for good
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise BackendError(f"An image of {side} px left the device unusable for this process: {why}.") from error
    return Try(False, why=why)


def run(
    models: Sequence[str],
    device: torch.device,
    *,
    out: Path | None,
    most: int | None = None,
    tries: int = TRIES,
    budget: Budget | None = None,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Find the largest image of each model, and add the rows to ``gpu_largest.csv``.

    Args:
        models: XCiT architectures.
        device: where.
        out: the CSV file that grows; None keeps no record.
        most: side in pixels beyond which nothing is tried; needed on a CPU, whose system may end what takes too much.
        tries: at most, of each competitor.
        budget: of time.
        again: measure what the file has, too.
        say: takes lines.

    Raises:
        ConfigError: a CPU without ``most``; a ``most`` that is no size.
        UnknownNameError: no such architecture.
        BackendError: the device broke.
    """
    budget = budget or Budget(None)
    if device.type == "cpu" and most is None:
        raise ConfigError("On a CPU, name the largest side to try, in pixels, by --most.")
    if most is not None and most < MULTIPLE:
        raise ConfigError(f"The largest side to try is {most}; it must be {MULTIPLE} px or more.")
    for model in models:
        if model not in ARCHITECTURES:
            raise UnknownNameError("architecture", model, ARCHITECTURES, "`xcit models` lists them.")
    here, rows = environment(device.type), []
    memory = torch.cuda.get_device_properties(device).total_memory / MIB if device.type == "cuda" else None
    known = {
        (row["model"], row["source"], row["kernels"])
        for row in (results.read(out, COLUMNS) if out else [])
        if not again and all(row[name] == here[name] for name in ("hardware", "torch", "code"))
    }
    for model in models:
        for entry in (
            Entry("timm", model, "eager"),
            Entry("folded", model, "eager"),
            Entry("folded", model, "eager", "triton"),
        ):
            if (model, entry.source, entry.kernels) in known or budget.left_s <= 0:
                say(f"{model}, {entry}: {'measured already' if budget.left_s > 0 else 'no time is left'}.")
                continue
            row = _largest(entry, device, most=most, tries=tries, budget=budget, memory=memory, say=say)
            if row is None:
                continue
            row |= {"date": results.now()} | here
            if out:
                results.append(out, [row], COLUMNS)
            rows.append(row)
    return rows


def _largest(
    entry: Entry,
    device: torch.device,
    *,
    most: int | None,
    tries: int,
    budget: Budget,
    memory: float | None,
    say: Callable[[str], None],
) -> Row | None:
    try:
        # of an unlisted size no positions are kept as a table
        module = build_module(replace(entry, run="eager"), FIRST, device).to(device, getattr(torch, PRECISION))
    except NoKernelsError as error:
        say(f"{entry.model}, {entry}: left out. {error}")
        return None

    def attempt(side: int) -> Try:
        found = forward_once(module, side, device)
        taken = f"{found.peak_mib:.0f} MiB, {found.seconds:.2f} s" if found.fits else f"refused ({found.why})"
        say(f"{entry.model}, {entry}: {side} px: {taken}.")
        return found

    first = FIRST if most is None else max(MULTIPLE, min(FIRST, most // 2 // MULTIPLE * MULTIPLE))
    tried = search(
        attempt,
        first=first,
        most=most,
        multiple=MULTIPLE,
        tries=tries,
        memory_mib=memory,
        go_on=lambda: budget.left_s > 0,
    )
    fit = [side for side, each in tried.items() if each.fits]
    refused = [side for side, each in tried.items() if not each.fits]
    if not fit:
        say(f"{entry.model}, {entry}: no side that was tried was taken.")
        return None
    side, last = max(fit), min(refused, default=None)
    patch = ARCHITECTURES[entry.model].patch_size
    return dict.fromkeys(COLUMNS, "") | {
        "model": entry.model,
        "source": entry.source,
        "kernels": entry.kernels,
        "precision": PRECISION,
        "side": str(side),
        "tokens": str((side // patch) ** 2),
        "peak_mib": f"{tried[side].peak_mib:.0f}" if memory else "",
        "seconds": f"{tried[side].seconds:.3f}",
        "refused_side": "" if last is None else str(last),
        "refused_by": "" if last is None else tried[last].why,
        "memory_mib": "" if memory is None else f"{memory:.0f}",
        "tries": str(len(tried)),
    }


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
