"""LPI's forward pass as one Triton kernel, and the statistics of the norm before it; ``xcit.ops.lpi`` is the meaning.

Legend: B batch, N tokens = Hp * Wp, C channels.

A program takes one image, a strip of four columns, some rows and a block of channels, and walks down the rows. Of each
row it reads the strip and two columns on either side, normalises them, and adds what they contribute to the three rows
of conv1's output around it, six columns wide. The row of these that is complete goes through gelu and batch norm, and
contributes to the three rows of conv2's output around it, of which one is then complete and written. So every input is
read and normalised (4 + 4) / 4 times, from the caches after the first, gelu is computed (4 + 2) / 4 times, and what is
carried from row to row is two rows of each output, in registers. Triton cannot shift a tensor that is in registers:
hence columns by name.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.lpi_blocks import blocks_for, even_rows
from xcit.ops.lpi_parts_triton import both, dense, gelu, normed, on_device, parameter, rows_of_channels, taps

STRIP = 4
"""Columns that ``_lpi_kernel`` is written out for."""


@triton.jit
def _eight_normed(image, statistics, row, column, height, width, stride, c, in_c, scale, shift):
    # The tokens of a row from two columns before the strip to two after it.
    return (
        normed(image, statistics, row, column - 2, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column - 1, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column + 1, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column + 2, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column + 3, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column + 4, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column + 5, height, width, stride, c, in_c, scale, shift),
    )


@triton.jit
def _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, left, middle, right):
    # One row of taps, on one row of tokens.
    return (
        left * n0 + middle * n1 + right * n2,
        left * n1 + middle * n2 + right * n3,
        left * n2 + middle * n3 + right * n4,
        left * n3 + middle * n4 + right * n5,
        left * n4 + middle * n5 + right * n6,
        left * n5 + middle * n6 + right * n7,
    )


@triton.jit
def _four_of_six(n0, n1, n2, n3, n4, n5, left, middle, right):
    return (
        left * n0 + middle * n1 + right * n2,
        left * n1 + middle * n2 + right * n3,
        left * n2 + middle * n3 + right * n4,
        left * n3 + middle * n4 + right * n5,
    )


@triton.jit
def _between(u, inside, center, scale, shift):
    # gelu and batch norm; conv2's zero padding stands outside of the grid, not what lies there.
    return tl.where(inside, (gelu(u) - center) * scale + shift, 0.0)


@triton.jit
def _write(x_image, y_image, row, column, width, stride, channels, c, mask, factor, v):
    token = row.to(tl.int64) * width + column
    mask = both(column < width, mask)
    x = tl.load(x_image + token * stride + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_image + token * channels + c, (x + factor * v).to(y_image.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _lpi_kernel(
    x,
    statistics,
    keep,
    y,
    norm_weight,
    norm_bias,
    conv1_weight,
    conv1_bias,
    center,
    factor,
    scale,
    shift,
    conv2_weight,
    conv2_bias,
    gamma,
    height,
    width,
    rows,
    channels,
    batch_stride,
    token_stride,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    strips = tl.cdiv(width, 4)
    chunks = tl.cdiv(height, rows)
    program = tl.program_id(0)
    column = program % strips * 4
    first_row = program // strips % chunks * rows
    end = tl.minimum(first_row + rows, height)
    b = (program // strips // chunks).to(tl.int64)
    tokens = b * height * width
    x_image = x + b * batch_stride
    y_image = y + tokens * channels
    s_image = statistics + 2 * tokens

    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if EVEN:  # noqa: SIM108
        in_c = tl.full((BLOCK_C,), 1, tl.int1)
    else:
        in_c = c < channels
    n_scale = parameter(norm_weight, c, in_c, 1.0)
    n_shift = parameter(norm_bias, c, in_c, 0.0)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = taps(conv1_weight, c, in_c)
    bias1 = parameter(conv1_bias, c, in_c, 0.0)
    z_center = parameter(center, c, in_c, 0.0)
    z_scale = parameter(factor, c, in_c, 1.0) * parameter(scale, c, in_c, 1.0)
    z_shift = parameter(shift, c, in_c, 0.0)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = taps(conv2_weight, c, in_c)
    bias2 = parameter(conv2_bias, c, in_c, 0.0)
    out_scale = parameter(gamma, c, in_c, 1.0)
    if keep is not None:
        out_scale *= tl.load(keep + b).to(tl.float32)

    in0 = (column >= 1) & (column <= width)
    in1 = column < width
    in2 = column + 1 < width
    in3 = column + 2 < width
    in4 = column + 3 < width
    in5 = column + 4 < width

    # Before a row is read: p holds conv1's output one row above it, which lacks this row's share, q that of its own
    # row, which lacks two. Likewise r and t, one row further up, of conv2's output.
    n0, n1, n2, n3, n4, n5, n6, n7 = _eight_normed(
        x_image, s_image, first_row - 2, column, height, width, token_stride, c, in_c, n_scale, n_shift
    )
    p0, p1, p2, p3, p4, p5 = _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, w0, w1, w2)
    n0, n1, n2, n3, n4, n5, n6, n7 = _eight_normed(
        x_image, s_image, first_row - 1, column, height, width, token_stride, c, in_c, n_scale, n_shift
    )
    a0, a1, a2, a3, a4, a5 = _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, w3, w4, w5)
    p0, p1, p2, p3, p4, p5 = p0 + a0, p1 + a1, p2 + a2, p3 + a3, p4 + a4, p5 + a5
    q0, q1, q2, q3, q4, q5 = _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, w0, w1, w2)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    r0, r1, r2, r3 = zero, zero, zero, zero
    t0, t1, t2, t3 = zero, zero, zero, zero

    for step in range(end - first_row + 2):
        row = first_row + step
        n0, n1, n2, n3, n4, n5, n6, n7 = _eight_normed(
            x_image, s_image, row, column, height, width, token_stride, c, in_c, n_scale, n_shift
        )
        a0, a1, a2, a3, a4, a5 = _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, w6, w7, w8)
        above = (row >= 1) & (row <= height)
        h0 = _between(p0 + a0 + bias1, above & in0, z_center, z_scale, z_shift)
        h1 = _between(p1 + a1 + bias1, above & in1, z_center, z_scale, z_shift)
        h2 = _between(p2 + a2 + bias1, above & in2, z_center, z_scale, z_shift)
        h3 = _between(p3 + a3 + bias1, above & in3, z_center, z_scale, z_shift)
        h4 = _between(p4 + a4 + bias1, above & in4, z_center, z_scale, z_shift)
        h5 = _between(p5 + a5 + bias1, above & in5, z_center, z_scale, z_shift)
        a0, a1, a2, a3, a4, a5 = _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, w3, w4, w5)
        p0, p1, p2, p3, p4, p5 = q0 + a0, q1 + a1, q2 + a2, q3 + a3, q4 + a4, q5 + a5
        q0, q1, q2, q3, q4, q5 = _six_of_eight(n0, n1, n2, n3, n4, n5, n6, n7, w0, w1, w2)

        a0, a1, a2, a3 = _four_of_six(h0, h1, h2, h3, h4, h5, v6, v7, v8)
        mask = both(row >= first_row + 2, in_c)
        out = row - 2
        _write(x_image, y_image, out, column, width, token_stride, channels, c, mask, out_scale, r0 + a0 + bias2)
        _write(x_image, y_image, out, column + 1, width, token_stride, channels, c, mask, out_scale, r1 + a1 + bias2)
        _write(x_image, y_image, out, column + 2, width, token_stride, channels, c, mask, out_scale, r2 + a2 + bias2)
        _write(x_image, y_image, out, column + 3, width, token_stride, channels, c, mask, out_scale, r3 + a3 + bias2)
        a0, a1, a2, a3 = _four_of_six(h0, h1, h2, h3, h4, h5, v3, v4, v5)
        r0, r1, r2, r3 = t0 + a0, t1 + a1, t2 + a2, t3 + a3
        t0, t1, t2, t3 = _four_of_six(h0, h1, h2, h3, h4, h5, v0, v1, v2)


@triton.jit(do_not_specialize=["total", "tokens"])
def _statistics_kernel(
    x,
    statistics,
    total,
    tokens,
    channels,
    batch_stride,
    token_stride,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)[None, :]
    in_t, in_c = t < total, c < channels
    start = t // tokens * batch_stride + t % tokens * token_stride
    v = tl.load(x + start[:, None] + c, mask=in_t[:, None] & in_c, other=0.0).to(tl.float32)
    mean = tl.sum(v, 1) / channels
    centered = tl.where(in_c, v - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) / channels
    tl.store(statistics + 2 * t, mean, mask=in_t)
    tl.store(statistics + 2 * t + 1, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=in_t)


def launch_statistics(x: Tensor, eps: float) -> Tensor:
    """Return the tokens' statistics (B, N, 2). The tokens' channels are contiguous."""
    B, N, C = x.shape
    statistics = x.new_empty((B, N, 2), dtype=torch.float32)
    blocks = blocks_for("statistics", B, 1, N, C)
    with on_device(x):
        _statistics_kernel[(triton.cdiv(B * N, blocks.columns),)](
            x,
            statistics,
            B * N,
            N,
            C,
            x.stride(0),
            x.stride(1),
            eps,
            BLOCK_T=blocks.columns,
            BLOCK_C=blocks.channels,
            num_warps=blocks.num_warps,
            enable_fp_fusion=True,
        )
    return statistics


def launch_lpi(
    x: Tensor,
    statistics: Tensor,
    keep: Tensor | None,
    height: int,
    width: int,
    norm: tuple[Tensor | None, Tensor | None],
    conv1: tuple[Tensor, Tensor | None],
    batch_norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    conv2: tuple[Tensor, Tensor | None],
    gamma: Tensor | None,
) -> Tensor:
    """Return the block's new tokens.

    Args:
        x: tokens, whose channels are contiguous.
        statistics: of them.
        keep: factor of each image's branch.
        height: of the grid.
        width: of the grid.
        norm: weight, bias.
        conv1: weight, bias.
        batch_norm: center, factor, scale, shift of ``(h - center) * factor * scale + shift``.
        conv2: weight, bias.
        gamma: LayerScale.
    """
    B, _, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = blocks_for("inference", B, height, width, C)
    rows = even_rows(height, blocks.rows)
    programs = B * triton.cdiv(height, rows) * triton.cdiv(width, STRIP)
    with on_device(x):
        _lpi_kernel[(programs, triton.cdiv(C, blocks.channels))](
            x,
            statistics,
            dense(keep),
            y,
            *(dense(p) for p in (*norm, *conv1, *batch_norm, *conv2, gamma)),
            height,
            width,
            rows,
            C,
            x.stride(0),
            x.stride(1),
            BLOCK_C=blocks.channels,
            EVEN=C % blocks.channels == 0,
            num_warps=blocks.num_warps,
            enable_fp_fusion=True,
        )
    return y


@torch.library.custom_op("xcit::token_statistics", mutates_args=())
def token_statistics(x: Tensor, eps: float) -> Tensor:
    """``xcit.ops.lpi.token_statistics``."""
    return launch_statistics(rows_of_channels(x), eps)


@token_statistics.register_fake
def _(x, eps):
    return x.new_empty((x.shape[0], x.shape[1], 2), dtype=torch.float32)


@torch.library.custom_op("xcit::lpi_residual", mutates_args=())
def lpi_residual(
    x: Tensor,
    height: int,
    width: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    conv2_weight: Tensor,
    conv2_bias: Tensor | None,
    gamma: Tensor | None,
    statistics: Tensor | None,
) -> Tensor:
    """``xcit.ops.lpi.lpi_residual``."""
    x = rows_of_channels(x)
    known = launch_statistics(x, norm_eps) if statistics is None else statistics.float().contiguous()
    norm, batch_norm = (norm_weight, norm_bias), (None, None, scale, shift)
    conv1, conv2 = (conv1_weight, conv1_bias), (conv2_weight, conv2_bias)
    return launch_lpi(x, known, None, height, width, norm, conv1, batch_norm, conv2, gamma)


@lpi_residual.register_fake
def _(x, *others):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
