"""The teacher is shown the right images and stays out of what is trained; the loss equals its formula."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xcit.data.preprocess import Preprocessing
from xcit.tasks.teacher import Teacher, distillation_loss

RGB = Preprocessing((12, 12), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


class Seen(nn.Module):
    """Keeps what it is given; its logits are a pixel's channels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm2d(3, track_running_stats=True)

    def forward(self, x):
        self.images = x
        self.norm(x.expand(-1, 3, -1, -1))
        return self.scale * x[:, :, 0, 0]


def teacher(own, student=RGB, **options):
    return Teacher(Seen(), name="t", student=student, own=own, **options)


def pixels(images, preprocessing):
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)


def test_equal_preparation_passes_the_very_same_tensor():
    images = torch.randn(2, 3, 12, 12)
    shown = teacher(Preprocessing((12, 12), RGB.mean, RGB.std, crop_pct=0.9, interpolation="bilinear"))
    assert shown.prepare(images) is images


def test_another_normalisation_shows_the_same_pixels():
    images = torch.randn(2, 3, 12, 12)
    own = Preprocessing((12, 12), (0.1, 0.6, 0.2), (0.5, 0.9, 0.1))
    torch.testing.assert_close(pixels(teacher(own).prepare(images), own), pixels(images, RGB))


def test_a_grey_image_is_repeated_and_each_channel_normalised():
    grey = Preprocessing((12, 12), (0.3,), (0.4,), in_chans=1)
    images = torch.randn(2, 1, 12, 12)
    shown = teacher(RGB, grey).prepare(images)
    assert shown.shape == (2, 3, 12, 12)
    torch.testing.assert_close(pixels(shown, RGB), pixels(images, grey).expand(-1, 3, -1, -1))


def test_colours_become_pillows_grey():
    grey = Preprocessing((12, 12), (0.3,), (0.4,), in_chans=1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    shown = teacher(grey).prepare(RGB(image)[None])
    torch.testing.assert_close(shown, grey(image.convert("L"))[None], atol=1 / 255 / 0.4, rtol=0)


@pytest.mark.parametrize("size", [(6, 6), (20, 24)])
def test_another_size_is_resized_as_pillow_would(size):
    """Smooth images, so that Pillow's rounding and clipping to 0..255 stay small."""
    ramp = np.linspace(20, 230, 12)
    image = Image.fromarray(
        np.stack([ramp[None] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp] * 2, -1)[..., :3].astype("uint8")
    )
    own = Preprocessing(size, RGB.mean, RGB.std)
    shown = teacher(own).prepare(RGB(image)[None])
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32) / 255
    difference = (pixels(shown[0], RGB).permute(1, 2, 0) - torch.from_numpy(resized)).abs().max()
    assert shown.shape == (1, 3, *size)
    assert difference < 1.5 / 255


def test_a_large_image_is_antialiased():
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(12, 12).expand(1, 3, 24, 24)
    student = Preprocessing((24, 24), (0.0,) * 3, (1.0,) * 3)
    shown = teacher(Preprocessing((6, 6), (0.0,) * 3, (1.0,) * 3), student).prepare(checks)
    assert (shown - 0.5).abs().max() < 0.1


def test_its_outputs_are_put_in_the_datas_order():
    images = torch.randn(4, 3, 12, 12)
    plain, reordered = teacher(RGB)(images), teacher(RGB, columns=[2, 0, 1])(images)
    assert torch.equal(reordered, plain[:, [2, 0, 1]])


def test_it_is_frozen_and_no_part_of_its_holder():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(1, 1)
            self.teacher = teacher(RGB)

    task = Task().train()
    assert sorted(task.state_dict()) == ["model.bias", "model.weight"]
    assert [name for name, _ in task.named_parameters()] == ["model.weight", "model.bias"]
    model = task.teacher.model
    assert not any(module.training for module in model.modules())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = task.teacher(torch.randn(4, 3, 12, 12))
    assert not logits.requires_grad
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    student = torch.randn(4, 3, requires_grad=True)
    distillation_loss(torch.tensor(0.0), student, logits, kind="soft", alpha=1.0, tau=1.0).backward()
    assert student.grad.abs().sum() > 0
    assert model.scale.grad is None


def test_to_takes_everything_along():
    shown = teacher(Preprocessing((6, 6), (0.3,), (0.4,), in_chans=1), columns=[0]).to("meta")
    assert shown(torch.empty(2, 3, 12, 12, device="meta")).device.type == "meta"


def plain_softmax(row, tau):
    exps = [math.exp(value / tau) for value in row]
    return [value / sum(exps) for value in exps]


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.3, 2.5), (1.0, 0.7)])
def test_the_loss_is_its_formula(alpha, tau):
    student, taught = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    base = torch.tensor(1.7, dtype=torch.float64)
    hard = soft = 0.0
    for z, t in zip(student.tolist(), taught.tolist(), strict=True):
        hard += -math.log(plain_softmax(z, 1.0)[t.index(max(t))]) / 5
        p, q = plain_softmax(t, tau), plain_softmax(z, tau)
        soft += tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / (5 * 4)
    for kind, part in (("hard", hard), ("soft", soft)):
        loss = distillation_loss(base, student, taught, kind=kind, alpha=alpha, tau=tau)
        assert loss.item() == pytest.approx((1 - alpha) * 1.7 + alpha * part, rel=1e-12)
        assert loss.dtype == torch.float64


def test_half_precision_logits_give_a_float32_loss_under_autocast():
    student, taught = torch.randn(5, 4), torch.randn(5, 4)
    for kind in ("hard", "soft"):
        expected = distillation_loss(torch.tensor(1.0), student, taught, kind=kind, alpha=0.5, tau=2.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = distillation_loss(
                torch.tensor(1.0), student.bfloat16(), taught.bfloat16(), kind=kind, alpha=0.5, tau=2.0
            )
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=2e-2, rtol=0)


def test_a_student_that_agrees_pays_nothing_softly():
    logits = 3 * torch.randn(5, 4)
    loss = distillation_loss(torch.tensor(0.0), logits, logits + 1.0, kind="soft", alpha=1.0, tau=2.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
