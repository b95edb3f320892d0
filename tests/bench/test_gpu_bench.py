"""`python -m xcit.bench gpu` in small, on a CPU: what is compared, what a row holds, what goes on, what is refused."""

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import tyro

from xcit.bench import gpu, gpu_cases, gpu_checks, gpu_contenders, gpu_peaks, gpu_rows, gpu_verbs, results, timer
from xcit.bench.gpu_budget import Budget, Costs, OutOfTimeError
from xcit.bench.gpu_cases import COLUMNS, Entry, GpuCase
from xcit.errors import BackendError, ConfigError, DataError
from xcit.ops import kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*")

FAST = timer.Plan(warmup=0, min_rounds=3, max_rounds=3, budget_s=0.0, min_sample_ms=0.0)
INFERENCE = GpuCase("inference", "xcit_nano_12_p16", 64, 2, "float32")
TRAINING = replace(INFERENCE, group="training")
EAGER = ("timm channels-last", "ours eager", "folded eager")
OPTIONS = gpu.Options(device="cpu", keep=EAGER, plan=FAST)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One block instead of twelve, small matrices, and multiply-adds as the zoo has them."""
    create = gpu_contenders.create_peer

    def create_shallow(name, *, num_classes, options=None):
        shallow = {"depth": 1} if name.startswith(("xcit", "deit")) else {}
        return create(name, num_classes=num_classes, options={**(options or {}), **shallow})

    monkeypatch.setattr(gpu_contenders, "create_peer", create_shallow)
    monkeypatch.setattr(gpu, "measure_peaks", lambda dtype, device: gpu_peaks.Peaks(0.1, 10.0))
    monkeypatch.setattr(gpu, "multiply_adds", lambda entry, case, device: 45_000_000)


def silent(line):
    pass


def names_of(rows):
    return [gpu_cases.competitor(row) for row in rows]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_run_from_models_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "measure_peaks", gpu_peaks.measure_peaks)
    monkeypatch.setattr(gpu, "multiply_adds", gpu_contenders.multiply_adds)
    monkeypatch.setattr(gpu_peaks, "SIDE", {"cpu": 64})
    monkeypatch.setattr(gpu_peaks, "COPIED_BYTES", {"cpu": 2**16})
    out, said = tmp_path / "gpu.csv", []
    outcome = gpu.run([INFERENCE, TRAINING], OPTIONS, out=out, say=said.append)
    assert (outcome.left, outcome.failed) == ([], [])
    assert results.read(out, COLUMNS) == outcome.rows
    assert {(row["mode"], name) for row, name in zip(outcome.rows, names_of(outcome.rows), strict=True)} == {
        ("inference", "timm eager"),
        ("inference", "timm channels-last"),
        ("inference", "ours eager"),
        ("inference", "folded eager"),
        ("training", "timm eager"),
        ("training", "timm channels-last"),
        ("training", "ours eager"),
    }
    for row in outcome.rows:
        assert set(row) == set(COLUMNS)
        ms = float(row["median_ms"])
        passes = {"inference": 1, "training": 3}[row["mode"]]
        assert float(row["p10_ms"]) <= ms <= float(row["p90_ms"])
        assert float(row["images_per_second"]) == pytest.approx(2000 / ms, rel=0.01)
        tflops = 2 * 2 * passes * int(row["multiply_adds"]) / ms / 1e9
        assert float(row["tflops"]) == pytest.approx(tflops, abs=6e-4)
        assert float(row["matrix_share"]) == pytest.approx(tflops / float(row["matrix_tflops"]), rel=0.2, abs=2e-2)
        assert float(row["floor_share"]) == pytest.approx(float(row["floor_ms"]) / ms, rel=0.05, abs=2e-4)
        assert float(row["peak_mib"]) > float(row["held_mib"]) > 0
        assert float(row["max_rel_diff"]) < 1e-4
        assert (row["kernels"], row["kernels_run"], row["graphs"]) == ("plain", "", "")
        assert (row["form"] != "") == (row["source"] in ("ours", "folded"))
    baselines = [r["ratio_vs_timm_eager"] for r in outcome.rows if gpu_cases.competitor(r) == "timm eager"]
    assert set(baselines) == {"1.000"}
    held = {(row["mode"], row["source"]): float(row["held_mib"]) for row in outcome.rows}
    # AdamW keeps two more numbers a parameter
    assert held["training", "ours"] == pytest.approx(3 * held["inference", "ours"], rel=0.05)
    assert sum("about" in line for line in said) == 3  # rounds: tier 1 of both, timm's layout in training is tier 2


def test_the_same_command_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "gpu.csv"
    first = gpu.run([INFERENCE], OPTIONS._replace(keep=("timm channels-last",)), out=out, say=silent)
    assert names_of(first.rows) == ["timm eager", "timm channels-last"]
    second = gpu.run([INFERENCE], OPTIONS._replace(skip=("folded *",)), out=out, say=silent)
    assert names_of(second.rows) == ["timm eager", "ours eager"]  # with what ratios are against
    rows = results.read(out, COLUMNS)
    assert rows == first.rows + second.rows
    here = gpu_rows.environment("cpu")

    def left(here, again=False):
        done = set() if again else gpu_rows.measured(rows, here)
        return [list(map(str, each.entries)) for each in gpu.plan_rounds([INFERENCE], OPTIONS, done)]

    assert left(here) == [["folded eager"]]
    assert left(here, again=True) == [[*EAGER]]
    assert left(here | {"code": "another"}) == [["ours eager", "folded eager"]]
    assert left(here | {"xcit": "9"}) == [["ours eager", "folded eager"]]
    assert left(here | {"torch": "9"}) == left(here | {"hardware": "another"}) == [[*EAGER]]


def test_the_digest_follows_the_code(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "ops" / "a.py").write_text("x = 1")
    monkeypatch.setattr(gpu_rows, "PACKAGE", tmp_path)
    before = gpu_rows.code_digest()
    assert before == gpu_rows.code_digest()
    (tmp_path / "ops" / "a.py").write_text("x = 2")
    assert gpu_rows.code_digest() != before


def test_a_source_tree_that_is_not_installed_is_measured_too(monkeypatch):
    def missing(device_type):
        raise gpu_rows.PackageNotFoundError

    whole = gpu_rows.environment("cpu")
    monkeypatch.setattr(results, "environment", missing)
    assert gpu_rows.environment("cpu").keys() == whole.keys()
    assert gpu_rows.environment("cpu")["timm"] == whole["timm"]


@pytest.mark.parametrize(
    ("case", "least"),
    [
        (replace(INFERENCE, precision="bfloat16"), 1e-4),
        (replace(TRAINING, precision="amp-bfloat16"), 1e-4),
        (replace(TRAINING, precision="amp-float16"), 1e-5),
    ],
    ids=str,
)
def test_precisions(case, least):
    outcome = gpu.run([case], OPTIONS._replace(keep=("ours eager",)), say=silent)
    assert outcome.failed == []
    assert names_of(outcome.rows) == ["timm eager", "ours eager"]
    assert all(least < float(row["max_rel_diff"]) < 0.3 for row in outcome.rows)  # it was that narrow


def test_a_batch_is_found_by_doubling(monkeypatch):
    times = {1: 1.0, 2: 1.1, 4: 2.0, 8: 4.0, 16: 8.0}  # milliseconds: from 4 images on nothing is gained
    started = []
    monkeypatch.setattr(gpu, "start", lambda case, entry, device: started.append(case) or _Idle())
    monkeypatch.setattr(timer, "time_interleaved", lambda steps, plan, kind: {"": [times[started[-1].batch_size]]})
    session = gpu._Session(torch.device("cpu"), OPTIONS, Budget(None), Costs(), silent)
    assert session.with_batch(replace(INFERENCE, batch_size=0)).batch_size == 4
    assert [case.batch_size for case in started] == [1, 2, 4, 8]

    def small_memory(case, entry, device):
        if case.batch_size > 2:
            raise torch.OutOfMemoryError("full")
        started.append(case)
        return _Idle()

    monkeypatch.setattr(gpu, "start", small_memory)
    assert session.with_batch(replace(INFERENCE, batch_size=0)).batch_size == 2


class _Idle:
    def step(self):
        pass


# --- what is compared -------------------------------------------------------------------------------------------------


def spoil(monkeypatch, change, source="ours"):
    build = gpu_contenders.build_module

    def wrong(entry, image_size, device, *, drop_path=None):
        module = build(entry, image_size, device, drop_path=drop_path)
        if entry.source == source:
            change(module)
        return module

    monkeypatch.setattr(gpu_contenders, "build_module", wrong)


@pytest.mark.parametrize("case", [INFERENCE, TRAINING], ids=str)
def test_what_computes_something_else_is_not_timed_and_the_others_are(monkeypatch, case):
    def change(module):
        with torch.no_grad():
            module.blocks[0].gamma1.mul_(1.01)

    spoil(monkeypatch, change)
    outcome = gpu.run([case], OPTIONS, say=silent)
    assert "ours eager" not in names_of(outcome.rows)
    assert names_of(outcome.rows)[:2] == ["timm eager", "timm channels-last"] or case == TRAINING
    assert len(outcome.failed) == 1
    assert "'ours eager' differs" in outcome.failed[0]


def test_a_wrong_gradient_alone_is_found(monkeypatch):
    spoil(monkeypatch, lambda module: module.norm.weight.register_hook(lambda grad: 1.1 * grad))
    outcome = gpu.run([TRAINING], OPTIONS, say=silent)
    assert "ours eager" not in names_of(outcome.rows)
    assert "norm.weight" in outcome.failed[0]


def test_gradients_that_are_nothing_but_rounding_do_not_count():
    truth = {"output": torch.ones(3), "a": torch.ones(100), "key.bias": torch.full((4,), 1e-9)}
    found = truth | {"key.bias": torch.full((4,), -1e-9)}
    assert gpu_checks.compare(found, truth).worst < 1e-4
    wrong = gpu_checks.compare(truth | {"a": torch.zeros(100)}, truth)
    assert (wrong.output, wrong.worst, wrong.worst_name) == (0, 1, "a")
    assert wrong.gradients == pytest.approx(1)
    broken = gpu_checks.compare(truth | {"a": torch.full((100,), float("nan"))}, truth)
    assert broken.most == float("inf")


def test_ours_may_differ_by_twice_what_timms_differs(monkeypatch):
    checker = gpu_checks.Checker(INFERENCE, torch.device("cpu"), silent)

    def judge(entry, difference):
        checker._judge(entry, gpu_checks.Difference(difference, 0.0, 0.0, "output"), "the truth")

    ours, timm = Entry("folded", INFERENCE.model, "graphs"), Entry("timm", INFERENCE.model, "eager")
    judge(ours, 0.9e-4)
    with pytest.raises(gpu_checks.OutputsDifferError):
        judge(ours, 1.1e-4)
    judge(timm, 2e-4)
    judge(ours, 3.9e-4)
    with pytest.raises(gpu_checks.OutputsDifferError, match="at most 4e-04"):
        judge(ours, 4.1e-4)
    with pytest.raises(gpu_checks.OutputsDifferError):
        judge(timm, 3.1e-4)
    with pytest.raises(gpu_checks.OutputsDifferError):
        judge(timm, float("inf"))


# --- kernels ----------------------------------------------------------------------------------------------------------


def give_kernels(monkeypatch, runs):
    """Models of ours that can choose kernels, which are seen to run where ``runs``."""

    def change(module):
        chosen = {}
        module.set_kernels = lambda name: chosen.update(kernels=name)

        def see(*_):
            if chosen["kernels"] == "triton" and runs and kernels._observer is not None:
                kernels._observer.append("lpi")

        module.register_forward_pre_hook(see)

    build = gpu_contenders.folded_copy

    def folded(model, **options):
        module = build(model, **options)
        change(module)
        return module

    monkeypatch.setattr(gpu_contenders, "folded_copy", folded)
    monkeypatch.setattr(gpu_contenders, "interpreted", lambda: True)


def test_which_kernels_ran_stands_in_the_row(monkeypatch):
    give_kernels(monkeypatch, runs=True)
    outcome = gpu.run([INFERENCE], OPTIONS._replace(keep=("folded eager*",)), say=silent)
    assert {gpu_cases.competitor(row): row["kernels_run"] for row in outcome.rows} == {
        "timm eager": "",
        "folded eager": "",
        "folded eager triton": "lpi",
    }


def test_kernels_that_did_not_run_are_refused(monkeypatch):
    give_kernels(monkeypatch, runs=False)
    outcome = gpu.run([INFERENCE], OPTIONS._replace(keep=("folded eager*",)), say=silent)
    assert names_of(outcome.rows) == ["timm eager", "folded eager"]
    assert "asked for triton kernels and ran none" in outcome.failed[0]


def test_a_model_without_kernels_is_left_out_with_one_line(monkeypatch):
    build = gpu_contenders.folded_copy

    class Old(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    monkeypatch.setattr(gpu_contenders, "folded_copy", lambda model, **options: Old(build(model, **options)))
    said = []
    outcome = gpu.run([INFERENCE], OPTIONS._replace(keep=("folded eager*",)), say=said.append)
    assert names_of(outcome.rows) == ["timm eager", "folded eager"]
    assert outcome.failed == []
    assert sum("folded eager triton is left out" in line for line in said) == 1


def test_a_cpu_has_no_kernels(monkeypatch):
    monkeypatch.setattr(gpu_contenders, "interpreted", lambda: False)
    module = torch.nn.Identity()
    module.set_kernels = silent
    with pytest.raises(gpu_contenders.NoKernelsError, match="CUDA"):
        gpu_contenders.choose_kernels(module, "triton", torch.device("cpu"))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def break_one(monkeypatch, error):
    start = gpu.start

    def broken(case, entry, device):
        if entry.source == "ours":
            raise error
        return start(case, entry, device)

    monkeypatch.setattr(gpu, "start", broken)


def test_what_does_not_fit_is_left_out_and_said(monkeypatch):
    break_one(monkeypatch, torch.OutOfMemoryError("full"))
    said = []
    outcome = gpu.run([INFERENCE], OPTIONS, say=said.append)
    assert names_of(outcome.rows) == ["timm eager", "timm channels-last", "folded eager"]
    assert outcome.failed == []
    assert any("ours eager did not fit into memory" in line for line in said)


def test_what_breaks_costs_its_competitor_alone(monkeypatch, capsys):
    break_one(monkeypatch, RuntimeError("a compiler's bug\nand more"))
    outcome = gpu.run([INFERENCE], OPTIONS, say=silent)
    assert names_of(outcome.rows) == ["timm eager", "timm channels-last", "folded eager"]
    assert outcome.failed == [f"{INFERENCE}: ours eager broke: RuntimeError: a compiler's bug"]
    assert "Traceback" in capsys.readouterr().err


def test_a_device_that_broke_ends_the_run(monkeypatch, tmp_path):
    break_one(monkeypatch, RuntimeError("illegal memory access"))

    ones = torch.ones

    def unusable(*args, **kwargs):
        if args == (1,):
            raise RuntimeError("CUDA error")
        return ones(*args, **kwargs)

    monkeypatch.setattr(torch, "ones", unusable)
    with pytest.raises(BackendError, match='--skip "ours eager"'):
        gpu.run([INFERENCE], OPTIONS, say=silent)


def test_without_its_baseline_nothing_of_a_case_is_measured(monkeypatch):
    start = gpu.start
    monkeypatch.setattr(gpu, "start", lambda case, entry, device: 1 / 0 if entry.source == "timm" else start(case))
    said = []
    outcome = gpu.run([INFERENCE], OPTIONS, say=said.append)
    assert outcome.rows == []
    assert len(outcome.failed) == 1
    assert said[-1].endswith("nothing of it is measured.")


def test_no_cuda_is_one_clear_error():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match="cuda"):
        gpu.run([INFERENCE], OPTIONS._replace(device="cuda"))


def test_an_old_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "gpu.csv").write_text("other,columns\n")
    monkeypatch.setattr(gpu, "start", lambda *args: pytest.fail("measured"))
    with pytest.raises(DataError, match="other, columns"):
        gpu.run([INFERENCE], OPTIONS, out=tmp_path / "gpu.csv")


# --- time -------------------------------------------------------------------------------------------------------------


class Paced(Budget):
    """A budget in which seconds pass only when a competitor is built, and no alarm rings."""

    def __init__(self, monkeypatch, budget_s, seconds):
        self.now = 0.0
        super().__init__(budget_s, lambda: self.now)
        start = gpu.start

        def slow(case, entry, device):
            self.now += seconds[entry.run]
            return replace(start(case, entry, device), build_s=seconds[entry.run])

        monkeypatch.setattr(gpu, "start", slow)

    def alarm(self, reserve_s=0.0):
        return nullcontext()


def test_the_most_important_rows_come_home_in_time(monkeypatch, tmp_path):
    # guesses: 3 s an eager competitor, twice that of a training step; one more second to time each
    budget = Paced(monkeypatch, 17.0, {"eager": 3.0, "channels-last": 3.0})
    said = []
    outcome = gpu.run(
        [INFERENCE, TRAINING],
        OPTIONS,
        out=tmp_path / "gpu.csv",
        say=said.append,
        budget=budget,
    )
    assert names_of(outcome.rows) == ["timm eager", "timm channels-last", "ours eager", "folded eager"]
    assert [(each.case, names) for each in outcome.left for names in [list(map(str, each.entries))]] == [
        (TRAINING, ["ours eager"]),
        (TRAINING, ["timm channels-last"]),
    ]
    assert any("Time is up: 2 competitors are left" in line for line in said)


def test_of_a_round_that_is_too_long_the_last_ones_are_left(monkeypatch):
    budget = Paced(monkeypatch, 13.0, {"eager": 3.0, "channels-last": 3.0})
    outcome = gpu.run([INFERENCE], OPTIONS, say=silent, budget=budget)
    assert names_of(outcome.rows) == ["timm eager", "timm channels-last", "ours eager"]
    assert [list(map(str, each.entries)) for each in outcome.left] == [["folded eager"]]


def test_what_takes_longer_than_guessed_is_ended_and_the_rest_is_timed(monkeypatch):
    break_one(monkeypatch, OutOfTimeError())
    outcome = gpu.run([INFERENCE], OPTIONS, say=silent, budget=Budget(1000.0))
    assert names_of(outcome.rows) == ["timm eager", "timm channels-last"]
    assert [list(map(str, each.entries)) for each in outcome.left] == [["ours eager", "folded eager"]]
    assert outcome.failed == []


def test_the_alarm():
    def endless():
        while True:
            time.sleep(0.01)

    with pytest.raises(OutOfTimeError), Budget(0.05).alarm():
        endless()
    with Budget(None).alarm():
        pass
    with pytest.raises(OutOfTimeError), Budget(1.0).alarm(reserve_s=2.0):
        pytest.fail("began")
    with Budget(0.2).alarm():
        pass
    time.sleep(0.3)  # it rings no more


def test_costs_are_learned():
    costs = Costs({(str(INFERENCE), "timm eager"): 7.0})
    timm, ours = (Entry(source, INFERENCE.model, "eager") for source in ("timm", "ours"))
    compiled = Entry("timm", INFERENCE.model, "compile")
    assert costs.build_s(INFERENCE, timm) == 7
    guessed = costs.build_s(INFERENCE, ours)
    assert costs.build_s(INFERENCE, compiled) > 5 * guessed
    assert costs.build_s(TRAINING, compiled) == 2 * costs.build_s(INFERENCE, compiled)
    large = GpuCase("inference", "xcit_large_24_p8", 384, 1, "bfloat16")
    assert costs.build_s(large, Entry("timm", large.model, "eager")) == 2 * guessed
    costs.note(INFERENCE, ours, 2 * guessed)
    assert costs.build_s(TRAINING, ours) == 2 * 2 * guessed  # this machine takes twice the guess


# --- the command line -------------------------------------------------------------------------------------------------


def command(*arguments):
    app = tyro.extras.SubcommandApp()
    gpu_verbs.register(app)
    app.cli(args=list(arguments))


def test_the_command_line(tmp_path, capsys):
    where = ("--results", str(tmp_path), "--device", "cpu", "--budget-s", "0")
    name = "inference/xcit_nano_12_p16/64/2/float32"
    command("gpu", name, *where, "--competitors", "ours eager", "--minutes", "5")
    shown = capsys.readouterr().out
    assert "ours eager: " in shown
    assert len(results.read(tmp_path / "gpu.csv", COLUMNS)) == 2
    command("gpu", name, *where, "--competitors", "ours eager")
    assert "0 rounds" in capsys.readouterr().out
    command("gpu", "--list")
    assert "inference/xcit_small_12_p16/224/256/bfloat16: timm eager, " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="minutes"):
        command("gpu", "--minutes", "0")


def test_a_refused_competitor_shows_in_the_exit_code(monkeypatch, tmp_path):
    break_one(monkeypatch, RuntimeError("a bug"))
    where = ("--results", str(tmp_path), "--device", "cpu", "--budget-s", "0")
    with pytest.raises(SystemExit) as stop:
        command("gpu", str(INFERENCE), *where, "--competitors", "ours eager")
    assert stop.value.code == 1


# --- what takes longer ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", [INFERENCE, TRAINING], ids=str)
def test_compiled_competitors_are_compared_too(monkeypatch, case):
    monkeypatch.setitem(gpu_contenders.DROP_PATH, "xcit_nano_12_p16", 0.2)  # draws must be equal, too
    wanted = ("timm compile", "ours compile", "folded compile")
    outcome = gpu.run([case], OPTIONS._replace(keep=wanted, full=True), say=silent)
    assert outcome.failed == []
    compiled = [row for row in outcome.rows if row["run"] == "compile"]
    assert {row["source"] for row in compiled} == {"timm", "ours", *(["folded"] if case is INFERENCE else [])}
    assert all(row["graphs"] == "1" and float(row["max_rel_diff"]) < 1e-5 for row in compiled)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [replace(INFERENCE, precision="bfloat16", batch_size=1), replace(TRAINING, precision="amp-float16", batch_size=8)],
    ids=str,
)
def test_a_case_on_cuda(case):
    outcome = gpu.run([case], OPTIONS._replace(device="cuda", keep=()), say=print)
    assert outcome.failed == []
    assert {"timm eager", "ours eager"} <= set(names_of(outcome.rows))
    assert all(float(row["median_ms"]) > 0 and row["device"] == "cuda" for row in outcome.rows)
