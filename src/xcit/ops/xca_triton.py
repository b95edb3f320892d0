"""Triton kernels of ``xcit.ops.xca_core``: XCA between packed q, k, v and the mixed values, one head a program.

A program reads its head's channels of q and k where they stand in the packed tokens (rows of d contiguous channels),
and keeps their (d, d) products and the sums of their squares in registers; d is padded with zeros to a power of two.

Forward: where images and heads fill the device, one launch does all. Else (``split_tokens``) the tokens are shared out:
``_gram_kernel`` leaves a split's products and squares, ``_finish_kernel`` adds them in their order and makes A, and
``_values_kernel`` applies it. The backward pass is in ``xca_grad_triton``.
"""

# Triton reads a kernel's arguments, and has no types of its own for them.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.tiles_triton import Tile, dot_options, over, product, rounded, split_tokens, tile_mask, with_rows

NORM_EPS = tl.constexpr(1e-12)  # as in xca_core; Triton takes globals of its own type only


TILES = {
    2: {16: Tile(128, 4, 3), 32: Tile(128, 4, 3), 64: Tile(64, 4, 2), 128: Tile(64, 8, 2)},
    4: {16: Tile(64, 4, 2), 32: Tile(64, 4, 2), 64: Tile(32, 4, 2), 128: Tile(32, 8, 2)},
}
"""By the bytes of an element, then by the padded channels of a head. A benchmark may put others in."""


class Heads(NamedTuple):
    """The sizes of a call, and how its work is cut."""

    batch: int
    num_tokens: int
    channels: int
    heads: int
    head_dim: int
    block_d: int
    tile: Tile
    splits: int
    chunk: int

    @property
    def cut(self) -> tuple[int, int, int, int]:
        """N, the tokens of a split, C and h: what every kernel over the tokens is told."""
        return self.num_tokens, self.chunk, self.channels, self.heads

    @property
    def options(self) -> dict[str, Any]:
        """What every kernel is compiled and launched with."""
        return {
            "HEAD": self.head_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_N": self.tile.tokens,
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,  # Triton asks for a choice, which its versions make differently
        }


def sizes_of(packed: Tensor, temperature: Tensor, parts: int) -> Heads:
    """Return the sizes of tokens with q, k (and v) side by side."""
    B, N, width = packed.shape
    h = temperature.shape[0]
    C = width // parts
    d = C // h
    block_d = max(16, triton.next_power_of_2(d))
    tile = TILES[packed.dtype.itemsize][block_d]
    splits, chunk = split_tokens(B * h, N, tile.tokens, packed.device)
    return Heads(B, N, C, h, d, block_d, tile, splits, chunk)


def mix(qkv: Tensor, temperature: Tensor, y: Tensor, cosines: Tensor, norms: Tensor, save: bool) -> None:
    """Write y, and the cosines and norms where they are to be saved."""
    qkv, temperature = with_rows(qkv), temperature.contiguous()
    sizes = sizes_of(qkv, temperature, 3)
    if sizes.splits == 1:
        _attend(qkv, temperature, sizes, y=y, attn=None, cosines=cosines, norms=norms, save=save)
        return
    attn = y.new_empty(sizes.batch, sizes.heads, sizes.head_dim, sizes.head_dim, dtype=torch.float32)
    _attend_split(qkv, temperature, sizes, attn, cosines, norms, save)
    _values_kernel[(sizes.batch * sizes.heads, sizes.splits)](
        qkv, attn, y, *qkv.stride()[:2], *sizes.cut, **sizes.options, **dot_options(qkv.dtype)
    )


def attend(qk: Tensor, temperature: Tensor, attn: Tensor, cosines: Tensor, norms: Tensor, save: bool) -> None:
    """Write A, and the cosines and norms where they are to be saved."""
    qk, temperature = with_rows(qk), temperature.contiguous()
    sizes = sizes_of(qk, temperature, 2)
    if sizes.splits == 1:
        _attend(qk, temperature, sizes, y=None, attn=attn, cosines=cosines, norms=norms, save=save)
    else:
        _attend_split(qk, temperature, sizes, attn, cosines, norms, save)


def _attend(
    packed: Tensor,
    temperature: Tensor,
    sizes: Heads,
    *,
    y: Tensor | None,
    attn: Tensor | None,
    cosines: Tensor,
    norms: Tensor,
    save: bool,
) -> None:
    _attend_kernel[(sizes.batch * sizes.heads,)](
        packed,
        temperature,
        packed if y is None else y,
        cosines if attn is None else attn,
        cosines,
        norms,
        *packed.stride()[:2],
        *sizes.cut,
        VALUES=y is not None,
        ATTN=attn is not None,
        SAVE=save,
        **sizes.options,
        **dot_options(packed.dtype),
    )


def _attend_split(
    packed: Tensor, temperature: Tensor, sizes: Heads, attn: Tensor, cosines: Tensor, norms: Tensor, save: bool
) -> None:
    grams, squares = split_grams(packed, packed[..., sizes.channels :], sizes, norms=True)
    options = sizes.options | {"num_stages": 1}
    del options["BLOCK_N"]
    _finish_kernel[(sizes.batch * sizes.heads,)](
        grams, squares, temperature, attn, cosines, norms, sizes.splits, sizes.heads, SAVE=save, **options
    )


def split_grams(a: Tensor, b: Tensor, sizes: Heads, *, norms: bool) -> tuple[Tensor, Tensor]:
    """Return each split's products (B h, splits, D, D), and sums of squares (B h, splits, 2, D) if asked."""
    programs = sizes.batch * sizes.heads
    grams = a.new_empty(programs, sizes.splits, sizes.block_d, sizes.block_d, dtype=torch.float32)
    squares = a.new_empty(programs if norms else 0, sizes.splits, 2, sizes.block_d, dtype=torch.float32)
    options = dot_options(a.dtype)
    del options["DTYPE"]
    _gram_kernel[(programs, sizes.splits)](
        a, b, grams, squares, *a.stride()[:2], *b.stride()[:2], *sizes.cut, NORMS=norms, **sizes.options, **options
    )
    return grams, squares


# --- on the device --------------------------------------------------------------------------------------------------


@triton.jit
def gram_of(
    a_ptr,
    b_ptr,
    a_stride,
    b_stride,
    start,
    stop,
    NORMS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Return a^T b over the tokens from start (where the pointers stand) to stop, and both sums of squares."""
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    a_ptrs = a_ptr + rows[:, None] * a_stride + cols[None, :]
    b_ptrs = b_ptr + rows[:, None] * b_stride + cols[None, :]
    gram = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    a_squares = tl.zeros((BLOCK_D,), tl.float32)
    b_squares = tl.zeros((BLOCK_D,), tl.float32)
    for n in range(start, stop, BLOCK_N):
        mask = tile_mask(n + rows, stop, cols, HEAD, BLOCK_D)
        a = tl.load(a_ptrs, mask=mask, other=0.0)
        b = tl.load(b_ptrs, mask=mask, other=0.0)
        gram = product(tl.trans(a), b, gram, PRECISION, BY_HAND)
        if NORMS:
            a_wide = a.to(tl.float32)
            b_wide = b.to(tl.float32)
            a_squares += tl.sum(a_wide * a_wide, 0)
            b_squares += tl.sum(b_wide * b_wide, 0)
        a_ptrs += BLOCK_N * a_stride
        b_ptrs += BLOCK_N * b_stride
    return gram, a_squares, b_squares


@triton.jit
def _gram_kernel(
    a_ptr,
    b_ptr,
    grams_ptr,
    squares_ptr,
    a_stride_b,
    a_stride_n,
    b_stride_b,
    b_stride_n,
    num_tokens,
    chunk,
    channels,
    heads,
    NORMS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // heads).to(tl.int64)
    first = program % heads * HEAD
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, num_tokens)
    a_ptr += image * a_stride_b + start.to(tl.int64) * a_stride_n + first
    b_ptr += image * b_stride_b + start.to(tl.int64) * b_stride_n + first
    gram, a_squares, b_squares = gram_of(
        a_ptr, b_ptr, a_stride_n, b_stride_n, start, stop, NORMS, HEAD, BLOCK_D, BLOCK_N, PRECISION, BY_HAND
    )
    part = program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    tl.store(grams_ptr + part * BLOCK_D * BLOCK_D + cols[:, None] * BLOCK_D + cols[None, :], gram)
    if NORMS:
        tl.store(squares_ptr + part * 2 * BLOCK_D + cols, a_squares)
        tl.store(squares_ptr + part * 2 * BLOCK_D + BLOCK_D + cols, b_squares)


@triton.jit
def softmax(cosines, t, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return A, zero in padded columns."""
    logits = cosines * t
    if HEAD != BLOCK_D:
        logits = tl.where((tl.arange(0, BLOCK_D) < HEAD)[None, :], logits, float("-inf"))
    attn = tl.exp(logits - tl.max(logits, 1)[:, None])
    return over(attn, tl.sum(attn, 1)[:, None])


@triton.jit
def _attention(
    gram,
    q_squares,
    k_squares,
    t,
    program,
    attn_ptr,
    cosines_ptr,
    norms_ptr,
    ATTN: tl.constexpr,
    SAVE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return A, and store what is asked for: A, the cosines, the norms (as they are: what divides is at least eps)."""
    q_norm = tl.sqrt_rn(q_squares)
    k_norm = tl.sqrt_rn(k_squares)
    cosines = over(gram, tl.maximum(q_norm, NORM_EPS)[:, None] * tl.maximum(k_norm, NORM_EPS)[None, :])
    attn = softmax(cosines, t, HEAD, BLOCK_D)
    cols = tl.arange(0, BLOCK_D)
    inside = (cols < HEAD)[:, None] & (cols < HEAD)[None, :]
    entries = program.to(tl.int64) * HEAD * HEAD + cols[:, None] * HEAD + cols[None, :]
    if ATTN:
        tl.store(attn_ptr + entries, attn, mask=inside)
    if SAVE:
        tl.store(cosines_ptr + entries, cosines, mask=inside)
        norm_ptrs = norms_ptr + program.to(tl.int64) * 2 * HEAD + cols
        tl.store(norm_ptrs, q_norm, mask=cols < HEAD)
        tl.store(norm_ptrs + HEAD, k_norm, mask=cols < HEAD)
    return attn


@triton.jit
def _mix_values(
    v_ptr,
    y_ptr,
    stride_n,
    channels,
    attn,
    start,
    stop,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Store A v for the tokens from start (where the pointers stand) to stop."""
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    v_ptrs = v_ptr + rows[:, None] * stride_n + cols[None, :]
    y_ptrs = y_ptr + rows[:, None] * channels + cols[None, :]
    across = tl.trans(rounded(attn, DTYPE, BY_HAND))
    for n in range(start, stop, BLOCK_N):
        mask = tile_mask(n + rows, stop, cols, HEAD, BLOCK_D)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
        y = product(v, across, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), PRECISION, BY_HAND)
        tl.store(y_ptrs, rounded(y, DTYPE, BY_HAND), mask=mask)
        v_ptrs += BLOCK_N * stride_n
        y_ptrs += BLOCK_N * channels


@triton.jit
def _attend_kernel(
    qkv_ptr,
    t_ptr,
    y_ptr,
    attn_ptr,
    cosines_ptr,
    norms_ptr,
    stride_b,
    stride_n,
    num_tokens,
    chunk,
    channels,
    heads,
    VALUES: tl.constexpr,
    ATTN: tl.constexpr,
    SAVE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // heads).to(tl.int64)
    head = program % heads
    q_ptr = qkv_ptr + image * stride_b + head * HEAD
    gram, q_squares, k_squares = gram_of(
        q_ptr, q_ptr + channels, stride_n, stride_n, 0, num_tokens, True, HEAD, BLOCK_D, BLOCK_N, PRECISION, BY_HAND
    )
    t = tl.load(t_ptr + head).to(tl.float32)
    attn = _attention(
        gram, q_squares, k_squares, t, program, attn_ptr, cosines_ptr, norms_ptr, ATTN, SAVE, HEAD, BLOCK_D
    )
    if VALUES:
        y_ptr += image * num_tokens * channels + head * HEAD
        v_ptr = q_ptr + 2 * channels
        _mix_values(
            v_ptr, y_ptr, stride_n, channels, attn, 0, num_tokens, HEAD, BLOCK_D, BLOCK_N, DTYPE, PRECISION, BY_HAND
        )


@triton.jit
def _finish_kernel(
    grams_ptr,
    squares_ptr,
    t_ptr,
    attn_ptr,
    cosines_ptr,
    norms_ptr,
    splits,
    heads,
    SAVE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    part = program.to(tl.int64) * splits
    gram_ptrs = grams_ptr + part * BLOCK_D * BLOCK_D + cols[:, None] * BLOCK_D + cols[None, :]
    square_ptrs = squares_ptr + part * 2 * BLOCK_D + cols
    gram = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    q_squares = tl.zeros((BLOCK_D,), tl.float32)
    k_squares = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(splits):
        gram += tl.load(gram_ptrs)
        q_squares += tl.load(square_ptrs)
        k_squares += tl.load(square_ptrs + BLOCK_D)
        gram_ptrs += BLOCK_D * BLOCK_D
        square_ptrs += 2 * BLOCK_D
    t = tl.load(t_ptr + program % heads).to(tl.float32)
    _attention(gram, q_squares, k_squares, t, program, attn_ptr, cosines_ptr, norms_ptr, True, SAVE, HEAD, BLOCK_D)


@triton.jit
def _values_kernel(
    qkv_ptr,
    attn_ptr,
    y_ptr,
    stride_b,
    stride_n,
    num_tokens,
    chunk,
    channels,
    heads,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // heads).to(tl.int64)
    first = program % heads * HEAD
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, num_tokens)
    cols = tl.arange(0, BLOCK_D)
    attn_ptrs = attn_ptr + program.to(tl.int64) * HEAD * HEAD + cols[:, None] * HEAD + cols[None, :]
    attn = tl.load(attn_ptrs, mask=(cols < HEAD)[:, None] & (cols < HEAD)[None, :], other=0.0)
    v_ptr = qkv_ptr + image * stride_b + start.to(tl.int64) * stride_n + 2 * channels + first
    y_ptr += (image * num_tokens + start) * channels + first
    _mix_values(v_ptr, y_ptr, stride_n, channels, attn, start, stop, HEAD, BLOCK_D, BLOCK_N, DTYPE, PRECISION, BY_HAND)
