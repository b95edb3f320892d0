"""LPI in training as Triton kernels: the forward pass, whose batch norm needs a sum over all tokens, and its gradient.

Legend: B batch, N tokens = Hp * Wp, C channels, u = conv1(norm(x)), h = gelu(u), z = batch_norm(h), v = conv2(z).

Forward: the tokens' statistics; u and h of every token, for their sums over tokens; then the kernel of
``lpi_triton``, which computes u and h again. To store h would write one map and read one, and spare that kernel no
read: it needs x all the same. The backward pass is in ``lpi_backward_triton``.

Sums over tokens are made in two stages, each in a fixed order, without atomics: the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.lpi_backward_triton import lpi_training_backward
from xcit.ops.lpi_blocks import blocks_for, even_rows
from xcit.ops.lpi_parts_triton import (
    channels_of,
    dense,
    gelu,
    on_device,
    parameter,
    rows_of_channels,
    store_sum,
    taps,
    three_normed,
)
from xcit.ops.lpi_triton import launch_lpi, launch_statistics


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _moments_kernel(
    x,
    statistics,
    partial,  # (programs, 2, C): mean, and sum of squared distances from it
    norm_weight,
    norm_bias,
    conv1_weight,
    conv1_bias,
    height,
    width,
    rows,
    channels,
    batch_stride,
    token_stride,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    strips = tl.cdiv(width, COLUMNS)
    chunks = tl.cdiv(height, rows)
    program = tl.program_id(0)
    first_column = program % strips * COLUMNS
    first_row = program // strips % chunks * rows
    end = tl.minimum(first_row + rows, height)
    b = (program // strips // chunks).to(tl.int64)
    x_image = x + b * batch_stride
    s_image = statistics + 2 * b * height * width
    column = (first_column + tl.arange(0, COLUMNS))[:, None]

    c, in_c = channels_of(channels, BLOCK_C, EVEN)
    n_scale = parameter(norm_weight, c, in_c, 1.0)
    n_shift = parameter(norm_bias, c, in_c, 0.0)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = taps(conv1_weight, c, in_c)
    bias1 = parameter(conv1_bias, c, in_c, 0.0)

    a0, a1, a2 = three_normed(
        x_image, s_image, first_row - 1, column, height, width, token_stride, c, in_c, n_scale, n_shift
    )
    b0, b1, b2 = three_normed(
        x_image, s_image, first_row, column, height, width, token_stride, c, in_c, n_scale, n_shift
    )
    # Sums of distances from a value of the column's own, so that a large mean does not cancel.
    reference = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    s1 = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    s2 = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    for step in range(end - first_row):
        row = first_row + step
        c0, c1, c2 = three_normed(
            x_image, s_image, row + 1, column, height, width, token_stride, c, in_c, n_scale, n_shift
        )
        u = w0 * a0 + w1 * a1 + w2 * a2 + w3 * b0 + w4 * b1 + w5 * b2 + w6 * c0 + w7 * c1 + w8 * c2 + bias1
        h = gelu(u)
        reference = tl.where(row == first_row, h, reference)
        distance = h - reference
        s1 += distance
        s2 += distance * distance
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2

    walked = (end - first_row).to(tl.float32)
    there = column < width
    mean = reference + s1 / walked  # of each column
    squares = tl.maximum(s2 - s1 * s1 / walked, 0.0)
    total = tl.sum(tl.where(there, mean, 0.0), 0)[None, :] / tl.minimum(width - first_column, COLUMNS)
    squares = tl.where(there, squares + walked * (mean - total) * (mean - total), 0.0)
    out = partial + program.to(tl.int64) * 2 * channels
    tl.store(out + c, total, mask=in_c)
    store_sum(out, 1, channels, c, in_c, squares)


@triton.jit(do_not_specialize=["height", "width", "rows", "programs"])
def _merge_kernel(
    partial,
    moments,  # (3, C): mean, variance, 1 / sqrt(variance + eps)
    height,
    width,
    rows,
    programs,
    channels,
    count,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979
    strips = tl.cdiv(width, COLUMNS)
    chunks = tl.cdiv(height, rows)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    in_c = c < channels
    lane = tl.arange(0, BLOCK_P)[:, None]
    reference = tl.load(partial + c, mask=in_c, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + lane
        size = tl.minimum(width - p % strips * COLUMNS, COLUMNS) * tl.minimum(
            height - p // strips % chunks * rows, rows
        )
        mask = (p < programs) & in_c
        mean = tl.load(partial + p.to(tl.int64) * 2 * channels + c, mask=mask, other=0.0)
        total += tl.where(mask, size.to(tl.float32) * (mean - reference), 0.0)
    mean_all = reference + tl.sum(total, 0)[None, :] / count
    # Then the distances from that mean, whose sum is what its rounding left out.
    drift = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + lane
        size = tl.minimum(width - p % strips * COLUMNS, COLUMNS) * tl.minimum(
            height - p // strips % chunks * rows, rows
        )
        mask = (p < programs) & in_c
        mean = tl.load(partial + p.to(tl.int64) * 2 * channels + c, mask=mask, other=0.0)
        squares = tl.load(partial + p.to(tl.int64) * 2 * channels + channels + c, mask=mask, other=0.0)
        distance = mean - mean_all
        drift += tl.where(mask, size.to(tl.float32) * distance, 0.0)
        total += tl.where(mask, squares + size.to(tl.float32) * distance * distance, 0.0)
    mean_all += tl.sum(drift, 0)[None, :] / count
    variance = tl.sum(total, 0)[None, :] / count
    tl.store(moments + c, mean_all, mask=in_c)
    tl.store(moments + channels + c, variance, mask=in_c)
    tl.store(moments + 2 * channels + c, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=in_c)


def launch_moments(
    x: Tensor,
    statistics: Tensor,
    height: int,
    width: int,
    norm: tuple[Tensor | None, Tensor | None],
    conv1: tuple[Tensor, Tensor | None],
    eps: float,
) -> Tensor:
    """Return of each channel of h its mean, its variance (biased), and 1 / sqrt(variance + eps): (3, C)."""
    B, _, C = x.shape
    blocks = blocks_for("moments", B, height, width, C)
    rows = even_rows(height, blocks.rows)
    programs = B * triton.cdiv(height, rows) * triton.cdiv(width, blocks.columns)
    partial = x.new_empty((programs, 2, C), dtype=torch.float32)
    moments = x.new_empty((3, C), dtype=torch.float32)
    with on_device(x):
        _moments_kernel[(programs, triton.cdiv(C, blocks.channels))](
            x,
            statistics,
            partial,
            *(dense(p) for p in (*norm, *conv1)),
            height,
            width,
            rows,
            C,
            x.stride(0),
            x.stride(1),
            COLUMNS=blocks.columns,
            BLOCK_C=blocks.channels,
            EVEN=C % blocks.channels == 0,
            num_warps=blocks.num_warps,
            enable_fp_fusion=True,
        )
        _merge_kernel[(triton.cdiv(C, 16),)](
            partial,
            moments,
            height,
            width,
            rows,
            programs,
            C,
            float(B * height * width),
            eps,
            COLUMNS=blocks.columns,
            BLOCK_P=64,
            BLOCK_C=16,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return moments


@torch.library.custom_op("xcit::lpi_training", mutates_args=())
def lpi_training(
    x: Tensor,
    height: int,
    width: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_eps: float,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``xcit.ops.lpi.lpi_residual_training``: the tokens, h's moments (3, C), the tokens' statistics."""
    x = rows_of_channels(x)
    norm, conv1, conv2 = (norm_weight, norm_bias), (conv1_weight, conv1_bias), (conv2_weight, conv2_bias)
    statistics = launch_statistics(x, norm_eps)
    moments = launch_moments(x, statistics, height, width, norm, conv1, bn_eps)
    batch_norm = (moments[0], moments[2], bn_weight, bn_bias)
    y = launch_lpi(x, statistics, keep, height, width, norm, conv1, batch_norm, conv2, gamma)
    return y, moments, statistics


@lpi_training.register_fake
def _(x, *others):
    B, N, C = x.shape
    return (
        torch.empty((B, N, C), dtype=x.dtype, device=x.device),
        x.new_empty((3, C), dtype=torch.float32),
        x.new_empty((B, N, 2), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, height, width, norm_weight, norm_bias, _, conv1_weight, conv1_bias, bn_weight, bn_bias, _ = inputs[:11]
    conv2_weight, conv2_bias, gamma, keep = inputs[11:]
    _, moments, statistics = output
    ctx.mark_non_differentiable(moments, statistics)
    ctx.height, ctx.width = height, width
    ctx.save_for_backward(
        x, norm_weight, norm_bias, conv1_weight, conv1_bias, bn_weight, bn_bias, conv2_weight, conv2_bias, gamma, keep,
        moments, statistics,
    )  # fmt: skip


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (x, norm_weight, norm_bias, conv1_weight, conv1_bias, bn_weight, bn_bias, conv2_weight, conv2_bias, gamma, keep,
     moments, statistics) = ctx.saved_tensors  # fmt: skip
    dx, outer, inner, norm = lpi_training_backward(
        dy, x, ctx.height, ctx.width, norm_weight, norm_bias, conv1_weight, conv1_bias, bn_weight, bn_bias,
        conv2_weight, gamma, keep, moments, statistics,
    )  # fmt: skip
    # v's taps are linear in z, so that gamma's gradient follows from the sums that conv2's is made of.
    d_taps, d_bias = outer[:9], outer[9]
    d_gamma = None
    if gamma is not None:
        d_gamma = (_rows_of_taps(conv2_weight) * d_taps).sum(0)
        if conv2_bias is not None:
            d_gamma = d_gamma + conv2_bias.float() * d_bias
        d_taps, d_bias = d_taps * gamma.float(), d_bias * gamma.float()
    return (
        dx,
        None,
        None,
        _like(norm_weight, norm[0]),
        _like(norm_bias, norm[1]),
        None,
        _weight_of_taps(inner[:9], conv1_weight),
        _like(conv1_bias, inner[9]),
        _like(bn_weight, outer[11]),
        _like(bn_bias, outer[10]),
        None,
        _weight_of_taps(d_taps, conv2_weight),
        _like(conv2_bias, d_bias),
        _like(gamma, d_gamma),
        None,
    )


def _rows_of_taps(weight: Tensor) -> Tensor:
    return weight.float().flatten(1).transpose(0, 1)  # (9, C)


def _weight_of_taps(rows: Tensor, like: Tensor) -> Tensor:
    return rows.transpose(0, 1).reshape(like.shape).to(like.dtype)


def _like(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if parameter is None or gradient is None else gradient.to(parameter.dtype)


lpi_training.register_autograd(_backward, setup_context=_setup_context)
