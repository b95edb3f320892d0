"""Which implementation of an operation runs: its plain definition in PyTorch, or a fused kernel in Triton.

A kernel is asked for by name and never put in another's place unseen: where it cannot run, it is refused.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from xcit.errors import BackendError, ConfigError

Kernels = Literal["plain", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernels)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take. Sums are float32 in all of them."""

_observer: list[str] | None = None


@contextmanager
def observe_kernels() -> Iterator[list[str]]:
    """Collect the names of the kernels that run inside the ``with``, in their order.

    A compiled model's calls are seen while it is traced, not when it runs.
    """
    global _observer
    before, _observer = _observer, []
    try:
        yield _observer
    finally:
        _observer = before


def use_triton(name: str, *tensors: Tensor) -> None:
    """Make sure that a Triton kernel can run on these tensors, and let ``observe_kernels`` see it.

    Args:
        name: of the kernel.
        tensors: those it reads, all of one device.

    Raises:
        BackendError: no Triton, or tensors that are not on a CUDA device (with ``TRITON_INTERPRET=1``, Triton's
            interpreter, a CPU's are taken as well: for tests, it is slow).
        ConfigError: another dtype than float32, bfloat16 or float16.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            f"The kernel {name!r} is written in Triton, which is not installed; it comes with PyTorch for CUDA on "
            f'Linux. Use kernels="plain" here.'
        )
    for tensor in tensors:
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
            raise BackendError(
                f"The kernel {name!r} runs on a CUDA device; the tensors are on {tensor.device}. Move the model and "
                f'the images to the GPU, or use kernels="plain".'
            )
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"The kernel {name!r} takes float32, bfloat16 and float16; got {tensor.dtype}. "
                f'Use kernels="plain" for other types.'
            )
    if _observer is not None:
        _observer.append(name)


def interpreted() -> bool:
    """Return whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
