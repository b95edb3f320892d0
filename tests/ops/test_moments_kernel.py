"""Layer norm, mean and second moment in Triton against float64, beside the plain version in the same dtype.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported anywhere: these
tests are skipped but for one, which runs the file in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xcit.errors import BackendError, ConfigError
from xcit.ops import xca
from xcit.ops.kernels import observe_kernels
from xcit.ops.norm_moments import norm_moments
from xcit.ops.second_moment import second_moment

pytestmark = pytest.mark.usefixtures("patch_once_a_launch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

ALL = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", ALL, ids=str)
NAMES = ("mean", "second", "statistics", "x")
CASES = [  # tokens, channels, images, offset in standard deviations
    (1, 96, 1, 100),
    (2, 96, 3, 10),
    (7, 32, 3, 100),
    (49, 384, 1, 10),
    (196, 96, 1, 100),
    (577, 32, 1, 0),
    (50, 24, 2, 0),
]
LARGE_CASES = [
    *[(case, dtype) for case in ((577, 384, 1, 100), (7, 96, 33, 100), (100, 768, 2, 3)) for dtype in ALL],
    ((196, 128, 33, 10), torch.float16),
    ((49, 384, 33, 0), torch.bfloat16),
    ((577, 128, 3, 10), torch.float32),
]


@pytest.mark.timeout(900)  # on a busy machine
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(selection: str, run_in_interpreter: Callable[..., None]) -> None:
    run_in_interpreter(__file__, "-m", f"{selection} and not gpu", at_least=30 if selection == "not slow" else 12)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def test_the_plain_version_is_layer_norm_then_moments() -> None:
    x = 3 + torch.randn(2, 50, 16, dtype=torch.float64)
    normed = F.layer_norm(x, (16,), eps=1e-6).numpy()
    mean, second, stats = norm_moments(x)
    np.testing.assert_allclose(mean, normed.mean(1), atol=1e-14)
    for image, moment in zip(normed, second, strict=True):
        np.testing.assert_allclose(moment, 50 * np.cov(image, rowvar=False, bias=True), atol=1e-12)
    np.testing.assert_allclose((x - stats[..., :1]) * stats[..., 1:], normed, atol=1e-14)


def test_the_plain_version_s_gradients() -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm_moments(x)[:2], x)


def draw(tokens, channels, images, offset, dtype) -> torch.Tensor:
    return (torch.randn(images, tokens, channels) + offset * torch.randn(channels)).to(DEVICE, dtype)


def results(x, upstream, **options) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    mean, second, stats = norm_moments(x, **options)
    assert not stats.requires_grad
    out = (mean, second)
    return [*(a.detach() for a in (*out, stats)), *torch.autograd.grad(out, x, [u.to(mean.dtype) for u in upstream])]


def check(tokens, channels, images, offset, dtype, draws=2, strided=False) -> None:
    """Outputs and gradient: at most twice the plain version's error, one rounding, and what float32 leaves uncancelled.

    The last is, for the second moment, the square of 2^-22 of the normed tokens: for one token nothing else is there.
    Errors are summed over draws.
    """
    ours, plain, allowed = ([0.0] * 4 for _ in range(3))
    for _ in range(draws):
        x = draw(tokens, channels, images, offset, dtype)
        if strided:
            wide = torch.randn(2 * images, 3 * tokens, channels + 5).to(DEVICE, dtype)
            wide[::2, ::3, 3 : channels + 3] = x
            x = wide[::2, ::3, 3 : channels + 3]
            assert not x.is_contiguous()
        upstream = torch.randn(images, channels).to(DEVICE), torch.randn(images, channels, channels).to(DEVICE)
        exact = results(x.double(), upstream)
        for sums, kernels in ((plain, "plain"), (ours, "triton")):
            for i, (result, reference) in enumerate(zip(results(x, upstream, kernels=kernels), exact, strict=True)):
                assert result.isfinite().all()
                assert result.dtype == (dtype if i == 3 else torch.float32)
                sums[i] += (result.double() - reference).norm().item()
        for i, reference in enumerate(exact):
            floor = 2.0**-44 * images**0.5 * tokens * channels if i == 1 else 0.0
            allowed[i] += unit(dtype if i == 3 else torch.float32) * reference.norm().item() + floor
    for name, error, baseline, allowance in zip(NAMES, ours, plain, allowed, strict=True):
        assert error <= 2 * baseline + allowance, (name, error, baseline, allowance)


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
    check(*case, dtype, draws=1 if case[0] > 100 else 2)


@interpreted
@DTYPES
def test_with_the_tokens_split(split, dtype) -> None:
    check(200, 96, 1, 10, dtype, draws=1)
    check_second_moment(200, 96, 1, dtype)


@interpreted
@DTYPES
def test_reads_strided_tokens_in_place(dtype) -> None:
    check(49, 32, 2, 10, dtype, draws=1, strided=True)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), LARGE_CASES, ids=str)
def test_large_ones_in_the_interpreter(case, dtype) -> None:
    check(*case, dtype, draws=1)


@gpu
@no_gpu
@DTYPES
@pytest.mark.parametrize("offset", [0, 10, 100])
@pytest.mark.parametrize(
    "size",
    [(1, 96, 3), (2, 384, 33), (196, 128, 33), (577, 384, 33), (577, 768, 4), (3000, 200, 4), (65_537, 384, 1)],
    ids=str,
)
def test_on_a_gpu(size, offset, dtype) -> None:
    check(*size, offset, dtype)
    check_second_moment(*size, dtype)


def check_second_moment(tokens, channels, images, dtype) -> None:
    """The drop-in for ``xca.second_moment``, and its gradient."""
    xc = torch.randn(images, tokens, channels).to(DEVICE, dtype)
    upstream = torch.randn(images, channels, channels).to(DEVICE)
    exact, plain, ours = [], [], []
    for found, function, values in (
        (exact, xca.second_moment, xc.double()),
        (plain, xca.second_moment, xc),
        (ours, lambda x: second_moment(x, kernels="triton"), xc),
    ):
        leaf = values.detach().requires_grad_()
        out = function(leaf)
        found += [out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]]
    assert torch.equal(ours[0], ours[0].mT)
    for result, baseline, reference in zip(ours, plain, exact, strict=True):
        assert result.dtype == baseline.dtype
        error = (result.double() - reference).norm()
        assert error <= 2 * (baseline.double() - reference).norm() + unit(result.dtype) * reference.norm()


@interpreted
@DTYPES
@pytest.mark.parametrize("size", [(1, 32, 3), (49, 96, 2), (130, 24, 2)], ids=str)
def test_second_moment_of_centred_tokens(size, dtype) -> None:
    check_second_moment(*size, dtype)


def check_extremes() -> None:
    x = (6e4 * (2 * torch.rand(2, 577, 32) - 1)).to(DEVICE, torch.float16)
    x[:, :, 5] = 6e4
    x[:, 3] = 6e4  # a token without variance
    for scale in (1e-9, 1.0, 1e5):  # of gradients, which float16 does not hold
        upstream = torch.randn(2, 32).to(DEVICE), scale * torch.randn(2, 32, 32).to(DEVICE)
        plain = results(x.float(), upstream)
        ours = results(x, upstream, kernels="triton")
        assert all(a.isfinite().all() for a in (*plain, *ours[:3]))
        assert not ours[3].isnan().any()  # at that token it is beyond float16 for the largest upstream gradient
        torch.testing.assert_close(ours[1], plain[1], rtol=2e-3, atol=1.0)
        others = torch.arange(577) != 3
        error = (ours[3][:, others].float() - plain[3][:, others]).norm()
        assert error <= 4e-3 * plain[3][:, others].norm() + 2.0**-24 * plain[3].numel() ** 0.5


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_float16_values_stay_finite() -> None:
    check_extremes()


@gpu
@no_gpu
def test_large_float16_values_stay_finite_on_a_gpu() -> None:
    check_extremes()


@interpreted
def test_symmetric_deterministic_and_seen(split) -> None:
    x = draw(100, 96, 1, 1, torch.bfloat16)
    upstream = torch.randn(1, 96), torch.randn(1, 96, 96)
    with observe_kernels() as names:
        first, again = (results(x, upstream, kernels="triton") for _ in range(2))
        second_moment(x, kernels="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[1], first[1].mT)
    assert names == ["norm_moments", "norm_moments", "second_moment"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_its_dtype_and_norms_in_float32(dtype) -> None:
    x = draw(49, 32, 2, 10, torch.float32)
    upstream = torch.randn(2, 32), torch.randn(2, 32, 32)
    exact = results(x.double(), upstream)
    with torch.autocast("cpu", dtype=dtype):
        plain, ours = (results(x, upstream, kernels=kernels) for kernels in ("plain", "triton"))
    assert all(a.dtype == torch.float32 for a in ours)
    for i, (result, baseline, reference) in enumerate(zip(ours, plain, exact, strict=True)):
        error = (result.double() - reference).norm() / reference.norm()
        rounding = unit(dtype if i == 3 else torch.float32)  # G + G^T is rounded to the dtype of the products
        assert error <= 2 * (baseline.double() - reference).norm() / reference.norm() + rounding
        assert i in (0, 2) or error > unit(dtype) / 50  # it did multiply in that dtype
        assert i not in (0, 2) or error < 1e-6


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_torch_knows_the_operations() -> None:
    for x in (torch.randn(2, 9, 32), torch.randn(9, 2, 32).transpose(0, 1)):
        x.requires_grad_()
        torch.library.opcheck(torch.ops.xcit.norm_moments.default, (x, 1e-6, torch.float32))
        torch.library.opcheck(torch.ops.xcit.second_moment.default, (x,))
        with torch.no_grad():
            mean, second, stats = norm_moments(x, kernels="triton")
            values = (x.detach(), stats, mean, mean, second, torch.float32)
            torch.library.opcheck(torch.ops.xcit.norm_moments_backward.default, values)


class Both(torch.nn.Module):
    def forward(self, x):
        mean, second, stats = norm_moments(x, kernels="triton")
        return mean.sum(1) + second.square().sum((1, 2)) + stats.sum() + second_moment(x, kernels="triton").sum()


@interpreted
def test_compiles_and_exports() -> None:
    module = Both()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for size in (9, 12):  # the second with a symbolic size
        x = torch.randn(2, size, 32, requires_grad=True)
        grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (module, compiled)]
        torch.testing.assert_close(*grads)
    dims = {0: torch.export.Dim("images"), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=(dims,))
    other = torch.randn(3, 20, 32)
    torch.testing.assert_close(exported.module()(other), module(other))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_honour() -> None:
    x = torch.randn(1, 9, 32)
    with pytest.raises(ConfigError, match=r"'cuda'.*plain, triton"):
        norm_moments(x, kernels="cuda")
    with pytest.raises(ConfigError, match=r'at most 1024 channels; got 1025.*kernels="plain"'):
        norm_moments(torch.randn(1, 2, 1025), kernels="triton")
    if not INTERPRETED:
        for function in (norm_moments, second_moment):
            with pytest.raises(BackendError, match=r'cpu.*kernels="plain"'):
                function(x, kernels="triton")
