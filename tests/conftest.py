"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_in_interpreter() -> Callable[..., None]:
    """Run a test file's tests once more in a process in which Triton's interpreter stands in for a GPU."""
    return _run_in_interpreter


def _run_in_interpreter(file: str, *options: str, at_least: int = 1) -> None:
    pytest.importorskip("triton")
    # triton reads the variable when it is imported, and cannot compile afterwards
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, file]
    run = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least, run.stdout


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
