"""The kernels of ``xcit.ops.class_tokens``: an online softmax over parts of the tokens, and the parts' merger.

A program holds the directions of a few heads and their weighted sums in registers, and goes through its part of one
image's tokens. Products are float32 on the ordinary units: with eight heads there are about as many as the memory
feeds, and the scores keep their digits.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHANNELS = 4096
HELD = 8192
"""Values of the directions that one program holds at most: heads * channels, both rounded up to powers of two."""
MAX_HEADS = 8
"""Taken by one program."""
TOKENS = 2
"""Taken at once. A benchmark may put another power of two in its place."""
MIN_PART = 32
"""Tokens of a part, at least."""
PROGRAMS_PER_SM = 4
INTERPRETED_PROGRAMS = 8


@triton.jit
def _parts_kernel(
    direction_ptr,
    tokens_ptr,
    statistics_ptr,
    top_ptr,
    total_ptr,
    weighted_ptr,
    tokens,
    heads,
    parts,
    length,
    tokens_batch,
    tokens_token,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts
    groups = tl.cdiv(heads, HEADS)
    image = (group // groups).to(tl.int64)
    head = (group % groups) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    wanted = column < C
    held = (head < heads)[:, None] & wanted[None, :]
    direction_at = (image * heads + head)[:, None] * C + column[None, :]
    direction = tl.load(direction_ptr + direction_at, mask=held, other=0.0).to(tl.float32)

    top = tl.full([HEADS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([HEADS], dtype=tl.float32)
    weighted = tl.zeros([HEADS, BLOCK], dtype=tl.float32)
    first = part * length
    last = tl.minimum(first + length, tokens)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = token < last
        mask = inside[:, None] & wanted[None, :]
        at = image * tokens_batch + (token.to(tl.int64) * tokens_token)[:, None] + column[None, :]
        x = tl.load(tokens_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if statistics_ptr is not None:
            statistics_at = statistics_ptr + (image * tokens + token) * 2
            mean = tl.load(statistics_at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(statistics_at + 1, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        scores = tl.sum(x[:, None, :] * direction[None, :, :], axis=2)
        scores = tl.where(inside[:, None], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=0))
        shrink = tl.exp(top - highest)
        share = tl.exp(scores - highest[None, :])
        total = total * shrink + tl.sum(share, axis=0)
        weighted = weighted * shrink[:, None] + tl.sum(share[:, :, None] * x[:, None, :], axis=0)
        top = highest

    result = (image * heads + head) * parts + part
    tl.store(top_ptr + result, top, mask=head < heads)
    tl.store(total_ptr + result, total, mask=head < heads)
    tl.store(weighted_ptr + result[:, None] * C + column[None, :], weighted, mask=held)


@triton.jit
def _merge_kernel(
    direction_ptr,
    own_ptr,
    top_ptr,
    total_ptr,
    weighted_ptr,
    result_ptr,
    heads,
    parts,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # image * heads + head
    column = tl.arange(0, BLOCK)
    wanted = column < C
    direction = tl.load(direction_ptr + row * C + column, mask=wanted, other=0.0).to(tl.float32)
    weighted = tl.load(own_ptr + row // heads * C + column, mask=wanted, other=0.0).to(tl.float32)
    top = tl.sum(direction * weighted, axis=0)
    total = top * 0.0 + 1.0
    for part in range(parts):
        at = row * parts + part
        part_top = tl.load(top_ptr + at)
        highest = tl.maximum(top, part_top)
        shrink, share = tl.exp(top - highest), tl.exp(part_top - highest)
        total = total * shrink + tl.load(total_ptr + at) * share
        weighted = weighted * shrink + tl.load(weighted_ptr + at * C + column, mask=wanted, other=0.0) * share
        top = highest
    tl.store(result_ptr + row * C + column, weighted / total, mask=wanted)


@torch.library.custom_op("xcit::class_attention_core", mutates_args=())
def class_attention_core_op(direction: Tensor, tokens: Tensor, own: Tensor, statistics: Tensor | None) -> Tensor:
    """Return ``class_attention_core``."""
    result = _result(direction, tokens, own, statistics)
    B, N, C = tokens.shape
    h = direction.shape[1]
    if result.numel() == 0:
        return result
    direction, own = direction.contiguous(), own.contiguous()
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    block = max(16, triton.next_power_of_2(C))
    held = triton.next_power_of_2(min(h, MAX_HEADS, HELD // block))
    groups = B * triton.cdiv(h, held)
    length = max(MIN_PART, triton.cdiv(N, max(1, _programs(tokens.device) // groups)))
    parts = triton.cdiv(N, length)
    top = tokens.new_empty((2, B, h, parts), dtype=torch.float32)
    weighted = tokens.new_empty((B, h, parts, C), dtype=torch.float32)
    with torch.cuda.device_of(tokens):
        if parts:
            _parts_kernel[(groups * parts,)](
                direction,
                tokens,
                None if statistics is None else statistics.contiguous(),
                top[0],
                top[1],
                weighted,
                N,
                h,
                parts,
                length,
                *tokens.stride()[:2],
                C=C,
                BLOCK=block,
                HEADS=held,
                TOKENS=TOKENS,
                num_warps=8 if held * block > 4096 else 4,
                enable_fp_fusion=True,
            )
        _merge_kernel[(B * h,)](
            direction, own, top[0], top[1], weighted, result, h, parts, C=C, BLOCK=block, enable_fp_fusion=True
        )
    return result


@class_attention_core_op.register_fake
def _result(direction: Tensor, tokens: Tensor, own: Tensor, statistics: Tensor | None) -> Tensor:
    return direction.new_empty(direction.shape, dtype=torch.float32)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
