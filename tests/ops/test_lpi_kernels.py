"""LPI's Triton kernels against the plain definitions in float64.

One body of tests, for two devices: a CUDA device ("gpu"), and Triton's interpreter on the CPU, in a process of its own
(``test_in_the_interpreter``), since triton must be imported with ``TRITON_INTERPRET=1`` and then cannot compile.

The rule: the kernel's error is at most twice that of the plain version in the same type, plus one rounding of the
result. Errors are norms of differences by norms. The interpreter rounds to bfloat16 by cutting off, which counts
double.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xcit.models.folded_layers import FoldedLPI
from xcit.models.layers import LPI
from xcit.ops.kernels import Kernels, interpreted, observe_kernels
from xcit.ops.lpi import (
    LPITrainingWeights,
    LPIWeights,
    lpi_residual,
    lpi_residual_training,
    token_statistics,
)
from xcit.ops.lpi_blocks import Blocks, power_of_two, try_blocks

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [pytest.param("cuda", marks=needs_cuda), *(["cpu"] if interpreted() else [])]
on_each_device = pytest.mark.parametrize("device", DEVICES)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(interpreted(), reason="this is the interpreter's process")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which: str, run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-m", f"{which} and not gpu", at_least=10)


def few_programs(height: int, width: int, channels: int) -> AbstractContextManager[None]:
    """In the interpreter, where a step of a program costs the same whatever its size, use few of just the size."""
    if not interpreted():
        return nullcontext()
    lanes, columns = power_of_two(channels), 1 << (width - 1).bit_length()
    sums = Blocks(lanes, columns, 32, 4)
    return try_blocks(
        inference=Blocks(lanes, 4, 32, 4), moments=sums, outer=sums, inner=sums, norm=sums,
        statistics=Blocks(lanes, 256, 1, 4),
    )  # fmt: skip


def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape) * scale + shift


def inference_weights(C: int) -> LPIWeights:
    return LPIWeights(
        draw(C, scale=0.2, shift=0.8), draw(C, scale=0.1), 1e-6, draw(C, 1, 3, 3, scale=0.33), draw(C, scale=0.1),
        draw(C, scale=0.2, shift=0.8), draw(C, scale=0.3), draw(C, 1, 3, 3, scale=0.33), draw(C, scale=0.1),
        draw(C, scale=0.3, shift=0.7),
    )  # fmt: skip


def training_weights(C: int) -> LPITrainingWeights:
    w = inference_weights(C)
    return LPITrainingWeights(*w[:5], w.scale, w.shift, 1e-5, *w[7:])


def moved(weights: Any, *to: Any) -> Any:
    return type(weights)(*(v.to(*to) if isinstance(v, Tensor) else v for v in weights))


SEVERAL_ROUNDINGS = 16 * torch.finfo(torch.float32).eps
"""Of a gradient's way through two convolutions and two norms: on one CPU or the other the definition has more luck."""


def rounding(dtype: torch.dtype, device: str) -> float:
    of_result = torch.finfo(dtype).eps * (1.0 if device == "cpu" and dtype == torch.bfloat16 else 0.5)
    return of_result + SEVERAL_ROUNDINGS


def error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_accurate(value: Tensor, plain: Tensor, truth: Tensor, name: str = "y") -> None:
    assert value.dtype == plain.dtype
    assert value.shape == plain.shape
    allowed = 2 * error(plain, truth) + rounding(value.dtype, value.device.type)
    assert error(value, truth) <= allowed, f"{name}: {error(value, truth):.2e}, allowed {allowed:.2e}"


def leaves(x: Tensor, weights: LPITrainingWeights) -> dict[str, Tensor]:
    return {"x": x} | {n: v for n, v in weights._asdict().items() if isinstance(v, Tensor)}


def step(
    x: Tensor, height: int, width: int, weights: LPITrainingWeights, dy: Tensor, keep: Tensor | None, kernels: Kernels
) -> dict[str, Tensor]:
    """Return the results of a training step, and every gradient, by name."""
    x = x.detach().requires_grad_()
    weights = type(weights)(*(v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in weights))
    out = lpi_residual_training(x, height, width, weights, keep=keep, kernels=kernels)
    named = leaves(x, weights)
    gradients = torch.autograd.grad(out.y, list(named.values()), dy)
    return {**out._asdict(), **{f"gradient of {n}": g for n, g in zip(named, gradients, strict=True)}}


def check_inference(
    x: Tensor, height: int, width: int, weights: LPIWeights, cut: AbstractContextManager[None] | None = None
) -> None:
    truth = lpi_residual(x.double(), height, width, moved(weights, torch.float64))
    plain = lpi_residual(x, height, width, weights)
    with observe_kernels() as ran, cut or few_programs(height, width, x.shape[2]):
        value = lpi_residual(x, height, width, weights, kernels="triton")
    assert ran == ["lpi"]
    assert_as_accurate(value, plain, truth)


def check_training(
    x: Tensor,
    height: int,
    width: int,
    weights: LPITrainingWeights,
    dy: Tensor,
    keep: Tensor | None = None,
    cut: AbstractContextManager[None] | None = None,
) -> None:
    exact = None if keep is None else keep.double()
    truth = step(x.double(), height, width, moved(weights, torch.float64), dy.double(), exact, "plain")
    plain = step(x, height, width, weights, dy, keep, "plain")
    with observe_kernels() as ran, cut or few_programs(height, width, x.shape[2]):
        values = step(x, height, width, weights, dy, keep, "triton")
    assert ran == ["lpi_training"]
    for name, value in values.items():
        assert_as_accurate(value, plain[name], truth[name], name)


def tokens(B: int, H: int, W: int, C: int, dtype: torch.dtype, device: str, **options: float) -> Tensor:
    return draw(B, H * W, C, **options).to(device, dtype)


SIZES = [(1, 1, 1, 32), (2, 1, 7, 48)]
SLOW_SIZES = [(3, 5, 3, 128), (65, 1, 1, 32), (1, 17, 23, 32), (2, 14, 14, 192), (1, 5, 3, 384)]
FULL_SIZES = [(1, 1, 1, 384), (65, 1, 7, 48), (7, 5, 3, 192), (65, 14, 14, 384), (3, 17, 23, 128), (2, 48, 48, 384),
              (4, 14, 14, 512), (2, 28, 28, 768)]  # fmt: skip
"""On a GPU. The others are for the interpreter, which takes milliseconds for a row of one program."""


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_inference_is_as_accurate_as_the_definition(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    B, H, W, C = size
    weights = inference_weights(C)
    weights = moved(weights, device, dtype)._replace(scale=weights.scale.to(device), shift=weights.shift.to(device))
    check_inference(tokens(B, H, W, C, dtype, device), H, W, weights)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [s for s in SIZES if s[:3] != (1, 1, 1)])
def test_training_is_as_accurate_as_the_definition(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    B, H, W, C = size
    keep = ((torch.rand(B) < 0.8) / 0.8).to(device, dtype) if B > 2 else None
    x, dy = tokens(B, H, W, C, dtype, device), tokens(B, H, W, C, dtype, device)
    check_training(x, H, W, moved(training_weights(C), device, dtype), dy, keep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", FULL_SIZES)
def test_at_full_size(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, H, W, C = size
    x, dy = tokens(B, H, W, C, dtype, "cuda"), tokens(B, H, W, C, dtype, "cuda")
    with torch.no_grad():
        check_inference(x, H, W, moved(inference_weights(C), "cuda", dtype))
    if B * H * W > 1:
        check_training(x, H, W, moved(training_weights(C), "cuda", dtype), dy)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("size", SLOW_SIZES)
def test_other_sizes(size: tuple[int, int, int, int], device: str) -> None:
    B, H, W, C = size
    x, dy = tokens(B, H, W, C, torch.float32, device), tokens(B, H, W, C, torch.float32, device)
    with torch.no_grad():
        check_inference(x, H, W, moved(inference_weights(C), device))
    check_training(x, H, W, moved(training_weights(C), device), dy)


@pytest.mark.slow
@on_each_device
def test_any_cut_gives_the_same(device: str) -> None:
    B, H, W, C = 1, 3, 5, 48
    x, dy = tokens(B, H, W, C, torch.float32, device), tokens(B, H, W, C, torch.float32, device)
    cuts = [
        (Blocks(16, 4, 2, 1), Blocks(16, 2, 2, 1), Blocks(64, 1, 4, 1)),
        (Blocks(32, 4, 3, 1), Blocks(32, 4, 3, 1), Blocks(64, 2, 1, 1)),
    ]
    for inference, sums, norm in cuts:
        others = {"outer": sums, "inner": sums, "norm": norm, "statistics": Blocks(64, 8, 1, 1)}
        cut = try_blocks(inference=inference, moments=sums, **others)
        check_training(x, H, W, moved(training_weights(C), device), dy, cut=cut)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize(
    "names",
    [("norm_weight", "conv1_bias", "scale", "bn_weight"), ("norm_bias", "conv2_bias", "shift", "bn_bias"), ("gamma",)],
)
def test_parts_may_be_left_out(names: tuple[str, ...], device: str) -> None:
    B, H, W, C = 1, 2, 3, 16
    x, dy = tokens(B, H, W, C, torch.float32, device), tokens(B, H, W, C, torch.float32, device)
    inference, training = moved(inference_weights(C), device), moved(training_weights(C), device)
    with torch.no_grad():
        check_inference(x, H, W, inference._replace(**{n: None for n in names if n in inference._fields}))
    check_training(x, H, W, training._replace(**{n: None for n in names if n in training._fields}), dy)


@on_each_device
@torch.no_grad()
def test_a_folded_layer(device: str, randomize: Callable[..., nn.Module]) -> None:
    C, H, W = 32, 6, 5
    parts = nn.ModuleDict({"norm": nn.LayerNorm(C), "lpi": LPI(C)})
    randomize(parts).eval()
    folded = FoldedLPI(parts["norm"], parts["lpi"], 0.7 + 0.2 * torch.randn(C)).to(device)
    conv1, conv2, x = folded.conv1, folded.conv2, tokens(2, H, W, C, torch.float32, device)
    weights = LPIWeights(
        None, conv1.shift, folded.norm.eps, conv1.weight, conv1.bias, None, conv2.shift, conv2.weight, conv2.bias, None
    )
    value = lpi_residual(x, H, W, weights, kernels="triton")
    torch.testing.assert_close(value, x + folded(x, H, W), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("layout", ["channels first", "every other token", "repeated"])
def test_other_strides(layout: str, device: str) -> None:
    B, H, W, C = 2, 3, 5, 32
    if layout == "channels first":
        x, dy = (draw(B, C, H * W).transpose(1, 2) for _ in range(2))
    elif layout == "every other token":
        x, dy = (draw(2 * B, 2 * H * W, 2 * C)[::2, ::2, C:] for _ in range(2))
    else:
        x, dy = draw(1, H * W, C).expand(B, -1, -1), torch.ones(()).expand(B, H * W, C)
    x, dy = x.to(device), dy.to(device)  # which keep their strides
    check_training(x, H, W, moved(training_weights(C), device), dy)
    with torch.no_grad():
        check_inference(x, H, W, moved(inference_weights(C), device))


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize(("offset", "bias"), [(1000.0, 0.0), (0.0, 300.0), (0.0, -3.0)])
def test_large_offsets(offset: float, bias: float, device: str) -> None:
    B, H, W, C = 3, 4, 9, 32
    x = tokens(B, H, W, C, torch.float32, device, shift=offset)
    dy = tokens(B, H, W, C, torch.float32, device)
    weights = moved(training_weights(C), device)
    check_training(x, H, W, weights._replace(conv1_bias=weights.conv1_bias + bias), dy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to infinity, as it should
@on_each_device
@pytest.mark.parametrize("scale", [6e4, 1e-7, 0.0])
def test_extreme_half_precision_has_no_nan(scale: float, device: str) -> None:
    B, H, W, C = 2, 4, 5, 32
    x = (scale * (2 * torch.rand(B, H * W, C) - 1)).to(device, torch.float16)
    dy = tokens(B, H, W, C, torch.float16, device)
    weights = moved(training_weights(C), device, torch.float16)
    weights = weights._replace(conv1_weight=100 * weights.conv1_weight)
    plain = step(x.float(), H, W, moved(weights, torch.float32), dy.float(), None, "plain")
    assert not any(v.isnan().any() for v in plain.values())
    values = step(x, H, W, weights, dy, None, "triton")
    assert [name for name, v in values.items() if v.isnan().any()] == []
    with torch.no_grad():
        y = lpi_residual(x, H, W, moved(inference_weights(C), device, torch.float16), kernels="triton")
    assert not y.isnan().any()


@pytest.mark.slow
@on_each_device
@torch.no_grad()
def test_given_statistics_are_used(device: str) -> None:
    B, H, W, C = 2, 3, 5, 48
    x, weights = tokens(B, H, W, C, torch.float32, device), moved(inference_weights(C), device)
    with observe_kernels() as ran:
        statistics = token_statistics(x, weights.norm_eps, kernels="triton")
    assert ran == ["token_statistics"]
    truth = token_statistics(x.double(), weights.norm_eps)
    assert_as_accurate(statistics, token_statistics(x, weights.norm_eps), truth)
    own = lpi_residual(x, H, W, weights, kernels="triton")
    assert torch.equal(lpi_residual(x, H, W, weights, statistics=statistics, kernels="triton"), own)
    other = statistics * torch.tensor([1.0, 2.0], device=device)
    plain = lpi_residual(x, H, W, weights, statistics=other)
    value = lpi_residual(x, H, W, weights, statistics=other, kernels="triton")
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@on_each_device
def test_a_dropped_image_passes_through(device: str) -> None:
    B, H, W, C = 3, 2, 5, 32
    x, dy = tokens(B, H, W, C, torch.float32, device), tokens(B, H, W, C, torch.float32, device)
    keep = torch.tensor([2.0, 0.0, 2.0], device=device)
    weights = moved(training_weights(C), device)
    check_training(x, H, W, weights, dy, keep)
    assert torch.equal(step(x, H, W, weights, dy, keep, "triton")["y"][1], x[1])


@pytest.mark.slow
@on_each_device
def test_the_same_bits_each_time(device: str) -> None:
    B, H, W, C = (65, 14, 14, 384) if device == "cuda" else (5, 3, 4, 32)
    x, dy = tokens(B, H, W, C, torch.float32, device), tokens(B, H, W, C, torch.float32, device)
    weights = moved(training_weights(C), device)
    first, second = (step(x, H, W, weights, dy, None, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
@on_each_device
def test_autocast_changes_nothing(device: str) -> None:
    B, H, W, C = 2, 3, 5, 32
    x, dy = tokens(B, H, W, C, torch.float32, device), tokens(B, H, W, C, torch.float32, device)
    weights = moved(training_weights(C), device)
    own = step(x, H, W, weights, dy, None, "triton")
    with torch.autocast(device, torch.bfloat16):
        under = step(x, H, W, weights, dy, None, "triton")
        plain = step(x, H, W, weights, dy, None, "plain")
    for name, value in under.items():
        assert torch.equal(value, own[name]), name
        assert plain[name].dtype == value.dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of opcheck's own copies
@on_each_device
def test_the_operators_are_registered_as_torch_wants_them(device: str) -> None:
    from xcit.ops import lpi_backward_triton, lpi_training_triton, lpi_triton

    B, H, W, C = 2, 2, 3, 16
    x, dy, keep = draw(B, H * W, C).to(device), draw(B, H * W, C).to(device), torch.ones(B, device=device)
    weights = moved(inference_weights(C), device)
    opcheck = torch.library.opcheck
    opcheck(lpi_triton.token_statistics, (x, 1e-6))
    opcheck(lpi_triton.lpi_residual, (x, H, W, *weights, None))
    training = moved(training_weights(C), device)
    grad = type(training)(*(v.requires_grad_() if isinstance(v, Tensor) else v for v in training))
    opcheck(lpi_training_triton.lpi_training, (x.clone().requires_grad_(), H, W, *grad, keep))
    t = moved(training_weights(C), device)
    _, moments, statistics = lpi_training_triton.lpi_training(x, H, W, *t, None)
    backward = (dy, x, H, W, t.norm_weight, None, t.conv1_weight, t.conv1_bias, t.bn_weight, t.bn_bias, t.conv2_weight,
                t.gamma, keep, moments, statistics)  # fmt: skip
    opcheck(lpi_backward_triton.lpi_training_backward, backward)


class Step(nn.Module):
    """A training step's or an inference's call, for what takes modules."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.own = nn.ParameterDict({n: nn.Parameter(v) for n, v in weights._asdict().items() if isinstance(v, Tensor)})
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights._replace(**dict(self.own.items()))
        if isinstance(weights, LPIWeights):
            return lpi_residual(x, 3, x.shape[1] // 3, weights, kernels="triton")
        return lpi_residual_training(x, 3, x.shape[1] // 3, weights, kernels="triton").y


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(dynamic: bool, device: str) -> None:
    torch.compiler.reset()
    eager = Step(training_weights(32)).to(device)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (15, 12):
        x = draw(2, tokens, 32).to(device).requires_grad_()
        inputs = [x, *eager.parameters()]
        ours, truth = (torch.autograd.grad(run(x).square().sum(), inputs) for run in (compiled, eager))
        for ours_gradient, gradient in zip(ours, truth, strict=True):
            torch.testing.assert_close(ours_gradient, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@on_each_device
@torch.no_grad()
def test_exported(device: str) -> None:
    module, x = Step(inference_weights(32)).to(device), draw(2, 15, 32).to(device)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "xcit.lpi_residual" in str(program.graph)
    x = draw(3, 15, 32).to(device)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.slow
@on_each_device
def test_a_second_derivative_is_refused(device: str) -> None:
    x = draw(2, 6, 32).to(device).requires_grad_()
    y = lpi_residual_training(x, 2, 3, moved(training_weights(32), device), kernels="triton").y
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_backward_pass_holds_two_maps() -> None:
    B, H, W, C = 64, 28, 28, 384
    x = tokens(B, H, W, C, torch.bfloat16, "cuda").requires_grad_()
    weights = moved(training_weights(C), "cuda")
    y = lpi_residual_training(x, H, W, weights, kernels="triton").y
    dy = torch.ones_like(y)
    one = y.numel() * y.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(y, x, dy)
    assert torch.cuda.max_memory_allocated() - before <= 2.2 * one
