"""The equations of DINO: a student predicts what a teacher, its own slow average, makes of other views of an image.

Legend: B images, V views, K outputs of the projection head.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021; the released code's
main_dino.py and utils.py, whose schedules these are, value by value.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from xcit.errors import ShapeError


def dino_loss(
    student_logits: Float[Tensor, "views batch outputs"],
    teacher_probabilities: Float[Tensor, "teacher_views batch outputs"],
    student_temp: float,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy between what the teacher says of one view and the student of another.

    mean over teacher views t and student views v != t of mean_b sum_k -p_t log softmax(s_v / student_temp).

    Args:
        student_logits: of all views; the teacher's come first, in its order.
        teacher_probabilities: see ``sharpen``.
        student_temp: temperature of the student, more than 0.

    Returns:
        A scalar in nats, in the wider dtype of float32 and the inputs'.

    Raises:
        ShapeError: fewer views than the teacher has, or fewer than two: there is no pair.

    Source: equations 1 to 3 of the paper.

    Cost: V + T reductions of (B, K); the pairs share one sum over the student's views.
    """
    views, teacher_views = len(student_logits), len(teacher_probabilities)
    if views < max(2, teacher_views):
        raise ShapeError(f"The student has {views} views, the teacher {teacher_views}; DINO compares two or more.")
    log_q = F.log_softmax(_wide(student_logits) / student_temp, dim=-1)
    everything = log_q.sum(dim=0)  # (B, K): each teacher view meets all of them but its own
    p = _wide(teacher_probabilities)
    total = log_q.new_zeros(())
    for t in range(teacher_views):
        total = total - (p[t] * (everything - log_q[t])).sum(dim=-1).mean()
    return total / (teacher_views * (views - 1))


def sharpen(
    teacher_logits: Float[Tensor, "... outputs"], center: Float[Tensor, "outputs"], temp: float
) -> Float[Tensor, "... outputs"]:
    """Return softmax((logits - center) / temp), in the wider dtype of float32 and the logits'.

    Args:
        teacher_logits: of any number of views and images.
        center: what the outputs are on average, which keeps one of them from winning everywhere.
        temp: temperature, below the student's, which keeps the distribution from going flat.
    """
    return F.softmax((_wide(teacher_logits) - center) / temp, dim=-1)


def entropy(p: Float[Tensor, "... outputs"]) -> Float[Tensor, "..."]:
    """Return the entropy of each distribution over the last dimension, in nats: 0 to log K."""
    return torch.special.entr(p).sum(dim=-1)


def moved_center(
    center: Float[Tensor, "outputs"], batch_mean: Float[Tensor, "outputs"], momentum: float
) -> Float[Tensor, "outputs"]:
    """Return momentum · center + (1 - momentum) · batch_mean.

    Args:
        center: the running mean of the teacher's logits.
        batch_mean: of the logits of a step, over all its views, images and processes.
        momentum: 0 to 1.

    Source: equation 4 of the paper.
    """
    return center * momentum + batch_mean * (1 - momentum)


def cosine_at(step: int, start: float, end: float, total_steps: int) -> float:
    """Return the value at a step of half a cosine from ``start`` at step 0 to ``end`` at ``total_steps`` and after."""
    if step >= total_steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def warm_up_at(step: int, start: float, end: float, num_steps: int) -> float:
    """Return the value at a step of a line whose first value is ``start`` and whose last of ``num_steps`` is ``end``.

    A line of one step is at its start, one after its last step at its end.
    """
    if step >= num_steps:
        return end
    return start + (end - start) * step / max(1, num_steps - 1)


def warm_cosine_at(
    step: int, *, lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, total_steps: int
) -> float:
    """Return the learning rate of a step, counted from 0.

    A line that reaches the peak at the last of its steps, then a cosine over the steps that remain, which begins at
    the peak. (Supervised training has another: ``xcit.tasks.optim``.)

    Args:
        step: optimiser steps done.
        lr: peak.
        min_lr: where the cosine ends, at ``total_steps``, and what stays after it.
        warmup_lr: of step 0, if there are ``warmup_steps``.
        warmup_steps: length of the rise; 0 begins at the peak.
        total_steps: length of all.
    """
    if step < warmup_steps:
        return warm_up_at(step, warmup_lr, lr, warmup_steps)
    return cosine_at(step - warmup_steps, lr, min_lr, total_steps - warmup_steps)


def teacher_temp_at(step: int, *, temp: float, warmup_temp: float, warmup_steps: int, steps_per_epoch: int) -> float:
    """Return the teacher's temperature at a step: it is the same within an epoch.

    A line over the epochs of the warm-up, whose last is at ``temp`` already.

    Args:
        step: optimiser steps done.
        temp: after the warm-up.
        warmup_temp: in the first epoch, if there is a warm-up.
        warmup_steps: length of the warm-up; taken to the nearest number of whole epochs.
        steps_per_epoch: optimiser steps an epoch.
    """
    return warm_up_at(step // steps_per_epoch, warmup_temp, temp, round(warmup_steps / steps_per_epoch))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
