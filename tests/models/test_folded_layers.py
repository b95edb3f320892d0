"""The parts of a folded model, each against a definition written here."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xcit.errors import ConfigError
from xcit.models.folded_layers import FoldedClassBlock, FoldedDepthwise, FoldedPosition
from xcit.models.folded_xca import FoldedXCA, covariance_graph
from xcit.models.layers import ClassAttentionBlock, PositionalEncodingFourier
from xcit.ops.xca import XCAWeights, xca_tokens

GRIDS = [(1, 1), (1, 2), (1, 5), (2, 1), (4, 1), (2, 2), (2, 3), (3, 3), (5, 4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_constant_at_every_place_is_that_of_the_taps_inside(grid: tuple[int, int]) -> None:
    H, W = grid
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3).double()
    scale, shift, gain = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    folded = FoldedDepthwise(conv, scale, shift, gain)
    found = folded(torch.zeros(1, 3, H, W, dtype=torch.float64))
    for c, y, x in itertools.product(range(3), range(H), range(W)):
        inside = sum(
            conv.weight[c, 0, i, j].item()
            for i, j in itertools.product(range(3), range(3))
            if 0 <= y + i - 1 < H and 0 <= x + j - 1 < W
        )
        expected = gain[c].item() * (conv.bias[c].item() + shift[c].item() * inside)
        assert found[0, c, y, x].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_ways_of_an_affine_before_a_convolution(grid: tuple[int, int], layout: torch.memory_format) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    scale, shift, gain = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    folded = FoldedDepthwise(conv, scale, shift, gain)
    x = torch.randn(2, 6, *grid, dtype=torch.float64).contiguous(memory_format=layout)
    kept = x.clone()
    column = (-1, 1, 1)
    expected = gain.view(column) * conv(scale.view(column) * x + shift.view(column))
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.of_shifted(x + folded.shift.view(column)), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_scale_of_nothing_leaves_the_shift(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    scale = torch.tensor([0.0, 0.0, 1e-30, 1.0], dtype=torch.float64)
    shift = torch.tensor([2.0, 0.0, -3.0, 0.0], dtype=torch.float64)
    folded = FoldedDepthwise(conv.to(dtype), scale, shift)
    x = torch.randn(1, 4, 3, 4).to(dtype)
    exact = nn.Conv2d(4, 4, 3, padding=1, groups=4).double()
    exact.load_state_dict({name: t.double() for name, t in conv.state_dict().items()})
    expected = exact(scale.view(-1, 1, 1) * x.double() + shift.view(-1, 1, 1))
    tolerance = 8 * torch.finfo(dtype).eps
    for found in (folded(x), folded.of_shifted(x + folded.shift.view(-1, 1, 1))):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_class_attention_passes_over_the_tokens_with_h_directions_only(tokens_norm: bool, randomize) -> None:
    C, h = 24, 4
    block = ClassAttentionBlock(C, h, 4.0, True, 0.0, 0.0, 1.0, tokens_norm)
    block = randomize(block).double().eval()
    folded = FoldedClassBlock(block)

    def multiply_adds(tokens: int) -> int:
        cls, patches = torch.randn(2, 1, C).double(), torch.randn(2, tokens, C).double()
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            new_cls, new_patches = folded(cls, patches)
        expected = block(torch.cat((cls, patches), dim=1))
        torch.testing.assert_close(new_cls, expected[:, :1], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(new_patches, expected[:, 1:], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(folded.class_token(cls, patches), new_cls)
        torch.testing.assert_close(folded.patch_tokens(patches), new_patches)
        return flops.get_total_flops() // 2

    assert multiply_adds(300) - multiply_adds(100) == 2 * 200 * 2 * C * h  # a batch of two


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 3)])
def test_the_position_is_that_of_the_original(grid: tuple[int, int]) -> None:
    embeder = PositionalEncodingFourier(16).double()
    for grids in ((), ((2, 2), grid)):
        found = FoldedPosition(embeder, grids)(*grid)
        torch.testing.assert_close(found, embeder(*grid), rtol=1e-12, atol=1e-13)


def weights_of(C: int, h: int, *, bias: bool = True) -> XCAWeights:
    return XCAWeights(
        torch.randn(3 * C, C) * C**-0.5,
        0.3 * torch.randn(3 * C) if bias else None,
        torch.randn(C, C) * C**-0.5,
        0.3 * torch.randn(C) if bias else None,
        torch.rand(h, 1, 1) + 0.5,
    )


def doubled(weights: XCAWeights) -> XCAWeights:
    return XCAWeights(*(None if t is None else t.double() for t in weights))


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("small_terms", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "offset"), [(64, 0.0), (196, 1.0), (196, 10.0), (784, 3.0), (784, 100.0)])
def test_the_covariance_form_of_graphs_is_as_accurate_as_the_definition(
    tokens: int, offset: float, small_terms: torch.dtype
) -> None:
    C, h = 96, 4
    weights = weights_of(C, h)
    x = F.layer_norm(torch.randn(2, tokens, C) + offset * torch.randn(C), (C,))
    truth = xca_tokens(x.double(), doubled(weights))
    definition = root_mean_square(xca_tokens(x, weights) - truth)
    assert root_mean_square(covariance_graph(x, weights, small_terms) - truth) <= 2 * definition


@pytest.mark.parametrize("tokens", [1, 2, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_the_covariance_form_of_graphs_is_the_same_function(tokens: int, bias: bool) -> None:
    weights = doubled(weights_of(24, 3, bias=bias))
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    if tokens == 1 and not bias:
        x = x + 1  # else the same: one token is its mean
    torch.testing.assert_close(covariance_graph(x, weights), xca_tokens(x, weights), rtol=1e-10, atol=1e-11)


def test_half_precision_keeps_its_moments_in_float32() -> None:
    weights = weights_of(48, 4)
    half = XCAWeights(*(None if t is None else t.bfloat16() for t in weights))
    x = F.layer_norm(torch.randn(2, 300, 48), (48,)).bfloat16()
    truth = xca_tokens(x.double(), doubled(half))
    found = covariance_graph(x, half)
    assert found.dtype == torch.bfloat16
    assert root_mean_square(found - truth) <= 2 * root_mean_square(xca_tokens(x, half) - truth)


def test_unknown_forms_and_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="form is 'fast'"):
        FoldedXCA(weights_of(8, 2), "fast", torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="small_terms"):
        FoldedXCA(weights_of(8, 2), "auto", torch.bfloat16)
