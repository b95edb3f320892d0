"""What this machine's matrix units can do: the yardstick for a model's arithmetic."""

from __future__ import annotations

import time

import torch

from xcit.inference.devices import synchronize

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Of the square matrices, by the kind of device."""


def matrix_gflops(dtype: torch.dtype, device: torch.device, *, budget_s: float = 2.0) -> float:
    """Measure the fastest product of two large square matrices.

    Args:
        dtype: of both; of int8 the products are int32.
        device: "cpu" or "cuda".
        budget_s: seconds in all, beyond three products of each size.

    Returns:
        GFLOP/s, two operations a multiply-add: the best of all products, since a peak is what is asked for.
    """
    best = 0.0
    product = torch._int_mm if dtype == torch.int8 else torch.matmul
    sides = SIDES[device.type]
    for side in sides:
        draw = torch.Generator().manual_seed(0)
        a, b = (torch.randn(side, side, generator=draw).to(device, dtype) for _ in range(2))
        started = time.perf_counter()
        for done in range(1000):
            if done >= 3 and time.perf_counter() - started > budget_s / len(sides):
                break
            start = time.perf_counter()
            product(a, b)
            synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - start) / 1e9)
    return best
