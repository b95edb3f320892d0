"""Self-distillation without labels (DINO): a student learns what its own slow average sees in other views of an image.

The order of a step is the released code's: the teacher sees the global crops, the student all; the loss; backward; each
parameter's gradient is clipped; the last layer's is dropped while it is frozen; the optimiser; the teacher's average;
the centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xcit.data.batches import Crops
from xcit.errors import ConfigError
from xcit.models.dino_head import DINOModel
from xcit.models.xcit import XCiT
from xcit.ops.dino import cosine_at, dino_loss, entropy, moved_center, sharpen, teacher_temp_at, warm_cosine_at
from xcit.tasks.optim import build_optimizer
from xcit.tasks.task import Task

CLIP_EPS = 1e-6
"""Added to a gradient's norm before dividing by it, as in the released code."""
TELLING = 0.056
"""Nats by which the teacher tells images apart below which it has collapsed: the entropy of an event of one in a
hundred, so as much as an output that singles out one image of a hundred and says the same of all others."""
FLAT = "all images get the same output, a flat one"
SHARP = "all images get the same output, a sharp one"
"""How a teacher's outputs collapse: to one whose entropy is over half of what it could be, or to one below that."""
_SUMS = ("teacher_entropy", "student_entropy", "teacher_spread")


class DinoSchedule(NamedTuple):
    """What changes over the steps, each a function of the step alone."""

    lr: float
    """Peak learning rate."""
    min_lr: float
    """Where its cosine ends."""
    warmup_lr: float
    """Of step 0."""
    warmup_steps: int
    """Length of its rise; the cosine begins at the peak, after it."""
    total_steps: int
    """Length of the run."""
    weight_decay: float
    """At the beginning, of the parameters that are decayed."""
    weight_decay_end: float
    """In the end, along a cosine."""
    momentum: float
    """Of the teacher, at the beginning; 1 in the end, along a cosine."""
    teacher_temp: float
    """The teacher's temperature after its warm-up."""
    warmup_teacher_temp: float
    """In the first epoch of its warm-up."""
    warmup_teacher_temp_steps: int
    """Length of its warm-up, a number of whole epochs; 0 for none."""
    steps_per_epoch: int
    """Optimiser steps an epoch; the temperature changes between epochs only."""

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return warm_cosine_at(
            step,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_lr=self.warmup_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of a step."""
        return cosine_at(step, self.weight_decay, self.weight_decay_end, self.total_steps)

    def momentum_at(self, step: int) -> float:
        """Return what share of itself the teacher keeps at a step."""
        return cosine_at(step, self.momentum, 1.0, self.total_steps)

    def teacher_temp_at(self, step: int) -> float:
        """Return the teacher's temperature at a step."""
        return teacher_temp_at(
            step,
            temp=self.teacher_temp,
            warmup_temp=self.warmup_teacher_temp,
            warmup_steps=self.warmup_teacher_temp_steps,
            steps_per_epoch=self.steps_per_epoch,
        )


class DinoTask(Task):
    """Train a backbone without labels.

    The teacher stays in training mode while it teaches: its parameters are the student's average, but its batch norm's
    statistics are not averaged. They come from its own passes over the global crops, and in those passes it normalises
    with the batch's own.

    Gradients may be accumulated: the centre, like the weights, moves once a step, by the mean over all of its parts.
    Batch norm sees a part at a time. Sharded parameters (FSDP) are not for this task: it clips by the norm of each
    parameter's whole gradient.

    Figures of an epoch, in nats: ``train_loss``; ``teacher_entropy`` and ``student_entropy``, the means of the entropy
    of each output; ``teacher_spread``, the entropy of the teacher's mean output of a step, averaged over the steps;
    ``kl``, from the teacher's outputs to the student's, which is the loss without the teacher's entropy.

    Args:
        student: with stochastic depth, if any.
        teacher: ``teacher_of(student)`` for a new run; of the same shapes in any case.
        schedule: see there.
        clip_grad: largest norm of a parameter's gradient, each by itself; 0 for none.
        freeze_last_layer_steps: for how many steps the head's last layer stays as it is.
        seed: of the run.
        channels_last: lay out images with channels last.
        compile: compile student and teacher.
        student_temp: the student's temperature.
        center_momentum: what share of itself the centre keeps in a step.

    Attributes:
        center: (K,) what the teacher's outputs are on average.
        recent: rows of the last epochs, for whoever looks; a run that is gone on with has them again.
        look: is called with an epoch's figures, by all processes, and returns others to stand beside them.

    Raises:
        ConfigError: student and teacher are not of the same shapes.

    Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021; main_dino.py of
        facebookresearch/dino. What decays is what it decays: all but vectors and biases, so the class token and XCA's
        temperatures too.
    """

    remedy: ClassVar[str] = "try a lower --lr (a third of it), a longer warm-up, or a smaller clip_grad"
    center: Tensor

    def __init__(
        self,
        student: DINOModel,
        teacher: DINOModel,
        *,
        schedule: DinoSchedule,
        clip_grad: float = 3.0,
        freeze_last_layer_steps: int = 0,
        seed: int = 0,
        channels_last: bool = False,
        compile: bool = False,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__(seed=seed, channels_last=channels_last)
        shapes = [{name: p.shape for name, p in network.named_parameters()} for network in (student, teacher)]
        if shapes[0] != shapes[1]:
            raise ConfigError("The teacher's parameters are not the student's; make it with teacher_of(student).")
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.schedule = schedule
        self.clip_grad = clip_grad
        self.freeze_last_layer_steps = freeze_last_layer_steps
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(student.head.out_dim))
        # In a list, so that they are no second submodules of the same weights.
        self._forward = [torch.compile(network) if compile else network for network in (student, teacher)]
        self._sums: dict[str, float | Tensor] = dict.fromkeys(_SUMS, 0.0)
        self._num_images = 0
        self.recent: list[dict[str, float]] = []
        self.look: Callable[[Mapping[str, float]], dict[str, float]] | None = None
        self._step_logits: Tensor | float = 0.0
        self._step_probabilities: Tensor | float = 0.0
        self._step_rows = self._step_images = 0
        self.train()

    @property
    def model(self) -> XCiT:  # type: ignore[override]
        """The teacher's backbone: what a run is for."""
        return self.teacher.backbone

    # --- a step ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the draws of this step, and set its learning rate and weight decay."""
        super().on_train_batch_start(batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(self.global_step)
            if group["decayed"]:
                group["weight_decay"] = self.schedule.weight_decay_at(self.global_step)

    def training_step(self, batch: Crops, batch_idx: int) -> Tensor:
        """Return the loss of one batch.

        Raises:
            DivergedError: the loss is not a number any more.
        """
        views = [self.arranged(view) for views in batch.views for view in views.unbind(1)]
        student, teacher = self._forward
        with torch.no_grad():
            taught = teacher(views[: batch.views[0].shape[1]])
        said = student(views)
        with torch.autocast(said.device.type, enabled=False):
            p = sharpen(taught, self.center, self.schedule.teacher_temp_at(self.global_step))
            loss = dino_loss(said, p, self.student_temp)
            self._note(said.detach(), taught, p)
        self.watch(loss.detach(), said.shape[1])
        return loss

    @torch.no_grad()
    def _note(self, said: Tensor, taught: Tensor, p: Tensor) -> None:
        """Sum up what the centre and the figures are made of."""
        num_images = said.shape[1]
        wide = torch.promote_types(taught.dtype, torch.float32)
        self._step_logits = self._step_logits + taught.to(wide).sum(dim=(0, 1))
        self._step_probabilities = self._step_probabilities + p.sum(dim=(0, 1))
        self._step_rows += taught.shape[0] * num_images
        self._step_images += num_images
        q = torch.softmax(said.to(wide) / self.student_temp, dim=-1)
        self._add("teacher_entropy", entropy(p).mean(), num_images)
        self._add("student_entropy", entropy(q).mean(), num_images)
        self._num_images += num_images

    def _add(self, name: str, value: Tensor, num_images: int) -> None:
        wide = torch.float64 if value.device.type != "mps" else torch.float32
        self._sums[name] = self._sums[name] + value.to(wide) * num_images

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip each parameter's gradient (which is unscaled by now), and drop those of a frozen last layer."""
        if self.clip_grad:
            for p in self.student.parameters():
                if p.grad is not None:
                    p.grad.mul_((self.clip_grad / (p.grad.norm() + CLIP_EPS)).clamp(max=1.0))
        if self.global_step < self.freeze_last_layer_steps:
            for p in self.student.head.last_layer.parameters():
                p.grad = None  # not zero: the optimiser would decay it, and begin its moments

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Make a step, then move the teacher and the centre: before any callback saves the state."""
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._move_teacher(self.schedule.momentum_at(step))
        self._move_center()

    @torch.no_grad()
    def _move_teacher(self, momentum: float) -> None:
        ours, theirs = ([p.detach() for p in network.parameters()] for network in (self.teacher, self.student))
        torch._foreach_mul_(ours, momentum)
        torch._foreach_add_(ours, theirs, alpha=1 - momentum)

    @torch.no_grad()
    def _move_center(self) -> None:
        assert isinstance(self._step_logits, Tensor)
        assert isinstance(self._step_probabilities, Tensor)
        rows = self._step_logits.new_tensor([float(self._step_rows)])
        sums = torch.cat((self._step_logits, self._step_probabilities, rows))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        logits, probabilities = (sums[:-1] / sums[-1]).chunk(2)
        self.center.copy_(moved_center(self.center, logits, self.center_momentum))
        self._add("teacher_spread", entropy(probabilities), self._step_images)
        self._step_logits = self._step_probabilities = 0.0
        self._step_rows = self._step_images = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the student; ``on_train_batch_start`` sets what changes."""
        table = {
            name: not (p.ndim <= 1 or name.endswith(".bias"))
            for name, p in self.student.named_parameters()
            if p.requires_grad
        }
        optimizer = build_optimizer(
            self.student,
            opt="adamw",
            lr=self.schedule.lr_at(0),
            weight_decay=self.schedule.weight_decay,
            table=table,
        )
        for group in optimizer.param_groups:
            group["decayed"] = any(p.ndim > 1 for p in group["params"])
        return optimizer

    # --- figures -----------------------------------------------------------------------------------------------------

    def conclude_epoch(self) -> dict[str, float]:
        """Put the epoch's figures together, with those that ``look`` adds."""
        sums = torch.tensor([float(self._sums[name]) for name in _SUMS] + [self._num_images], dtype=torch.float64)
        *totals, count = self.over_processes(sums).tolist()
        found = {"train_loss": self.take_train_loss()}
        found |= {name: total / max(1.0, count) for name, total in zip(_SUMS, totals, strict=True)}
        found["kl"] = found["train_loss"] - found["teacher_entropy"]
        self._sums, self._num_images = dict.fromkeys(_SUMS, 0.0), 0
        return found if self.look is None else found | self.look(found)

    def collapse(self, figures: Mapping[str, float]) -> str | None:
        """Say how the teacher's outputs have collapsed, by an epoch's figures; None if they have not.

        ``teacher_spread - teacher_entropy`` is how many nats an output tells about which image it is of: 0 where all
        images get the same. How flat that one output is, up to the entropy log K of a uniform one, tells which of two
        forces has won: centring makes it flat, sharpening makes it sharp.

        Returns:
            ``FLAT``, ``SHARP`` or None.
        """
        if figures["teacher_spread"] - figures["teacher_entropy"] >= TELLING:
            return None
        return FLAT if figures["teacher_spread"] > math.log(len(self.center)) / 2 else SHARP

    @staticmethod
    def merit(row: Mapping[str, float], prefix: str = "") -> tuple[float]:
        """Return the epoch: there is no figure by which an earlier one would be better, so the last is kept."""
        return (row["epoch"],)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the running epoch has summed up so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["epoch_so_far"] |= {name: float(value) for name, value in self._sums.items()}
        checkpoint["epoch_so_far"]["num_images"] = self._num_images
        checkpoint["recent_epochs"] = self.recent

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with those sums."""
        super().on_load_checkpoint(checkpoint)
        self._sums = {name: checkpoint["epoch_so_far"][name] for name in _SUMS}
        self._num_images = checkpoint["epoch_so_far"]["num_images"]
        self.recent = list(checkpoint.get("recent_epochs", ()))
