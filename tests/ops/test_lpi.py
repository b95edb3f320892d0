"""The plain definitions of LPI, against the modules of the model; and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from xcit.errors import BackendError, ConfigError, ShapeError, UnknownNameError
from xcit.models.layers import XCABlock
from xcit.ops.lpi import (
    LPITrainingWeights,
    LPIWeights,
    batch_norm_affine,
    lpi_residual,
    lpi_residual_training,
    token_statistics,
)


def block_of(C: int, randomize: Callable[..., nn.Module], dtype: torch.dtype = torch.float64) -> XCABlock:
    block = XCABlock(C, 4, 1.0, True, 0.0, 0.0, 0.0, 1.0, "auto")
    randomize(block)
    return block.to(dtype)


def inference_weights(block: XCABlock) -> LPIWeights:
    norm, lpi = block.norm3, block.local_mp
    scale, shift = batch_norm_affine(lpi.bn.running_mean, lpi.bn.running_var, lpi.bn.weight, lpi.bn.bias, lpi.bn.eps)
    conv1, conv2 = lpi.conv1, lpi.conv2
    return LPIWeights(
        norm.weight, norm.bias, norm.eps, conv1.weight, conv1.bias, scale, shift, conv2.weight, conv2.bias, block.gamma3
    )


def training_weights(block: XCABlock) -> LPITrainingWeights:
    norm, lpi, gamma = block.norm3, block.local_mp, block.gamma3
    conv1, bn, conv2 = lpi.conv1, lpi.bn, lpi.conv2
    return LPITrainingWeights(
        norm.weight, norm.bias, norm.eps, conv1.weight, conv1.bias, bn.weight, bn.bias, bn.eps, conv2.weight,
        conv2.bias, gamma,
    )  # fmt: skip


def residual(block: XCABlock, x: Tensor, height: int, width: int) -> Tensor:
    return x + block.gamma3 * block.local_mp(block.norm3(x), height, width)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3), (14, 14)])
@torch.no_grad()
def test_inference_is_what_the_modules_compute(height: int, width: int, randomize: Callable[..., nn.Module]) -> None:
    block = block_of(32, randomize).eval()
    x = torch.randn(3, height * width, 32, dtype=torch.float64)
    truth = residual(block, x, height, width)
    weights = inference_weights(block)
    torch.testing.assert_close(lpi_residual(x, height, width, weights), truth, rtol=1e-11, atol=1e-12)
    statistics = token_statistics(x, weights.norm_eps)
    with_statistics = lpi_residual(x, height, width, weights, statistics=statistics)
    torch.testing.assert_close(with_statistics, truth, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(lpi_residual(x, height, width, weights, statistics=2 * statistics), truth)


@pytest.mark.parametrize(("height", "width"), [(1, 7), (5, 3)])
def test_training_is_what_the_modules_compute(height: int, width: int, randomize: Callable[..., nn.Module]) -> None:
    block = block_of(32, randomize).train()
    bn = block.local_mp.bn
    means = bn.running_mean.clone(), bn.running_var.clone()
    x = torch.randn(3, height * width, 32, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)
    y = x + keep.view(-1, 1, 1) * (residual(block, x, height, width) - x)
    parameters = [x, *(p for p in training_weights(block) if isinstance(p, Tensor))]
    seed = torch.randn_like(y)
    truth = torch.autograd.grad(y, parameters, seed)

    ours = lpi_residual_training(x, height, width, training_weights(block), keep=keep)
    torch.testing.assert_close(ours.y, y, rtol=1e-11, atol=1e-12)
    for ours_gradient, gradient in zip(torch.autograd.grad(ours.y, parameters, seed), truth, strict=True):
        torch.testing.assert_close(ours_gradient, gradient, rtol=1e-9, atol=1e-10)
    moved = [m.lerp(batch, bn.momentum) for m, batch in zip(means, (ours.batch_mean, ours.batch_var), strict=True)]
    torch.testing.assert_close(moved, [bn.running_mean, bn.running_var], rtol=1e-11, atol=1e-12)
    assert not ours.batch_mean.requires_grad
    assert not ours.batch_var.requires_grad


def test_a_dropped_image_keeps_its_tokens(randomize: Callable[..., nn.Module]) -> None:
    weights = training_weights(block_of(32, randomize))
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    y, _, _ = lpi_residual_training(x, 5, 3, weights, keep=torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert torch.equal(y[0], x[0])
    assert not torch.equal(y[1], x[1])


def test_what_does_not_fit_is_refused(randomize: Callable[..., nn.Module]) -> None:
    block = block_of(32, randomize, torch.float32).requires_grad_(False)
    weights, training = inference_weights(block), training_weights(block)
    x = torch.randn(2, 15, 32)
    with pytest.raises(ShapeError, match="15 tokens; a grid of 4 x 4 has 16"):
        lpi_residual(x, 4, 4, weights)
    with pytest.raises(ShapeError, match=r"tokens \(batch, tokens, channels\)"):
        lpi_residual(x[0], 5, 3, weights)
    with pytest.raises(ShapeError, match="conv1_weight"):
        lpi_residual(x, 5, 3, weights._replace(conv1_weight=torch.zeros(32, 1, 5, 5)))
    with pytest.raises(ShapeError, match="gamma"):
        lpi_residual(x, 5, 3, weights._replace(gamma=torch.ones(16)))
    with pytest.raises(ShapeError, match="statistics"):
        lpi_residual(x, 5, 3, weights, statistics=torch.zeros(2, 14, 2))
    with pytest.raises(ShapeError, match="keep is one factor an image"):
        lpi_residual_training(x, 5, 3, training, keep=torch.ones(3))
    with pytest.raises(ShapeError, match="more than one token"):
        lpi_residual_training(x[:1, :1], 1, 1, training)
    with pytest.raises(ShapeError, match="Tokens are"):
        token_statistics(x[0], 1e-6)
    with pytest.raises(UnknownNameError, match="tritn"):
        lpi_residual(x, 5, 3, weights, kernels="tritn")  # type: ignore[arg-type]


def test_the_kernels_refuse_what_they_cannot_honour(
    randomize: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    block = block_of(32, randomize, torch.float32).requires_grad_(False)
    x = torch.randn(2, 15, 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="runs on a CUDA device"):
        lpi_residual(x, 5, 3, inference_weights(block), kernels="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # nothing is launched below
    with pytest.raises(ConfigError, match="float64"):
        lpi_residual_training(x.double(), 5, 3, training_weights(block), kernels="triton")
    block.requires_grad_(True)
    with pytest.raises(ConfigError, match="has no gradient"):
        lpi_residual(x, 5, 3, inference_weights(block), kernels="triton")
    with pytest.raises(ConfigError, match="has no gradient"):
        token_statistics(x.requires_grad_(), 1e-6, kernels="triton")
