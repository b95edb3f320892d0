"""Whole layers and models run by the fused kernels, against their plain definitions.

What needs the kernels is named ``test_kernel_...``: in Triton's interpreter, in a process of its own, and on a GPU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xcit.deploy.fold import fold
from xcit.errors import BackendError, ConfigError, UnknownNameError
from xcit.models.kernel_layers import choose_kernels
from xcit.models.layers import XCABlock
from xcit.models.pyramid import XCiTPyramid
from xcit.models.xcit import XCiT
from xcit.ops.kernels import observe_kernels
from xcit.ops.lpi_blocks import Blocks, try_blocks

TINY = {"patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernel_test = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="test_in_the_interpreter runs it"
)


def images(batch: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(batch, 3, height, width, device=DEVICE)


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """In the interpreter, where a program costs the same whatever its size, use few."""
    large = Blocks(512, 32, 32, 4)
    names = ("inference", "moments", "outer", "inner", "norm", "statistics") if INTERPRETED else ()
    with try_blocks(**dict.fromkeys(names, large)):
        yield


@pytest.fixture
def make(randomize):
    def make(**options: Any) -> XCiT:
        return randomize(XCiT(**TINY | options)).to(DEVICE)

    return make


def close(found: Tensor, expected: Tensor, limit: float = 2e-5) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).norm() / expected.norm())
    assert difference < limit, difference


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter(run_in_interpreter) -> None:
    run_in_interpreter(__file__, at_least=10)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_the_rest_in_the_interpreter(run_in_interpreter) -> None:
    run_in_interpreter(__file__, "-m", "slow", at_least=5)


@kernel_test
@pytest.mark.parametrize("form", ["tokens", "covariance"])
def test_kernel_inference(form: Any, make) -> None:
    model, x = make(attn_form=form).eval(), images()
    with torch.inference_mode():
        expected = model(x)
        model.set_kernels("triton")
        with observe_kernels() as ran:
            close(model(x), expected)
    attention = "xca_core" if form == "tokens" else "second_moment"
    assert ran == 2 * [attention, "residual_norm", "lpi", "residual_norm"]


@kernel_test
@pytest.mark.parametrize("form", ["tokens", "covariance"])
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernel_training_steps(recompute: bool, form: Any, make) -> None:
    """The same losses, gradients, running statistics and stochastic depth, over optimiser steps."""
    plain = make(attn_form=form, drop_path_rate=0.4).train()
    fused = copy.deepcopy(plain)
    fused.set_kernels("triton")
    for model in (plain, fused):
        model.set_grad_checkpointing(recompute)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (plain, fused)]
    for step in range(2):
        x, target = images(3), torch.randint(0, 5, (3,), device=DEVICE)
        losses = []
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            torch.manual_seed(step)
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        close(losses[1], losses[0], 1e-4)
    for (name, found), expected in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None, name
        close(found, expected, 1e-4)
    for (name, found), expected in zip(fused.named_buffers(), plain.buffers(), strict=True):
        if found.is_floating_point():
            close(found, expected, 1e-4)
        else:
            assert torch.equal(found, expected), name  # batches counted once, recomputed or not


@kernel_test
@pytest.mark.slow
def test_kernel_momentum_of_none_is_the_plain_mean(make) -> None:
    plain = make().train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    fused = copy.deepcopy(plain)
    fused.set_kernels("triton")
    for _ in range(2):
        x = images()
        plain(x), fused(x)
    for found, expected in zip(fused.buffers(), plain.buffers(), strict=True):
        close(found, expected, 1e-4)


@kernel_test
@pytest.mark.parametrize("form", ["tokens", "covariance"])
@pytest.mark.parametrize("tokens_norm", [True, False])
def test_kernel_folded(tokens_norm: bool, form: Any, make) -> None:
    model, x = make(tokens_norm=tokens_norm).eval(), images()
    folded = fold(model, form=form).model
    with torch.inference_mode():
        expected = model(x)
        folded.set_kernels("triton")
        with observe_kernels() as ran:
            close(folded(x), expected)
    attention = "xca_core" if form == "tokens" else "norm_moments"
    layer = [attention, "residual_norm", "lpi", "residual_norm"]
    assert ran == [*layer, *layer, "token_statistics", "class_attention_core"]


@kernel_test
@pytest.mark.slow
def test_kernel_pyramid(make, randomize) -> None:
    pyramid = randomize(XCiTPyramid(make(depth=4), taps=(0, 1, 2, 3))).to(DEVICE).eval()
    folded = fold(pyramid).model
    x = images(1, 96, 70)
    with torch.inference_mode():
        expected = pyramid(x)
        for model in (pyramid, folded):
            model.set_kernels("triton")
            with observe_kernels() as ran:
                for found, level in zip(model(x), expected, strict=True):
                    close(found, level)
            assert ran


@kernel_test
@pytest.mark.slow
def test_kernel_without_lpi(make) -> None:
    model, x = make(variant="no_lpi").eval(), images()
    with torch.inference_mode():
        expected = model(x)
        for each in (model, fold(model).model):
            each.set_kernels("triton")
            close(each(x), expected)


@kernel_test
def test_kernel_under_autocast(make) -> None:
    model, x = make().eval(), images()
    with torch.inference_mode():
        truth = model(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            plain = model(x)
            model.set_kernels("triton")
            fused = model(x)
    limit = 2 * float((plain.float() - truth).norm() / truth.norm())
    close(fused.float(), truth, limit)


@kernel_test
def test_kernel_refuses_what_it_cannot_do(make) -> None:
    model = make(proj_drop_rate=0.1).train()
    model.set_kernels("triton")
    with pytest.raises(ConfigError, match="proj_drop_rate"):
        model(images())
    model = make().train()
    model.set_kernels("triton")
    model.blocks[0].local_mp = nn.SyncBatchNorm.convert_sync_batchnorm(model.blocks[0].local_mp)
    with pytest.raises(ConfigError, match="synchronised"):
        model(images())
    model = make().eval()
    model.set_kernels("triton")
    model.blocks[0].mlp.act = nn.GELU("tanh")
    with pytest.raises(ConfigError, match="exact GELU"), torch.inference_mode():
        model(images())
    model = make().eval()
    model.set_kernels("triton")
    with pytest.raises(ConfigError, match="no gradient"):
        model(images())


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_nothing_is_chosen_unasked() -> None:
    model = XCiT(**TINY).eval()
    assert {block.kernels for block in model.blocks} == {"plain"}
    with observe_kernels() as ran, torch.inference_mode():
        model(torch.randn(1, 3, 16, 16))
    assert ran == []


def test_all_layers_are_set_and_set_back() -> None:
    model = XCiT(**TINY)
    model.set_kernels("triton")
    assert {m.kernels for m in model.modules() if isinstance(m, XCABlock)} == {"triton"}
    assert {block.attn.kernels for block in model.blocks} == {"triton"}
    assert "kernels" not in model.config  # how a model runs is not part of what it is
    model.set_kernels("plain")
    assert {block.attn.kernels for block in model.blocks} == {"plain"}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes a CPU's tensors")
def test_on_a_cpu_the_kernels_are_refused() -> None:
    model = XCiT(**TINY).eval()
    model.set_kernels("triton")
    with pytest.raises(BackendError, match="CUDA"), torch.inference_mode():
        model(torch.randn(1, 3, 16, 16))


def test_unknown_names_and_models_without_layers() -> None:
    with pytest.raises(UnknownNameError, match="triton"):
        XCiT(**TINY).set_kernels("tritn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Linear"):
        choose_kernels(nn.Linear(2, 2), "triton")
    with pytest.raises(ConfigError, match="no_qk_norm"):
        XCiT(**TINY, variant="no_qk_norm").set_kernels("triton")
