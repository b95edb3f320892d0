"""Rows of `python -m xcit.bench gpu`: where and with what they were measured, which exist, and what stands in one."""

from __future__ import annotations

import hashlib
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from xcit.bench import results, timer
from xcit.bench.gpu_cases import COLUMNS, PRECISIONS, GpuCase, baseline, competitor
from xcit.bench.gpu_contenders import Running
from xcit.bench.gpu_floors import model_floor
from xcit.bench.gpu_peaks import Peaks

Row = dict[str, str]

PASSES = {"inference": 1, "training": 3}
"""Forward passes' worth of arithmetic: backward takes twice as much."""
PACKAGE = Path(__file__).parents[1]
WHAT_RUNS = ("models", "ops")
"""The rooms whose code decides what a model costs."""


def environment(device_type: str) -> Row:
    """Return where and with what this process measures, one value a column from ``device`` on."""
    try:
        found = results.environment(device_type)
    except PackageNotFoundError:  # a source tree that is not installed: its code's digest tells which
        import timm

        found = {
            "device": device_type,
            "hardware": torch.cuda.get_device_name() if device_type == "cuda" else platform.machine(),
            "threads": str(torch.get_num_threads()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "xcit": "source",
        }
    return found | {"triton": _triton(), "code": code_digest()}


def code_digest() -> str:
    """Return twelve digits that change with any file of the package's equations and models."""
    root, digest = PACKAGE, hashlib.sha256()
    for room in WHAT_RUNS:
        for file in sorted((root / room).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def measured(rows: Iterable[Row], here: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return the case and the competitor of rows that measuring again would only repeat.

    Those of the same device, torch, timm and Triton; of ours also of the same version and code.
    """
    common = ("device", "hardware", "torch", "timm", "triton")
    return {
        (row["case"], competitor(row))
        for row in rows
        if all(row[name] == here[name] for name in common)
        and (row["source"] in ("timm", "peer") or all(row[name] == here[name] for name in ("xcit", "code")))
    }


def known_costs(rows: Iterable[Row], here: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """Return how long competitors took to build on this device before, the last of each."""
    return {
        (row["case"], competitor(row)): float(row["build_s"])
        for row in rows
        if row["hardware"] == here["hardware"] and row["build_s"]
    }


def make_row(
    case: GpuCase,
    running: Running,
    samples: Mapping[str, Sequence[float]],
    *,
    multiply_adds: int,
    step_mib: float | None,
    peaks: Peaks,
) -> Row:
    """Return a competitor's row, without what all rows of a run share.

    Args:
        case: which.
        running: the competitor.
        samples: milliseconds of each competitor of the round, one sample a turn.
        multiply_adds: of one image in inference.
        step_mib: allocated by one call above what was there before it; None where that says nothing.
        peaks: of the device, in the type of the case's matrix products.
    """
    entry, own = running.entry, samples[str(running.entry)]
    median = statistics.median(own)
    p10, p90 = np.percentile(own, [10, 90])
    tflops = 2 * multiply_adds * case.batch_size * PASSES[case.mode] / median / 1e9
    row = dict.fromkeys(COLUMNS, "") | {
        "case": str(case),
        "model": entry.model,
        "source": entry.source,
        "run": entry.run,
        "kernels": entry.kernels,
        "mode": case.mode,
        "precision": case.precision,
        "image_size": str(case.image_size),
        "batch_size": str(case.batch_size),
        "median_ms": f"{median:.4f}",
        "p10_ms": f"{p10:.4f}",
        "p90_ms": f"{p90:.4f}",
        "rounds": str(len(own)),
        "images_per_second": f"{1000 * case.batch_size / median:.2f}",
        "ratio_vs_timm_eager": f"{timer.paired_ratio([*samples[str(baseline(case))]], [*own]):.3f}",
        "multiply_adds": str(multiply_adds),
        "tflops": f"{tflops:.3f}",
        "matrix_tflops": f"{peaks.matrix_tflops:.3f}",
        "matrix_share": f"{tflops / peaks.matrix_tflops:.4f}",
        "copy_gbs": f"{peaks.copy_gbs:.1f}",
        "max_rel_diff": f"{running.difference:.1e}",
        "form": running.form,
        "kernels_run": "+".join(running.kernels_run),
        "graphs": str(running.graphs) if running.graphs else "",
        "build_s": f"{running.build_s:.1f}",
        "held_mib": f"{running.held_bytes / 2**20:.1f}",
    }
    if step_mib is not None:
        row["peak_mib"] = f"{running.held_bytes / 2**20 + step_mib:.1f}"
    if entry.source != "peer":
        floor = model_floor(case, peaks)
        row |= {
            "floor_mib": f"{floor.mib:.1f}",
            "copy_share": f"{floor.bytes / median / 1e6 / peaks.copy_gbs:.4f}",
            "floor_ms": f"{floor.ms:.4f}",
            "floor_share": f"{floor.ms / median:.4f}",
        }
    return row


def arithmetic(case: GpuCase) -> str:
    """Return the name of the type of a case's matrix products."""
    return PRECISIONS[case.precision].arithmetic


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
