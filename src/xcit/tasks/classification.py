"""Image classification: a model and a batch of labelled images give a loss and its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from xcit.data.batches import LabelledImages
from xcit.errors import ConfigError
from xcit.tasks.optim import build_optimizer, build_schedule, decay_table
from xcit.tasks.task import Schedule, Task
from xcit.tasks.teacher import Teacher, distillation_loss
from xcit.tasks.totals import ValidationTotals

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images (B, C, H, W) and labels (B,), returns mixed images and soft targets (B, classes)."""


class Distillation(NamedTuple):
    """A teacher and how it is listened to."""

    teacher: Teacher
    """Frozen; not a part of what is trained or saved."""
    kind: Literal["hard", "soft"]
    """Its most probable class, or its distribution."""
    alpha: float
    """Weight of its part of the loss, 0 to 1."""
    tau: float
    """Temperature of the distribution."""


class ClassificationTask(Task):
    """Train a classifier.

    Logs of an epoch are in ``figures`` once it has been validated: ``train_loss`` (of the augmented images, with soft
    targets and the teacher's part), ``val_loss`` (plain), ``val_accuracy`` (top-1, 0 to 1; where an image may have
    several classes ``val_map``, the mean average precision), and with averaged weights ``ema_...`` of the last two.

    Args:
        model: images (B, C, H, W) to logits (B, classes).
        schedule: of the learning rate.
        opt: "adamw" or "sgd".
        weight_decay: of the parameters that ``xcit.tasks.optim`` decays.
        label_smoothing: share of the target that is spread over all classes; where a mixer is given it does that.
        mixer: mixes the images of a batch and makes soft targets.
        class_weights: (classes,) weights of the classes in the loss, for hard targets only.
        distillation: a teacher; None for none.
        ema_decay: decay a step of the averaged weights; 0 keeps none.
        multi_label: an image may have several classes; the loss is the binary cross-entropy.
        compile: compile the model.
        channels_last: lay out images with channels last.
        freeze: parts of the model that are not trained and stay in evaluation mode, by name.
        seed: of the run.

    Raises:
        ConfigError: the model has no classes to learn, or settings that exclude each other.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019; Touvron et al., "Training
        data-efficient image transformers", 2021; the released code's training loop.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        opt: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
        mixer: Mixer | None = None,
        class_weights: Tensor | None = None,
        distillation: Distillation | None = None,
        ema_decay: float = 0.0,
        multi_label: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        freeze: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed, channels_last=channels_last)
        num_classes = int(getattr(model, "num_classes", 2))
        if num_classes < 2 and not multi_label:
            raise ConfigError(f"num_classes is {num_classes}; a classifier needs 2 classes or more.")
        if mixer is not None and class_weights is not None:
            raise ConfigError(
                "Class weights need hard targets; mixup and cutmix make soft ones. Switch one of them off."
            )
        if multi_label and (distillation or class_weights is not None):
            raise ConfigError("Distillation and class weights are for images of one class each.")
        self.model = model
        self.schedule = schedule
        self.opt = opt
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.mixer = mixer
        self.multi_label = multi_label
        self.frozen = [model.get_submodule(name) for name in freeze]
        for part in self.frozen:
            part.requires_grad_(False)
        self.decay = decay_table(model)  # by the shapes that sharding would hide
        self.ema = ModelEmaV3(model, decay=ema_decay).requires_grad_(False) if ema_decay else None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.distillation = distillation
        # In a list, so that it is no second submodule of the same weights.
        self._forward = [torch.compile(model) if compile else model]

        self._totals = ValidationTotals(multi_label)
        self._ema_totals = ValidationTotals(multi_label)
        self.train()  # the trainer leaves each part in the mode that it finds

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits (B, classes)."""
        return self._forward[0](images)

    def train(self, mode: bool = True) -> ClassificationTask:
        """Switch to training; what is frozen and what is averaged stays in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        if self.ema is not None:
            self.ema.eval()
        return self

    def on_fit_start(self) -> None:
        """Take the teacher to where the model is."""
        if self.distillation is not None:
            self.distillation.teacher.to(self.device)

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Return the loss of one batch.

        Raises:
            DivergedError: the loss is not a number any more.
        """
        images, targets = self.arranged(batch.images), batch.labels
        if self.mixer is not None:
            images, targets = self.mixer(images, targets)
        logits = self(images)
        loss = self._base_loss(logits, targets)
        if self.distillation is not None:
            teacher, kind, alpha, tau = self.distillation
            loss = distillation_loss(loss, logits, teacher(images), kind=kind, alpha=alpha, tau=tau)
        self.watch(loss.detach(), len(images))
        return loss

    def _base_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.multi_label:
            smoothed = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smoothed)
        smoothing = 0.0 if self.mixer is not None else self.label_smoothing
        return F.cross_entropy(logits, targets, weight=self.class_weights, label_smoothing=smoothing)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Make a step, then average the weights: before any callback saves the state."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self.model)

    def on_validation_epoch_start(self) -> None:
        """Begin to count, and make sure that what is validated is sound."""
        self.check_finite()
        self._totals.reset()
        self._ema_totals.reset()

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Count what the model gets right of one batch, and what its averaged weights do."""
        images, wanted = self.arranged(batch.images), batch.decoded
        labels = batch.labels[wanted]
        self._totals.update(self(images)[wanted], labels)
        if self.ema is not None:
            self._ema_totals.update(self.ema.module(images)[wanted], labels)

    def on_validation_epoch_end(self) -> None:
        """Put the epoch's figures together, over all processes.

        Raises:
            DivergedError: the validation loss is not a number any more: the epoch's last step broke the weights.
        """
        self.figures = {"train_loss": self.take_train_loss()}
        for prefix, totals in (("", self._totals), ("ema_", self._ema_totals if self.ema is not None else None)):
            if totals is not None:
                found = totals.compute(self.over_processes, self.gathered)
                self.figures |= {f"{prefix}{name}": value for name, value in found.items()}
        if not math.isfinite(self.figures["val_loss"]):
            self.refuse("validation loss", self.figures["val_loss"], self.global_step, self.current_epoch, self.lr())

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule in the form that Lightning expects."""
        optimizer = build_optimizer(
            self.model, opt=self.opt, lr=self.schedule.lr, weight_decay=self.weight_decay, table=self.decay
        )
        scheduler = build_schedule(optimizer, **self.schedule._asdict())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @staticmethod
    def merit(row: Mapping[str, float], prefix: str = "") -> tuple[float, float]:
        """Return the accuracy (or mean average precision), and of equals the lowest loss.

        On a few hundred images many epochs get the same number right.
        """
        name = f"{prefix}val_map" if f"{prefix}val_map" in row else f"{prefix}val_accuracy"
        return row[name], -row[f"{prefix}val_loss"]
