import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from xcit.bench import cases, contenders, results, runner, timer
from xcit.errors import BackendError, DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*")

CPU = torch.device("cpu")
PLAN = timer.Plan(warmup=0, min_rounds=2, max_rounds=2, min_sample_ms=0)
LAYER = cases.XCACase(32, 4, 2, 48, "inference")
STEP = replace(LAYER, mode="training")


def run(suite, case, **options):
    return runner.run(
        suite, [case], **{"results_dir": None, "device": CPU, "dtype": torch.float32, "plan": PLAN} | options
    )


@pytest.mark.parametrize("case", [LAYER, STEP], ids=["inference", "training"])
def test_a_layer_from_start_to_row(tmp_path, case):
    lines = []
    rows = run(cases.XCA, case, results_dir=tmp_path, report=lines.append)
    with (tmp_path / "xca.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        on_disk = list(reader)
    assert on_disk == rows
    assert tuple(reader.fieldnames) == cases.XCA.columns
    assert len(lines) == 1

    by_name = {row["competitor"]: row for row in rows}
    assert list(by_name) == ["timm", "tokens", "covariance", "auto"]
    assert {name: row["form"] for name, row in by_name.items() if name in ("timm", "tokens", "covariance")} == {
        "timm": "",
        "tokens": "tokens",
        "covariance": "covariance",
    }
    assert by_name["auto"]["form"] in ("tokens", "covariance")
    assert float(by_name["timm"]["ratio_vs_timm"]) == 1
    for row in rows:
        assert row["embed_dim"] == "32"
        assert row["num_tokens"] == "48"
        assert row["dtype"] == "float32"
        assert float(row["p25_ms"]) <= float(row["median_ms"]) <= float(row["p75_ms"])
        assert row["rounds"] == "2"
        assert float(row["max_rel_diff"]) < 1e-5
        assert float(row["peak_mib"]) > 0
        assert (float(row["saved_mib"]) > 0) == (case.mode == "training")


def test_what_a_layer_saves_against_a_count_by_hand():
    rows = runner.measure(cases.XCA_MEMORY, STEP, device=CPU, dtype=torch.float64, plan=PLAN)
    timm = next(row for row in rows if row["competitor"] == "timm")
    tokens = 2 * 48 * 32 * 8  # bytes of one (B, N, C) tensor
    # seven are needed by the equation's gradients: x, q, k, v, q̂, k̂, y; layout may copy a few of them
    assert 7 * tokens <= float(timm["saved_mib"]) * 2**20 <= 10 * tokens
    assert "median_ms" not in timm


def test_the_covariance_form_saves_at_most_two_fifths_of_timms():
    case = next(c for c in cases.XCA_MEMORY.cases if c.embed_dim == 384)
    assert case.num_tokens == 2304
    rows = runner.measure(cases.XCA_MEMORY, case, device=CPU, dtype=torch.float32, plan=PLAN)
    saved = {row["competitor"]: float(row["saved_mib"]) for row in rows}
    assert saved["auto"] <= 0.4 * saved["timm"]


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_backbone_from_start_to_row(mode):
    rows = run(cases.BACKBONE, cases.BackboneCase("xcit_nano_12_p16", 32, 2, mode))
    assert [row["competitor"] for row in rows] == ["timm", "tokens", "covariance", "auto"]
    assert all(float(row["max_rel_diff"]) < 1e-4 for row in rows)
    assert [row["form"] for row in rows[:3]] == ["", "tokens", "covariance"]


@pytest.mark.parametrize("mode", cases.MODES)
def test_competitors_that_differ_are_not_timed(monkeypatch, mode):
    def build_wrong(*args, **kwargs):
        built = contenders.build(*args, **kwargs)
        with torch.no_grad():
            built[2].module.temperature[0] *= 1.05
        return built

    def must_not_run(*args):
        raise AssertionError("timed")

    monkeypatch.setattr(runner, "build", build_wrong)
    monkeypatch.setattr(runner.timer, "time_interleaved", must_not_run)
    with pytest.raises(runner.OutputsDifferError, match=r"'covariance' differs from 'timm' by .* Nothing was timed"):
        run(cases.XCA, replace(LAYER, mode=mode))


def test_a_difference_in_a_gradient_alone_is_found():
    def contender(name, scale):
        layer = nn.Linear(2, 2)
        nn.init.ones_(layer.weight)

        def step():
            y = layer(torch.ones(1, 2))
            y.sum().backward()
            layer.weight.grad *= scale
            return torch.ones(3)

        return contenders.Contender(name, layer, step, layer.zero_grad)

    assert runner.compare([contender("a", 1), contender("b", 1)], LAYER, 1e-6)["b"] == 0
    with pytest.raises(runner.OutputsDifferError, match="in 'weight'"):
        runner.compare([contender("a", 1), contender("b", 1.1)], LAYER, 1e-6)
    with pytest.raises(runner.OutputsDifferError, match="in 'weight'"):
        runner.compare([contender("a", 1), contender("b", float("nan"))], LAYER, 1e-6)


def test_every_parameter_and_statistic_is_random():
    models = contenders.build(
        cases.BackboneCase("xcit_nano_12_p16", 32, 1, "inference"), ("timm", "tokens"), device=CPU, dtype=torch.float32
    )
    for contender in models:
        for name, value in [*contender.module.named_parameters(), *contender.module.named_buffers()]:
            if value.is_floating_point() and value.numel() > 4:
                assert value.std() > 1e-3, name


def test_a_device_that_cannot_be_measured_is_refused():
    with pytest.raises(BackendError, match="mps"):
        run(cases.XCA, LAYER, device=torch.device("mps"))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="CUDA"):
            run(cases.XCA, LAYER, device=torch.device("cuda"))


def test_an_old_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "xca.csv").write_text("other,columns\n")
    monkeypatch.setattr(runner, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(DataError, match="other, columns"):
        run(cases.XCA, LAYER, results_dir=tmp_path)


def test_the_suites_hold_the_cases_that_the_project_promises():
    xca = {(c.batch_size, c.num_tokens, c.mode) for c in cases.XCA.cases if (c.embed_dim, c.num_heads) == (384, 8)}
    assert xca >= {(b, n, mode) for b, n in ((4, 2304), (2, 4096), (1, 16384)) for mode in cases.MODES}
    grid = {(c.embed_dim, c.num_heads, c.num_tokens, c.mode) for c in cases.XCA_FORMS.cases}
    assert grid == {
        (*width, n, mode)
        for width in ((128, 4), (192, 4), (384, 8), (512, 8), (768, 16))
        for n in (196, 576, 784, 2304, 4096, 16384)
        for mode in cases.MODES
    }
    assert cases.BackboneCase("xcit_small_12_p8", 512, 1, "inference") in cases.BACKBONE.cases
    assert all(set(results.ENVIRONMENT) < set(suite.columns) for suite in cases.SUITES.values())


@pytest.mark.slow
def test_compiled_competitors_compute_the_same():
    rows = run(cases.XCA, LAYER, compiled=True)
    assert [row["competitor"] for row in rows][-2:] == ["timm compiled", "auto compiled"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LAYER, STEP], ids=["inference", "training"])
def test_a_layer_on_cuda(case):
    rows = run(cases.XCA, case, device=torch.device("cuda"))
    assert all(float(row["median_ms"]) > 0 and row["device"] == "cuda" for row in rows)
