"""Where a competitor's time goes: torch's profiler over its steps, kernel by kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from xcit.bench import results
from xcit.bench.gpu_cases import FOUND, Entry, GpuCase, entries
from xcit.bench.gpu_contenders import start
from xcit.bench.gpu_rows import Row, environment
from xcit.bench.results import ENVIRONMENT
from xcit.errors import ConfigError, UnknownNameError
from xcit.inference.devices import synchronize

COLUMNS = (
    *("date", "case", "competitor", "rank", "kernel", "class", "calls", "ms", "share", "step_ms"),
    *ENVIRONMENT,
    *("triton", "code"),
)
"""Of ``gpu_profile.csv``: of one step, the kernels that take most. ``step_ms`` is the time of all of them."""
STEPS = 5
"""That are profiled; figures are of one of them."""
LONGEST_NAME = 160

CLASSES: tuple[tuple[str, str], ...] = (
    ("elementwise", r"^triton_poi"),
    ("depthwise conv", r"depthwise|dwconv|conv_dw|_lpi|lpi_"),
    ("softmax", r"softmax"),
    ("norm", r"layer_?norm|batch_?norm|bn_fw|bn_bw|welford|rms_?norm|vector_norm"),
    ("convolution", r"convolution|conv2d|cudnn|implicit|fprop|dgrad"),
    ("matmul", r"gemm|nvjet|cublas|cutlass|wgmma|xmma|\b(?:mm|bmm|addmm|baddbmm)\b|matmul|moment|gram|flash|fmha"),
    ("optimiser", r"adam|multi_tensor_apply|foreach"),
    ("copy", r"copy|memcpy|memset|transpose|permute|\bcat\b|catarray|contiguous|fill"),
    ("elementwise", r"elementwise|gelu|\badd_?\b|\bmul_?\b|\bdiv_?\b|_add|_mul|dropout|bernoulli|distribution"),
)
"""What a kernel is, by the first pattern that its name has; compiled kernels are named after all that is in them."""
OTHER = "other"


class Kernel(NamedTuple):
    """One kernel of a step."""

    name: str
    calls: float
    ms: float

    @property
    def kind(self) -> str:
        """Of ``CLASSES``, or other."""
        return class_of(self.name)


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "gpu_profile.csv"


def class_of(name: str) -> str:
    """Return what a kernel of this name does."""
    small = name.lower()
    return next((kind for kind, pattern in CLASSES if re.search(pattern, small)), OTHER)


def find_entry(case: GpuCase, name: str) -> Entry:
    """Return a case's competitor of that name.

    Raises:
        UnknownNameError: there is none.
    """
    known = {str(entry): entry for entry in entries(case)}
    if name not in known:
        raise UnknownNameError("competitor", name, known, f"{case} has {', '.join(known)}.")
    return known[name]


def profile_step(case: GpuCase, entry: Entry, device: torch.device, *, steps: int = STEPS) -> list[Kernel]:
    """Return the kernels of one step of a competitor, the longest first; on a CPU its operations.

    Args:
        case: which.
        entry: the competitor.
        device: where.
        steps: that are profiled.
    """
    running = start(case, entry, device)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as log:
        for _ in range(steps):
            running.step()
        synchronize(device)
    found = []
    for event in log.key_averages():
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            found.append(Kernel(str(event.key), event.count / steps, microseconds / steps / 1e3))
    return sorted(found, key=lambda kernel: kernel.ms, reverse=True)


def run(
    case: GpuCase,
    names: list[str],
    device: torch.device,
    *,
    out: Path | None,
    top: int = 25,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Profile competitors of a case, print each, and add them to ``gpu_profile.csv``.

    Args:
        case: with a batch of its own.
        names: of its competitors.
        device: where.
        out: the CSV file that grows; None keeps no record.
        top: kernels that are shown and kept; the rest is one row.
        say: takes lines.

    Raises:
        ConfigError: the batch is still to be found.
        UnknownNameError: a name that is no competitor of the case.
        NoKernelsError: kernels are asked for where there are none.
    """
    if case.batch_size == FOUND:
        raise ConfigError(f"{case}: a profile is of a batch of so many images; write their number instead of max.")
    chosen = [find_entry(case, name) for name in names]
    here = environment(device.type)
    if out:
        results.read(out, COLUMNS)
    all_rows: list[Row] = []
    for entry in chosen:
        kernels = profile_step(case, entry, device)
        total = sum(kernel.ms for kernel in kernels)
        kept = [(k.name[:LONGEST_NAME], k.kind, k.calls, k.ms) for k in kernels[:top]]
        rest = kernels[top:]
        if rest:
            kept.append((f"{len(rest)} others", OTHER, sum(k.calls for k in rest), sum(k.ms for k in rest)))
        rows = [
            {
                "date": results.now(),
                "case": str(case),
                "competitor": str(entry),
                "rank": str(rank),
                "kernel": name,
                "class": kind,
                "calls": f"{calls:g}",
                "ms": f"{ms:.4f}",
                "share": f"{ms / total:.4f}",
                "step_ms": f"{total:.4f}",
            }
            | here
            for rank, (name, kind, calls, ms) in enumerate(kept, 1)
        ]
        if out:
            results.append(out, rows, COLUMNS)
        all_rows += rows
        say(f"{case}: {entry}: {total:.3f} ms in {sum(k.calls for k in kernels):g} kernels.")
        by_class: dict[str, float] = {}
        for kernel in kernels:
            by_class[kernel.kind] = by_class.get(kernel.kind, 0.0) + kernel.ms
        for kind, ms in sorted(by_class.items(), key=lambda item: -item[1]):
            say(f"  {kind}: {ms:.3f} ms, {100 * ms / total:.1f} %")
        for row in rows:
            share = 100 * float(row["share"])
            say(
                f"  {row['rank']:>2} {float(row['ms']):8.3f} ms {share:5.1f} % {row['calls']:>5} × {row['kernel'][:90]}"
            )
    return all_rows
