"""The kernels of ``xcit.ops.residual_norm``: a token is a row, and a program holds a few rows in registers.

Statistics are two passes over registers, not E[x^2] - E[x]^2, and centred a second time: the mean of tokens far from
zero is rounded to a float32, and what that leaves is taken off the differences.

The gradients of gamma and of the norm's affine are sums over all tokens. Each program sums its own rows, a second
kernel the programs': no atomics, so the same every time on one kind of device.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHANNELS = 8192


class Tile(NamedTuple):
    """How one program is laid out."""

    rows: int
    """Tokens that it holds at once, a power of two."""
    warps: int


FORWARD_TILES = {
    16: Tile(64, 4),
    32: Tile(64, 4),
    64: Tile(32, 4),
    128: Tile(16, 4),
    256: Tile(8, 4),
    512: Tile(4, 4),
    1024: Tile(2, 4),
    2048: Tile(1, 4),
    4096: Tile(1, 8),
    8192: Tile(1, 16),
}
"""By the channels rounded up to a power of two: about 16 values a thread. A benchmark may put others in their place."""
BACKWARD_TILES = {
    16: Tile(32, 4),
    32: Tile(32, 4),
    64: Tile(16, 4),
    128: Tile(8, 4),
    256: Tile(4, 4),
    512: Tile(2, 4),
    1024: Tile(1, 4),
    2048: Tile(1, 8),
    4096: Tile(1, 16),
    8192: Tile(1, 16),
}
"""Likewise; half of it, as three sums stay in registers too."""
PROGRAMS_PER_SM = 4
"""Of the backward kernel, each of which goes through rows until there are none left."""
INTERPRETED_PROGRAMS = 3
"""Of the backward kernel without a GPU."""


@triton.jit
def _forward_kernel(
    x_ptr,
    update_ptr,
    gamma_ptr,
    weight_ptr,
    bias_ptr,
    keep_ptr,
    new_ptr,
    normed_ptr,
    statistics_ptr,
    rows,
    tokens,
    x_batch,
    x_token,
    update_batch,
    update_token,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    image, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wanted = column < C
    mask = inside[:, None] & wanted[None, :]

    x_at = x_ptr + (image * x_batch + token * x_token)[:, None] + column[None, :]
    update_at = update_ptr + (image * update_batch + token * update_token)[:, None] + column[None, :]
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(update_at, mask=mask, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        added *= tl.load(gamma_ptr + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if keep_ptr is not None:
        added *= tl.load(keep_ptr + image, mask=inside, other=0.0).to(tl.float32)[:, None]
    rounded = (x + added).to(new_ptr.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(new_ptr + at, rounded, mask=mask)

    if statistics_ptr is not None:
        # of what is stored, which is what the backward pass and whoever is given the statistics will read
        x = rounded.to(tl.float32)
        mean = tl.sum(x, axis=1) / C
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rest = tl.sum(centred, axis=1) / C
        centred = tl.where(mask, centred - rest[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / C
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        tl.store(statistics_ptr + row.to(tl.int64) * 2, mean + rest, mask=inside)
        tl.store(statistics_ptr + row.to(tl.int64) * 2 + 1, rstd, mask=inside)
        if normed_ptr is not None:
            normed = centred * rstd[:, None]
            if weight_ptr is not None:
                normed *= tl.load(weight_ptr + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
            if bias_ptr is not None:
                normed += tl.load(bias_ptr + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
            tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_new_ptr,
    grad_normed_ptr,
    grad_statistics_ptr,
    new_ptr,
    statistics_ptr,
    update_ptr,
    gamma_ptr,
    weight_ptr,
    keep_ptr,
    grad_x_ptr,
    grad_update_ptr,
    partial_ptr,
    rows,
    tokens,
    grad_new_batch,
    grad_new_token,
    grad_normed_batch,
    grad_normed_token,
    update_batch,
    update_token,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GAMMA_GRAD: tl.constexpr,
    NORM_GRAD: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    wanted = column < C
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + column, mask=wanted, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=wanted, other=0.0).to(tl.float32)
    gamma_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    weight_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)

    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        image, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        mask = inside[:, None] & wanted[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]

        grad = tl.zeros([ROWS, BLOCK], dtype=tl.float32)  # of x_new
        if statistics_ptr is not None:
            x = tl.load(new_ptr + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(statistics_ptr + row.to(tl.int64) * 2, mask=inside, other=0.0)
            rstd = tl.load(statistics_ptr + row.to(tl.int64) * 2 + 1, mask=inside, other=0.0)
            centred = tl.where(mask, x - mean[:, None], 0.0)
            rest = tl.sum(centred, axis=1) / C
            unit = tl.where(mask, (centred - rest[:, None]) * rstd[:, None], 0.0)
            if grad_normed_ptr is not None:
                grad_normed_at = (image * grad_normed_batch + token * grad_normed_token)[:, None] + column[None, :]
                slope = tl.load(grad_normed_ptr + grad_normed_at, mask=mask, other=0.0).to(tl.float32)
                if NORM_GRAD:
                    weight_sum += slope * unit
                    bias_sum += slope
                if weight_ptr is not None:
                    slope *= weight[None, :]
                along = tl.sum(slope * unit, axis=1) / C
                grad = (slope - (tl.sum(slope, axis=1) / C)[:, None] - unit * along[:, None]) * rstd[:, None]
            if grad_statistics_ptr is not None:
                of_mean = tl.load(grad_statistics_ptr + row.to(tl.int64) * 2, mask=inside, other=0.0)
                of_rstd = tl.load(grad_statistics_ptr + row.to(tl.int64) * 2 + 1, mask=inside, other=0.0)
                grad += (of_mean[:, None] - unit * (of_rstd * rstd * rstd)[:, None]) / C
        if grad_new_ptr is not None:
            grad_new_at = (image * grad_new_batch + token * grad_new_token)[:, None] + column[None, :]
            grad += tl.load(grad_new_ptr + grad_new_at, mask=mask, other=0.0).to(tl.float32)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)

        if keep_ptr is not None:
            grad *= tl.load(keep_ptr + image, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GAMMA_GRAD:
            update_at = (image * update_batch + token * update_token)[:, None] + column[None, :]
            added = tl.load(update_ptr + update_at, mask=mask, other=0.0).to(tl.float32)
            gamma_sum += tl.where(mask, grad * added, 0.0)
        if gamma_ptr is not None:
            grad *= gamma[None, :]
        tl.store(grad_update_ptr + at, grad.to(grad_update_ptr.dtype.element_ty), mask=mask)

    partial_at = partial_ptr + program * 3 * C + column
    if GAMMA_GRAD:
        tl.store(partial_at, tl.sum(gamma_sum, axis=0), mask=wanted)
    if NORM_GRAD:
        tl.store(partial_at + C, tl.sum(weight_sum, axis=0), mask=wanted)
        tl.store(partial_at + 2 * C, tl.sum(bias_sum, axis=0), mask=wanted)


@triton.jit
def _sum_kernel(
    partial_ptr,
    gamma_ptr,
    weight_ptr,
    bias_ptr,
    programs,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what the programs left: (programs, 3, C) to three vectors, of which some may not be wanted."""
    part = tl.program_id(1)
    if part == 0:
        if gamma_ptr is not None:
            _sum_part(partial_ptr, gamma_ptr, part, programs, C, ROWS, BLOCK)
    elif part == 1:
        if weight_ptr is not None:
            _sum_part(partial_ptr, weight_ptr, part, programs, C, ROWS, BLOCK)
    elif bias_ptr is not None:
        _sum_part(partial_ptr, bias_ptr, part, programs, C, ROWS, BLOCK)


@triton.jit
def _sum_part(partial_ptr, out_ptr, part, programs, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # only of parts that are wanted: the memory of the others was never written
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)
        mask = (program < programs)[:, None] & (column < C)[None, :]
        total += tl.load(partial_ptr + (program * 3 + part)[:, None] * C + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < C)


@torch.library.custom_op("xcit::residual_norm", mutates_args=())
def residual_norm_op(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    keep: Tensor | None,
    eps: float,
    want: str,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_new, normed and statistics, those that are not wanted with no elements.

    Statistics are written with the normed tokens as well: the backward pass needs them.
    """
    new, normed, statistics = _outputs(x, want, dtype, normed_dtype)
    B, N, C = x.shape
    if x.numel() == 0:
        return new, normed, statistics
    x, update = _rows(x), _rows(update)
    block, tile = _tile(FORWARD_TILES, C)
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(B * N, tile.rows),)](
            x,
            update,
            _vector(gamma),
            _vector(norm_weight),
            _vector(norm_bias),
            _vector(keep),
            new,
            normed if want == "normed" else None,
            None if want == "none" else statistics,
            B * N,
            N,
            *x.stride()[:2],
            *update.stride()[:2],
            eps,
            C=C,
            BLOCK=block,
            ROWS=tile.rows,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return new, normed, statistics


@residual_norm_op.register_fake
def _(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    keep: Tensor | None,
    eps: float,
    want: str,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, want, dtype, normed_dtype)


def _outputs(x: Tensor, want: str, dtype: torch.dtype, normed_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    return (
        x.new_empty((B, N, C), dtype=dtype),
        x.new_empty((B, N, C) if want == "normed" else (0,), dtype=normed_dtype),
        x.new_empty((0,) if want == "none" else (B, N, 2), dtype=torch.float32),
    )


@torch.library.custom_op("xcit::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    grad_statistics: Tensor | None,
    x_new: Tensor | None,
    statistics: Tensor | None,
    update: Tensor | None,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    keep: Tensor | None,
    like_x: torch.dtype,
    like_update: torch.dtype,
    gamma_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, update, gamma, norm_weight and norm_bias, those that are not there with no elements.

    With no gradient through the norm, that of x is that of x_new, and left to the caller.
    """
    grad, through = _incoming(grad_new, grad_normed, grad_statistics, x_new)
    outputs = _gradients(
        grad, through, gamma, norm_weight, norm_bias, like_x, like_update, gamma_grad, weight_grad, bias_grad
    )
    B, N, C = grad.shape
    if grad.numel() == 0:
        for output in outputs:
            output.zero_()
        return outputs
    grad_new = None if grad_new is None else _rows(grad_new)
    grad_normed = None if grad_normed is None else _rows(grad_normed)
    update = None if update is None else _rows(update)
    block, tile = _tile(BACKWARD_TILES, C)
    programs = min(triton.cdiv(B * N, tile.rows), _programs(grad.device))
    sums = gamma_grad or weight_grad or bias_grad
    partial = grad.new_empty((programs, 3, C) if sums else (0,), dtype=torch.float32)
    grad_x, grad_update, grad_gamma, grad_weight, grad_bias = outputs
    with torch.cuda.device_of(grad):
        _backward_kernel[(programs,)](
            grad_new,
            grad_normed,
            None if grad_statistics is None else grad_statistics.contiguous(),
            x_new,
            statistics if through else None,
            update,
            _vector(gamma),
            _vector(norm_weight),
            _vector(keep),
            grad_x if through else None,
            grad_update,
            partial,
            B * N,
            N,
            *(grad_new.stride()[:2] if grad_new is not None else (0, 0)),
            *(grad_normed.stride()[:2] if grad_normed is not None else (0, 0)),
            *(update.stride()[:2] if update is not None else (0, 0)),
            C=C,
            BLOCK=block,
            ROWS=tile.rows,
            GAMMA_GRAD=gamma_grad,
            NORM_GRAD=weight_grad or bias_grad,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        if sums:
            _sum_kernel[(triton.cdiv(C, 32), 3)](
                partial,
                grad_gamma if gamma_grad else None,
                grad_weight if weight_grad else None,
                grad_bias if bias_grad else None,
                programs,
                C=C,
                ROWS=32,
                BLOCK=32,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return outputs


@residual_norm_backward_op.register_fake
def _(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    grad_statistics: Tensor | None,
    x_new: Tensor | None,
    statistics: Tensor | None,
    update: Tensor | None,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    keep: Tensor | None,
    like_x: torch.dtype,
    like_update: torch.dtype,
    gamma_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, through = _incoming(grad_new, grad_normed, grad_statistics, x_new)
    return _gradients(
        grad, through, gamma, norm_weight, norm_bias, like_x, like_update, gamma_grad, weight_grad, bias_grad
    )


def _incoming(
    grad_new: Tensor | None, grad_normed: Tensor | None, grad_statistics: Tensor | None, x_new: Tensor | None
) -> tuple[Tensor, bool]:
    """Return a tensor of the tokens' shape, and whether a gradient comes through the norm."""
    shaped = next(t for t in (x_new, grad_normed, grad_new) if t is not None)
    return shaped, not (grad_normed is None and grad_statistics is None)


def _gradients(
    grad: Tensor,
    through: bool,
    gamma: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    like_x: torch.dtype,
    like_update: torch.dtype,
    gamma_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, C = grad.shape

    def vector(part: Tensor | None, there: bool) -> Tensor:
        assert part is not None or not there
        return grad.new_empty((C,) if there else (0,), dtype=torch.float32 if part is None else part.dtype)

    return (
        grad.new_empty((B, N, C) if through else (0,), dtype=like_x),
        grad.new_empty((B, N, C), dtype=like_update),
        vector(gamma, gamma_grad),
        vector(norm_weight, weight_grad),
        vector(norm_bias, bias_grad),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, update, gamma, norm_weight, norm_bias, keep, _, want, _, _ = inputs
    x_new, _, statistics = output
    normed = want != "none"
    ctx.save_for_backward(
        x_new if normed else None,
        statistics if normed else None,
        update if ctx.needs_input_grad[2] else None,  # for the gradient of gamma alone
        gamma,
        norm_weight,
        norm_bias,
        keep,
    )
    ctx.dtypes = (x.dtype, update.dtype)
    ctx.want = want
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_new: Tensor | None, grad_normed: Tensor | None, grad_statistics: Tensor | None
) -> tuple[Tensor | None, ...]:
    # what was not wanted has no elements, and no gradient
    grad_normed = grad_normed if ctx.want == "normed" else None
    grad_statistics = grad_statistics if ctx.want == "statistics" else None
    if grad_new is None and grad_normed is None and grad_statistics is None:
        return (None,) * 10
    x_new, statistics, update, gamma, norm_weight, norm_bias, keep = ctx.saved_tensors
    through = not (grad_normed is None and grad_statistics is None)
    gamma_grad, weight_grad, bias_grad = ctx.needs_input_grad[2:5]
    grad_x, grad_update, grad_gamma, grad_weight, grad_bias = residual_norm_backward_op(
        grad_new,
        grad_normed,
        grad_statistics,
        x_new if through else None,
        statistics if through else None,
        update if gamma_grad else None,
        gamma,
        norm_weight,
        norm_bias,
        keep,
        *ctx.dtypes,
        gamma_grad,
        weight_grad and grad_normed is not None,
        bias_grad and grad_normed is not None,
    )
    if not through:
        assert grad_new is not None
        grad_x = grad_new.to(ctx.dtypes[0])
    return (
        grad_x,
        grad_update,
        grad_gamma if gamma_grad else None,
        grad_weight if weight_grad and grad_normed is not None else None,
        grad_bias if bias_grad and grad_normed is not None else None,
        *(None,) * 5,
    )


residual_norm_op.register_autograd(_backward, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    """Return tokens whose channels lie side by side; images and tokens may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _vector(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.contiguous()


def _tile(table: dict[int, Tile], C: int) -> tuple[int, Tile]:
    block = max(16, triton.next_power_of_2(C))
    return block, table[block]


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
