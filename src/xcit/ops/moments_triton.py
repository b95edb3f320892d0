"""Triton kernels of ``xcit.ops.norm_moments``: layer norm, mean and centred second moment in two readings of x.

1. ``_stats_kernel`` reads x once: mean and 1 / standard deviation of each token, and the sums of the normed channels.
2. ``_gram_kernel`` reads it again, a pair of channel tiles a program: norms and centres both tiles in registers, rounds
   them to the dtype of the products, and multiplies. Only tiles on and above the diagonal, and of those on it only the
   upper half, are kept; the other half is their mirror image, so that the result is symmetric to the last bit.
3. ``_sum_kernel``, only where the tokens are split: adds the splits up, in their order. No atomics.

The backward pass is one kernel, which reads x and writes its gradient: normed tokens times G + G^T, then the gradient
of the layer norm, with a tile's whole tokens in registers. With matrix products of torch's, x would be normed, written,
multiplied, the product written, and both read again: 7 passes over memory instead of 2, and memory is the limit up to
about C = 600 (2 C^2 / (4 C) operations a byte; an H100 does 300 in that time).
"""

# Triton reads a kernel's arguments, and has no types of its own for them.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.tiles_triton import Tile, dot_options, over, product, rounded, split_tokens, tile_mask, with_rows

STATS_TILES = {128: Tile(32, 4, 2), 256: Tile(16, 4, 2), 512: Tile(16, 8, 2), 1024: Tile(8, 8, 2)}
"""Of the first pass, by the padded number of channels (the least entry that holds them). A benchmark may put others
into this table and the next."""

GRAM_TILES = {
    2: {32: Tile(64, 2, 3), 64: Tile(64, 4, 3), 128: Tile(64, 8, 3)},
    4: {32: Tile(32, 4, 2), 64: Tile(32, 4, 2)},
}
"""Of the second pass, by the bytes of a product's operand, then by the channels of a tile: the most that divide C."""

BACKWARD_TILES = {
    2: {128: Tile(64, 4, 3), 256: Tile(64, 8, 3), 512: Tile(32, 8, 2), 1024: Tile(16, 8, 2)},
    4: {128: Tile(32, 4, 2), 256: Tile(32, 8, 2), 512: Tile(16, 8, 2), 1024: Tile(16, 8, 2)},
}
"""Of the backward pass, by the bytes of an operand, then by the padded number of channels: tokens x those in float32
are its accumulator."""
BACKWARD_DEPTH = {2: 32, 4: 16}
"""Channels that a step of the backward product takes, by the bytes of an operand."""


def norm_moments(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (B, C), second moment (B, C, C) and statistics (B, N, 2), all float32."""
    x = with_rows(x)
    B, N, C = x.shape
    stats = x.new_empty(B, N, 2, dtype=torch.float32)
    padded, tile = _padded(STATS_TILES, C)
    splits, chunk = split_tokens(B, N, tile.tokens, x.device)
    sums = x.new_empty(B, splits, C, dtype=torch.float32)
    _stats_kernel[(B, splits)](
        x,
        stats,
        sums,
        *x.stride()[:2],
        N,
        chunk,
        eps,
        C=C,
        BLOCK_C=padded,
        BLOCK_N=tile.tokens,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    mean = sums.sum(1)
    return mean, _second_moment(x, stats, mean, dtype), stats


def second_moment(x: Tensor) -> Tensor:
    """Return X^T X (B, C, C) of tokens that are centred already, in float32."""
    return _second_moment(with_rows(x), None, None, x.dtype)


def _second_moment(x: Tensor, stats: Tensor | None, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
    B, N, C = x.shape
    tiles = GRAM_TILES[dtype.itemsize]
    block = next((b for b in sorted(tiles, reverse=True) if C % b == 0), min(tiles))
    tile = tiles[block]
    num_tiles = triton.cdiv(C, block)
    pairs = num_tiles * (num_tiles + 1) // 2
    splits, chunk = split_tokens(B * pairs, N, tile.tokens, x.device)
    second = x.new_empty(B, C, C, dtype=torch.float32)
    parts = second if splits == 1 else x.new_empty(splits, B, C, C, dtype=torch.float32)
    _gram_kernel[(B * pairs, splits)](
        x,
        x if stats is None else stats,
        x if mean is None else mean,
        parts,
        *x.stride()[:2],
        N,
        chunk,
        B * C * C,
        pairs,
        C=C,
        NORM=stats is not None,
        SPLIT=splits > 1,
        BLOCK_C=block,
        BLOCK_N=tile.tokens,
        **dot_options(dtype),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _sum_kernel[(B * pairs,)](
            parts, second, splits, B * C * C, pairs, C=C, BLOCK_C=block, num_warps=tile.num_warps, enable_fp_fusion=True
        )
    return second


def norm_moments_backward(
    x: Tensor, stats: Tensor, mean: Tensor, d_mean: Tensor, d_second: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of x, (B, N, C) in its dtype."""
    x = with_rows(x)
    B, N, C = x.shape
    both = d_second + d_second.mT
    # float16 holds neither large nor small gradients: the largest of an image becomes one
    largest = both.abs().amax((1, 2))
    scale = torch.where(largest > 0, largest, 1.0)
    both = (both / scale[:, None, None]).to(dtype).contiguous()
    padded, tile = _padded(BACKWARD_TILES[dtype.itemsize], C)
    dx = x.new_empty(B, N, C)
    _backward_kernel[(B, triton.cdiv(N, tile.tokens))](
        x,
        stats,
        mean,
        (d_mean / N).contiguous(),
        both,
        scale,
        dx,
        *x.stride()[:2],
        N,
        C=C,
        BLOCK_C=padded,
        BLOCK_N=tile.tokens,
        BLOCK_K=BACKWARD_DEPTH[dtype.itemsize],
        OUT=dot_options(x.dtype)["DTYPE"],
        OUT_BY_HAND=dot_options(x.dtype)["BY_HAND"],
        **dot_options(dtype),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )
    return dx


def _padded(tiles: dict[int, Tile], channels: int) -> tuple[int, Tile]:
    """Return the power of two that holds the channels, and the tile for it."""
    padded = max(16, triton.next_power_of_2(channels))
    return padded, tiles[min(size for size in tiles if size >= padded)]


@triton.jit
def _stats_kernel(
    x_ptr,
    stats_ptr,
    sums_ptr,
    stride_b,
    stride_n,
    num_tokens,
    chunk,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * chunk
    stop = tl.minimum(start + chunk, num_tokens)
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + image * stride_b + start.to(tl.int64) * stride_n + rows[:, None] * stride_n + cols[None, :]
    stats_ptrs = stats_ptr + (image * num_tokens + start + rows) * 2
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for n in range(start, stop, BLOCK_N):
        x = tl.load(x_ptrs, mask=tile_mask(n + rows, stop, cols, C, BLOCK_C), other=0.0).to(tl.float32)
        token_mean = over(tl.sum(x, 1), C)
        offsets = x - token_mean[:, None]
        if C != BLOCK_C:
            offsets = tl.where((cols < C)[None, :], offsets, 0.0)
        deviation = tl.sqrt_rn(over(tl.sum(offsets * offsets, 1), C) + eps)
        rstd = over(tl.full((BLOCK_N,), 1.0, tl.float32), deviation)
        sums += tl.sum(offsets * rstd[:, None], 0)  # rows past the end are zero throughout
        tl.store(stats_ptrs, token_mean, mask=n + rows < stop)
        tl.store(stats_ptrs + 1, rstd, mask=n + rows < stop)
        x_ptrs += BLOCK_N * stride_n
        stats_ptrs += BLOCK_N * 2
    sums_ptrs = sums_ptr + (image * tl.num_programs(1) + split) * C + cols
    tl.store(sums_ptrs, over(sums, num_tokens), mask=cols < C)


@triton.jit
def _tile_of_pair(pair):
    """Return row and column, row <= column, of the pair-th tile on and above the diagonal, column by column."""
    # one more under the root than exact, so that an approximate root of a square does not fall short of it
    column = ((tl.sqrt(8.0 * pair + 2.0) - 1.0) * 0.5).to(tl.int32)
    return pair - column * (column + 1) // 2, column


@triton.jit
def _store_mirrored(ptr, tile, rows, cols, C: tl.constexpr):
    """Store the upper half of a tile of a (C, C) matrix, and its mirror image."""
    r = rows[:, None]
    c = cols[None, :]
    inside = (r < C) & (c < C)
    tl.store(ptr + r * C + c, tile, mask=inside & (r <= c))
    tl.store(ptr + c * C + r, tile, mask=inside & (r < c))


@triton.jit
def _operand(x_ptrs, mask, token_mean, rstd, mean, NORM: tl.constexpr, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if NORM:
        normed = (x.to(tl.float32) - token_mean[:, None]) * rstd[:, None]
        x = rounded(tl.where(mask, normed - mean[None, :], 0.0), DTYPE, BY_HAND)
    return x


@triton.jit
def _gram_kernel(
    x_ptr,
    stats_ptr,
    mean_ptr,
    out_ptr,
    stride_b,
    stride_n,
    num_tokens,
    chunk,
    part_stride,
    pairs,
    C: tl.constexpr,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    image = (tl.program_id(0) // pairs).to(tl.int64)
    row, column = _tile_of_pair(tl.program_id(0) % pairs)
    split = tl.program_id(1)
    start = split * chunk
    stop = tl.minimum(start + chunk, num_tokens)
    rows = tl.arange(0, BLOCK_N)
    left = row * BLOCK_C + tl.arange(0, BLOCK_C)
    right = column * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = x_ptr + image * stride_b + start.to(tl.int64) * stride_n + rows[:, None] * stride_n
    left_ptrs = tokens + left[None, :]
    right_ptrs = tokens + right[None, :]
    stats_ptrs = stats_ptr + (image * num_tokens + start + rows) * 2
    left_mean = tl.zeros((BLOCK_C,), tl.float32)
    right_mean = left_mean
    token_mean = tl.zeros((BLOCK_N,), tl.float32)
    rstd = token_mean
    if NORM:
        left_mean = tl.load(mean_ptr + image * C + left, mask=left < C, other=0.0)
        right_mean = tl.load(mean_ptr + image * C + right, mask=right < C, other=0.0)
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for n in range(start, stop, BLOCK_N):
        left_mask = (n + rows < stop)[:, None]
        right_mask = left_mask
        if C % BLOCK_C != 0:
            left_mask = left_mask & (left < C)[None, :]
            right_mask = right_mask & (right < C)[None, :]
        if NORM:
            token_mean = tl.load(stats_ptrs, mask=n + rows < stop, other=0.0)
            rstd = tl.load(stats_ptrs + 1, mask=n + rows < stop, other=0.0)
        a = _operand(left_ptrs, left_mask, token_mean, rstd, left_mean, NORM, DTYPE, BY_HAND)
        b = _operand(right_ptrs, right_mask, token_mean, rstd, right_mean, NORM, DTYPE, BY_HAND)
        gram = product(tl.trans(a), b, gram, PRECISION, BY_HAND)
        left_ptrs += BLOCK_N * stride_n
        right_ptrs += BLOCK_N * stride_n
        stats_ptrs += BLOCK_N * 2
    if SPLIT:
        r = left[:, None]
        c = right[None, :]
        matrix = out_ptr + split.to(tl.int64) * part_stride + image * C * C
        tl.store(matrix + r * C + c, gram, mask=(r <= c) & (r < C) & (c < C))
    else:
        _store_mirrored(out_ptr + image * C * C, gram, left, right, C)


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, splits, part_stride, pairs, C: tl.constexpr, BLOCK_C: tl.constexpr):
    image = (tl.program_id(0) // pairs).to(tl.int64)
    row, column = _tile_of_pair(tl.program_id(0) % pairs)
    left = row * BLOCK_C + tl.arange(0, BLOCK_C)
    right = column * BLOCK_C + tl.arange(0, BLOCK_C)
    r = left[:, None]
    c = right[None, :]
    mask = (r <= c) & (r < C) & (c < C)
    ptrs = parts_ptr + image * C * C + r * C + c
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for _ in range(splits):
        gram += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += part_stride
    _store_mirrored(out_ptr + image * C * C, gram, left, right, C)


@triton.jit
def _backward_kernel(
    x_ptr,
    stats_ptr,
    mean_ptr,
    d_mean_ptr,
    both_ptr,
    scale_ptr,
    dx_ptr,
    stride_b,
    stride_n,
    num_tokens,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUT: tl.constexpr,
    OUT_BY_HAND: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    inside = rows < num_tokens
    tokens = x_ptr + image * stride_b + rows.to(tl.int64)[:, None] * stride_n
    stats_ptrs = stats_ptr + (image * num_tokens + rows) * 2
    token_mean = tl.load(stats_ptrs, mask=inside, other=0.0)
    rstd = tl.load(stats_ptrs + 1, mask=inside, other=0.0)

    # the gradient of the normed tokens: (G + G^T) times the centred ones. It sums to zero over the tokens as they do,
    # so that their centring adds nothing.
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, C, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        mask = tile_mask(rows, num_tokens, ks, C, C // BLOCK_K * BLOCK_K)
        mean = tl.load(mean_ptr + image * C + ks, mask=ks < C, other=0.0)
        a = _operand(tokens + ks[None, :], mask, token_mean, rstd, mean, True, DTYPE, BY_HAND)
        both_ptrs = both_ptr + image * C * C + ks[:, None] * C + cols[None, :]
        b = tl.load(both_ptrs, mask=(ks < C)[:, None] & (cols < C)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION, BY_HAND)
    d_mean = tl.load(d_mean_ptr + image * C + cols, mask=cols < C, other=0.0)
    d_normed = acc * tl.load(scale_ptr + image) + d_mean[None, :]  # zero past C

    mask = tile_mask(rows, num_tokens, cols, C, BLOCK_C)
    x = tl.load(tokens + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    normed = (x - token_mean[:, None]) * rstd[:, None]
    along_one = over(tl.sum(d_normed, 1), C)
    along_normed = over(tl.sum(tl.where(mask, d_normed * normed, 0.0), 1), C)
    dx = rstd[:, None] * (d_normed - along_one[:, None] - normed * along_normed[:, None])
    dx_ptrs = dx_ptr + (image * num_tokens + rows)[:, None] * C + cols[None, :]
    tl.store(dx_ptrs, rounded(dx, OUT, OUT_BY_HAND), mask=mask)
