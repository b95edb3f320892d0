"""Fixtures that every room's tests may use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def randomize() -> Callable[..., nn.Module]:
    """Give every parameter and statistic of a model a value of its own, so that no term hides behind a 0 or a 1."""
    return _randomize


@torch.no_grad()
def _randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if name.endswith("temperature"):
            p.copy_(noise.abs() + 0.5)
        elif p.ndim == 1 and (name.endswith("weight") or "gamma" in name):  # norm scales and LayerScale
            p.copy_(0.7 + 0.2 * noise)
        elif p.ndim == 1:  # biases
            p.copy_(0.1 * noise)
        else:
            fan_in = max(1, p[0].numel())
            p.copy_(noise * fan_in**-0.5)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.3 * torch.randn(b.shape, generator=g))
        elif name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=g))
    return model
