"""The feed-forward network that does not keep gelu(h), against the definition in float64.

What needs the kernel is named ``test_kernel_...``. It runs on a GPU (marked ``gpu``), and in Triton's interpreter,
which must be on before anything imports triton: in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.errors import BackendError, ConfigError, ShapeError
from xcit.models.layers import Mlp
from xcit.ops.kernels import observe_kernels
from xcit.ops.mlp import gelu_backward_plain, mlp

pytestmark = pytest.mark.usefixtures("round_to_nearest")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ALL_SIZES = list(product((1, 3, 65), (1, 2, 49, 197), (32, 48, 128, 192, 384, 768)))
FEW = [
    *(((3, 49, 48), dtype) for dtype in (F32, BF16, F16)),
    ((1, 197, 32), BF16),
    ((65, 2, 48), F32),
    ((1, 2, 384), F16),
    ((3, 1, 768), BF16),
    ((1, 1, 192), F32),
]


def devices() -> list[Any]:
    """Return where the kernel can be tested."""
    return [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]


def cases() -> list[Any]:
    found: list[Any] = []
    for size, dtype in product(ALL_SIZES, (F32, BF16, F16)):
        found.append(pytest.param("cuda", size, dtype, marks=pytest.mark.gpu))
        if INTERPRETED and (size, dtype) in FEW:
            found.append(("cpu", size, dtype))
    return found


def given(size: tuple[int, int, int], dtype: torch.dtype = F32, device: str = "cpu", hidden: int = 4) -> list[Tensor]:
    """Return x, W_1, b_1, W_2, b_2."""
    B, N, C = size
    K = hidden * C
    drawn = (
        torch.randn(B, N, C),
        torch.randn(K, C) * C**-0.5,
        0.3 * torch.randn(K),
        torch.randn(C, K) * K**-0.5,
        0.3 * torch.randn(C),
    )
    return [value.to(dtype).to(device) for value in drawn]


def outcome(arguments: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """Return the output and the gradient of every argument."""
    taken = [value.detach().requires_grad_() for value in arguments]
    y = mlp(*taken, **options)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(value.grad for value in taken if value.grad is not None)]


def hold(fused: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Hold the error to twice that of the definition in the same dtype, and one rounding of the result."""
    assert (fused.dtype, fused.shape) == (plain.dtype, exact.shape)
    error, of_plain = (float((found.double() - exact).norm() / exact.norm()) for found in (fused, plain))
    assert error <= 2 * of_plain + torch.finfo(fused.dtype).eps / 2, (error, of_plain)


@pytest.mark.parametrize(("device", "size", "dtype"), cases())
def test_kernel_is_the_definition(device: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    _need(device)
    arguments, grad = given(size, dtype, device), torch.randn(size).to(dtype).to(device)
    exact = outcome([value.double() for value in arguments], grad)
    with observe_kernels() as ran:
        fused = outcome(arguments, grad, kernels="triton")
    assert ran == ["gelu_backward"]
    for found in zip(fused, outcome(arguments, grad), exact, strict=True):
        hold(*found)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's numpy, in a square
def test_kernel_over_all_values(device: str, dtype: torch.dtype) -> None:
    _need(device)
    from xcit.ops.mlp_triton import gelu_backward_op

    top = 6e4 if dtype == F16 else 1e30
    ends = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 11.0, -11.0, 100.0, -100.0, top, -top])
    hidden = torch.cat((torch.linspace(-9, 9, 3001), ends)).to(dtype).to(device)
    grad = torch.randn(hidden.shape).to(dtype).to(device)
    exact = gelu_backward_plain(hidden.double(), grad.double())
    plain, fused = gelu_backward_plain(hidden, grad), gelu_backward_op(hidden, grad)
    for found in zip(fused, plain, exact, strict=True):
        hold(*(value[:3001] for value in found))
        assert found[0].isfinite().all()
        # each by itself, not outshone by the largest
        torch.testing.assert_close(found[0].double(), found[2], rtol=torch.finfo(dtype).eps, atol=4e-7)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [F32, F16])
def test_kernel_takes_any_layout(device: str, dtype: torch.dtype) -> None:
    _need(device)
    _, *weights = given((3, 50, 48), dtype, device)
    x = torch.randn(3, 48, 50).to(dtype).to(device).transpose(1, 2)
    grad = torch.randn(3, 48, 50).to(dtype).to(device).transpose(1, 2)
    for incoming in (grad, torch.ones((), dtype=dtype, device=device).expand(3, 50, 48)):
        exact = outcome([value.double() for value in (x, *weights)], incoming)
        fused = outcome([x, *weights], incoming, kernels="triton")
        for found in zip(fused, outcome([x, *weights], incoming), exact, strict=True):
            hold(*found)


@pytest.mark.parametrize("device", devices())
def test_kernel_keeps_one_hidden_map(device: str) -> None:
    _need(device)
    kept: dict[str, list[int]] = {"plain": [], "triton": []}
    for kernels, numels in kept.items():

        def keep(value: Tensor, numels: list[int] = numels) -> Tensor:
            numels.append(value.numel())
            return value

        arguments = [value.requires_grad_() for value in given((5, 40, 16), device=device)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            mlp(*arguments, kernels=kernels)  # type: ignore[arg-type]
    hidden = 5 * 40 * 64
    assert [kept[kernels].count(hidden) for kernels in ("plain", "triton")] == [2, 1]


@pytest.mark.parametrize("device", devices())
def test_kernel_with_frozen_weights_and_without_biases(device: str) -> None:
    _need(device)
    found = []
    for kernels in ("plain", "triton"):
        torch.manual_seed(1)
        x, w1, b1, w2, b2 = given((3, 7, 16), device=device)
        for biases, leaves in (((None, None), (x, w1)), ((b1, b2), (w2,)), ((b1, b2), (x, b2))):
            for value in (x, w1, b1, w2, b2):
                value.requires_grad_(False).grad = None
            for value in leaves:
                value.requires_grad_()
            mlp(x, w1, biases[0], w2, biases[1], kernels=kernels).square().sum().backward()  # type: ignore[arg-type]
            found.append([value.grad for value in leaves])
    half = len(found) // 2
    torch.testing.assert_close(found[half:], found[:half], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", devices())
def test_kernel_is_a_sound_operator(device: str) -> None:
    _need(device)
    from xcit.ops.mlp_triton import gelu_backward_op

    torch.library.opcheck(
        gelu_backward_op, (torch.randn(3, 5, 16, device=device), torch.randn(3, 5, 16, device=device))
    )
    empty = torch.randn(3, 0, 16, device=device)
    assert gelu_backward_op(empty, empty)[0].shape == empty.shape


class _Fused(nn.Module):
    def __init__(self, module: Mlp) -> None:
        super().__init__()
        self.mlp = module

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.mlp.fc1, self.mlp.fc2
        return mlp(x, first.weight, first.bias, second.weight, second.bias, kernels="triton")


@pytest.mark.parametrize("device", devices())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_kernel_is_compiled_and_exported_whole(device: str) -> None:
    _need(device)
    fused = _Fused(Mlp(16, 64)).to(device)
    x = torch.randn(3, 5, 16, device=device)
    expected = fused(x)
    found = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    of_compiled = [p.grad.clone() for p in fused.parameters() if p.grad is not None]
    fused.zero_grad()
    expected.square().sum().backward()
    torch.testing.assert_close(of_compiled, [p.grad for p in fused.parameters()], rtol=1e-5, atol=1e-5)
    exported = torch.export.export(fused, (x,), dynamic_shapes={"x": {1: torch.export.Dim("tokens", min=2, max=99)}})
    longer = torch.randn(3, 11, 16, device=device)
    torch.testing.assert_close(exported.module()(longer), fused(longer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kernel_under_autocast(device: str) -> None:
    _need(device)
    module = Mlp(16, 64).to(device)
    x = torch.randn(3, 5, 16, device=device)
    found = []
    for model in (module, _Fused(module)):
        module.zero_grad()
        with torch.autocast(device, dtype=BF16):
            y = model(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert [value.dtype for value in found[0]] == [value.dtype for value in found[1]]
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("device", devices())
def test_kernel_refuses_float64(device: str) -> None:
    _need(device)
    with pytest.raises(ConfigError, match="float64"):
        mlp(*(value.double().requires_grad_() for value in given((1, 2, 16), device=device)), kernels="triton")


def _need(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter(run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-k", "test_kernel", at_least=10)


def test_the_definition_is_the_network_of_a_block() -> None:
    module = Mlp(16, 64).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    found = mlp(x, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)
    torch.testing.assert_close(found, module(x), rtol=1e-12, atol=1e-12)


def test_the_kernel_s_definition_is_gelu_differentiated() -> None:
    hidden = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(101, dtype=torch.float64)
    y = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    y.backward(grad)
    activated, grad_hidden = gelu_backward_plain(hidden.detach(), grad)
    torch.testing.assert_close(activated, F.gelu(hidden.detach()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel can run here")
def test_the_kernel_is_refused_on_a_cpu() -> None:
    x, *weights = given((1, 2, 16))
    with pytest.raises(BackendError, match=r"CUDA|not installed"):
        mlp(x.requires_grad_(), *weights, kernels="triton")


def test_mistakes_are_named() -> None:
    x, w1, b1, w2, b2 = given((1, 2, 16))
    with pytest.raises(ConfigError, match="plain, triton"):
        mlp(x, w1, b1, w2, b2, kernels="fused")  # type: ignore[arg-type]
    for mistake in ((x, w2, b1, w1, b2), (x, w1, b1, w1, b2)):
        with pytest.raises(ShapeError, match="do not fit"):
            mlp(*mistake)
