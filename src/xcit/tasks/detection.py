"""Object detection: a Mask R-CNN and a batch of annotated images give losses, and an epoch average precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from torch import Tensor

from xcit.data.coco import CocoSet
from xcit.data.detection import AnnotatedImages
from xcit.evaluate.coco_ap import CocoFigures, Kind, coco_figures
from xcit.evaluate.detection import coco_results, coco_truth
from xcit.models.mask_rcnn import MaskRCNN
from xcit.tasks.dense import DenseTask, number
from xcit.tasks.optim import build_optimizer, build_schedule
from xcit.tasks.task import Schedule

DECAY_RATE = 0.1
"""What each step of the schedule leaves of the learning rate."""
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


class StepSchedule(NamedTuple):
    """The learning rate over the steps: a linear rise, then a tenth from each of some steps on."""

    lr: float
    """Until the first of them."""
    warmup_lr: float
    """Where the rise begins."""
    warmup_steps: int
    """Length of the rise."""
    decay_steps: tuple[int, ...]
    """From which on the rate is a tenth of what it was."""
    total_steps: int
    """Length of all."""


class DetectionTask(DenseTask):
    """Train a Mask R-CNN.

    Figures of an epoch: ``train_loss``, the five losses that it is the sum of, and of the validation images ``box_ap``,
    ``box_ap50``, and where the model has masks ``mask_ap``, ``mask_ap50``; with averaged weights ``ema_...`` of those.

    Args:
        model: the detector.
        schedule: of the learning rate: steps as released, or a cosine.
        val: what is validated on; None for nothing.
        weight_decay: of the parameters that ``norm_spared_decay`` names.
        ema_decay: decay a step of the averaged weights; 0 keeps none.
        seed: of the run.

    Source: the released detection configurations (AdamW, betas 0.9 and 0.999).
    """

    model: MaskRCNN

    def __init__(
        self,
        model: MaskRCNN,
        *,
        schedule: StepSchedule | Schedule,
        val: CocoSet | None,
        weight_decay: float = 0.05,
        ema_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, weight_decay=weight_decay, ema_decay=ema_decay, seed=seed)
        self.schedule = schedule
        self.val = val
        self.evaluation: dict[str, dict[Kind, CocoFigures]] = {}
        self._results: dict[str, list[dict[str, Any]]] = {"": [], "ema_": []}
        self._seen: list[int] = []

    def training_step(self, batch: AnnotatedImages, batch_idx: int) -> Tensor:
        """Return the sum of the losses of one batch.

        Raises:
            DivergedError: it is not a number any more.
        """
        losses = self.model(list(batch.images), list(batch.targets))
        loss = torch.stack(list(losses.values())).sum()
        self.watch(loss.detach(), len(batch.images))
        self.note_parts(losses, len(batch.images))
        return loss

    # --- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin to collect, and make sure that what is validated is sound."""
        self.check_finite()
        self._results, self._seen = {"": [], "ema_": []}, []

    def validation_step(self, batch: AnnotatedImages, batch_idx: int) -> None:
        """Collect what the model finds in one batch, and what its averaged weights do."""
        assert self.val is not None
        wanted = [i for i, decoded in enumerate(batch.decoded.tolist()) if decoded]
        if not wanted:
            return
        images, indices = [batch.images[i] for i in wanted], [int(batch.indices[i]) for i in wanted]
        self._seen += indices
        for prefix, model in self.judged().items():
            self._results[prefix] += detected(model, images, indices, self.val)

    def on_validation_epoch_end(self) -> None:
        """Put the epoch's figures together, over all processes.

        Raises:
            DivergedError: the weights are not numbers any more.
        """
        assert self.val is not None
        self.figures = self.take_losses(LOSSES)
        seen = sorted(index for part in self.gathered(self._seen) for index in part)
        truth = coco_truth(self.val, seen)
        for prefix in self.judged():
            results = [row for part in self.gathered(self._results[prefix]) for row in part]
            results.sort(key=lambda row: row["image_id"])  # the same order from any number of processes
            found = self.evaluation[prefix] = evaluated(truth, results, masks=self.model.roi_heads.has_mask())
            for kind, figures in found.items():
                word = {"bbox": "box", "segm": "mask"}[kind]
                self.figures[f"{prefix}{word}_ap"] = number(figures.ap)
                self.figures[f"{prefix}{word}_ap50"] = number(figures.ap50)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule in the form that Lightning expects."""
        optimizer = build_optimizer(
            self.model, opt="adamw", lr=self.schedule.lr, weight_decay=self.weight_decay, table=self.decay
        )
        if isinstance(self.schedule, StepSchedule):
            scheduler: Any = build_step_schedule(optimizer, self.schedule)
        else:
            scheduler = build_schedule(optimizer, **self.schedule._asdict())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @staticmethod
    def merit(row: Mapping[str, float], prefix: str = "") -> tuple[float, ...]:
        """Return the masks' average precision, and of equals the boxes'."""
        return tuple(row[f"{prefix}{name}"] for name in ("mask_ap", "box_ap") if f"{prefix}{name}" in row)


def build_step_schedule(optimizer: torch.optim.Optimizer, plan: StepSchedule) -> MultiStepLRScheduler:
    """Return the schedule, which has set the learning rate of step 0; after each step call ``step_update``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = plan.lr
    schedule = MultiStepLRScheduler(
        optimizer,
        decay_t=[step + 1 for step in plan.decay_steps],  # timm's milestones take effect one step early
        decay_rate=DECAY_RATE,
        warmup_t=plan.warmup_steps,
        warmup_lr_init=plan.warmup_lr,
        warmup_prefix=False,  # the rise is part of the run, not before it
        t_in_epochs=False,
    )
    schedule.step_update(num_updates=0)
    return schedule


def detected(model: MaskRCNN, images: list[Tensor], indices: list[int], annotated: CocoSet) -> list[dict[str, Any]]:
    """Return what a detector finds in images of a set, as COCO results.

    Only images of one size share a batch: XCA sees the padding, so that an image's neighbours would change its figures.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        alike.setdefault(model.transform.scaled_size(int(image.shape[1]), int(image.shape[2])), []).append(i)
    rows: list[dict[str, Any]] = []
    for group in alike.values():
        for i, found in zip(group, model.detect([images[i] for i in group]), strict=True):
            size = int(images[i].shape[1]), int(images[i].shape[2])
            rows += coco_results(found, int(annotated.image_ids[indices[i]]), size, annotated.category_ids)
    return rows


def evaluated(truth: dict[str, Any], results: list[dict[str, Any]], *, masks: bool) -> dict[Kind, CocoFigures]:
    """Return COCO's figures of boxes, and of masks where there are any."""
    kinds: tuple[Kind, ...] = ("bbox", "segm") if masks else ("bbox",)
    return {kind: coco_figures(truth, results, kind) for kind in kinds}
