"""The one timer: competitors take turns in one run, so that what slows the machine slows them all.

One round times every competitor once, in an order that rotates from round to round. Ratios are taken within a round,
between neighbours in time, and the median of those is reported: it moves far less than the ratio of two medians when
the machine's clock or its other tenants change.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Step = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        warmup: untimed calls of each competitor before the first round.
        min_rounds: rounds that are timed whatever they cost.
        max_rounds: rounds at which timing stops.
        budget_s: seconds after which no round beyond ``min_rounds`` starts.
        min_sample_ms: a sample repeats the call until the fastest competitor fills this many milliseconds.
        rest_ms: pause after each sample. onnxruntime's threads go on spinning for some 50 ms after a call, which would
            count against whoever comes next.
    """

    warmup: int = 1
    min_rounds: int = 5
    max_rounds: int = 40
    budget_s: float = 6.0
    min_sample_ms: float = 10.0
    rest_ms: float = 0.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples, in milliseconds."""

    median: float
    p25: float
    p75: float


def time_interleaved(steps: Mapping[str, Step], plan: Plan, device_type: str = "cpu") -> dict[str, list[float]]:
    """Time competitors in turns.

    Args:
        steps: what each competitor does, by its name.
        plan: how long.
        device_type: "cuda" is timed by events on its stream, which the host's own speed does not enter; other
            devices by the host's clock.

    Returns:
        For each name the milliseconds of one call, one sample a round; sample i of all names is of the same round.
    """
    sample = _cuda_sample if device_type == "cuda" else _host_sample
    for step in steps.values():
        for _ in range(plan.warmup):
            step()
    fastest = min(sample(step, 1) for step in steps.values())
    repeats = max(1, round(plan.min_sample_ms / max(fastest, 1e-3)))

    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    started = time.perf_counter()
    with _no_garbage_collection():
        for done in range(plan.max_rounds):
            if done >= plan.min_rounds and time.perf_counter() - started > plan.budget_s:
                break
            for name in order:
                samples[name].append(sample(steps[name], repeats))
                time.sleep(plan.rest_ms / 1e3)
            order.append(order.pop(0))
    return samples


def spread(samples: list[float]) -> Spread:
    """Median and quartiles of one competitor's samples."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, p25, p75)


def paired_ratio(baseline: list[float], ours: list[float]) -> float:
    """How many times faster ``ours`` is: the median over the rounds of baseline / ours."""
    return statistics.median(b / o for b, o in zip(baseline, ours, strict=True))


def _host_sample(step: Step, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats * 1e3


def _cuda_sample(step: Step, repeats: int) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from falling into one competitor's sample."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
