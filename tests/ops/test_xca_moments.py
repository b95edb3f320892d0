"""XCA from gathered moments, against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xcit.ops.xca import XCAWeights, xca_tokens
from xcit.ops.xca_moments import Moments, channel_map, merge_moments, moments_of


def weights_of(C: int, h: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> XCAWeights:
    parts = (
        torch.randn(3 * C, C) * C**-0.5,
        0.3 * torch.randn(3 * C) if bias else None,
        torch.randn(C, C) * C**-0.5,
        0.3 * torch.randn(C) if bias else None,
        torch.rand(h, 1, 1) + 0.5,
    )
    return XCAWeights(*(None if part is None else part.to(dtype) for part in parts))


def mapped(x: Tensor, moments: Moments, weights: XCAWeights, **options: torch.dtype) -> Tensor:
    weight, bias = channel_map(moments, weights, **options)
    return x @ weight.transpose(1, 2) + bias.unsqueeze(1)


def gathered(x: Tensor, lengths: list[int]) -> Moments:
    first, *others = (moments_of(part) for part in x.split(lengths, dim=1))
    for other in others:
        first = merge_moments(first, other)
    return first


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("C", "h"), [(24, 3), (15, 5), (1, 1)])
@pytest.mark.parametrize("tokens", [2, 3, 40])
def test_the_map_is_the_definition(tokens: int, C: int, h: int, bias: bool) -> None:
    weights = weights_of(C, h, bias)
    x = torch.randn(2, tokens, C, dtype=torch.float64)
    torch.testing.assert_close(mapped(x, moments_of(x), weights), xca_tokens(x, weights), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [[60], [1] * 60, [7, 53], [59, 1], [20, 1, 1, 38]])
def test_moments_of_parts_merge_to_those_of_the_whole(lengths: list[int]) -> None:
    x = torch.randn(2, 60, 12, dtype=torch.float64) + 5 * torch.randn(12, dtype=torch.float64)
    count, mean, second = gathered(x, lengths)
    assert count == 60
    torch.testing.assert_close(mean, x.mean(1), rtol=1e-12, atol=1e-12)
    centered = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(second, centered.transpose(1, 2) @ centered, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_are_overwritten_if_they_may_be_and_need_not_be_widened(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 60, 12) + 3).to(dtype)
    kept, lost = x.clone(), x.clone()
    expected, found = moments_of(kept), moments_of(lost, overwrite=True)
    assert torch.equal(kept, x)
    assert torch.equal(lost, x) == (dtype == torch.bfloat16)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.second, expected.second)


@pytest.mark.parametrize("small_terms", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "offset"), [(64, 0.0), (196, 10.0), (784, 3.0), (784, 100.0)])
def test_the_map_is_as_accurate_as_the_definition(tokens: int, offset: float, small_terms: torch.dtype) -> None:
    C, h = 96, 4
    weights = weights_of(C, h, dtype=torch.float32)
    exact = XCAWeights(*(None if part is None else part.double() for part in weights))
    x = F.layer_norm(torch.randn(2, tokens, C) + offset * torch.randn(C), (C,))
    truth = xca_tokens(x.double(), exact)
    definition = (xca_tokens(x, weights) - truth).square().mean().sqrt()
    for moments in (moments_of(x, torch.float32), gathered(x, [tokens // 3, tokens - tokens // 3])):
        error = (mapped(x, moments, weights, small_terms=small_terms) - truth).square().mean().sqrt()
        assert error <= 2 * definition


def test_half_precision_gathers_in_float32() -> None:
    x = (torch.randn(1, 70_000, 4) + 3).half()  # whose sums of squares float16 cannot hold
    count, mean, second = moments_of(x, torch.float32)
    centered = x.double() - x.double().mean(1, keepdim=True)
    assert (count, second.dtype) == (70_000, torch.float32)
    torch.testing.assert_close(second.double(), centered.transpose(1, 2) @ centered, rtol=1e-4, atol=1.0)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-5, atol=0)
