"""The proof itself: it must be able to fail, and its figures are the errors that were put in."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from xcit.deploy.proof import KINDS, TOLERANCE_FP32, failure, proof_images, prove
from xcit.errors import ExportError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
SHAPES = [(2, 3, 8, 12), (3, 3, 16, 9)]


class Linear(nn.Module):
    """Five scores of an image: a map of its channels' means."""

    def __init__(self, times=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(times * torch.randn(5, 3, generator=generator))

    def forward(self, x):
        return x.mean(dim=(2, 3)) @ self.weight.T


class Session:
    """Stands for a file: the module's outputs, changed as asked."""

    runtime, version, format = "a runtime", "1.2", "onnx"

    def __init__(self, module, change=lambda output: output):
        self.module, self.change = module, change

    def __call__(self, images):
        with torch.no_grad():
            return (self.change(self.module(torch.from_numpy(images))).numpy(),)


def proved(session, model, dtype="fp32", scores=True):
    return prove(session, model, SHAPES, dtype=dtype, mean=MEAN, std=STD, scores=scores)


def test_the_model_itself_passes():
    model = Linear().train()
    proof = proved(Session(model), model)
    assert proof.passed
    assert [case.shape for case in proof.cases] == SHAPES
    assert all(0 < case.relative < 1e-6 for case in proof.cases)
    assert [(case.agreeing, case.compared) for case in proof.cases] == [(2, 2), (3, 3)]
    assert model.training
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize(("off", "passes"), [(0.5e-4, True), (2e-4, False), (1.0, False)])
def test_errors_are_measured(off, passes):
    model = Linear()
    proof = proved(Session(model, lambda output: output * (1 + off)), model)
    for case in proof.cases:
        assert case.relative == pytest.approx(off, rel=0.02)
        assert case.absolute == pytest.approx(off * case.largest, rel=0.02)
    assert proof.passed == passes
    written = json.loads(proof.to_json())
    assert written["passed"] == passes
    assert written["max_relative_error"] == pytest.approx(off, rel=0.02)
    assert (written["runtime"], written["version"]) == ("a runtime", "1.2")
    if not passes:
        message = str(failure(proof, "m.onnx"))
        assert message.startswith("m.onnx does not reproduce the model: in a runtime 1.2 its output differs")
        assert f"{TOLERANCE_FP32:.1e} is allowed" in message


def test_other_classes_are_counted():
    model = Linear()
    proof = proved(Session(model, lambda output: output.flip(1)), model)
    assert not proof.passed
    assert all(case.agreeing < case.compared for case in proof.cases)
    assert all(case.clear_agreeing < case.clear for case in proof.cases)
    assert "clear decisions agree" in str(failure(proof, "m.onnx"))


def test_a_tie_is_not_clear():
    model = Linear()
    with torch.no_grad():
        model.weight[1] = model.weight[0] * (1 + 1e-6)
    proof = proved(Session(model, lambda output: output[:, [1, 0, 2, 3, 4]]), model)
    assert proof.passed


@pytest.mark.parametrize(("dtype", "type"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_lower_precisions_may_lose_what_eager_loses(dtype, type):
    model = Linear()
    low = Linear().to(type)
    proof = proved(Session(model, lambda output: output.to(type).float()), model, dtype)
    assert proof.passed
    for case in proof.cases:
        images = proof_images(case.shape, MEAN, STD, first=0 if case is proof.cases[0] else 2)
        with torch.no_grad():
            wanted = model.double()(images.double())
            lost = ((low(images.to(type)).double() - wanted).abs().max() / wanted.abs().max()).item()
        assert case.tolerance == pytest.approx(max(4 * lost, torch.finfo(type).eps))
        model.float()
    assert not proved(Session(model, lambda output: output * 1.2), model, dtype).passed


def test_features_have_no_classes():
    model = Linear()
    proof = proved(Session(model, lambda output: output + 1e-3), model, scores=False)
    assert not proof.passed
    assert proof.worst.compared is None


def test_values_that_are_not_finite_and_other_outputs():
    model = Linear()
    with pytest.raises(ExportError, match="not finite for images"):
        proved(Session(model, lambda output: output / 0), model)
    with pytest.raises(ExportError, match=r"outputs are \[\(2, 4\)\].*the model's \[\(2, 5\)\]"):
        proved(Session(model, lambda output: output[:, :4]), model)
    with torch.no_grad():
        model.weight.mul_(1e5)
    with pytest.raises(ExportError, match="model itself returns values that are not finite in fp16"):
        proved(Session(model), model, "fp16")


def test_images_show_every_kind():
    pixels = proof_images((5, 3, 40, 56), MEAN, STD).double().numpy()
    pixels = pixels * np.reshape(STD, (1, 3, 1, 1)) + np.reshape(MEAN, (1, 3, 1, 1))
    assert len(KINDS) == 5
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
    np.testing.assert_allclose(pixels * 255, np.round(pixels * 255), atol=1e-3)
    steps = np.abs(np.diff(pixels, axis=3)).mean(axis=(1, 2, 3))
    noise, soft, ramp, board, grey = steps
    assert noise > 3 * soft > 3 * grey == 0
    assert 0 < ramp < soft
    assert 0 < board < noise
    assert np.ptp(pixels[4], axis=(1, 2)).max() < 1e-6
    # the same again, and others for another start
    torch.testing.assert_close(proof_images((1, 3, 40, 56), MEAN, STD), proof_images((1, 3, 40, 56), MEAN, STD))
    assert np.ptp(proof_images((1, 3, 40, 56), MEAN, STD, first=4)[0, 0].numpy()) == 0
