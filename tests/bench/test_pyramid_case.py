"""The pyramid's bench: all competitors are the same function, and no unequal pair is timed."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from xcit.bench import cases, contenders, results, runner, tables, timer
from xcit.bench.pyramid import TimmPyramid, make_images, operations
from xcit.models.factory import from_timm
from xcit.models.pyramid import STRIDES, XCiTPyramid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:timm.*")

CPU = torch.device("cpu")
PLAN = timer.Plan(warmup=0, min_rounds=2, max_rounds=2, min_sample_ms=0)
CASE = cases.PyramidCase("xcit_nano_12_p16", 50, 90, 1, "inference")
NAMES = ("timm", "tokens", "covariance", "auto")


def build(case, names=NAMES, dtype=torch.float64):
    return contenders.build(case, names, device=CPU, dtype=dtype)


def run(case, **options):
    options = {"results_dir": None, "report": lambda _: None} | options
    return runner.run(cases.PYRAMID, [case], device=CPU, dtype=torch.float32, plan=PLAN, **options)


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_case_from_start_to_row(tmp_path, mode):
    case = replace(CASE, mode=mode)
    lines = []
    rows = run(case, results_dir=tmp_path, report=lines.append)
    assert results.read(tmp_path / "pyramid.csv", cases.PYRAMID.columns) == rows
    assert [row["competitor"] for row in rows] == ["timm", "auto"]
    assert rows[1]["form"] in ("tokens", "covariance")
    assert lines[0].startswith(f"xcit_nano_12_p16 pyramid of 50 × 90 px, batch 1, {mode}: timm ")
    for row in rows:
        assert (row["height"], row["width"], row["batch_size"], row["mode"]) == ("50", "90", "1", mode)
        assert float(row["max_rel_diff"]) < 1e-4
        assert float(row["median_ms"]) > 0
        # of what autograd keeps, the image was there before
        assert float(row["peak_mib"]) > 0.9 * float(row["saved_mib"])
        assert (float(row["saved_mib"]) > 0) == (mode == "training")


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_levels_and_all_gradients_are_equal_in_float64(patch_size, batch_size):
    """What a benchmark compares in float32, here to the last digits, and with nothing left out."""
    case = cases.PyramidCase(f"xcit_nano_12_p{patch_size}", 50, 90, batch_size, "training")
    built = build(case)
    evidence = [contender.evidence() for contender in built]
    assert [tuple(evidence[0][f"output {i}"].shape[2:]) for i in range(4)] == [(64 // s, 96 // s) for s in STRIDES]
    for contender, own in zip(built[1:], evidence[1:], strict=True):
        names = {name for name, _ in contender.module.named_parameters()} - contender.uncompared
        used = {name for name in names if not name.startswith(("cls_", "norm.", "head."))}
        assert set(own) == used | {f"output {i}" for i in range(4)}
        assert own.keys() == evidence[0].keys()
    assert max(runner.compare(built, case, 1e-10).values()) < 1e-10


def test_a_gradient_that_is_left_out_is_zero_but_for_rounding():
    case = replace(CASE, mode="training", batch_size=2)
    for contender in build(case):
        assert contender.uncompared == {"fpn1.0.bias"}
        contender.step()
        gradients = {name: p.grad for name, p in contender.module.named_parameters() if p.grad is not None}
        assert gradients["fpn1.0.bias"].norm() < 1e-10 * gradients["fpn1.0.weight"].norm()
    assert all(c.uncompared == frozenset() for c in build(replace(case, architecture="xcit_nano_12_p8"), ("timm",)))


def test_timms_levels_are_its_own_blocks_features():
    """Caught by hooks on the blocks, and brought to their strides one by one."""
    model = timm.create_model("xcit_nano_12_p16_224", pretrained=False).eval()
    contenders.randomize(model)
    taps = (2, 2, 5, 9)
    pyramid = TimmPyramid(model, XCiTPyramid(from_timm(model), taps)).eval()
    caught = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: caught.__setitem__(i, out))
        for i, block in enumerate(model.blocks)
    ]
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        levels = pyramid(x)
        for hook in hooks:
            hook.remove()
        assert max(caught) == 9  # blocks after the last tap are not run
        for level, tap, operation in zip(levels, taps, operations(pyramid), strict=True):
            rows = [operation(caught[tap][i].T.reshape(1, -1, 4, 6)) for i in range(2)]
            torch.testing.assert_close(level, torch.cat(rows))


def test_competitors_share_values_and_no_tensor():
    timm_one, ours = (contender.module for contender in build(CASE, ("timm", "auto")))
    ours_state, timm_state = ours.state_dict(), timm_one.state_dict()
    assert ours_state.keys() < timm_state.keys()
    for name, value in ours_state.items():
        assert torch.equal(value, timm_state[name]), name
        assert value.data_ptr() != timm_state[name].data_ptr(), name
        if value.is_floating_point() and value.numel() > 4:
            assert value.std() > 1e-3, name  # random, so that a difference would show


def test_a_level_that_differs_is_not_timed(monkeypatch):
    def build_wrong(*args, **kwargs):
        built = contenders.build(*args, **kwargs)
        with torch.no_grad():
            built[1].module.fpn2[0].bias += 0.05
        return built

    monkeypatch.setattr(runner, "build", build_wrong)
    monkeypatch.setattr(runner.timer, "time_interleaved", lambda *args: pytest.fail("timed"))
    with pytest.raises(runner.OutputsDifferError, match=r"'auto' differs from 'timm' .* in 'output 1'.* Nothing was"):
        run(CASE)


def test_a_gradient_beyond_what_a_maximum_can_move_is_not_timed(monkeypatch):
    """Two nearly equal values in a window are told apart by rounding alone; more than that is a fault."""
    case = replace(CASE, mode="training")

    def build_wrong(share):
        def wrong(*args, **kwargs):
            built = contenders.build(*args, **kwargs)
            weight = built[1].module.blocks[11].mlp.fc2.weight
            weight.register_hook(lambda gradient: gradient * (1 + share))
            return built

        return wrong

    monkeypatch.setattr(runner, "build", build_wrong(2e-3))
    assert float(run(case)[1]["max_rel_diff"]) == pytest.approx(2e-3, rel=0.1)
    monkeypatch.setattr(runner, "build", build_wrong(2e-2))
    monkeypatch.setattr(runner.timer, "time_interleaved", lambda *args: pytest.fail("timed"))
    with pytest.raises(runner.OutputsDifferError, match=r"in 'blocks.11.mlp.fc2.weight'; at most 1e-02 is"):
        run(case)
    assert runner.gradient_tolerance(cases.TRAINING.cases[0], 1e-4) == 1e-4


@pytest.mark.parametrize(
    ("height", "width", "padded"), [(800, 1333, (800, 1344)), (64, 32, (64, 32)), (1, 33, (32, 64))]
)
def test_images_are_padded_below_and_to_the_right(height, width, padded):
    images = make_images(replace(CASE, height=height, width=width), torch.Generator().manual_seed(0))
    assert tuple(images.shape) == (1, 3, *padded)
    assert (images[..., :height, :width] != 0).float().mean() > 0.99
    assert images[..., height:, :].abs().sum() == images[..., width:].abs().sum() == 0


def test_every_call_does_the_same():
    (contender,) = build(replace(CASE, mode="training"), ("auto",))
    first, again = contender.evidence(), contender.evidence()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in contender.module.parameters())


def test_the_promised_cases_are_among_them():
    promised = {cases.PyramidCase("xcit_small_12_p16", 800, 1333, 1, mode) for mode in cases.MODES}
    assert promised <= set(cases.PYRAMID.cases)
    assert cases.SUITES["pyramid"] is cases.PYRAMID


def test_the_table(tmp_path):
    assert "`python -m xcit.bench pyramid` measures it" in tables.TABLES["pyramid"](tmp_path)
    case = cases.PYRAMID.cases[0]
    common = dict.fromkeys(cases.PYRAMID.columns, "1") | {name: str(value) for name, value in vars(case).items()}
    common |= {"date": "2026-01-02T03:04:05Z", "dtype": "float32", "hardware": "Some CPU", "device": "cpu"}
    theirs = common | {"competitor": "timm", "median_ms": "900.04", "peak_mib": "412.40", "ratio_vs_timm": "1.000"}
    ours = common | {"competitor": "auto", "median_ms": "600.06", "peak_mib": "201.60", "ratio_vs_timm": "1.504"}
    results.append(tmp_path / "pyramid.csv", [theirs, ours | {"form": "covariance"}], cases.PYRAMID.columns)
    line = "| `xcit_small_12_p16` | 800 × 1333 | 1 | forward | 900.0 | 600.1, 1.50× (covariance) | 412 → 202 |"
    assert line in tables.TABLES["pyramid"](tmp_path).splitlines()
