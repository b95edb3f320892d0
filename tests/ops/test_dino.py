"""DINO's equations against loops over views, images and outputs, and its schedules against NumPy's linspace."""

import math

import numpy as np
import pytest
import torch

from xcit.errors import ShapeError
from xcit.ops.dino import (
    cosine_at,
    dino_loss,
    entropy,
    moved_center,
    sharpen,
    teacher_temp_at,
    warm_cosine_at,
)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_softmax(row, temp):
    weights = [math.exp(value / temp) for value in row]
    return [weight / sum(weights) for weight in weights]


def naive_loss(student, teacher, temp):
    """One pair of views after another, one image, one output."""
    terms = []
    for t, taught in enumerate(teacher):
        for v, said in enumerate(student):
            if v == t:
                continue
            losses = []
            for p, logits in zip(taught.tolist(), said.tolist(), strict=True):
                q = naive_softmax(logits, temp)
                losses.append(-sum(p_k * math.log(q_k) for p_k, q_k in zip(p, q, strict=True)))
            terms.append(sum(losses) / len(losses))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("views", "teacher_views"), [(2, 2), (5, 2), (10, 2), (3, 1)])
def test_the_loss_is_the_mean_over_all_pairs_of_other_views(views, teacher_views):
    for seed in range(20):
        student = draw(views, 3, 7, seed=seed, scale=0.5)
        teacher = draw(teacher_views, 3, 7, seed=seed + 100).softmax(-1)
        expected = naive_loss(student, teacher, 0.1)
        assert dino_loss(student, teacher, 0.1).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_the_loss():
    student = draw(4, 2, 5, scale=0.3).requires_grad_()
    teacher = draw(2, 2, 5, seed=1).softmax(-1)
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher, 0.1), student)


def test_a_student_is_not_compared_with_the_teacher_of_its_own_view():
    student, teacher = draw(2, 3, 6), draw(2, 3, 6, seed=1).softmax(-1)
    other = teacher.clone()
    other[0] = other[0].flip(-1)
    alone = [
        dino_loss(student[[0, 1]], t, 0.1)  # of two views, teacher 0 meets student 1 only
        for t in (teacher, other)
    ]
    changed = -(other[0] - teacher[0]) * (student[1] / 0.1).log_softmax(-1)
    torch.testing.assert_close(alone[1] - alone[0], changed.sum(-1).mean() / 2)


def test_low_precision_is_widened():
    student, teacher = draw(3, 4, 50, dtype=torch.bfloat16), draw(2, 4, 50, seed=1, dtype=torch.bfloat16)
    p = sharpen(teacher, torch.zeros(50), 0.04)
    assert p.dtype == dino_loss(student, p, 0.1).dtype == torch.float32
    exact = dino_loss(student.double(), sharpen(teacher.double(), torch.zeros(50).double(), 0.04), 0.1)
    torch.testing.assert_close(dino_loss(student, p, 0.1).double(), exact, rtol=1e-5, atol=0)


def test_one_view_is_refused():
    with pytest.raises(ShapeError, match="1 views"):
        dino_loss(draw(1, 2, 3), draw(1, 2, 3).softmax(-1), 0.1)


def test_sharpening_centres_and_divides():
    logits, center = draw(2, 3, 6), draw(6, seed=1)
    p = sharpen(logits, center, 0.07)
    for t in range(2):
        for b in range(3):
            row = [a - c for a, c in zip(logits[t, b].tolist(), center.tolist(), strict=True)]
            assert p[t, b].tolist() == pytest.approx(naive_softmax(row, 0.07))


def test_entropy_of_known_distributions():
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=torch.float64)
    assert entropy(p).tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])


def test_the_centre_over_many_steps():
    center, expected = torch.zeros(5, dtype=torch.float64), [0.0] * 5
    for step in range(300):
        logits = draw(2, 4, 5, seed=step)
        center = moved_center(center, logits.mean((0, 1)), 0.9)
        for k in range(5):
            mean = sum(logits[t, b, k].item() for t in range(2) for b in range(4)) / 8
            expected[k] = 0.9 * expected[k] + 0.1 * mean
    assert center.tolist() == pytest.approx(expected, rel=1e-12)


# --- schedules: arrays of all steps, as they were written down before training ---------------------------------------


def array_of(start, base, final, warmup, total):
    rise = np.linspace(start, base, warmup)
    rest = np.arange(total - warmup)
    return np.concatenate([rise, final + (base - final) * (1 + np.cos(np.pi * rest / len(rest))) / 2])


@pytest.mark.parametrize(("warmup", "start"), [(0, 0.0), (1, 0.0), (2, 1e-5), (60, 0.0), (60, 1e-4)])
def test_the_learning_rate_is_that_of_the_released_code(warmup, start):
    expected = array_of(start, 2e-3, 1e-6, warmup, 500)
    settings = {"lr": 2e-3, "min_lr": 1e-6, "warmup_lr": start, "warmup_steps": warmup, "total_steps": 500}
    assert [warm_cosine_at(step, **settings) for step in range(500)] == pytest.approx(expected.tolist(), rel=1e-12)
    assert warm_cosine_at(500, **settings) == warm_cosine_at(10_000, **settings) == 1e-6


@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.996, 1.0), (0.04, 0.04)])
def test_the_cosine_of_weight_decay_and_momentum(start, end):
    expected = array_of(0.0, start, end, 0, 300)
    assert [cosine_at(step, start, end, 300) for step in range(300)] == pytest.approx(expected.tolist(), rel=1e-12)
    assert cosine_at(300, start, end, 300) == end


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 30])
def test_the_teachers_temperature_changes_with_the_epoch(warmup_epochs):
    expected = np.concatenate([np.linspace(0.04, 0.07, warmup_epochs), np.full(40 - warmup_epochs, 0.07)])
    found = [
        teacher_temp_at(step, temp=0.07, warmup_temp=0.04, warmup_steps=warmup_epochs * 7, steps_per_epoch=7)
        for step in range(40 * 7)
    ]
    assert found == pytest.approx(np.repeat(expected, 7).tolist(), rel=1e-12)
