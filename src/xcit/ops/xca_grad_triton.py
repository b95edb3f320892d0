"""The backward kernel of ``xcit.ops.xca_core``, one head a program, or a head's share of the tokens.

From the cosines and the norms follow three (d, d) maps, and with them the gradients of a tile of tokens:

    dq = (k E^T) g - q p         E_ij = dcos_ij / |k_j|
    dk = (q F) g' - k p'         F_ij = dcos_ij / |q_i|
    dv = dy A

q and k enter the products as they are; the maps are rounded to their dtype. What is subtracted is the part of the
gradient along q (along k), since a norm does not change the output: it is computed from the rounded maps, not from
dcos, so that it cancels what it is to cancel however nearly parallel the channels are. In float16 neither 1 / |k| nor
dcos need be representable: each output channel's map is scaled to a largest entry of 2^14, and g scales it back.
"""

# Triton reads a kernel's arguments, and has no types of its own for them.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.tiles_triton import dot_options, over, product, rounded, tile_mask, with_rows
from xcit.ops.xca_triton import NORM_EPS, Heads, gram_of, sizes_of, softmax, split_grams


def mix_backward(dy: Tensor, qkv: Tensor, temperature: Tensor, cosines: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of packed qkv (B, N, 3C) and of the temperatures.

    The gradient of A is a product like q^T k, of dy and v; where the tokens are split, it takes a launch of its own.
    """
    dy, qkv = with_rows(dy), with_rows(qkv)
    sizes = sizes_of(qkv, temperature, 3)
    d_attn = None
    if sizes.splits > 1:
        d_attn = split_grams(dy, qkv[..., 2 * sizes.channels :], sizes, norms=False)[0].sum(1)
    return _backward(dy, d_attn, qkv, temperature, cosines, norms, sizes)


def attend_backward(
    d_attn: Tensor, qk: Tensor, temperature: Tensor, cosines: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of packed q and k (B, N, 2C) and of the temperatures."""
    qk = with_rows(qk)
    return _backward(None, d_attn.contiguous(), qk, temperature, cosines, norms, sizes_of(qk, temperature, 2))


def _backward(
    dy: Tensor | None,
    d_attn: Tensor | None,
    packed: Tensor,
    temperature: Tensor,
    cosines: Tensor,
    norms: Tensor,
    sizes: Heads,
) -> tuple[Tensor, Tensor]:
    d_packed = packed.new_empty(packed.shape)
    d_temperature = packed.new_empty(sizes.batch, sizes.heads, dtype=torch.float32)
    upstream = packed if dy is None else dy
    _backward_kernel[(sizes.batch * sizes.heads, sizes.splits)](
        packed,
        upstream,
        cosines if d_attn is None else d_attn,
        cosines,
        norms,
        temperature.contiguous(),
        d_packed,
        d_temperature,
        *packed.stride()[:2],
        *upstream.stride()[:2],
        *sizes.cut,
        PARTS=2 if dy is None else 3,
        GRAM=d_attn is None,
        # A's gradient is padded where it comes from the products of the splits
        ROW=0 if d_attn is None else d_attn.shape[-1],
        **sizes.options,
        **dot_options(packed.dtype),
    )
    return d_packed, d_temperature.sum(0).reshape(temperature.shape).to(temperature.dtype)


@triton.jit
def _map_of(d_cosines, cosines, norm, other_norm, AXIS: tl.constexpr, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """Return the map from one of q, k to the other's gradient, the gains of its channels, and their pulls.

    Args:
        d_cosines: (D, D), row i of q, column j of k.
        cosines: likewise.
        norm: of the one whose gradient it is, (D, 1) for q or (1, D) for k.
        other_norm: of the other.
        AXIS: along which the other's channels lie: 1 for the gradient of q, 0 for that of k.
        DTYPE: of the map.
        BY_HAND: see ``rounded``.
    """
    divisor = tl.maximum(norm, NORM_EPS)
    other_divisor = tl.maximum(other_norm, NORM_EPS)
    # a channel that is zero throughout adds nothing, but 1 / eps would push the others out of float16's range
    entries = tl.where(other_norm > 0.0, over(d_cosines, other_divisor), 0.0)
    scale = tl.expand_dims(tl.maximum(tl.max(tl.abs(entries), AXIS), 1e-30), AXIS) * 6.103515625e-05  # 2^-14
    entries = rounded(over(entries, scale), DTYPE, BY_HAND)
    along = tl.expand_dims(tl.sum(entries.to(tl.float32) * (cosines * other_divisor), AXIS), AXIS)
    gain = over(scale, divisor)
    # below eps it is not the norm that q is divided by, but a constant
    pull = tl.where(norm >= NORM_EPS, over(over(along * scale, divisor), divisor), 0.0)
    return entries, gain, pull


@triton.jit
def _backward_kernel(
    qkv_ptr,
    dy_ptr,
    d_attn_ptr,
    cosines_ptr,
    norms_ptr,
    t_ptr,
    d_qkv_ptr,
    d_t_ptr,
    stride_b,
    stride_n,
    dy_stride_b,
    dy_stride_n,
    num_tokens,
    chunk,
    channels,
    heads,
    PARTS: tl.constexpr,
    GRAM: tl.constexpr,
    ROW: tl.constexpr,
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
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, num_tokens)
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (cols < HEAD)[:, None] & (cols < HEAD)[None, :]
    q_ptr = qkv_ptr + image * stride_b + start.to(tl.int64) * stride_n + head * HEAD
    dy_ptr += image * dy_stride_b + start.to(tl.int64) * dy_stride_n + head * HEAD

    if GRAM:  # all tokens are this program's: start is 0
        v_ptr = q_ptr + 2 * channels
        d_attn, _, _ = gram_of(
            dy_ptr, v_ptr, dy_stride_n, stride_n, start, stop, False, HEAD, BLOCK_D, BLOCK_N, PRECISION, BY_HAND
        )
    else:
        d_attn_ptrs = d_attn_ptr + program.to(tl.int64) * ROW * ROW + cols[:, None] * ROW + cols[None, :]
        d_attn = tl.load(d_attn_ptrs, mask=inside, other=0.0)

    cosine_ptrs = cosines_ptr + program.to(tl.int64) * HEAD * HEAD + cols[:, None] * HEAD + cols[None, :]
    cosines = tl.load(cosine_ptrs, mask=inside, other=0.0)
    norm_ptrs = norms_ptr + program.to(tl.int64) * 2 * HEAD + cols
    q_norm = tl.load(norm_ptrs, mask=cols < HEAD, other=0.0)[:, None]
    k_norm = tl.load(norm_ptrs + HEAD, mask=cols < HEAD, other=0.0)[None, :]
    t = tl.load(t_ptr + head).to(tl.float32)
    attn = softmax(cosines, t, HEAD, BLOCK_D)
    d_logits = attn * (d_attn - tl.sum(attn * d_attn, 1)[:, None])
    if tl.program_id(1) == 0:
        # a row of d_logits sums to zero: what the row's cosines have in common is taken out before it is rounded
        spread = cosines - over(tl.sum(cosines, 1), HEAD)[:, None]
        tl.store(d_t_ptr + program, tl.sum(tl.sum(d_logits * spread, 1), 0))
    d_cosines = t * d_logits
    to_q, q_gain, q_pull = _map_of(d_cosines, cosines, q_norm, k_norm, 1, DTYPE, BY_HAND)
    to_k, k_gain, k_pull = _map_of(d_cosines, cosines, k_norm, q_norm, 0, DTYPE, BY_HAND)
    to_q = tl.trans(to_q)  # (channel of k, channel of q)
    q_gain = tl.trans(q_gain)
    q_pull = tl.trans(q_pull)
    to_v = rounded(attn, DTYPE, BY_HAND)

    q_ptrs = q_ptr + rows[:, None] * stride_n + cols[None, :]
    dy_ptrs = dy_ptr + rows[:, None] * dy_stride_n + cols[None, :]
    d_qkv_ptr += (image * num_tokens + start) * (PARTS * channels) + head * HEAD
    dq_ptrs = d_qkv_ptr + rows[:, None] * (PARTS * channels) + cols[None, :]
    for n in range(start, stop, BLOCK_N):
        mask = tile_mask(n + rows, stop, cols, HEAD, BLOCK_D)
        q = tl.load(q_ptrs, mask=mask, other=0.0)
        k = tl.load(q_ptrs + channels, mask=mask, other=0.0)
        zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dq = product(k, to_q, zeros, PRECISION, BY_HAND) * q_gain - q.to(tl.float32) * q_pull
        dk = product(q, to_k, zeros, PRECISION, BY_HAND) * k_gain - k.to(tl.float32) * k_pull
        tl.store(dq_ptrs, rounded(dq, DTYPE, BY_HAND), mask=mask)
        tl.store(dq_ptrs + channels, rounded(dk, DTYPE, BY_HAND), mask=mask)
        if PARTS == 3:
            dy = tl.load(dy_ptrs, mask=mask, other=0.0)
            dv = product(dy, to_v, zeros, PRECISION, BY_HAND)
            tl.store(dq_ptrs + 2 * channels, rounded(dv, DTYPE, BY_HAND), mask=mask)
            dy_ptrs += BLOCK_N * dy_stride_n
        q_ptrs += BLOCK_N * stride_n
        dq_ptrs += BLOCK_N * (PARTS * channels)
