"""Semantic segmentation: a segmenter and a batch of masked images give a loss, and an epoch the overlap of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from xcit.data.mask_set import IGNORE
from xcit.data.segmentation import MaskedImages
from xcit.evaluate.segmentation import SegmentationFigures, confusion, segmentation_figures
from xcit.inference.segment_image import segment_image
from xcit.models.segmentation import SegmentationModel, resize
from xcit.tasks.dense import DenseTask, number
from xcit.tasks.optim import build_optimizer


class PolySchedule(NamedTuple):
    """The learning rate over the steps: a power of what is left of the run, times a linear rise at its beginning."""

    lr: float
    """What it would begin with if it did not rise."""
    min_lr: float
    """Where it ends."""
    power: float
    """1 falls in a straight line."""
    warmup_ratio: float
    """Factor at step 0."""
    warmup_steps: int
    """Length of the rise, at whose end the factor is 1."""
    total_steps: int
    """Length of all."""

    def at(self, step: int) -> float:
        """Return the learning rate of a step.

        Source: mmcv's ``poly`` policy with a linear warm-up, which multiplies the falling rate.
        """
        left = max(0.0, 1 - step / self.total_steps)
        rate = (self.lr - self.min_lr) * left**self.power + self.min_lr
        if step < self.warmup_steps:
            rate *= self.warmup_ratio + (1 - self.warmup_ratio) * step / self.warmup_steps
        return rate


class PolyScheduler(Scheduler):
    """Sets an optimiser's learning rate by a ``PolySchedule``; has set that of step 0."""

    def __init__(self, optimizer: torch.optim.Optimizer, plan: PolySchedule) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = plan.lr
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.plan = plan
        self.step_update(num_updates=0)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a rate follows from its step alone."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    def _get_lr(self, t: int) -> list[float]:
        return [self.plan.at(t)] * len(self.base_values)


def pixel_loss(
    logits: Float[Tensor, "batch classes rows columns"],
    masks: Int64[Tensor, "batch height width"],
    class_weights: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the logits at the size of the masks, the mean over all pixels, ignored ones included.

    An ignored pixel adds nothing to the sum and one to what it is divided by: a crop half of which is padding weighs
    half, as in the released training. Nor are weights of the classes divided out: they are factors on the pixels' loss.

    Source: mmsegmentation 0.11's cross-entropy, whose mean is over what the loss was computed for, ignored or not, and
    its ``class_weight``.
    """
    # Bilinear weights and log-softmax in half precision lose what the loss lives on.
    whole = resize(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, masks.shape[-2:])
    weights = None if class_weights is None else class_weights.to(whole)
    return F.cross_entropy(whole, masks, weights, ignore_index=IGNORE, reduction="sum") / masks.numel()


class SegmentationTask(DenseTask):
    """Train a segmenter.

    Figures of an epoch: ``train_loss``, with an auxiliary head the two that it is made of, before the second's weight
    (``train_loss_decode``, ``train_loss_auxiliary``), and of the validation images ``miou``, ``macc``, ``aacc``; with
    averaged weights ``ema_...`` of those.

    Args:
        model: the segmenter.
        schedule: of the learning rate.
        weight_decay: of the parameters that ``norm_spared_decay`` names.
        auxiliary_weight: of the auxiliary head's loss.
        class_weights: factors (K,) on the loss of the classes' pixels, in both losses; None for 1.
        ema_decay: decay a step of the averaged weights; 0 keeps none.
        seed: of the run.

    Source: the released segmentation configurations (AdamW, betas 0.9 and 0.999; auxiliary loss times 0.4).
    """

    model: SegmentationModel
    class_weights: Tensor | None

    def __init__(
        self,
        model: SegmentationModel,
        *,
        schedule: PolySchedule,
        weight_decay: float = 0.01,
        auxiliary_weight: float = 0.4,
        class_weights: Sequence[float] | None = None,
        ema_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, ema_decay=ema_decay, seed=seed)
        self.schedule = schedule
        self.auxiliary_weight = auxiliary_weight
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.evaluation: dict[str, SegmentationFigures] = {}
        self._matrices: dict[str, Tensor] = {}

    def training_step(self, batch: MaskedImages, batch_idx: int) -> Tensor:
        """Return the loss of one batch.

        Raises:
            DivergedError: it is not a number any more.
        """
        assert isinstance(batch.images, Tensor)
        assert isinstance(batch.masks, Tensor)
        logits, auxiliary = self.model.forward_auxiliary(batch.images)
        loss = pixel_loss(logits, batch.masks, self.class_weights)
        parts = {}
        if auxiliary is not None:
            auxiliary_loss = pixel_loss(auxiliary, batch.masks, self.class_weights)
            parts = {"loss_decode": loss, "loss_auxiliary": auxiliary_loss}
            loss = loss + self.auxiliary_weight * parts["loss_auxiliary"]
        self.watch(loss.detach(), len(batch.images))
        self.note_parts(parts, len(batch.images))
        return loss

    # --- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin to count, and make sure that what is validated is sound."""
        self.check_finite()
        K = self.model.num_classes
        self._matrices = {prefix: torch.zeros(K, K, dtype=torch.int64) for prefix in self.judged()}

    def validation_step(self, batch: MaskedImages, batch_idx: int) -> None:
        """Count the pixels of one batch by what they are and what they are taken for."""
        for prefix, model in self.judged().items():
            self._matrices[prefix] += counted(model, batch)

    def on_validation_epoch_end(self) -> None:
        """Put the epoch's figures together, over all processes.

        Raises:
            DivergedError: the weights are not numbers any more.
        """
        self.figures = self.take_losses(("loss_decode", "loss_auxiliary"))
        for prefix, matrix in self._matrices.items():
            whole = torch.stack(self.gathered(matrix)).sum(0)  # whole numbers, too large for the sums of float32
            found = self.evaluation[prefix] = segmentation_figures(whole)
            self.figures |= {f"{prefix}{name}": number(getattr(found, name)) for name in ("miou", "macc", "aacc")}

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule in the form that Lightning expects."""
        optimizer = build_optimizer(
            self.model, opt="adamw", lr=self.schedule.lr, weight_decay=self.weight_decay, table=self.decay
        )
        scheduler = PolyScheduler(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @staticmethod
    def merit(row: Mapping[str, float], prefix: str = "") -> tuple[float, ...]:
        """Return the mean overlap of the classes, and of equals the share of right pixels."""
        return row[f"{prefix}miou"], row[f"{prefix}aacc"]


def counted(model: SegmentationModel, batch: MaskedImages) -> Int64[Tensor, "classes classes"]:
    """Return the confusion matrix of a batch for evaluation, each image at its own size; broken ones count nothing."""
    matrix = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    for image, mask, decoded in zip(batch.images, batch.masks, batch.decoded.tolist(), strict=True):
        if decoded:
            matrix += confusion(segment_image(model, image.cpu()).labels, mask, model.num_classes)
    return matrix
