"""`xcit bench` in small: that competitors are compared, what a row holds, what is refused."""

import math

import pytest
import torch
from torch import nn

from xcit.bench import deploy, deploy_contenders, deploy_models, deploy_runtimes, results, timer
from xcit.bench.deploy_cases import DeployCase, Entry
from xcit.bench.runner import OutputsDifferError
from xcit.errors import BackendError, DataError

FAST = timer.Plan(warmup=0, min_rounds=3, max_rounds=3, budget_s=0.01, min_sample_ms=0.0)
SMALL = DeployCase("xcit", "xcit_nano_12_p16", 64, 2)
OPTIONS = deploy.Options(runtimes=("eager",), plan=FAST, memory=False, peak_budget_s=0.0)


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    """Two blocks instead of twelve, and small matrices."""
    create = deploy_models.create_peer

    def create_shallow(name, *, num_classes, options=None):
        shallow = {"depth": 2} if name.startswith(("xcit", "vit", "deit")) else {}
        return create(name, num_classes=num_classes, options={**(options or {}), **shallow})

    monkeypatch.setattr(deploy_models, "create_peer", create_shallow)
    monkeypatch.setattr("xcit.bench.deploy_peak.SIDES", {"cpu": (64,)})


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_run_from_models_to_a_file(tmp_path):
    seen = []
    options = OPTIONS._replace(dtypes=("float32", "bfloat16"))
    out = tmp_path / "mine.csv"
    rows = deploy.run([SMALL], options, out=out, report=lambda case, rows: seen.append((case, len(rows))))
    assert seen == [(SMALL, 3)] * 2
    assert results.read(out, deploy.COLUMNS) == rows
    assert [(row["dtype"], row["source"]) for row in rows] == [
        (dtype, source) for dtype in ("float32", "bfloat16") for source in ("timm", "ours", "folded")
    ]
    for row in rows:
        assert set(row) == set(deploy.COLUMNS)
        assert row["case"] == str(SMALL)
        assert float(row["median_ms"]) <= float(row["p90_ms"])
        assert float(row["images_per_second"]) == pytest.approx(2000 / float(row["median_ms"]), rel=0.01)
        assert float(row["gflops"]) == pytest.approx(
            2 * 2 * int(row["multiply_adds"]) / float(row["median_ms"]) / 1e6, rel=0.05, abs=0.06
        )
        assert float(row["matrix_gflops"]) > 0
        assert (row["rounds"], row["threads"], row["peak_mib"]) == ("3", "1", "")
        assert row["hardware"]
        assert (row["ratio_vs_eager"] == "1.000") == (row["source"] == "timm")
        assert row["ratio_vs_openvino"] == ""
    exact = {row["source"]: float(row["max_rel_diff"]) for row in rows if row["dtype"] == "float32"}
    assert exact["timm"] == 0
    assert 0 < exact["folded"] < 1e-5
    rough = [float(row["max_rel_diff"]) for row in rows if row["dtype"] == "bfloat16"]
    assert min(rough) > 1e-4  # they were bfloat16
    work = {row["source"]: int(row["multiply_adds"]) for row in rows}
    assert work["folded"] < work["ours"]


def test_threads_are_the_callers_again_afterwards():
    before = torch.get_num_threads()
    rows = deploy.run([SMALL], OPTIONS._replace(threads=before + 1))
    assert torch.get_num_threads() == before
    assert {row["threads"] for row in rows} == {str(before + 1)}


def test_peers_at_one_size(monkeypatch):
    from xcit.bench import deploy_cases

    peers = {"xcit_nano_12_p16": (deploy_cases.Peer("deit_tiny_patch16_224", 224, 72.2),)}
    monkeypatch.setattr(deploy_cases, "PEERS", peers)
    rows = deploy.run([DeployCase("peers", "xcit_nano_12_p16", 64, 1)], OPTIONS)
    assert [(row["source"], row["model"], row["image_size"]) for row in rows] == [
        ("folded", "xcit_nano_12_p16", "64"),
        ("peer", "deit_tiny_patch16_224", "64"),
    ]
    assert rows[0]["ratio_vs_eager"] == "1.000"
    assert rows[1]["max_rel_diff"] == "0.0e+00"  # its own eager model is its measure


def test_a_peer_with_a_class_token_of_its_own_is_counted():
    """CaiT's, which is a parameter where a module takes it in."""
    model = deploy_models.build("peer", "cait_xxs24_224", 224)
    assert deploy_models.count_multiply_adds(model, 224) == pytest.approx(2.5e9, rel=0.05)  # timm's table has 2.53


def test_steps_of_a_peer_are_the_same_each_time():
    """Swin comes with stochastic depth."""
    model = deploy_models.build("peer", "swin_tiny_patch4_window7_224", 64).train()
    images = deploy_models.make_images(64, 2)
    assert torch.equal(model(images), model(images))


def test_a_training_step():
    rows = deploy.run(
        [DeployCase("training", "xcit_nano_12_p16", 64, 2)], OPTIONS._replace(dtypes=("float32", "bfloat16"))
    )
    assert [(row["source"], row["mode"]) for row in rows] == [("timm", "training"), ("ours", "training")] * 2
    first = rows[0]
    assert float(first["gflops"]) == pytest.approx(
        3 * 2 * 2 * int(first["multiply_adds"]) / float(first["median_ms"]) / 1e6, rel=0.05, abs=0.06
    )


def test_figures_of_samples():
    assert deploy.p90([5.0]) == 5
    assert deploy.p90([float(i) for i in range(10, 0, -1)]) == 9
    row = deploy.times_of([4.0, 1.0, 2.0], batch_size=8)
    assert row == {"median_ms": "2.000", "p90_ms": "4.000", "images_per_second": "4000.00", "rounds": "3"}


def test_ratios_are_taken_within_a_round_and_against_each_runtime_of_the_first_model():
    def entry(source, runtime):
        return Entry(source, "xcit_nano_12_p16", 64, runtime)

    wanted = [entry("timm", "eager"), entry("timm", "openvino"), entry("folded", "openvino")]
    samples = {"timm eager": [8.0, 80.0, 8.0], "timm openvino": [4.0, 40.0, 5.0], "folded openvino": [2.0, 20.0, 4.0]}
    assert deploy.ratios_of(wanted[2], wanted, samples) == {"ratio_vs_eager": "4.000", "ratio_vs_openvino": "2.000"}
    assert deploy.ratios_of(wanted[0], wanted, samples) == {"ratio_vs_eager": "1.000", "ratio_vs_openvino": "0.500"}


# --- what is compared -------------------------------------------------------------------------------------------------


def test_a_model_that_computes_something_else_stops_the_run(monkeypatch):
    build = deploy_models.build

    def wrong(source, model, image_size):
        module = build(source, model, image_size)
        if source == "ours":
            with torch.no_grad():
                module.blocks[1].gamma1.mul_(1.01)
        return module

    monkeypatch.setattr(deploy_models, "build", wrong)
    monkeypatch.setattr(timer, "time_interleaved", lambda *args: pytest.fail("something was timed"))
    with pytest.raises(OutputsDifferError, match=r"'ours eager' differs .* in float32"):
        deploy.run([SMALL], OPTIONS)
    with pytest.raises(OutputsDifferError, match="'ours' differs"):
        deploy.run([DeployCase("training", "xcit_nano_12_p16", 64, 2)], OPTIONS)


def test_a_wrong_gradient_alone_stops_a_training_case(monkeypatch):
    build = deploy_models.build

    def wrong(source, model, image_size):
        module = build(source, model, image_size)
        if source == "ours":
            module.norm.weight.register_hook(lambda grad: 1.1 * grad)
        return module

    monkeypatch.setattr(deploy_models, "build", wrong)
    with pytest.raises(OutputsDifferError, match=r"norm\.weight"):
        deploy_contenders.compare_gradients(DeployCase("training", "xcit_nano_12_p16", 64, 2), torch.device("cpu"))


def test_differences():
    import numpy as np

    truth = np.array([[3.0, 4.0]])
    assert deploy_contenders.relative_difference(truth, truth) == 0
    assert deploy_contenders.relative_difference(np.array([[3.0, 4.5]]), truth) == pytest.approx(0.1)
    assert math.isinf(deploy_contenders.relative_difference(np.array([[3.0, math.nan]]), truth))
    assert math.isinf(deploy_contenders.relative_difference(truth[0], truth))


def test_what_does_not_fit_into_memory_is_left_out_and_said(monkeypatch):
    forward = deploy_runtimes.forward_step
    built = []

    def small_memory(module, images, runtime, dtype, device):
        step = forward(module, images, runtime, dtype, device)
        if type(module).__name__ == "XCiT":  # ours, unfolded
            built.append(module)
            return lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
        return step

    monkeypatch.setattr(deploy_runtimes, "forward_step", small_memory)
    said = []
    rows = deploy.run([SMALL], OPTIONS, say=said.append)
    assert [row["source"] for row in rows] == ["timm", "folded"]
    assert said == [f"{SMALL}: ours eager did not fit into memory and is left out."]


# --- models and what they cost ----------------------------------------------------------------------------------------


def test_models_of_one_architecture_have_the_same_weights_each_time():
    first, second = (deploy_models.build("timm", "xcit_nano_12_p16", 64).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours = deploy_models.build("ours", "xcit_nano_12_p16", 64).state_dict()
    assert torch.equal(ours["blocks.1.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])


def test_multiply_adds_of_a_vit_are_those_of_the_formula():
    model = deploy_models.build("timm", "vit_small_patch16_224", 96)
    n, d, depth = 36, 384, 2
    patches = n * 16 * 16 * 3 * d
    block = 4 * (n + 1) * d * d + 2 * (n + 1) ** 2 * d + 8 * (n + 1) * d * d
    assert deploy_models.count_multiply_adds(model, 96) == patches + depth * block + d * 1000


def test_multiply_adds_of_a_convolution():
    assert deploy_models.count_multiply_adds(nn.Conv2d(3, 8, 3, padding=1).eval(), 32) == 32 * 32 * 3 * 8 * 9


# --- runtimes ---------------------------------------------------------------------------------------------------------


def test_runtimes_are_all_that_can_run_a_precision(caplog):
    with caplog.at_level("INFO", logger="xcit"):
        chosen = deploy_runtimes.choose_runtimes((), "bfloat16", "cpu")
    assert "eager" in chosen
    assert "onnxruntime" not in chosen
    assert (
        "onnxruntime, bfloat16: left out. onnxruntime's CPU provider has no matrix product in bfloat16" in caplog.text
    )


@pytest.mark.parametrize(
    ("names", "dtype", "device", "words"),
    [
        (("onnxruntime",), "bfloat16", "cpu", "no matrix product in bfloat16"),
        (("openvino",), "float32", "cuda", "--device cpu"),
        ((), "float16", "cpu", "float16 is for CUDA"),
    ],
)
def test_runtimes_that_are_refused(names, dtype, device, words):
    with pytest.raises(BackendError, match=words):
        deploy_runtimes.choose_runtimes(names, dtype, device)


def test_a_runtime_that_is_missing_is_named_with_its_extra(monkeypatch):
    find = deploy_runtimes.importlib.util.find_spec
    monkeypatch.setattr(
        deploy_runtimes.importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name)
    )
    with pytest.raises(BackendError, match=r'openvino is not installed; `pip install "xcit\[export\]"`'):
        deploy.run([SMALL], OPTIONS._replace(runtimes=("eager", "openvino")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(BackendError, match="xcit doctor"):
        deploy.run([SMALL], OPTIONS._replace(device="cuda"))


def test_training_needs_a_runtime_that_trains():
    case = DeployCase("training", "xcit_nano_12_p16", 64, 2)
    pytest.importorskip("openvino")
    with pytest.raises(BackendError, match="eager and compile"):
        deploy.run([case], OPTIONS._replace(runtimes=("openvino",)))


def test_a_file_of_other_columns_stops_the_run_before_it_begins(tmp_path, monkeypatch):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    monkeypatch.setattr(deploy, "measure", lambda *args, **kwargs: pytest.fail("something was measured"))
    with pytest.raises(DataError, match="has the columns a, b"):
        deploy.run([SMALL], OPTIONS, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_runtime_runs_what_the_eager_model_computes(dtype):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    rows = deploy.run([SMALL], OPTIONS._replace(runtimes=(), dtypes=(dtype,)))
    runtimes = [r for r in ("eager", "compile", "onnxruntime", "openvino") if dtype == "float32" or r != "onnxruntime"]
    assert [f"{row['source']} {row['runtime']}" for row in rows] == [
        *(f"timm {runtime}" for runtime in runtimes),
        "ours eager",
        *(f"folded {runtime}" for runtime in runtimes),
    ]
    worst = max(float(row["max_rel_diff"]) for row in rows)
    assert worst < (1e-5 if dtype == "float32" else 0.1)
    if dtype == "bfloat16":
        assert min(float(row["max_rel_diff"]) for row in rows) > 1e-4  # no runtime took float32 instead
    assert all(row[f"ratio_vs_{runtime}"] for row in rows for runtime in runtimes)


def test_int8_is_for_the_runtimes_that_have_it(caplog):
    with caplog.at_level("INFO", logger="xcit"):
        assert deploy_runtimes.choose_runtimes((), "int8", "cpu") == ["onnxruntime", "openvino"]
    assert "eager, int8: left out" in caplog.text
    with pytest.raises(BackendError, match="int8 is what onnxruntime and openvino run"):
        deploy_runtimes.choose_runtimes(("eager",), "int8", "cpu")
    with pytest.raises(BackendError, match="no int8"):
        deploy.run(
            [DeployCase("training", "xcit_nano_12_p16", 64, 2)],
            OPTIONS._replace(runtimes=("openvino",), dtypes=("int8",)),
        )
    with pytest.raises(BackendError, match="openvino and onnxruntime"):
        deploy.run([DeployCase("precisions", "xcit_nano_12_p16", 64, 1)], OPTIONS._replace(runtimes=("eager",)))


def test_nncf_is_missing(monkeypatch):
    find = deploy_runtimes.importlib.util.find_spec
    monkeypatch.setattr(
        deploy_runtimes.importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name)
    )
    with pytest.raises(BackendError, match=r"nncf is not installed"):
        deploy_runtimes.choose_runtimes(("openvino",), "int8", "cpu")


@pytest.mark.slow
def test_int8_of_timms_and_ours_and_all_precisions_in_one_run():
    cases = [DeployCase("precisions", "xcit_nano_12_p16", 64, 1), SMALL]
    rows = deploy.run(cases, OPTIONS._replace(runtimes=("onnxruntime", "openvino"), dtypes=("int8",)))
    assert [f"{row['source']} {row['runtime']} {row['dtype']}" for row in rows] == [
        "folded openvino bfloat16", "folded openvino float32", "folded openvino int8",
        "folded onnxruntime float32", "folded onnxruntime int8",
        "timm onnxruntime int8", "timm openvino int8", "folded onnxruntime int8", "folded openvino int8",
    ]  # fmt: skip
    for row in rows:
        least, most = {"float32": (0, 1e-5), "bfloat16": (1e-4, 0.1), "int8": (1e-3, 0.1)}[row["dtype"]]
        assert least < float(row["max_rel_diff"]) < most
        assert float(row["matrix_gflops"]) > 0
    assert rows[0]["ratio_vs_openvino"] == "1.000"
    assert all(row["ratio_vs_openvino"] for row in rows)


@pytest.mark.gpu
def test_on_cuda():
    rows = deploy.run([SMALL], OPTIONS._replace(device="cuda", dtypes=("float32", "bfloat16", "float16"), memory=True))
    assert len(rows) == 9
    assert all(float(row["peak_mib"]) > 0 for row in rows)
