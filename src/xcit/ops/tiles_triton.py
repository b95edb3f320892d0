"""What the Triton kernels of the attention share: products, roundings, and how the tokens are split over programs.

Triton's interpreter, which stands in for a GPU in tests, multiplies bfloat16 as if it were integers and cuts its last
digits off where a device rounds to the nearest; ``product`` and ``rounded`` mend both there and are plain elsewhere.
"""

# Triton reads a kernel's arguments, and has no types of its own for them.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.kernels import interpreted

MIN_SPLIT = 256
"""Tokens that a program takes at least where an image's are split over several: less is lost in their reduction."""

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """How a kernel cuts its work."""

    tokens: int
    num_warps: int
    num_stages: int


def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """Return how a kernel rounds to a dtype and multiplies in it, as the constants that ``product`` and so on take.

    Products of float32 are full ones unless ``torch.backends.cuda.matmul.allow_tf32`` says otherwise.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "DTYPE": _TRITON_DTYPES[dtype],
        "PRECISION": "tf32" if tf32 else "ieee",
        "BY_HAND": interpreted() and dtype == torch.bfloat16,
    }


def wanted_programs(device: torch.device) -> int:
    """Return how many programs keep a device busy: two for each of its multiprocessors."""
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def split_tokens(programs: int, num_tokens: int, block: int, device: torch.device) -> tuple[int, int]:
    """Share an image's tokens between programs where there are fewer of these than the device wants.

    Args:
        programs: how many there are without splitting.
        num_tokens: N.
        block: tokens of a tile.
        device: that the kernel runs on.

    Returns:
        Number of splits, and tokens of each (a multiple of the block; the last may have less). They follow from the
        sizes and the device alone, and so does the order of every sum.
    """
    splits = max(1, min(triton.cdiv(wanted_programs(device), programs), triton.cdiv(num_tokens, MIN_SPLIT)))
    chunk = triton.cdiv(triton.cdiv(num_tokens, splits), block) * block
    return triton.cdiv(num_tokens, chunk), chunk


def with_rows(x: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous, as the kernels read it; any other stride they take as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, BY_HAND: tl.constexpr):
    """Add ``a @ b`` to a float32 accumulator."""
    if BY_HAND:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """Round float32 to the nearest of another dtype."""
    if BY_HAND:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + (0x7FFF + ((bits >> 16) & 1))
        x = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def over(x, y):
    """Divide with one rounding; Triton's ``/`` of float32 is only an approximation on a device."""
    return tl.div_rn(x, tl.zeros_like(x) + y)


@triton.jit
def tile_mask(rows, stop, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mask of a tile of tokens: all its columns where the block is as wide as the data."""
    mask = (rows < stop)[:, None]
    if WIDTH != BLOCK:
        mask = mask & (cols < WIDTH)[None, :]
    return mask
