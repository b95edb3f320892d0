"""What LPI's Triton kernels have in common. A program's tensors are (channels,), or (columns, channels)."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gelu(u):
    """Return u times the normal distribution's function."""
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def parameter(pointer, c, in_c, default: tl.constexpr):
    """Return a parameter of the channels c, or what takes the place of one that is left out."""
    if pointer is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(pointer + c, mask=in_c, other=0.0).to(tl.float32)


@triton.jit
def tap(weight, index: tl.constexpr, c, in_c):
    """Return one tap of a depthwise 3 x 3 convolution, of the channels c."""
    return tl.load(weight + c * 9 + index, mask=in_c, other=0.0).to(tl.float32)


@triton.jit
def taps(weight, c, in_c):
    """Return all nine, row by row."""
    return (
        tap(weight, 0, c, in_c),
        tap(weight, 1, c, in_c),
        tap(weight, 2, c, in_c),
        tap(weight, 3, c, in_c),
        tap(weight, 4, c, in_c),
        tap(weight, 5, c, in_c),
        tap(weight, 6, c, in_c),
        tap(weight, 7, c, in_c),
        tap(weight, 8, c, in_c),
    )


@triton.jit
def both(a, b):
    """Return ``a & b``. One may be a scalar, whose truth Triton's interpreter spreads as integers."""
    return (a & b) != 0


@triton.jit
def value(image, row, column, height, width, stride, c, in_c):
    """Return the token at (row, column), or a column of tokens; zero outside of the grid."""
    inside = both((row >= 0) & (row < height), (column >= 0) & (column < width))
    token = row.to(tl.int64) * width + column
    return tl.load(image + token * stride + c, mask=both(inside, in_c), other=0.0).to(tl.float32)


@triton.jit
def normed(image, statistics, row, column, height, width, stride, c, in_c, scale, shift):
    """Return layer_norm of the token at (row, column), or of a column of tokens; zero outside of the grid."""
    inside = both((row >= 0) & (row < height), (column >= 0) & (column < width))
    token = row.to(tl.int64) * width + column
    x = tl.load(image + token * stride + c, mask=both(inside, in_c), other=0.0).to(tl.float32)
    mean = tl.load(statistics + 2 * token, mask=inside, other=0.0)
    rstd = tl.load(statistics + 2 * token + 1, mask=inside, other=0.0)
    return tl.where(inside, (x - mean) * rstd * scale + shift, 0.0)


@triton.jit
def three_values(image, row, column, height, width, stride, c, in_c):
    """Return the tokens of a row, left, here and right."""
    return (
        value(image, row, column - 1, height, width, stride, c, in_c),
        value(image, row, column, height, width, stride, c, in_c),
        value(image, row, column + 1, height, width, stride, c, in_c),
    )


@triton.jit
def three_normed(image, statistics, row, column, height, width, stride, c, in_c, scale, shift):
    """Return layer_norm of the tokens of a row, left, here and right."""
    return (
        normed(image, statistics, row, column - 1, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column, height, width, stride, c, in_c, scale, shift),
        normed(image, statistics, row, column + 1, height, width, stride, c, in_c, scale, shift),
    )


@triton.jit
def channels_of(channels, BLOCK_C: tl.constexpr, EVEN: tl.constexpr):
    """Return the program's channels (1, BLOCK_C), along the grid's axis 1, and which of them exist."""
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    if EVEN:  # noqa: SIM108
        in_c = tl.full((1, BLOCK_C), 1, tl.int1)
    else:
        in_c = c < channels
    return c, in_c


@triton.jit
def store_sum(partial, index: tl.constexpr, channels, c, in_c, lanes):
    """Store what a program's columns of tokens sum to, as row ``index`` of (rows, C)."""
    tl.store(partial + index * channels + c, tl.sum(lanes, 0)[None, :], mask=in_c)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a kernel is launched where the tensor is: Triton takes the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows_of_channels(x: Tensor) -> Tensor:
    """Return tokens whose channels are contiguous, at no cost where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter as the kernels index it, at no cost where it lies so."""
    return None if parameter is None else parameter.contiguous()
