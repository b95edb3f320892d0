"""Class attention's pass over the tokens, against the definition in float64 and the folded layer.

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
from xcit.models.folded_layers import FoldedClassAttention, without_affine
from xcit.models.layers import ClassAttention
from xcit.ops.class_tokens import class_attention_core
from xcit.ops.kernels import observe_kernels
from xcit.ops.residual_norm import residual_norm

EPS = 1e-6
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HEADS = {32: 1, 48: 3, 128: 4, 192: 4, 384: 8, 768: 16}
ALL_SIZES = list(product((1, 3, 65), (1, 2, 49, 197), HEADS))
FEW = [
    *(((3, 49, 48), *option) for option in product((F32, BF16, F16), (False, True))),
    ((1, 197, 384), BF16, True),
    ((65, 1, 32), F32, False),
    ((3, 2, 768), F16, True),
    ((1, 1, 192), F32, True),
    ((1, 197, 128), BF16, False),
]


def devices() -> list[Any]:
    """Return where the kernel can be tested."""
    return [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]


def cases() -> list[Any]:
    found: list[Any] = []
    for size, dtype, statistics in product(ALL_SIZES, (F32, BF16, F16), (False, True)):
        found.append(pytest.param("cuda", size, dtype, statistics, marks=pytest.mark.gpu))
        if INTERPRETED and (size, dtype, statistics) in FEW:
            found.append(("cpu", size, dtype, statistics))
    return found


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter take many tokens at once: it needs as long for one."""
    if INTERPRETED:
        from xcit.ops import class_tokens_triton as kernel

        monkeypatch.setattr(kernel, "TOKENS", 16)


def given(
    size: tuple[int, int, int], dtype: torch.dtype, device: str, *, statistics: bool, offset: float = 0.0
) -> dict[str, Tensor]:
    """Return arguments, with scores of standard deviation 3."""
    B, _, C = size
    x = (torch.randn(size) + offset).to(dtype)
    found = {
        "direction": 3 * C**-0.5 * torch.randn(B, HEADS[C], C),
        "tokens": F.layer_norm(x, (C,)),
        "own": F.layer_norm(torch.randn(B, C), (C,)).to(dtype),
    }
    if statistics:
        _, both = residual_norm(x, torch.zeros_like(x), None, None, None, EPS, want="statistics")
        assert both is not None
        found |= {"tokens": x, "statistics": both}
    return {name: value.to(device) for name, value in found.items()}


def compare(arguments: dict[str, Tensor]) -> None:
    """Hold the error to twice that of the definition in the same dtypes, and one rounding of the result."""
    exact = class_attention_core(**{name: value.double() for name, value in arguments.items()})
    plain = class_attention_core(**arguments)
    with observe_kernels() as ran:
        fused = class_attention_core(**arguments, kernels="triton")
    assert ran == ["class_attention_core"]
    assert (fused.dtype, fused.shape) == (plain.dtype, exact.shape)
    error, of_plain = (float((found.double() - exact).norm() / exact.norm()) for found in (fused, plain))
    assert error <= 2 * of_plain + torch.finfo(fused.dtype).eps / 2, (error, of_plain)


@pytest.mark.parametrize(("device", "size", "dtype", "statistics"), cases())
def test_kernel_is_the_definition(
    device: str, size: tuple[int, int, int], dtype: torch.dtype, statistics: bool
) -> None:
    _need(device)
    compare(given(size, dtype, device, statistics=statistics))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("offset", [100.0, 1e4])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernel_far_from_zero(device: str, offset: float, dtype: torch.dtype) -> None:
    _need(device)
    compare(given((3, 49, 192), dtype, device, statistics=True, offset=offset))


@pytest.mark.parametrize("device", devices())
def test_kernel_with_scores_beyond_exp(device: str) -> None:
    _need(device)
    arguments = given((3, 49, 192), F32, device, statistics=False)
    compare(arguments | {"direction": 100 * arguments["direction"]})
    arguments = given((3, 49, 192), F16, device, statistics=False)
    spread = 6e4 * (2 * torch.rand(3, 49, 192, device=device) - 1)
    compare(arguments | {"tokens": spread.half(), "direction": 1e-3 * arguments["direction"]})


def _views(B: int, N: int, C: int) -> dict[str, Callable[[], Tensor]]:
    return {
        "channels first": lambda: torch.randn(B, C, N).transpose(1, 2),
        "tokens first": lambda: torch.randn(N, B, C).transpose(0, 1),
        "behind the class token": lambda: torch.randn(B, N + 1, C)[:, 1:],
        "one token for all": lambda: torch.randn(B, 1, C).expand(B, N, C),
    }


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", list(_views(1, 1, 1)))
def test_kernel_takes_any_layout(device: str, layout: str) -> None:
    _need(device)
    arguments = given((3, 50, 48), F32, device, statistics=False) | {
        "tokens": _views(3, 50, 48)[layout]().to(device),
        "direction": torch.randn(3, 48, 3, device=device).transpose(1, 2),
        "own": torch.randn(48, 3, device=device).t(),
    }
    compare(arguments)


@pytest.mark.parametrize("device", devices())
def test_kernel_in_other_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _need(device)
    from xcit.ops import class_tokens_triton as kernel

    arguments = given((2, 21, 48), F32, device, statistics=True)
    expected = class_attention_core(**arguments, kernels="triton")
    for least, at_once, held, heads in ((5, 1, 8192, 8), (1000, 2, 8192, 8), (7, 4, 128, 8), (5, 2, 8192, 1)):
        for name, value in (("MIN_PART", least), ("TOKENS", at_once), ("HELD", held), ("MAX_HEADS", heads)):
            monkeypatch.setattr(kernel, name, value)
        found = class_attention_core(**arguments, kernels="triton")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", devices())
def test_kernel_without_patch_tokens(device: str) -> None:
    _need(device)
    arguments = given((2, 1, 48), F32, device, statistics=False)
    arguments["tokens"] = arguments["tokens"][:, :0]
    found = class_attention_core(**arguments, kernels="triton")
    torch.testing.assert_close(found, arguments["own"].unsqueeze(1).expand(2, 3, 48), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", devices())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_kernel_is_a_sound_operator(device: str) -> None:
    _need(device)
    from xcit.ops.class_tokens_triton import class_attention_core_op

    class Core(nn.Module):
        def forward(self, direction: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
            return class_attention_core(direction, tokens, own, kernels="triton")

    arguments = given((2, 5, 48), F32, device, statistics=True)
    torch.library.opcheck(class_attention_core_op, tuple(arguments.values()))
    del arguments["statistics"]
    torch.library.opcheck(class_attention_core_op, (*arguments.values(), None))
    taken, expected = tuple(arguments.values()), class_attention_core(**arguments)
    compiled = torch.compile(Core(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*taken), expected, rtol=1e-5, atol=1e-6)
    exported = torch.export.export(
        Core(), taken, dynamic_shapes=({}, {1: torch.export.Dim("tokens", min=2, max=99)}, {})
    )
    longer = given((2, 11, 48), F32, device, statistics=False)
    torch.testing.assert_close(
        exported.module()(*longer.values()), class_attention_core(**longer), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("device", devices())
def test_kernel_refuses_what_it_cannot_do(device: str) -> None:
    _need(device)
    arguments = given((2, 5, 48), F32, device, statistics=False)
    with pytest.raises(ConfigError, match="no gradient"):
        class_attention_core(**arguments | {"own": arguments["own"].requires_grad_()}, kernels="triton")
    with torch.no_grad():
        class_attention_core(**arguments, kernels="triton")
        with pytest.raises(ConfigError, match="float64"):
            class_attention_core(**{k: v.double() for k, v in arguments.items()}, kernels="triton")
        wide = torch.zeros(1, 1, 4100, device=device)
        with pytest.raises(ConfigError, match="4096 channels"):
            class_attention_core(wide, wide, wide[0], kernels="triton")


def _need(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter(run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-k", "test_kernel", at_least=10)


@pytest.mark.parametrize("statistics", [False, True])
def test_the_definition_is_the_folded_layer(statistics: bool, randomize: Callable[..., nn.Module]) -> None:
    C, h = 48, 3
    norm, attn = randomize(nn.LayerNorm(C, eps=EPS)), randomize(ClassAttention(C, h), seed=1)
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(attn, ClassAttention)
    norm, attn, gamma = norm.double(), attn.double(), torch.randn(C, dtype=torch.float64)
    folded = FoldedClassAttention(norm, attn, gamma)
    tokens = torch.randn(2, 8, C, dtype=torch.float64) + 3
    expected = gamma * attn(norm(tokens))
    bare = without_affine(norm)
    cls, patches = bare(tokens).split((1, 7), dim=1)
    options: dict[str, Tensor] = {}
    if statistics:
        patches = tokens[:, 1:]
        _, both = residual_norm(patches, torch.zeros_like(patches), None, None, None, EPS, want="statistics")
        assert both is not None
        options = {"statistics": both}
    mean = class_attention_core(folded.direction(cls), patches, cls[:, 0], **options)
    torch.testing.assert_close(folded.of_mean(mean), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel can run here")
def test_the_kernel_is_refused_on_a_cpu() -> None:
    with pytest.raises(BackendError, match=r"CUDA|not installed"):
        class_attention_core(**given((1, 2, 48), F32, "cpu", statistics=False), kernels="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernels": "fast"}, ConfigError, "plain, triton"),
        ({"tokens": torch.zeros(5, 48)}, ShapeError, "patch tokens"),
        ({"direction": torch.zeros(2, 3, 47)}, ShapeError, r"\(2, heads, 48\)"),
        ({"own": torch.zeros(2, 1, 48)}, ShapeError, r"\(2, 48\)"),
        ({"statistics": torch.zeros(2, 4, 2)}, ShapeError, r"\(2, 5, 2\)"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        class_attention_core(**(given((2, 5, 48), F32, "cpu", statistics=False) | change))
