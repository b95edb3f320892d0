"""XCA's core in Triton against float64, beside the plain version in the same dtype.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported anywhere: these
tests are skipped but for one, which runs the file in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from xcit.errors import BackendError, ConfigError, ShapeError
from xcit.ops.kernels import observe_kernels
from xcit.ops.xca import XCAWeights, xca_tokens
from xcit.ops.xca_core import xca_attention_core, xca_core

pytestmark = pytest.mark.usefixtures("patch_once_a_launch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

ALL = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", ALL, ids=str)
CASES = [  # tokens, channels, heads, images, offset in standard deviations
    (1, 32, 4, 1, 0),
    (1, 96, 2, 1, 100),
    (2, 96, 2, 1, 10),
    (7, 96, 4, 2, 100),
    (49, 96, 4, 1, 10),
    (196, 32, 4, 1, 100),
]
LARGE_CASES = [
    *[(case, dtype) for case in ((577, 384, 8, 1, 100), (7, 32, 4, 33, 100), (196, 128, 4, 3, 10)) for dtype in ALL],
    ((49, 384, 8, 33, 0), torch.float16),
    ((49, 96, 4, 33, 10), torch.bfloat16),
    ((577, 128, 4, 3, 0), torch.float32),
]


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(selection: str, run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-m", f"{selection} and not gpu", at_least=28 if selection == "not slow" else 12)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gradients(function, inputs, upstream, **options) -> list[torch.Tensor]:
    leaves = [a.detach().requires_grad_() for a in inputs]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def before_cancelling(qkv: torch.Tensor, temperature: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of qkv with the norms held fixed: what of it lies along q and k is still there."""
    h = temperature.shape[0]
    qkv = qkv.detach().requires_grad_()
    q, k, v = qkv.unflatten(-1, (3, h, -1)).permute(2, 0, 3, 4, 1).unbind(0)
    q, k = (a / a.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12) for a in (q, k))
    attn = (q @ k.mT * temperature).softmax(-1)
    return torch.autograd.grad((attn @ v).permute(0, 3, 1, 2).flatten(2), qkv, dy)[0]


def draw(tokens, channels, heads, images, offset, dtype, parts=3):
    shift = offset * torch.randn(parts * channels)
    packed = (torch.randn(images, tokens, parts * channels) + shift).to(DEVICE, dtype)
    return packed, (4 * torch.rand(heads, 1, 1) + 1).to(DEVICE)


def check(tokens, channels, heads, images, offset, dtype, strided=False) -> None:
    """Output and gradients: at most twice the plain version's error, one rounding, and what float32 leaves uncancelled.

    The last is 2^-22 of the gradient's size before the parts along q and k are taken out, which for one token is all
    of it. Errors are summed over draws, until there are 12 temperatures or many images: a few numbers can be right by
    luck.
    """
    names = ("output", "qkv", "temperature")
    ours, plain, allowed = ([0.0] * 3 for _ in range(3))
    for _ in range(1 if images > 8 else -(-12 // heads)):
        qkv, temperature = draw(tokens, channels, heads, images, offset, dtype)
        if strided:
            wide = torch.randn(2 * images, 3 * tokens, 3 * channels + 5).to(DEVICE, dtype)
            wide[::2, ::3, 3 : 3 * channels + 3] = qkv
            qkv = wide[::2, ::3, 3 : 3 * channels + 3]
            assert not qkv.is_contiguous()
        dy = torch.randn(images, tokens, channels).to(DEVICE, dtype)
        exact = gradients(xca_core, (qkv.double(), temperature.double()), dy)
        rough = before_cancelling(qkv.double(), temperature.double(), dy.double()).norm().item()
        for sums, kernels in ((plain, "plain"), (ours, "triton")):
            results = gradients(xca_core, (qkv, temperature), dy, kernels=kernels)
            for i, (result, reference) in enumerate(zip(results, exact, strict=True)):
                assert result.isfinite().all()
                sums[i] += (result.double() - reference).norm().item()
        for i, (reference, floor) in enumerate(zip(exact, (0.0, rough, 0.0), strict=True)):
            rounding = unit(torch.float32 if i == 2 else dtype)
            allowed[i] += rounding * reference.norm().item() + 2.0**-22 * floor
    for name, error, baseline, allowance in zip(names, ours, plain, allowed, strict=True):
        assert error <= 2 * baseline + allowance, (name, error, baseline, allowance)


def check_attention(tokens, channels, heads, images, offset, dtype) -> None:
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(-(-12 // heads)):
        qkv, temperature = draw(tokens, channels, heads, images, offset, dtype)
        qk = qkv[..., : 2 * channels]  # not contiguous
        upstream = torch.randn(images, heads, channels // heads, channels // heads).to(DEVICE)
        exact = gradients(xca_attention_core, (qk.double(), temperature.double()), upstream)
        for row, kernels in enumerate(("plain", "triton")):
            found = gradients(xca_attention_core, (qk, temperature), upstream, kernels=kernels)
            assert [a.dtype for a in found] == [torch.float32, dtype, torch.float32]
            for i, (result, reference) in enumerate(zip(found, exact, strict=True)):
                sums[row, i] += (result.double() - reference).norm().item()
                sums[2, i] += row * unit(result.dtype) * reference.norm().item()
    assert (sums[1] <= 2 * sums[0] + sums[2]).all(), sums


@pytest.fixture
def split(monkeypatch) -> None:
    """Share the tokens out as for a large device."""
    from xcit.ops import tiles_triton

    monkeypatch.setattr(tiles_triton, "wanted_programs", lambda device: 10_000)
    monkeypatch.setattr(tiles_triton, "MIN_SPLIT", 32)


@interpreted
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_accurate_as_the_plain_version(case, dtype) -> None:
    check(*case, dtype)


@interpreted
@DTYPES
def test_with_the_tokens_split(split, dtype) -> None:
    check(100, 32, 4, 1, 10, dtype)
    check_attention(100, 32, 4, 1, 10, dtype)


@interpreted
@DTYPES
def test_reads_strided_tokens_in_place(dtype) -> None:
    check(49, 32, 4, 1, 10, dtype, strided=True)


@interpreted
@DTYPES
def test_attention_alone(dtype) -> None:
    check_attention(49, 96, 4, 1, 10, dtype)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), LARGE_CASES, ids=str)
def test_large_ones_in_the_interpreter(case, dtype) -> None:
    check(*case, dtype)


@gpu
@no_gpu
@DTYPES
@pytest.mark.parametrize("offset", [0, 10, 100])
@pytest.mark.parametrize(
    "size",
    [(1, 96, 2, 3), (2, 384, 8, 33), (196, 128, 4, 33), (577, 384, 8, 33), (577, 512, 8, 1), (65_537, 384, 8, 1)],
    ids=str,
)
def test_on_a_gpu(size, offset, dtype) -> None:
    check(*size, offset, dtype)
    if size[0] > 2:
        check_attention(*size, offset, dtype)


def check_extremes() -> None:
    for tokens in (1, 577):
        qkv = (6e4 * (2 * torch.rand(2, tokens, 96) - 1)).to(DEVICE, torch.float16)
        temperature, dy = torch.full((2, 1, 1), 3.0, device=DEVICE), torch.randn(2, tokens, 32).to(DEVICE).half()
        plain = gradients(xca_core, (qkv.float(), temperature), dy)
        ours = gradients(xca_core, (qkv, temperature), dy, kernels="triton")
        assert all(a.isfinite().all() for a in (*plain, *ours))
        torch.testing.assert_close(ours[0].float(), plain[0], rtol=2e-3, atol=30.0)
        torch.testing.assert_close(ours[1][..., 64:].float(), plain[1][..., 64:], rtol=4e-3, atol=4e-3)
        torch.testing.assert_close(ours[2], plain[2], rtol=1e-3, atol=1.0)


@interpreted
def test_large_float16_values_stay_finite() -> None:
    check_extremes()


@gpu
@no_gpu
def test_large_float16_values_stay_finite_on_a_gpu() -> None:
    check_extremes()


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of 1e12 to float16
@DTYPES
def test_channels_without_norm(dtype) -> None:
    """Zeros are divided by the epsilon, not by zero; the other channels' gradients are none the worse for it."""
    qkv, temperature = draw(9, 32, 4, 2, 0, dtype)
    qkv[..., [1, 33, 40]] = 0  # two of q's and k's channels in one head, one in another
    dy = torch.randn(2, 9, 32).to(dtype)
    plain = gradients(xca_core, (qkv.double(), temperature.double()), dy)
    ours = gradients(xca_core, (qkv, temperature), dy, kernels="triton")
    assert not any(a.isnan().any() for a in ours)
    usual = [c for c in range(96) if c not in (1, 33, 40)]
    tolerance = 30 * unit(dtype)
    for a, b in ((ours[0], plain[0]), (ours[1][..., usual], plain[1][..., usual]), (ours[2], plain[2])):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    if dtype != torch.float16:
        assert (ours[1].double() - plain[1]).norm() <= tolerance * plain[1].norm()


@interpreted
def test_very_unequal_channels_in_float16() -> None:
    """k's norms from 1e-4 to 1e4: neither their inverses nor the maps may leave float16's range."""
    qkv = torch.randn(1, 49, 96) * torch.logspace(-2, 3, 96)[torch.randperm(96)]
    qkv, temperature, dy = qkv.half(), torch.full((2, 1, 1), 2.0), torch.randn(1, 49, 32).half()
    exact = gradients(xca_core, (qkv.double(), temperature.double()), dy)
    plain = gradients(xca_core, (qkv, temperature), dy)
    ours = gradients(xca_core, (qkv, temperature), dy, kernels="triton")
    for channel in range(64):
        a, b, e = (g[1][..., channel].double() for g in (ours, plain, exact))
        assert (a - e).norm() <= 2 * (b - e).norm() + 3 * unit(torch.float16) * e.norm() + 1e-7


@interpreted
def test_is_the_middle_of_xca_tokens() -> None:
    x, h = torch.randn(2, 30, 32), 4
    weights = XCAWeights(
        torch.randn(96, 32), torch.randn(96), torch.randn(32, 32), torch.randn(32), torch.rand(h, 1, 1) + 1
    )
    for kernels in ("plain", "triton"):
        qkv = torch.nn.functional.linear(x, weights.qkv_weight, weights.qkv_bias)
        y = xca_core(qkv, weights.temperature, kernels=kernels)
        out = torch.nn.functional.linear(y, weights.proj_weight, weights.proj_bias)
        torch.testing.assert_close(out, xca_tokens(x, weights), rtol=1e-5, atol=1e-4)


@interpreted
def test_is_deterministic_and_seen(split) -> None:
    qkv, temperature = draw(100, 64, 2, 1, 0, torch.float16)
    dy = torch.randn(1, 100, 64).half()
    with observe_kernels() as names:
        first, second = (gradients(xca_core, (qkv, temperature), dy, kernels="triton") for _ in range(2))
        xca_attention_core(qkv[..., :128], temperature, kernels="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert names == ["xca_core", "xca_core", "xca_attention_core"]


@interpreted
def test_saves_nothing_where_no_gradient_is_needed() -> None:
    qkv, temperature = draw(9, 32, 4, 2, 0, torch.float32)
    y, cosines, norms = torch.ops.xcit.xca_core(qkv, temperature, False)
    assert cosines.numel() == norms.numel() == 0
    kept = torch.ops.xcit.xca_core(qkv, temperature, True)
    assert torch.equal(y, kept[0])
    q, k, _ = qkv.double().unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 4, 1).unbind(0)
    torch.testing.assert_close(kept[2].double(), torch.stack((q.norm(dim=-1), k.norm(dim=-1)), 2), rtol=1e-6, atol=0)


@interpreted
def test_autocast_casts_the_tokens_and_not_the_temperature() -> None:
    qkv, temperature = draw(49, 32, 4, 2, 0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = xca_core(qkv, temperature, kernels="triton")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, xca_core(qkv.bfloat16(), temperature, kernels="triton"))


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_torch_knows_the_operations() -> None:
    for strided in (True, False):
        qkv, temperature = draw(9, 32, 4, 1, 0, torch.float32)
        if strided:
            qkv = torch.randn(9, 1, 100)[..., 2:98].transpose(0, 1)
        qkv.requires_grad_()
        temperature.requires_grad_()
        torch.library.opcheck(torch.ops.xcit.xca_core.default, (qkv, temperature, True))
        if strided:
            continue
        torch.library.opcheck(torch.ops.xcit.xca_attention_core.default, (qkv[..., :64], temperature, True))
        with torch.no_grad():
            torch.library.opcheck(torch.ops.xcit.xca_core.default, (qkv.detach(), temperature.detach(), False))
            y, cosines, norms = torch.ops.xcit.xca_core(qkv, temperature, True)
            saved = (qkv.detach(), temperature.detach(), cosines, norms)
            torch.library.opcheck(torch.ops.xcit.xca_core_backward.default, (y, *saved))
            attn, *saved = torch.ops.xcit.xca_attention_core(qkv[..., :64], temperature, True)
            saved = (qkv[..., :64].detach(), temperature.detach(), *saved)
            torch.library.opcheck(torch.ops.xcit.xca_attention_core_backward.default, (attn, *saved))


class Core(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.rand(4, 1, 1) + 1)

    def forward(self, qkv):
        attn = xca_attention_core(qkv[..., :64], self.temperature, kernels="triton")
        return xca_core(qkv, self.temperature, kernels="triton") * attn.mean()


@interpreted
def test_compiles_and_exports() -> None:
    core, qkv = Core(), torch.randn(2, 9, 96, requires_grad=True)
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    for size in (9, 12):  # the second with a symbolic size
        qkv = torch.randn(2, size, 96, requires_grad=True)
        leaves = (qkv, core.temperature)
        grads = [torch.autograd.grad(f(qkv).square().sum(), leaves) for f in (core, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    dims = {0: torch.export.Dim("images"), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(core, (qkv.detach(),), dynamic_shapes=(dims,))
    other = torch.randn(3, 20, 96)
    torch.testing.assert_close(exported.module()(other), core(other))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_honour() -> None:
    qkv, temperature = torch.randn(1, 9, 96), torch.ones(4, 1, 1)
    with pytest.raises(ConfigError, match=r'attn_drop is 0\.1.*kernels="plain"'):
        xca_core(qkv, temperature, attn_drop=0.1, kernels="triton")
    with pytest.raises(ConfigError, match=r'at most 128 channels; these have 129.*kernels="plain"'):
        xca_core(torch.randn(1, 2, 387), torch.ones(1, 1, 1), kernels="triton")
    with pytest.raises(ConfigError, match=r"'cuda'.*plain, triton"):
        xca_core(qkv, temperature, kernels="cuda")
    with pytest.raises(ShapeError, match=r"\(1, 9, 95\)"):
        xca_core(qkv[..., :95], temperature)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        xca_attention_core(qkv[..., :64], temperature.flatten())
    if not INTERPRETED:
        with pytest.raises(BackendError, match=r'cpu.*kernels="plain"'):
            xca_core(qkv, temperature, kernels="triton")


def test_the_plain_version_drops_out() -> None:
    qkv, temperature = torch.randn(2, 9, 96), torch.ones(4, 1, 1)
    assert not torch.equal(xca_core(qkv, temperature, attn_drop=0.5), xca_core(qkv, temperature))
