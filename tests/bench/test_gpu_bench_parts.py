"""Parts of the GPU benchmark: names of cases, floors, profiles, the largest image, the forms' fit, the tables."""

import json

import numpy as np
import pytest
import torch

from xcit.bench import (
    deploy_models,
    gpu_calibrate,
    gpu_cases,
    gpu_contenders,
    gpu_floors,
    gpu_largest,
    gpu_peaks,
    gpu_profile,
    gpu_tables,
    results,
    timer,
)
from xcit.bench.cases import XCACase
from xcit.bench.gpu_budget import Budget
from xcit.bench.gpu_cases import Entry, GpuCase
from xcit.bench.runner import OutputsDifferError
from xcit.errors import ConfigError, DataError, UnknownNameError
from xcit.models.xcit import XCiT
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*")

CPU = torch.device("cpu")
NANO = GpuCase("inference", "xcit_nano_12_p16", 64, 1, "float32")
PEAKS = gpu_peaks.Peaks(matrix_tflops=100.0, copy_gbs=1000.0)


def silent(line):
    pass


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_cases():
    for case in gpu_cases.CASES:
        assert gpu_cases.parse(str(case)) == case
    assert gpu_cases.parse("inference/xcit_nano_12_p16/64/max/float32").batch_size == gpu_cases.FOUND
    assert len(set(gpu_cases.CASES)) == len(gpu_cases.CASES)
    assert gpu_cases.select([]) == list(gpu_cases.HEADLINE)
    only = gpu_cases.select(["training/*/384/*/amp-bfloat16"])
    assert {(case.model, case.batch_size) for case in only} == {("xcit_small_12_p8", 32), ("xcit_large_24_p8", 8)}
    assert {case.batch_size for case in gpu_cases.select([], batch=7)} == {1, 7}


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("inference/xcit_nano_12_p16/64/1", ConfigError, "GROUP/MODEL/SIZE/BATCH/PRECISION"),
        ("inference/xcit_nano_12_p16/64/0/float32", ConfigError, "one image"),
        ("inference/xcit_nano_12_p16/16/1/float32", ConfigError, "32 px"),
        ("trainin/xcit_nano_12_p16/64/1/float32", UnknownNameError, "'training'"),
        ("training/xcit_nan_12_p16/64/1/float32", UnknownNameError, "xcit_nano_12_p16"),
        ("training/xcit_nano_12_p16/64/1/bf16", UnknownNameError, "amp-bfloat16"),
        ("trian*", UnknownNameError, "--list"),
    ],
)
def test_names_that_are_none(name, error, says):
    with pytest.raises(error, match=says):
        gpu_cases.select([name])


def test_a_batch_that_is_none():
    with pytest.raises(ConfigError, match="one image"):
        gpu_cases.select([], batch=0)


def test_who_competes():
    headline = {str(case): case for case in gpu_cases.HEADLINE}
    batches = headline["inference/xcit_small_12_p16/224/256/bfloat16"]
    names = [str(entry) for entry in gpu_cases.entries(batches)]
    assert names[0] == "timm eager"
    assert len(set(names)) == len(names)
    assert {"timm channels-last", "timm compile", "timm autotune", "folded compile triton", "ours graphs triton"} <= {
        *names
    }
    assert {"deit_small_patch16_224 eager", "swin_tiny_patch4_window7_224 compile", "convnext_tiny compile"} <= {*names}
    single = gpu_cases.entries(headline["inference/xcit_small_12_p16/224/1/bfloat16"], most_tier=1)
    assert {"timm graphs", "folded graphs triton"} <= {str(entry) for entry in single}
    training = gpu_cases.entries(headline["training/xcit_small_12_p8/384/32/amp-bfloat16"])
    assert not any(entry.source == "folded" or entry.run == "graphs" for entry in training)
    kept = gpu_cases.entries(batches, keep=["folded *"], skip=["*triton", "* graphs"])
    assert [str(entry) for entry in kept] == ["timm eager", "folded eager", "folded compile"]
    with pytest.raises(UnknownNameError, match="folded"):
        gpu_cases.entries(batches, keep=["foldet*"])


# --- floors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "size"), [("xcit_small_12_p16", 224), ("xcit_large_24_p8", 384)])
def test_multiply_adds_are_the_published_ones(model, size):
    """The zoo's counts of the token form (mmpretrain, timm) have norms in them, some hundredths of the whole."""
    stages = gpu_floors.stages(ARCHITECTURES[model], image_size=size, batch_size=2, form="tokens", folded=False)
    adds = sum(stage.count * stage.multiply_adds for stage in stages) / 2
    published = CHECKPOINTS[f"{model}_{'224' if size == 224 else '384_dist'}"].gmacs_port
    assert 0.99 < adds / 1e9 / published < 1


@pytest.mark.parametrize(("model", "size"), [("xcit_nano_12_p8", 100), ("xcit_tiny_12_p16", 224)])
def test_multiply_adds_are_those_that_are_counted(model, size):
    with torch.device("meta"):
        ours = XCiT(**ARCHITECTURES[model].config, attn_form="tokens").eval()
    stages = gpu_floors.stages(ARCHITECTURES[model], image_size=size, batch_size=1, form="tokens", folded=False)
    adds = sum(stage.count * stage.multiply_adds for stage in stages)
    assert adds == deploy_models.count_multiply_adds(ours, size)


def test_multiply_adds_of_a_folded_model_are_those_that_are_counted():
    case = GpuCase("inference", "xcit_nano_12_p16", 160, 1, "float32")
    folded = gpu_contenders.build_module(Entry("folded", case.model, "eager"), case.image_size, CPU)
    folded.set_attn_form("covariance")
    image = torch.empty(1, 3, 160, 160)
    counted = gpu_contenders.count_multiply_adds(folded, tuple(image.shape), image)
    architecture = ARCHITECTURES[case.model]
    stages = gpu_floors.stages(architecture, image_size=160, batch_size=1, form="covariance", folded=True)
    floor = sum(stage.count * stage.multiply_adds for stage in stages)
    # the floor takes half of the symmetric moment, eager mode three quarters of it or all
    moment = 12 * 100 * 128**2
    assert floor <= counted <= floor + moment / 2 + 0.02 * counted


def test_bytes_of_a_block_by_hand():
    architecture = ARCHITECTURES["xcit_small_12_p16"]  # 384 wide, 8 heads
    stages = gpu_floors.stages(architecture, image_size=224, batch_size=3, form="tokens", folded=True)
    block = {stage.name: stage for stage in stages if stage.name.startswith("block")}
    T, square = 3 * 196 * 384, 384 * 384
    assert {name: stage.values("inference") for name, stage in block.items()} == {
        "block: XCA qkv": 4 * T + 3 * square,
        "block: XCA gram": 2 * T + 3 * 384 * 48,
        "block: XCA mix, project": 3 * T + 3 * 384 * 48 + square,
        "block: LPI": 2 * T + 18 * 384,
        "block: network 1": 5 * T + 4 * square,
        "block: network 2": 6 * T + 4 * square,
    }
    # forward with a second pass; backward reads x and the gradient twice, writes one; weights read, their gradients too
    assert block["block: LPI"].values("training") == 8 * T + 3 * 18 * 384
    assert all(stage.count == 12 for stage in block.values())
    assert block["block: LPI"].operations("training") == 3 * 18 * T


def test_a_floor_takes_the_slower_of_bytes_and_arithmetic_in_each_stage():
    bytes_bound = gpu_floors.Stage("a", 2, 1e9, 0, 0, 1e9)
    adds_bound = gpu_floors.Stage("b", 1, 0, 1e6, 0, 1e12)
    found = gpu_floors.floor([bytes_bound, adds_bound], "inference", 2, PEAKS)
    assert found.ms == pytest.approx(2 * 2e9 / 1e12 * 1e3 + 2e12 / 1e14 * 1e3)
    assert found.bytes == pytest.approx(4e9 + 2e6)
    assert found.mib == pytest.approx(found.bytes / 2**20)
    assert found.multiply_adds == pytest.approx(1.002e12)


def test_a_models_floor():
    large = GpuCase("inference", "xcit_small_12_p8", 1024, 1, "bfloat16")
    small = GpuCase("inference", "xcit_small_12_p16", 224, 1, "bfloat16")
    bandwidth = gpu_peaks.Peaks(1e9, 1000.0)  # arithmetic is free: the form that moves less
    assert any("moment" in stage.name for stage in gpu_floors.model_stages(large, bandwidth)[0])
    slow = gpu_peaks.Peaks(1.0, 1e9)  # bytes are free: few tokens take the token form
    assert any("qkv" in stage.name for stage in gpu_floors.model_stages(small, slow)[0])
    inference, training = (
        gpu_floors.model_floor(GpuCase(group, "xcit_small_12_p8", 224, 8, "amp-bfloat16"), PEAKS)
        for group in ("inference", "training")
    )
    assert 3 < training.ms / inference.ms < 6
    adamw = 7 * 4 * ARCHITECTURES["xcit_small_12_p8"].num_params
    assert training.bytes > 2 * inference.bytes + adamw


def test_peaks(monkeypatch):
    asked = []

    def known(steps, plan, kind):
        (step,) = steps.values()
        step()
        asked.append(kind)
        return {"": [4.0, 2.0, 2.0]}

    monkeypatch.setattr(gpu_peaks, "SIDE", {"cpu": 100})
    monkeypatch.setattr(gpu_peaks, "COPIED_BYTES", {"cpu": 4000})
    monkeypatch.setattr(timer, "time_interleaved", known)
    found = gpu_peaks.measure_peaks(torch.bfloat16, CPU)
    assert found.matrix_tflops == pytest.approx(2e6 / 2e-3 / 1e12)
    assert found.copy_gbs == pytest.approx(8000 / 2e-3 / 1e9)
    assert asked == ["cpu", "cpu"]


# --- profile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopB_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matmul"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norm"),
        ("triton_per_fused_add_mul_native_layer_norm_3", "norm"),
        ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float>", "depthwise conv"),
        ("_lpi_forward_kernel", "depthwise conv"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 6, false, false>", "softmax"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("triton_poi_fused_mul_sigmoid_2", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("sm80_xmma_fprop_implicit_gemm_bf16", "convolution"),
        ("triton_poi_fused__native_batch_norm_legit_no_training_convolution_gelu_4", "elementwise"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "norm"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("reduce_1Block_kernel", "other"),
    ],
)
def test_what_a_kernel_does(name, kind):
    assert gpu_profile.class_of(name) == kind


def test_a_profile(tmp_path, shallow):
    case = GpuCase("inference", "xcit_nano_12_p16", 64, 1, "float32")
    said = []
    out = tmp_path / "profile.csv"
    rows = gpu_profile.run(case, ["timm eager", "ours eager"], CPU, out=out, top=8, say=said.append)
    assert results.read(out, gpu_profile.COLUMNS) == rows
    for name in ("timm eager", "ours eager"):
        own = [row for row in rows if row["competitor"] == name]
        assert [row["rank"] for row in own] == [str(rank) for rank in range(1, 10)]
        assert sum(float(row["share"]) for row in own) == pytest.approx(1, abs=1e-2)
        assert sum(float(row["ms"]) for row in own) == pytest.approx(float(own[0]["step_ms"]), rel=1e-2)
        convolutions = [row for row in own if "conv" in row["kernel"]]
        assert convolutions
        assert own[-1]["kernel"].endswith("others")
    table = gpu_tables.profile_table(tmp_path)
    assert table.startswith("Not measured yet: `python -m xcit.bench gpu-profile")
    out.rename(gpu_profile.path(tmp_path))
    assert len([line for line in gpu_tables.profile_table(tmp_path).splitlines() if line.startswith("| `")]) == 2


def test_a_profile_of_what_is_not_there():
    with pytest.raises(UnknownNameError, match="ours eager"):
        gpu_profile.run(NANO, ["our eager"], CPU, out=None)
    with pytest.raises(ConfigError, match="max"):
        gpu_profile.run(gpu_cases.parse("inference/xcit_nano_12_p16/64/max/float32"), ["ours eager"], CPU, out=None)


@pytest.fixture
def shallow(monkeypatch):
    """One block instead of twelve."""
    create = gpu_contenders.create_peer
    monkeypatch.setattr(
        gpu_contenders,
        "create_peer",
        lambda name, *, num_classes, options=None: create(
            name, num_classes=num_classes, options={**(options or {}), "depth": 1}
        ),
    )


# --- the largest image ------------------------------------------------------------------------------------------------


def device_with(memory_mib, limit_px):
    """A device on which an image of s px takes s² / 1000 MiB and a bit, up to a limit."""

    def attempt(side):
        assert side % 32 == 0
        fits = side <= limit_px
        return gpu_largest.Try(fits, side**2 / 1000 + 100, 0.1, "" if fits else "memory")

    return attempt


@pytest.mark.parametrize("limit", [2500, 5000, 17_000])
def test_the_search_ends_at_the_largest_side(limit):
    tried = gpu_largest.search(device_with(None, limit), first=2048, most=None, multiple=32, tries=40, memory_mib=None)
    assert max(side for side, each in tried.items() if each.fits) == limit // 32 * 32
    assert min(side for side, each in tried.items() if not each.fits) == limit // 32 * 32 + 32


def test_peaks_shorten_the_search():
    memory = 17_000**2 / 1000 + 100
    tried = gpu_largest.search(
        device_with(memory, 16_500), first=2048, most=None, multiple=32, tries=12, memory_mib=memory
    )
    assert max(side for side, each in tried.items() if each.fits) == 16_480
    assert sorted(tried)[:2] == [2048, 3072]
    assert all(side > 15_000 for side in sorted(tried)[2:])


def test_the_search_has_bounds():
    attempt = device_with(None, 10**6)
    assert max(gpu_largest.search(attempt, first=64, most=100, multiple=32, tries=9)) == 96
    assert len(gpu_largest.search(attempt, first=2048, most=None, multiple=32, tries=3)) == 3
    asked = iter([True, True, False])
    tried = gpu_largest.search(attempt, first=64, most=None, multiple=32, tries=9, go_on=lambda: next(asked))
    assert len(tried) == 2
    nothing = gpu_largest.search(device_with(None, 0), first=64, most=None, multiple=32, tries=9)
    assert not any(each.fits for each in nothing.values())


def test_the_largest_image(tmp_path, shallow, monkeypatch):
    forward = gpu_largest.forward_once

    def small(module, side, device):
        return forward(module, side, device) if side < 96 else gpu_largest.Try(False, why="memory")

    monkeypatch.setattr(gpu_largest, "forward_once", small)
    out = gpu_largest.path(tmp_path)
    rows = gpu_largest.run(["xcit_nano_12_p16"], CPU, out=out, most=128, say=silent)
    assert [(row["source"], row["side"], row["refused_side"], row["tokens"]) for row in rows] == [
        ("timm", "64", "96", "16"),
        ("folded", "64", "96", "16"),
    ]
    assert gpu_largest.run(["xcit_nano_12_p16"], CPU, out=out, most=128, say=silent) == []
    assert "| `xcit_nano_12_p16` |  | 64 | 64 |  | 1.00× |" in gpu_tables.largest_table(tmp_path)
    assert gpu_largest.run(["xcit_nano_12_p16"], CPU, out=None, most=64, budget=Budget(0.0), say=silent) == []


def test_a_forward_pass_that_does_not_fit():
    class Full(torch.nn.Module):
        def __init__(self, error):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.error = error

        def forward(self, x):
            raise self.error

    assert gpu_largest.forward_once(Full(torch.OutOfMemoryError("full")), 64, CPU).why == "memory"
    odd = gpu_largest.forward_once(Full(RuntimeError("integer out of range\nmore")), 64, CPU)
    assert (odd.fits, odd.why) == (False, "integer out of range")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ConfigError, "--most"),
        ({"most": 16}, ConfigError, "32 px"),
        ({"most": 64, "models": ["xcit_nano"]}, UnknownNameError, "xcit_nano_12_p16"),
    ],
)
def test_what_the_largest_image_needs(options, error, says):
    with pytest.raises(error, match=says):
        gpu_largest.run(**{"models": ["xcit_nano_12_p16"], "device": CPU, "out": None} | options)


# --- the forms' fit ---------------------------------------------------------------------------------------------------


def test_nonnegative_least_squares_against_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(0)
    for _ in range(20):
        matrix, target = draw.normal(size=(12, 4)) * [1.0, 1e6, 1e-3, 1.0], draw.normal(size=12)
        expected, residual = optimize.nnls(matrix, target)
        found = np.array(gpu_calibrate.nonnegative_least_squares(matrix, target))
        assert (found >= 0).all()
        assert np.linalg.norm(matrix @ found - target) == pytest.approx(residual, rel=1e-9)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def forms_rows(tokens, covariance, cases=gpu_calibrate.GRID, **others):
    """Rows whose times are exactly those of known terms."""
    rows = []
    for case in cases:
        size = {name: value for name, value in vars(case).items() if name != "mode"}
        for form, terms in (("tokens", tokens), ("covariance", covariance)):
            rows.append(
                dict.fromkeys(gpu_calibrate.COLUMNS, "1")
                | {name: str(value) for name, value in vars(case).items()}
                | {"date": "2026-01-02T03:04:05Z", "dtype": "bfloat16", "form": form, "kernels": "plain"}
                | {"hardware": "Some GPU", "median_ms": repr(terms.ns(form, **size) / 1e6)}
                | others
            )
    return rows


TOKENS = gpu_calibrate.Terms(products=3e-6, values=8e-3, square=0.0, call=1.2e5)
COVARIANCE = gpu_calibrate.Terms(products=3.5e-6, values=4e-3, square=4e-5, call=3e5)


def test_a_fit_finds_what_times_were_made_of(tmp_path):
    rows = forms_rows(TOKENS, COVARIANCE)
    fits = gpu_calibrate.fit_rows(rows)
    assert set(fits) == {("Some GPU", "bfloat16", mode, "plain") for mode in ("inference", "training")}
    for fit in fits.values():
        for found, made in ((fit.tokens, TOKENS), (fit.covariance, COVARIANCE)):
            assert list(vars(found).values()) == pytest.approx(list(vars(made).values()), rel=1e-6)
        assert (fit.worst_choice, fit.wrong, fit.num_sizes) == (1.0, 0, len(gpu_calibrate.GRID) // 2)
    said = []
    content = gpu_calibrate.write_fit(rows, tmp_path / "fit.json", say=said.append)
    assert json.loads((tmp_path / "fit.json").read_text()) == content
    assert [each["needs_grad"] for each in content["fits"]] == [False, True]
    assert len(said) == 2


def test_a_fit_says_how_good_its_choices_are():
    rows = forms_rows(TOKENS, COVARIANCE)
    odd = next(row for row in rows if row["form"] == "covariance" and row["mode"] == "inference")
    newer = odd | {"date": "2026-02-01T00:00:00Z", "median_ms": repr(float(odd["median_ms"]) * 50)}
    fit = gpu_calibrate.fit_rows([newer, *rows])["Some GPU", "bfloat16", "inference", "plain"]
    assert fit.num_sizes == len(gpu_calibrate.GRID) // 2
    assert fit.wrong >= 1 or fit.worst_choice == 1.0
    with pytest.raises(DataError, match="gpu-calibrate"):
        gpu_calibrate.write_fit(rows[:4], None)


def test_calibration_in_small(tmp_path):
    out = gpu_calibrate.path(tmp_path)
    plan = timer.Plan(warmup=0, min_rounds=2, max_rounds=2, budget_s=0.0, min_sample_ms=0.0)
    grid = [XCACase(128, 4, 2, 64, mode) for mode in ("inference", "training")]
    said = []
    rows = gpu_calibrate.run(grid, CPU, dtype="float32", out=out, plan=plan, say=said.append)
    assert results.read(out, gpu_calibrate.COLUMNS) == rows
    assert [(row["mode"], row["form"], row["kernels"]) for row in rows] == [
        (mode, form, "plain") for mode in ("inference", "training") for form in ("tokens", "covariance")
    ]
    assert all(float(row["max_rel_diff"]) < 1e-5 for row in rows)
    assert gpu_calibrate.run(grid, CPU, dtype="float32", out=out, plan=plan, say=silent) == []
    table = gpu_tables.forms_table(tmp_path)
    assert "| 128 / 4, training, plain |" in table
    gpu_calibrate.run(grid, CPU, dtype="float32", out=None, plan=plan, budget=Budget(0.0), say=said.append)
    assert "2 sizes are left" in said[-1]


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch):
    xca = gpu_calibrate.xca

    def wrong(x, weights, *, form):
        return xca(x, weights, form=form) * (1.01 if form == "covariance" else 1.0)

    monkeypatch.setattr(gpu_calibrate, "xca", wrong)
    plan = timer.Plan(warmup=0, min_rounds=1, max_rounds=1, budget_s=0.0, min_sample_ms=0.0)
    said = []
    with pytest.raises(OutputsDifferError, match="1 of what was asked"):
        gpu_calibrate.run(
            [XCACase(128, 4, 1, 64, "inference")], CPU, dtype="float32", out=None, plan=plan, say=said.append
        )
    assert "covariance plain" not in said[-1]
    assert "tokens plain" in said[-1]


# --- tables -----------------------------------------------------------------------------------------------------------


def gpu_row(case, entry, ms, **others):
    """A row of a competitor whose model eager takes 100 ms."""
    return (
        dict.fromkeys(gpu_cases.COLUMNS, "1")
        | {"date": "2026-01-02T03:04:05Z", "case": str(case), "model": entry.model, "source": entry.source}
        | {"run": entry.run, "kernels": entry.kernels, "mode": case.mode, "precision": case.precision}
        | {"image_size": str(case.image_size), "batch_size": str(case.batch_size), "hardware": "Some GPU"}
        | {"median_ms": f"{ms}", "ratio_vs_timm_eager": f"{100 / ms}", "peak_mib": "50", "matrix_share": "0.5"}
        | {"floor_share": "0.25", "matrix_tflops": "700", "copy_gbs": "3000", "max_rel_diff": "1.0e-03"}
        | others
    )


def test_nothing_measured_says_how(tmp_path):
    for table, verb in (
        (gpu_tables.speed_table, "gpu`"),
        (gpu_tables.competitors_table, "gpu`"),
        (gpu_tables.floors_table, "gpu`"),
        (gpu_tables.profile_table, "gpu-profile"),
        (gpu_tables.largest_table, "gpu-largest"),
        (gpu_tables.forms_table, "gpu-calibrate"),
    ):
        assert table(tmp_path).startswith(f"Not measured yet: `python -m xcit.bench {verb}")


def test_tables_of_what_was_measured(tmp_path):
    case = gpu_cases.HEADLINE[0]
    model = case.model
    timm = Entry("timm", model, "eager")
    rows = [
        gpu_row(case, timm, 120.0),
        gpu_row(case, timm, 100.0),  # the last one counts
        gpu_row(case, Entry("timm", model, "compile"), 50.0),
        gpu_row(case, Entry("timm", model, "autotune"), 40.0, peak_mib=""),
        gpu_row(case, Entry("ours", model, "eager"), 90.0),
        gpu_row(case, Entry("folded", model, "eager", "triton"), 30.0, peak_mib="20"),
        gpu_row(case, Entry("folded", model, "graphs", "triton"), 20.0, peak_mib=""),
        gpu_row(GpuCase("inference", model, 225, 3, "bfloat16"), timm, 1.0),  # not listed
    ]
    results.append(gpu_cases.path(tmp_path), rows, gpu_cases.COLUMNS)
    head, _, row, _, note = gpu_tables.speed_table(tmp_path).splitlines()
    assert head.count("|") == row.count("|")
    assert row == (
        "| `xcit_small_12_p16` | 224 | 256 | bfloat16 | inference | 100.00 | 40.00 | 30.00 | 20.00 | "
        "folded graphs triton | 5.00× | 2.00× | 50 % | 25 % | 50, 20 (0.40×) |"
    )
    assert note.startswith("Some GPU; products of large matrices reached, in TFLOP/s, bfloat16 700; copies 3000 GB/s")
    assert note.endswith("2026-01-02.")
    shown = gpu_tables.competitors_table(tmp_path).splitlines()
    assert len([line for line in shown if line.startswith("| `")]) == 6
    floors = [line for line in gpu_tables.floors_table(tmp_path).splitlines() if line.startswith("| `")]
    assert floors[-1].split("|")[2].strip() == "the model"
    whole = gpu_floors.model_floor(case, gpu_peaks.Peaks(700.0, 3000.0))
    assert floors[-1].split("|")[-2].strip() == f"{whole.ms:.3f}"


def test_memory_of_the_best_is_that_of_the_same_kernels(tmp_path):
    case = gpu_cases.HEADLINE[0]
    rows = {"timm eager": gpu_row(case, Entry("timm", case.model, "eager"), 100.0)}
    best = gpu_row(case, Entry("folded", case.model, "graphs"), 20.0, peak_mib="")
    assert gpu_tables._peaks(rows | {"best": best}, best) == ""
