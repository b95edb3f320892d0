"""Memory as the allocator saw it: the highest sum of live tensors during a step, and what waits for the backward pass.

Both are measured on the running step, nothing is derived from shapes. On the CPU the allocator's own log (torch's
profiler) gives the peak, on CUDA its counters; scratch space that a library takes outside torch's allocator is in
neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

MIB = 2**20


def peak_mib(step: Callable[[], Any], device_type: str = "cpu") -> float:
    """The most that a step had allocated at once, above what was there before it.

    Args:
        step: called once. Call it before, so that what is allocated once only (an optimiser's state) is there, and
            leave nothing of that call behind that this one frees (gradients).
        device_type: "cpu" or "cuda".

    Returns:
        MiB.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(profile_memory=True) as log:
        step()
    changes = [(e.start_ns(), e.nbytes()) for e in log.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        live += change
        peak = max(peak, live)
    return peak / MIB


def saved_mib(step: Callable[[], Any], parameters: Iterable[Tensor]) -> float:
    """What a step's forward pass keeps for its backward pass.

    Args:
        step: called once; a step that computes no gradients saves nothing.
        parameters: not counted, since they are there anyway.

    Returns:
        MiB of all distinct storages that autograd saved; two views of one storage count once. The input counts if it
        is saved.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}
    alive = []  # a storage that was freed could give its address to the next one, which would then not be counted

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values()) / MIB
