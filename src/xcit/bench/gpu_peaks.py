"""What this device reaches in the two things that bound a model: products of large matrices, and copies."""

from __future__ import annotations

from typing import NamedTuple

import torch

from xcit.bench import timer

SIDE = {"cuda": 8192, "cpu": 512}
"""Of the square matrices, by the kind of device."""
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**25}
"""Far beyond every cache."""
PLAN = timer.Plan(warmup=3, min_rounds=10, max_rounds=10, budget_s=0.0, min_sample_ms=0.0)


class Peaks(NamedTuple):
    """The two ceilings."""

    matrix_tflops: float
    """Of the median product of two square matrices, two operations a multiply-add, in 1e12 a second."""
    copy_gbs: float
    """Of the median copy, bytes read and bytes written, in 1e9 bytes a second."""


def measure_peaks(dtype: torch.dtype, device: torch.device) -> Peaks:
    """Measure both ceilings: random values, a warm-up, the median of ten.

    Args:
        dtype: of the matrices. float32 is measured as torch multiplies it by default.
        device: "cpu" or "cuda".
    """
    side, num_bytes = SIDE[device.type], COPIED_BYTES[device.type]
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=draw, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = timer.spread(_samples(lambda: torch.mm(a, b, out=out), device)).median
    del a, b, out
    source = torch.randn(num_bytes // 4, generator=draw, device=device)
    target = torch.empty_like(source)
    copy = timer.spread(_samples(lambda: target.copy_(source), device)).median
    return Peaks(2 * side**3 / product / 1e9, 2 * num_bytes / copy / 1e6)


def _samples(step: timer.Step, device: torch.device) -> list[float]:
    return timer.time_interleaved({"": step}, PLAN, device.type)[""]
