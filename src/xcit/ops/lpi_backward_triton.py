"""The backward pass of LPI in training, as Triton kernels.

Legend: B batch, N tokens = Hp * Wp, C channels, u = conv1(norm(x)), h = gelu(u), z = batch_norm(h), v = conv2(z).

Two sums stand between y's gradient dy and x's: over all tokens, in batch norm, and over a token's channels, in the
norm. Hence three sweeps. "outer" reads x and dy, and sums what batch norm needs and conv2's gradient; "inner" reads
them again, computes the same, and writes du; "norm" reads du, x and dy, and writes dx. Beside x and dy, du and dx are
all that is as large as the tokens. What is computed twice costs arithmetic; to store dz instead would write one map and
read one, for one read less. Each sweep walks down rows and carries the last two in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from xcit.ops.lpi_blocks import Blocks, Kernel, blocks_for, even_rows
from xcit.ops.lpi_parts_triton import (
    channels_of,
    dense,
    normed,
    on_device,
    parameter,
    rows_of_channels,
    store_sum,
    taps,
    three_normed,
    three_values,
    value,
)

OUTER_SUMS = 12
"""Of each channel: nine of z with the gradient of conv2's output around it, that gradient, dz, and dz * h_normed."""
INNER_SUMS = 10
"""Nine of du with conv1's input around it, and du."""


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _convolutions_backward_kernel(
    x,
    dy,
    statistics,
    keep,
    moments,
    sums,  # (OUTER_SUMS, C), where INNER
    du,  # (B, N, C), written where INNER
    partial,  # (programs, OUTER_SUMS or INNER_SUMS, C)
    norm_weight,
    norm_bias,
    conv1_weight,
    conv1_bias,
    bn_weight,
    bn_bias,
    conv2_weight,
    gamma,
    height,
    width,
    rows,
    channels,
    batch_stride,
    token_stride,
    dy_batch_stride,
    dy_token_stride,
    count,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    INNER: tl.constexpr,
):
    strips = tl.cdiv(width, COLUMNS)
    chunks = tl.cdiv(height, rows)
    program = tl.program_id(0)
    first_row = program // strips % chunks * rows
    end = tl.minimum(first_row + rows, height)
    b = (program // strips // chunks).to(tl.int64)
    tokens = b * height * width
    x_image = x + b * batch_stride
    dy_image = dy + b * dy_batch_stride
    s_image = statistics + 2 * tokens
    column = (program % strips * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    there = column < width

    c, in_c = channels_of(channels, BLOCK_C, EVEN)
    n_scale = parameter(norm_weight, c, in_c, 1.0)
    n_shift = parameter(norm_bias, c, in_c, 0.0)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = taps(conv1_weight, c, in_c)
    bias1 = parameter(conv1_bias, c, in_c, 0.0)
    mean = parameter(moments, c, in_c, 0.0)
    rstd = parameter(moments + 2 * channels, c, in_c, 0.0)
    z_scale = parameter(bn_weight, c, in_c, 1.0)
    z_shift = parameter(bn_bias, c, in_c, 0.0)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = taps(conv2_weight, c, in_c)
    dv_scale = parameter(gamma, c, in_c, 1.0)
    kept = 1.0
    if keep is not None:
        kept = tl.load(keep + b).to(tl.float32)
        dv_scale *= kept
    if INNER:
        dz_mean = parameter(sums + 10 * channels, c, in_c, 0.0) / count
        dzh_mean = parameter(sums + 11 * channels, c, in_c, 0.0) / count
        du_image = du + tokens * channels

    a0, a1, a2 = three_normed(
        x_image, s_image, first_row - 1, column, height, width, token_stride, c, in_c, n_scale, n_shift
    )
    b0, b1, b2 = three_normed(
        x_image, s_image, first_row, column, height, width, token_stride, c, in_c, n_scale, n_shift
    )
    d0, d1, d2 = three_values(dy_image, first_row - 1, column, height, width, dy_token_stride, c, in_c)
    e0, e1, e2 = three_values(dy_image, first_row, column, height, width, dy_token_stride, c, in_c)
    zeros = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    s9, s10, s11 = zeros, zeros, zeros
    for step in range(end - first_row):
        row = first_row + step
        c0, c1, c2 = three_normed(
            x_image, s_image, row + 1, column, height, width, token_stride, c, in_c, n_scale, n_shift
        )
        f0, f1, f2 = three_values(dy_image, row + 1, column, height, width, dy_token_stride, c, in_c)
        u = w0 * a0 + w1 * a1 + w2 * a2 + w3 * b0 + w4 * b1 + w5 * b2 + w6 * c0 + w7 * c1 + w8 * c2 + bias1
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        h_normed = (u * cdf - mean) * rstd
        # conv2's transpose: the tap at an offset meets the gradient at the opposite one
        dz = v0 * f2 + v1 * f1 + v2 * f0 + v3 * e2 + v4 * e1 + v5 * e0 + v6 * d2 + v7 * d1 + v8 * d0
        dz = tl.where(there, dz * dv_scale, 0.0)
        if INNER:
            dh = z_scale * rstd * (dz - dz_mean - h_normed * dzh_mean)
            du_here = dh * (cdf + u * tl.exp(-0.5 * u * u) * 0.3989422804014327)
            du_here = tl.where(there, du_here, 0.0)
            token = row.to(tl.int64) * width + column
            tl.store(du_image + token * channels + c, du_here.to(du.dtype.element_ty), mask=there & in_c)
            s0 += du_here * a0
            s1 += du_here * a1
            s2 += du_here * a2
            s3 += du_here * b0
            s4 += du_here * b1
            s5 += du_here * b2
            s6 += du_here * c0
            s7 += du_here * c1
            s8 += du_here * c2
            s9 += du_here
        else:
            z = tl.where(there, h_normed * z_scale + z_shift, 0.0)
            s0 += z * f2
            s1 += z * f1
            s2 += z * f0
            s3 += z * e2
            s4 += z * e1
            s5 += z * e0
            s6 += z * d2
            s7 += z * d1
            s8 += z * d0
            s9 += e1
            s10 += dz
            s11 += dz * h_normed
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
        d0, d1, d2 = e0, e1, e2
        e0, e1, e2 = f0, f1, f2

    if INNER:
        out = partial + program.to(tl.int64) * 10 * channels
        store_sum(out, 0, channels, c, in_c, s0)
        store_sum(out, 1, channels, c, in_c, s1)
        store_sum(out, 2, channels, c, in_c, s2)
        store_sum(out, 3, channels, c, in_c, s3)
        store_sum(out, 4, channels, c, in_c, s4)
        store_sum(out, 5, channels, c, in_c, s5)
        store_sum(out, 6, channels, c, in_c, s6)
        store_sum(out, 7, channels, c, in_c, s7)
        store_sum(out, 8, channels, c, in_c, s8)
        store_sum(out, 9, channels, c, in_c, s9)
    else:
        out = partial + program.to(tl.int64) * 12 * channels
        store_sum(out, 0, channels, c, in_c, kept * s0)
        store_sum(out, 1, channels, c, in_c, kept * s1)
        store_sum(out, 2, channels, c, in_c, kept * s2)
        store_sum(out, 3, channels, c, in_c, kept * s3)
        store_sum(out, 4, channels, c, in_c, kept * s4)
        store_sum(out, 5, channels, c, in_c, kept * s5)
        store_sum(out, 6, channels, c, in_c, kept * s6)
        store_sum(out, 7, channels, c, in_c, kept * s7)
        store_sum(out, 8, channels, c, in_c, kept * s8)
        store_sum(out, 9, channels, c, in_c, kept * s9)
        store_sum(out, 10, channels, c, in_c, s10)
        store_sum(out, 11, channels, c, in_c, s11)


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _norm_backward_kernel(
    x,
    dy,
    du,
    statistics,
    dx,
    partial,  # (programs, 2, C): the gradient of the norm's weight and bias
    norm_weight,
    conv1_weight,
    height,
    width,
    rows,
    channels,
    batch_stride,
    token_stride,
    dy_batch_stride,
    dy_token_stride,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    strips = tl.cdiv(width, COLUMNS)
    chunks = tl.cdiv(height, rows)
    program = tl.program_id(0)
    first_row = program // strips % chunks * rows
    end = tl.minimum(first_row + rows, height)
    b = (program // strips // chunks).to(tl.int64)
    tokens = b * height * width
    x_image = x + b * batch_stride
    dy_image = dy + b * dy_batch_stride
    du_image = du + tokens * channels
    dx_image = dx + tokens * channels
    s_image = statistics + 2 * tokens
    column = (program % strips * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    there = column < width

    c, in_c = channels_of(channels, BLOCK_C, EVEN)
    scale = parameter(norm_weight, c, in_c, 1.0)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = taps(conv1_weight, c, in_c)

    a0, a1, a2 = three_values(du_image, first_row - 1, column, height, width, channels, c, in_c)
    b0, b1, b2 = three_values(du_image, first_row, column, height, width, channels, c, in_c)
    d_weight = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    d_bias = tl.zeros((COLUMNS, BLOCK_C), tl.float32)
    for step in range(end - first_row):
        row = first_row + step
        c0, c1, c2 = three_values(du_image, row + 1, column, height, width, channels, c, in_c)
        dn = w0 * c2 + w1 * c1 + w2 * c0 + w3 * b2 + w4 * b1 + w5 * b0 + w6 * a2 + w7 * a1 + w8 * a0
        dn = tl.where(there, dn, 0.0)
        n = normed(x_image, s_image, row, column, height, width, token_stride, c, in_c, 1.0, 0.0)
        token = row.to(tl.int64) * width + column
        rstd = tl.load(s_image + 2 * token + 1, mask=there, other=0.0)
        d_weight += dn * n
        d_bias += dn
        dn *= scale
        mean = tl.sum(dn, 1)[:, None] / channels
        slope = tl.sum(dn * n, 1)[:, None] / channels
        residual = value(dy_image, row, column, height, width, dy_token_stride, c, in_c)
        out = residual + rstd * (dn - mean - n * slope)
        tl.store(dx_image + token * channels + c, out.to(dx.dtype.element_ty), mask=there & in_c)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    partial += program.to(tl.int64) * 2 * channels
    store_sum(partial, 0, channels, c, in_c, d_weight)
    store_sum(partial, 1, channels, c, in_c, d_bias)


def _cut(kernel: Kernel, x: Tensor, height: int, width: int) -> tuple[Blocks, int, tuple[int, int]]:
    """Return a kernel's blocks, the rows of a program, and the grid of programs."""
    B, _, C = x.shape
    blocks = blocks_for(kernel, B, height, width, C)
    rows = even_rows(height, blocks.rows)
    programs = B * triton.cdiv(height, rows) * triton.cdiv(width, blocks.columns)
    return blocks, rows, (programs, triton.cdiv(C, blocks.channels))


@torch.library.custom_op("xcit::lpi_training_backward", mutates_args=())
def lpi_training_backward(
    dy: Tensor,
    x: Tensor,
    height: int,
    width: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    conv1_weight: Tensor,
    conv1_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    conv2_weight: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    moments: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x's gradient, and the sums over tokens of which the parameters' are made, in float32.

    Args:
        dy: gradient of the result.
        x: tokens.
        height: of the grid.
        width: of the grid.
        norm_weight: the parameters, as ``xcit.ops.lpi.LPITrainingWeights`` has them.
        norm_bias: ...
        conv1_weight: ...
        conv1_bias: ...
        bn_weight: ...
        bn_bias: ...
        conv2_weight: ...
        gamma: ...
        keep: factor of each image's branch.
        moments: of h, (3, C).
        statistics: of the tokens, (B, N, 2).

    Returns:
        dx (B, N, C); (12, C) and (10, C), rows as ``OUTER_SUMS`` and ``INNER_SUMS`` say, without gamma's factor; and
        (2, C), the gradients of the norm's weight and bias.
    """
    x, dy = rows_of_channels(x), rows_of_channels(dy)
    B, N, C = x.shape
    strides = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1))
    conv1 = (conv1_weight.contiguous(), dense(conv1_bias))
    others = (dense(bn_weight), dense(bn_bias), conv2_weight.contiguous(), dense(gamma))
    du = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def sweep(kernel: Kernel, num_sums: int, sums: Tensor | None) -> Tensor:
        blocks, rows, grid = _cut(kernel, x, height, width)
        partial = x.new_empty((grid[0], num_sums, C), dtype=torch.float32)
        _convolutions_backward_kernel[grid](
            x,
            dy,
            statistics,
            dense(keep),
            moments,
            sums,
            du,
            partial,
            dense(norm_weight),
            dense(norm_bias),
            *conv1,
            *others,
            height,
            width,
            rows,
            C,
            *strides,
            float(B * N),
            COLUMNS=blocks.columns,
            BLOCK_C=blocks.channels,
            EVEN=C % blocks.channels == 0,
            INNER=sums is not None,
            num_warps=blocks.num_warps,
            enable_fp_fusion=True,
        )
        return partial.sum(0)

    with on_device(x):
        outer = sweep("outer", OUTER_SUMS, None)
        inner = sweep("inner", INNER_SUMS, outer)
        blocks, rows, grid = _cut("norm", x, height, width)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        partial = x.new_empty((grid[0], 2, C), dtype=torch.float32)
        _norm_backward_kernel[grid](
            x,
            dy,
            du,
            statistics,
            dx,
            partial,
            dense(norm_weight),
            conv1[0],
            height,
            width,
            rows,
            C,
            *strides,
            COLUMNS=blocks.columns,
            BLOCK_C=blocks.channels,
            EVEN=C % blocks.channels == 0,
            num_warps=blocks.num_warps,
            enable_fp_fusion=True,
        )
    return dx, outer, inner, partial.sum(0)


@lpi_training_backward.register_fake
def _(dy, x, *others):
    B, N, C = x.shape
    return (
        torch.empty((B, N, C), dtype=x.dtype, device=x.device),
        x.new_empty((OUTER_SUMS, C), dtype=torch.float32),
        x.new_empty((INNER_SUMS, C), dtype=torch.float32),
        x.new_empty((2, C), dtype=torch.float32),
    )
