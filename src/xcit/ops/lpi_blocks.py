"""How LPI's kernels cut their work into programs: a small table by shape, and a way to try other cuts.

Legend: B batch, Hp x Wp the patch grid, C channels. A program walks down a tile of columns, for a block of channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

Kernel = Literal["statistics", "inference", "moments", "outer", "inner", "norm"]
"""Names of the kernels: the tokens' statistics; the forward pass; the sums over channels between its halves; the
backward pass through conv2, through conv1, and through the norm."""


class Blocks(NamedTuple):
    """The cut of one kernel."""

    channels: int
    """Of a program, a power of two: 32 consecutive threads read 64 bytes at least."""
    columns: int
    """Of a program, a power of two. The kernel "inference" is written out for four. For "statistics": tokens."""
    rows: int
    """That a program walks down at most. Its neighbours' rows are read, and their gelu computed, by both."""
    num_warps: int


ENOUGH_PROGRAMS = 1024
"""From here on programs walk further down rather than being more: some eight for each of 132 multiprocessors."""
ROWS = (32, 16, 8, 4)

_tried: dict[str, Blocks] = {}


def blocks_for(kernel: Kernel, batch: int, height: int, width: int, channels: int) -> Blocks:
    """Return the cut for a shape: that of ``try_blocks``, or the table's."""
    if kernel in _tried:
        return _tried[kernel]
    whole = power_of_two(channels)
    if kernel == "statistics":
        return Blocks(whole, max(1, 2048 // whole), 1, 4)
    if kernel == "norm":  # a token's channels are in one program
        block, columns, num_warps = whole, max(1, 512 // whole), 8 if whole > 512 else 4
    elif kernel == "inference":
        block, columns, num_warps = _divisor(channels, 128), 4, 4
    else:
        block, columns, num_warps = _divisor(channels, 64), 8, 4 if kernel == "moments" else 8
    others = batch * -(-width // columns) * -(-channels // block)
    rows = next((r for r in ROWS if others * -(-height // r) >= ENOUGH_PROGRAMS), ROWS[-1])
    return Blocks(block, columns, rows, num_warps)


@contextmanager
def try_blocks(**blocks: Blocks) -> Iterator[None]:
    """Use other cuts inside the ``with``, by the kernels' names: for measurements and tests."""
    before = dict(_tried)
    _tried.update(blocks)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def even_rows(height: int, rows: int) -> int:
    """Return how many rows each program walks down, at most ``rows`` and as equal as can be."""
    chunks = -(-height // rows)
    return -(-height // chunks)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not less, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def _divisor(channels: int, most: int) -> int:
    """Return the largest power of two that divides the channels, so that no lane idles; where that is small, cover."""
    divisor = min(most, channels & -channels)
    return divisor if divisor >= 32 else min(most, power_of_two(channels))
