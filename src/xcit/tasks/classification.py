"""Image classification: a model and a batch of labelled images give a loss and its figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import lightning
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from xcit.data.batches import LabelledImages
from xcit.data.sampling import derive_seed, seed_everything
from xcit.errors import ConfigError, XCiTError
from xcit.tasks.optim import build_optimizer, build_schedule, decay_table
from xcit.tasks.teacher import Teacher, distillation_loss
from xcit.tasks.totals import ValidationTotals

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images (B, C, H, W) and labels (B,), returns mixed images and soft targets (B, classes)."""


class DivergedError(XCiTError):
    """The loss is not a number any more."""


class Schedule(NamedTuple):
    """The learning rate over the steps: a linear rise, then a cosine."""

    lr: float
    """Its peak."""
    min_lr: float
    """Where the cosine ends."""
    warmup_lr: float
    """Where the rise begins."""
    warmup_steps: int
    """Length of the rise."""
    total_steps: int
    """Length of all."""


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


class ClassificationTask(lightning.LightningModule):
    """Train a classifier; the random numbers of a step follow from seed, epoch, batch and process alone.

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
        super().__init__()
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
        self.channels_last = channels_last
        self.seed = seed
        self.frozen = [model.get_submodule(name) for name in freeze]
        for part in self.frozen:
            part.requires_grad_(False)
        self.decay = decay_table(model)  # by the shapes that sharding would hide
        self.ema = ModelEmaV3(model, decay=ema_decay).requires_grad_(False) if ema_decay else None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.distillation = distillation
        # In a list, so that it is no second submodule of the same weights.
        self._forward = [torch.compile(model) if compile else model]

        self.figures: dict[str, float] = {}
        self._loss_sum: float | Tensor = 0.0
        self._loss_count = 0
        self._pending: tuple[Tensor, int, int, float] | None = None
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

    def on_train_batch_start(self, batch: LabelledImages, batch_idx: int) -> None:
        """Seed the draws of this step: mixing, stochastic depth, dropout."""
        seed_everything(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Return the loss of one batch.

        Raises:
            DivergedError: the loss is not a number any more.
        """
        images, targets = self._arranged(batch.images), batch.labels
        if self.mixer is not None:
            images, targets = self.mixer(images, targets)
        logits = self(images)
        loss = self._base_loss(logits, targets)
        if self.distillation is not None:
            teacher, kind, alpha, tau = self.distillation
            loss = distillation_loss(loss, logits, teacher(images), kind=kind, alpha=alpha, tau=tau)
        self._watch(loss.detach(), len(images))
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
        images, wanted = self._arranged(batch.images), batch.decoded
        labels = batch.labels[wanted]
        self._totals.update(self(images)[wanted], labels)
        if self.ema is not None:
            self._ema_totals.update(self.ema.module(images)[wanted], labels)

    def on_validation_epoch_end(self) -> None:
        """Put the epoch's figures together, over all processes.

        Raises:
            DivergedError: the validation loss is not a number any more: the epoch's last step broke the weights.
        """
        sums = torch.tensor([self._train_loss_sum(), self._loss_count], dtype=torch.float64)
        train_loss, count = self._over_processes(sums).tolist()
        self.figures = {"train_loss": train_loss / max(1.0, count)}
        for prefix, totals in (("", self._totals), ("ema_", self._ema_totals if self.ema is not None else None)):
            if totals is not None:
                found = totals.compute(self._over_processes, self._gathered)
                self.figures |= {f"{prefix}{name}": value for name, value in found.items()}
        if not math.isfinite(self.figures["val_loss"]):
            self._refuse("validation loss", self.figures["val_loss"], self.global_step, self.current_epoch, self._lr())
        self._loss_sum, self._loss_count = 0.0, 0

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule in the form that Lightning expects."""
        optimizer = build_optimizer(
            self.model, opt=self.opt, lr=self.schedule.lr, weight_decay=self.weight_decay, table=self.decay
        )
        scheduler = build_schedule(optimizer, **self.schedule._asdict())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the learning rate of the next step."""
        scheduler.step_update(num_updates=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the running epoch has summed up so far."""
        self.check_finite()
        checkpoint["epoch_so_far"] = {
            "loss_sum": self._train_loss_sum(),
            "loss_count": self._loss_count,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with those sums."""
        so_far = checkpoint["epoch_so_far"]
        self._loss_sum, self._loss_count = so_far["loss_sum"], so_far["loss_count"]

    def check_finite(self) -> None:
        """Look at the last step's loss, which on an accelerator is looked at one step late so as not to wait for it.

        Raises:
            DivergedError: it is not a number, naming step, epoch and learning rate.
        """
        if self._pending is not None:
            (loss, step, epoch, lr), self._pending = self._pending, None
            if not bool(torch.isfinite(loss)):
                self._refuse("loss", loss.item(), step, epoch, lr)

    def _watch(self, loss: Tensor, num_images: int) -> None:
        self.check_finite()
        self._pending = (loss, self.global_step, self.current_epoch, self._lr())
        if loss.device.type == "cpu":
            self.check_finite()
        self._loss_sum = (
            self._loss_sum + loss.to(torch.float64 if loss.device.type != "mps" else torch.float32) * num_images
        )
        self._loss_count += num_images

    def _train_loss_sum(self) -> float:
        return float(self._loss_sum)

    def _refuse(self, what: str, value: float, step: int, epoch: int, lr: float) -> None:
        raise DivergedError(
            f"The {what} became {value} at step {step + 1} (epoch {epoch + 1}), with a learning rate of {lr:.2g}; try "
            f"a lower --lr (a third of it) or a longer warm-up (optim.warmup_epochs)."
        )

    def _lr(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def _arranged(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _over_processes(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, exactly the values where there is one."""
        if self.trainer.world_size == 1:
            return values
        values = values.to(self.device, torch.float64 if self.device.type != "mps" else torch.float32)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def _gathered(self, item: Any) -> list[Any]:
        """Return what all processes hold, in their order."""
        if self.trainer.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(items, item)
        return items
