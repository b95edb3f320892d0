"""Residual, LayerScale and layer norm in one kernel, against the definition in float64.

What needs the kernel is named ``test_kernel_...``. It runs on a GPU (marked ``gpu``), and in Triton's interpreter,
which must be on before anything imports triton: in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xcit.errors import BackendError, ConfigError, ShapeError
from xcit.ops.kernels import observe_kernels
from xcit.ops.residual_norm import residual_norm

pytestmark = pytest.mark.usefixtures("round_to_nearest")
EPS = 1e-6
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # of x, update, the parameters, normed
    "float32": (F32, F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16, BF16),
    "float16": (F16, F16, F16, F16),
    "autocast": (F32, BF16, F32, BF16),
    "first": (BF16, BF16, F32, BF16),
}
ALL_SIZES = list(product((1, 3, 65), (1, 2, 49, 197), (32, 48, 128, 192, 384, 768)))
FEW = [
    *(((3, 49, 192), name) for name in DTYPES),
    ((1, 197, 384), "autocast"),
    ((65, 2, 48), "float32"),
    ((65, 1, 128), "bfloat16"),
    ((3, 2, 768), "float16"),
    ((3, 1, 768), "float32"),
    ((1, 1, 32), "first"),
]


def devices() -> list[Any]:
    """Return where the kernel can be tested."""
    return [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]


def cases() -> list[Any]:
    found: list[Any] = []
    for size, name in product(ALL_SIZES, DTYPES):
        found.append(pytest.param("cuda", size, name, marks=pytest.mark.gpu))
        if INTERPRETED and prod(size) <= 20_000:  # it would take minutes for the larger ones
            found.append(pytest.param("cpu", size, name, marks=[] if (size, name) in FEW else pytest.mark.slow))
    return found


@pytest.fixture(autouse=True)
def _many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program take many rows: in the interpreter it costs the same whatever their number."""
    if not INTERPRETED:
        return
    from xcit.ops import residual_norm_triton as kernel

    for table in (kernel.FORWARD_TILES, kernel.BACKWARD_TILES):
        for block in table:
            monkeypatch.setitem(table, block, kernel.Tile(32, 4))


def given(
    size: tuple[int, int, int], dtypes: str = "float32", device: str = "cpu", offset: float = 0.0, scale: float = 1.0
) -> dict[str, Tensor]:
    """Return arguments; tokens of standard deviation ``scale``, which lie that often ``offset`` away from zero."""
    B, N, C = size
    of_x, of_update, of_params, _ = DTYPES[dtypes]
    drawn = {
        "x": (scale * (torch.randn(B, N, C) + offset)).to(of_x),
        "update": (scale * torch.randn(B, N, C)).to(of_update),
        "gamma": (0.3 * torch.randn(C)).to(of_params),
        "norm_weight": (1 + 0.3 * torch.randn(C)).to(of_params),
        "norm_bias": (0.3 * torch.randn(C)).to(of_params),
        "keep": (torch.rand(B) > 0.3).float() / 0.7,
    }
    return {name: value.to(device) for name, value in drawn.items()}


def outcome(
    arguments: dict[str, Tensor], grads: list[Tensor], *, exact: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Return what comes back, and the gradient of every argument."""
    taken = {name: value.double() if exact else value.detach() for name, value in arguments.items()}
    for name, value in taken.items():
        value.requires_grad_(name != "keep")
    rest = {name: taken.get(name) for name in ("x", "update", "gamma", "norm_weight", "norm_bias")}
    if exact and "normed_dtype" in options:
        options["normed_dtype"] = torch.float64
    x_new, second = residual_norm(**rest, eps=EPS, keep=taken.get("keep"), **options)  # type: ignore[arg-type]
    outputs = [x_new] if second is None else [x_new, second]
    torch.autograd.backward(outputs, [grad.to(o.dtype) for grad, o in zip(grads, outputs, strict=False)])
    found = {"x_new": x_new}
    if second is not None and options.get("want") == "statistics":
        found |= {"mean": second[..., 0], "rstd": second[..., 1]}
    elif second is not None:
        found["normed"] = second
    found |= {f"grad of {name}": value.grad for name, value in taken.items() if value.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def compare(arguments: dict[str, Tensor], grads: list[Tensor], **options: Any) -> None:
    """Hold the kernel's error to twice that of the definition in the same dtypes, and one rounding of the result."""
    exact = outcome(arguments, grads, exact=True, **options)
    plain = outcome(arguments, grads, **options)
    with observe_kernels() as ran:
        fused = outcome(arguments, grads, kernels="triton", **options)
    assert ran == ["residual_norm"]
    assert fused.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        assert fused[name].dtype == plain[name].dtype, name
        assert fused[name].shape == truth.shape, name
        rounding = torch.finfo(fused[name].dtype).eps / 2
        error, of_plain = (
            float((found[name].double() - truth).norm() / truth.norm().clamp_min(1e-30)) for found in (fused, plain)
        )
        assert error <= 2 * of_plain + rounding, (name, error, of_plain)


def random_grads(size: tuple[int, int, int], dtypes: str, device: str) -> list[Tensor]:
    dtype = DTYPES[dtypes][3]
    return [torch.randn(size).to(dtype).to(device) for _ in range(2)]


@pytest.mark.parametrize(("device", "size", "dtypes"), cases())
def test_kernel_is_the_definition(device: str, size: tuple[int, int, int], dtypes: str) -> None:
    _need(device)
    compare(
        given(size, dtypes, device), random_grads(size, dtypes, device), normed_dtype=DTYPES[dtypes][3], want="normed"
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("offset", [100.0, 1e4])
@pytest.mark.parametrize("want", ["normed", "statistics"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "autocast"])
def test_kernel_far_from_zero(device: str, offset: float, want: str, dtypes: str) -> None:
    _need(device)
    size = (3, 49, 192)
    arguments, grads = given(size, dtypes, device, offset), random_grads(size, dtypes, device)
    if want == "statistics":
        arguments = {name: value for name, value in arguments.items() if not name.startswith("norm_")}
        grads[1] = torch.randn(3, 49, 2, device=device)
    compare(arguments, grads, want=want)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtypes", ["float16", "autocast"])
def test_kernel_takes_the_whole_range_of_float16(device: str, dtypes: str) -> None:
    _need(device)
    size = (3, 49, 384)
    arguments = given(size, dtypes, device)
    for name, value in (("x", 6e4), ("update", 5e4)):
        arguments[name] = (value * (2 * torch.rand(size) - 1)).half().to(device)
    arguments["gamma"] = arguments["gamma"] * 0.03
    arguments["x"][0, 0] = 6e4  # whose variance is nothing but that of the update
    x_new, normed = residual_norm(**arguments, eps=EPS, kernels="triton")  # type: ignore[arg-type]
    assert normed is not None
    assert x_new.isfinite().all()
    assert normed.isfinite().all()
    grads = random_grads(size, dtypes, device)
    compare({k: v for k, v in arguments.items() if k != "gamma"} | {"update": arguments["update"] * 0.05}, grads)
    tiny = given(size, dtypes, device, scale=6e-8 / 5)  # subnormal, most of them zero
    compare(tiny, grads)


def _views(size: tuple[int, int, int]) -> dict[str, Callable[[], Tensor]]:
    B, N, C = size
    return {
        "channels first": lambda: torch.randn(B, C, N).transpose(1, 2),
        "tokens first": lambda: torch.randn(N, B, C).transpose(0, 1),
        "behind the class token": lambda: torch.randn(B, N + 1, C)[:, 1:],
        "every other channel": lambda: torch.randn(B, N, 2 * C)[..., ::2],
        "one image for all": lambda: torch.randn(1, N, C).expand(B, N, C),
        "one token for all": lambda: torch.randn(B, 1, C).expand(B, N, C),
    }


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", list(_views((1, 1, 1))))
def test_kernel_takes_any_layout(device: str, layout: str) -> None:
    _need(device)
    size = (3, 50, 48)
    view = _views(size)[layout]
    arguments = given(size, device=device) | {"x": view().to(device), "update": view().to(device)}
    compare(arguments, [view().to(device), view().to(device)])
    compare(given(size, device=device), [view().to(device), view().to(device)])
    arguments["gamma"] = torch.randn(2 * size[2], device=device)[::2]
    compare(arguments, [torch.ones((), device=device).expand(size)] * 2)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("without", [("gamma",), ("keep",), ("norm_weight",), ("norm_bias",), "all"])
@pytest.mark.parametrize("want", ["normed", "statistics", "none"])
def test_kernel_without_some_arguments(device: str, without: tuple[str, ...] | str, want: str) -> None:
    _need(device)
    size = (3, 7, 48)
    left_out = ("gamma", "keep", "norm_weight", "norm_bias") if without == "all" else without
    if want != "normed":
        left_out = (*left_out, "norm_weight", "norm_bias")
    arguments = {name: value for name, value in given(size, device=device).items() if name not in left_out}
    second = (3, 7, 2) if want == "statistics" else size
    compare(arguments, [torch.randn(size, device=device), torch.randn(second, device=device)], want=want)


@pytest.mark.parametrize("device", devices())
def test_kernel_where_one_output_alone_is_used(device: str) -> None:
    _need(device)
    for used in (0, 1):
        found = []
        for kernels in ("plain", "triton"):
            torch.manual_seed(1)
            arguments = given((3, 7, 48), device=device)
            for name, value in arguments.items():
                value.requires_grad_(name not in ("keep", "norm_weight"))  # one that is frozen
            out = residual_norm(**arguments, eps=EPS, kernels=kernels)[used]  # type: ignore[arg-type]
            assert out is not None
            (out * torch.randn_like(out)).sum().backward()
            found.append({name: value.grad for name, value in arguments.items()})
        assert {k for k, v in found[0].items() if v is None} == {k for k, v in found[1].items() if v is None}
        for name, grad in found[0].items():
            if grad is not None:
                torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", devices())
def test_kernel_is_the_same_every_time_and_in_every_tile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _need(device)
    from xcit.ops import residual_norm_triton as kernel

    size = (3, 9, 48)
    arguments, grads = given(size, device=device), random_grads(size, "float32", device)
    first = outcome(arguments, grads, kernels="triton")
    again = outcome(arguments, grads, kernels="triton")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for forward, backward, programs in ((2, 16, 2), (64, 2, 40), (1, 1, 1)):
        monkeypatch.setitem(kernel.FORWARD_TILES, 64, kernel.Tile(forward, 2))
        monkeypatch.setitem(kernel.BACKWARD_TILES, 64, kernel.Tile(backward, 8))
        monkeypatch.setattr(kernel, "INTERPRETED_PROGRAMS", programs)
        other = outcome(arguments, grads, kernels="triton")
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", devices())
def test_kernel_keeps_two_maps_for_the_backward_pass(device: str) -> None:
    _need(device)
    size = (3, 50, 192)
    for left_out, maps in ((), 2), (("gamma",), 1):
        arguments = {k: v for k, v in given(size, device=device).items() if k not in left_out}
        kept: list[int] = []

        def keep(value: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(value.numel())
            return value

        for name, value in arguments.items():
            value.requires_grad_(name != "keep")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            residual_norm(**{"gamma": None, **arguments}, eps=EPS, kernels="triton")  # type: ignore[arg-type]
        assert sum(numel == 3 * 50 * 192 for numel in kept) == maps
        assert sum(numel for numel in kept if numel < 3 * 50 * 192) <= 3 * 50 * 2 + 3 * 192 + 3


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("size", [(3, 0, 48), (0, 5, 48)])
def test_kernel_of_no_tokens(device: str, size: tuple[int, int, int]) -> None:
    _need(device)
    found = outcome(given(size, device=device), [torch.zeros(size, device=device)] * 2, kernels="triton")
    assert found["normed"].shape == size
    assert not found["grad of gamma"].any()
    assert not found["grad of norm_weight"].any()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("want", ["normed", "statistics", "none"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_kernel_is_a_sound_operator(device: str, want: str) -> None:
    _need(device)
    from xcit.ops.residual_norm_triton import residual_norm_op

    arguments = given((2, 5, 48), device=device)
    for name, value in arguments.items():
        value.requires_grad_(name != "keep")
    order = ("x", "update", "gamma", "norm_weight", "norm_bias", "keep")
    torch.library.opcheck(residual_norm_op, (*(arguments[name] for name in order), EPS, want, F32, F32))


class _Step(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels))
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor | None]:
        return residual_norm(x, update, self.gamma, self.norm.weight, self.norm.bias, EPS, kernels="triton")


@pytest.mark.parametrize("device", devices())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_kernel_is_compiled_and_exported_whole(device: str) -> None:
    _need(device)
    step = _Step(48).to(device)
    x, update = torch.randn(3, 5, 48, device=device), torch.randn(3, 5, 48, device=device)
    expected = step(x, update)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    found = compiled(x, update)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    sum(o.square().sum() for o in found).backward()
    of_compiled = [p.grad.clone() for p in step.parameters() if p.grad is not None]
    step.zero_grad()
    sum(o.square().sum() for o in expected).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(of_compiled, [p.grad for p in step.parameters()], rtol=1e-5, atol=1e-5)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    dims = {"x": {1: tokens}, "update": {1: tokens}}
    exported = torch.export.export(step, (x, update), dynamic_shapes=dims)
    assert "xcit.residual_norm.default" in exported.graph_module.code
    longer = torch.randn(3, 11, 48, device=device), torch.randn(3, 11, 48, device=device)
    torch.testing.assert_close(exported.module()(*longer), step(*longer), rtol=0, atol=0)


@pytest.mark.parametrize("device", devices())
def test_kernel_under_autocast(device: str) -> None:
    _need(device)
    arguments = given((3, 5, 48), "first", device)
    with torch.autocast(device, dtype=BF16):
        plain = residual_norm(**arguments, eps=EPS)  # type: ignore[arg-type]
        fused = residual_norm(**arguments, eps=EPS, kernels="triton")  # type: ignore[arg-type]
    for results in (plain, fused):
        assert [r.dtype for r in results if r is not None] == [F32, BF16]
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", devices())
def test_kernel_refuses_what_it_cannot_do(device: str) -> None:
    _need(device)
    with pytest.raises(ConfigError, match="float64"):
        residual_norm(**_double(given((1, 2, 16), device=device)), eps=EPS, kernels="triton")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="float64"):
        residual_norm(
            **given((1, 2, 16), device=device),  # type: ignore[arg-type]
            eps=EPS,
            normed_dtype=torch.float64,
            kernels="triton",
        )
    with pytest.raises(ConfigError, match="8192 channels"):
        residual_norm(**given((1, 1, 8200), device=device), eps=EPS, kernels="triton")  # type: ignore[arg-type]


def _double(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in arguments.items()}


def _need(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter(run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-k", "test_kernel", at_least=10)


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_all_sizes_in_the_interpreter(run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-m", "slow and not gpu", at_least=10)


@pytest.mark.parametrize("want", ["normed", "statistics", "none"])
def test_the_definition_is_what_a_block_computes(want: str) -> None:
    arguments = _double(given((4, 6, 24)))
    norm = nn.LayerNorm(24, eps=EPS).double()
    with torch.no_grad():
        norm.weight.copy_(arguments["norm_weight"])
        norm.bias.copy_(arguments["norm_bias"])
    expected = torch.stack(
        [
            x + float(keep) * (arguments["gamma"] * update)
            for x, update, keep in zip(arguments["x"], arguments["update"], arguments["keep"], strict=True)
        ]
    )
    if want != "normed":
        del arguments["norm_weight"], arguments["norm_bias"]
    affine = {name: arguments.pop(name, None) for name in ("norm_weight", "norm_bias")}
    x_new, second = residual_norm(**arguments, **affine, eps=EPS, want=want)  # type: ignore[arg-type]
    torch.testing.assert_close(x_new, expected, rtol=1e-12, atol=1e-12)
    if want == "normed":
        torch.testing.assert_close(second, norm(expected), rtol=1e-10, atol=1e-10)
    elif want == "statistics":
        assert second is not None
        variance = expected.var(-1, correction=0)
        torch.testing.assert_close(second[..., 0], expected.mean(-1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(second[..., 1], (variance + EPS) ** -0.5, rtol=1e-10, atol=1e-10)
    else:
        assert second is None


def test_dtypes_follow_torch() -> None:
    for name, (of_x, of_update, of_params, _) in DTYPES.items():
        x_new, normed = residual_norm(**given((2, 3, 16), name), eps=EPS)  # type: ignore[arg-type]
        assert normed is not None
        expected = torch.promote_types(torch.promote_types(of_x, of_update), of_params)
        assert (x_new.dtype, normed.dtype) == (expected, expected)
    _, normed = residual_norm(**given((2, 3, 16)), eps=EPS, normed_dtype=BF16)  # type: ignore[arg-type]
    assert normed is not None
    assert normed.dtype == BF16


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel can run here")
def test_the_kernel_is_refused_on_a_cpu() -> None:
    with pytest.raises(BackendError, match=r"CUDA|not installed"):
        residual_norm(**given((1, 2, 16)), eps=EPS, kernels="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernels": "cuda"}, ConfigError, "plain, triton"),
        ({"want": "mean"}, ConfigError, "normed, statistics, none"),
        ({"want": "none"}, ConfigError, "scale or shift"),
        ({"want": "none", "norm_weight": None, "norm_bias": None, "normed_dtype": BF16}, ConfigError, "normed_dtype"),
        ({"eps": 0.0}, ConfigError, "more than 0"),
        ({"update": torch.zeros(1, 3, 16)}, ShapeError, "residual stream"),
        ({"x": torch.zeros(3, 16), "update": torch.zeros(3, 16)}, ShapeError, "residual stream"),
        ({"gamma": torch.zeros(15)}, ShapeError, r"gamma must be \(16,\)"),
        ({"norm_bias": torch.zeros(1, 16)}, ShapeError, r"norm_bias must be \(16,\)"),
        ({"keep": torch.zeros(3)}, ShapeError, r"keep must be \(2,\)"),
        ({"keep": torch.zeros(2, requires_grad=True)}, ConfigError, "Detach"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_norm(**({"eps": EPS} | given((2, 3, 16)) | change))
