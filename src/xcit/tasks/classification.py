"""Image classification: a model and a batch of labelled images give a loss and its logs."""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from xcit.data.batches import LabelledImages
from xcit.errors import ConfigError, XCiTError
from xcit.models.xcit import XCiT

EPOCHS_APART = 1_000_003
"""Distance between the epoch seeds of two neighbouring run seeds: no two epochs of any two runs draw alike."""


class ClassificationTask(lightning.LightningModule):
    """Train a classifier with AdamW, a linear warm-up and a cosine decay, both by the step.

    Logs, once an epoch: ``train_loss`` (of the augmented images, with smoothed labels), ``val_loss`` (plain
    cross-entropy) and ``val_accuracy`` (top-1, 0 to 1).

    Args:
        model: returns logits (B, num_classes).
        lr: peak learning rate.
        weight_decay: of matrices and kernels only; not of vectors, and not of what ``model.no_weight_decay`` names.
        warmup_fraction: share of all steps in which the learning rate rises from (nearly) 0 to ``lr``.
        min_lr: where the cosine ends.
        label_smoothing: share of the target that is spread over all classes.
        mixup: parameter alpha of the Beta distribution that pairs of images are mixed by; 0 does not mix.
        seed: what the draws of every epoch depend on.

    Raises:
        ConfigError: the model has no classes to learn.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019; Zhang et al., "mixup", 2018.
    """

    def __init__(
        self,
        model: XCiT,
        *,
        lr: float,
        weight_decay: float,
        warmup_fraction: float,
        min_lr: float,
        label_smoothing: float,
        mixup: float,
        seed: int,
    ) -> None:
        super().__init__()
        if model.num_classes < 2:
            raise ConfigError(f"num_classes is {model.num_classes}; a classifier needs 2 classes or more.")
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.min_lr = min_lr
        self.label_smoothing = label_smoothing
        self.mix: nn.Module | None = v2.MixUp(alpha=mixup, num_classes=model.num_classes) if mixup else None
        self.seed = seed
        self.val_accuracy = MulticlassAccuracy(model.num_classes, average="micro")

    def on_train_epoch_start(self) -> None:
        """Start every epoch's draws (augmentation, stochastic depth) from a state that seed and epoch give.

        An epoch then comes out the same whether the run got here in one go or was resumed.
        """
        torch.manual_seed(self.seed * EPOCHS_APART + self.current_epoch)

    def training_step(self, batch: LabelledImages, batch_idx: int) -> Tensor:
        """Return the loss of one augmented batch.

        Raises:
            XCiTError: the loss is not a number any more.
        """
        images, targets = batch if self.mix is None else self.mix(batch.images, batch.labels)
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=self.label_smoothing)
        self._check_finite(loss, "loss")
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: LabelledImages, batch_idx: int) -> None:
        """Count what the model gets right of one batch.

        Raises:
            XCiTError: the loss is not a number any more: the epoch's last step broke the weights.
        """
        logits = self.model(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        self._check_finite(loss, "validation loss")
        self.val_accuracy(logits, batch.labels)
        self.log("val_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.labels))
        self.log("val_accuracy", self.val_accuracy, on_step=False, on_epoch=True, batch_size=len(batch.labels))

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule in the form that Lightning expects."""
        optimizer = create_optimizer_v2(self.model, opt="adamw", lr=self.lr, weight_decay=self.weight_decay)
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=num_steps,
            lr_min=self.min_lr,
            warmup_t=round(self.warmup_fraction * num_steps),
            warmup_lr_init=self.lr / 100,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the learning rate of the next step."""
        scheduler.step_update(num_updates=self.global_step)

    def _check_finite(self, loss: Tensor, what: str) -> None:
        if torch.isfinite(loss):
            return
        raise XCiTError(
            f"The {what} became {loss.item()} at step {self.global_step} (epoch {self.current_epoch + 1}), with a "
            f"learning rate of {self.optimizers().param_groups[0]['lr']:.2g}; "  # type: ignore[union-attr]
            f"try a lower lr (a third of {self.lr:g}) or a longer warm-up."
        )
