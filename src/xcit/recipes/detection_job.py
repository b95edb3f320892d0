"""A run of object detection: built from its settings, judged by COCO's figures and reported at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcit.data.coco import CocoSet
from xcit.data.coco_parts import open_coco_parts
from xcit.data.detection import EvalDetection, TrainDetection
from xcit.data.detection_augment import DetectionAugment
from xcit.data.image_set import NamedImages
from xcit.data.loading import eval_loader
from xcit.errors import DataError
from xcit.evaluate.coco_ap import CocoFigures, Kind
from xcit.evaluate.detection import coco_truth
from xcit.files import write_atomic
from xcit.models.detectors import create_detector, read_detector, save_detector
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.zoo import CHECKPOINTS
from xcit.recipes.checkpointing import RunKeeper, skipped_images, write_skipped
from xcit.recipes.detection_config import DetectionConfig
from xcit.recipes.detection_report import DetectionRecord, write_detection_report
from xcit.recipes.dry_run import lr_lines, mib
from xcit.recipes.initial_weights import architecture_of, backbone_options, backbone_source, whole_model
from xcit.recipes.job import Fact, Job, Share, num_workers, train_loader
from xcit.recipes.provenance import environment
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import check_config
from xcit.tasks.detection import DetectionTask, StepSchedule, build_step_schedule, detected, evaluated
from xcit.tasks.optim import lr_at
from xcit.tasks.task import Schedule

EVAL_BATCH_SIZE = 2
"""Images at once in validation, of 800 x 1333; more at smaller sizes."""


@dataclass(frozen=True)
class DetectionResult:
    """What a run of detection came to.

    Attributes:
        figures: COCO's, of boxes and of masks, by kind.
        part: "test", or "validation" where the data has no test part.
        class_names: by category id.
        num_images: that were judged.
        environment: versions and machine.
    """

    figures: Mapping[Kind, CocoFigures]
    part: str
    class_names: Mapping[int, str]
    num_images: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {kind: found.to_dict() for kind, found in self.figures.items()} | {"num_images": self.num_images}


class DetectionJob(Job):
    """Train a detector, and evaluate its best epoch's weights once on the test part.

    Args:
        config: all settings.
        share: which process this is; None for the only one.
        pin_memory: lay batches where CUDA can fetch them.

    Raises:
        ConfigError: settings that are out of range or do not go together, all at once.
        DataError: a data set that cannot be used.
        UnknownNameError, CheckpointError: a model or file that cannot be had.
    """

    task: DetectionTask
    images: Mapping[str, NamedImages]

    def __init__(self, config: DetectionConfig, share: Share | None = None, *, pin_memory: bool = False) -> None:
        check_config(config)
        share = share or Share()
        self.config = config
        data, optim = config.data, config.optim
        self.accumulate, self.clip_grad = optim.accumulate, optim.clip_grad
        self.splits = open_coco_parts(data.root, val_fraction=data.val_fraction, split_seed=data.split_seed)
        train, val, test, _ = self.splits
        self.images = {"train": train, "val": val} | ({"test": test} if test is not None else {})
        self._refuse_missing()
        self.with_masks = train.has_masks and data.masks == "auto"
        torch.manual_seed(config.seed)
        model = build_detector(config, train, with_masks=self.with_masks)
        self.train_loader = train_loader(
            config,
            TrainDetection(train, augment_of(config), with_masks=self.with_masks),
            share,
            pin_memory=pin_memory,
        )
        self.eval_batch_size = max(1, int(EVAL_BATCH_SIZE * (800 * 1333) / (data.image_size * data.max_size)))
        self.val_loader = eval_loader(
            EvalDetection(val),
            min(16, self.eval_batch_size),
            num_workers=num_workers(config),
            pin_memory=pin_memory,
            rank=share.rank,
            world_size=share.world_size,
        )
        self.task = DetectionTask(
            model,
            schedule=schedule_of(config, self.train_loader.sampler.num_steps),
            val=val,
            weight_decay=optim.weight_decay,
            ema_decay=optim.ema_decay,
            seed=config.seed,
        )

    def _refuse_missing(self) -> None:
        """Refuse a set of which more files are not there than may be broken, before anything is computed."""
        for part, images in self.images.items():
            assert isinstance(images, CocoSet)
            missing = images.missing_images()
            if len(missing) > self.config.data.max_bad_fraction * len(images):
                raise DataError(
                    f"{images.file}: {len(missing)} of {len(images)} {part} images are not in {images.root} (one is "
                    f"{missing[0]}), more than data.max_bad_fraction={self.config.data.max_bad_fraction:g} allows. "
                    f"Look at them with xcit data check-coco, or allow more."
                )

    # --- what the run asks of it -------------------------------------------------------------------------------------

    def save(self, model: nn.Module, path: Path) -> None:
        """Write a detector with its classes."""
        save_detector(model, path, class_names=self.splits.train.class_names)

    def introduction(self) -> Iterator[Fact]:
        """Yield what to say before the first step."""
        train, val, test, notes = self.splits
        held_out = f", {len(test):,} held out" if test is not None else ""
        what = "boxes and masks" if self.with_masks else "boxes"
        parameters = sum(p.numel() for p in self.task.model.parameters()) / 1e6
        yield (
            "data",
            f"{len(train.class_names)} classes, {len(train.labels):,} instances: {len(train):,} images to train on, "
            f"{len(val):,} to choose by{held_out}",
        )
        yield "model", f"Mask R-CNN on {self.config.model.name}, {parameters:.2f} M parameters, {what}"
        yield from (("note", note) for note in notes)

    def plan(self) -> list[Fact]:
        """Return what the run would do."""
        config, schedule = self.config, self.task.schedule
        augment, steps = config.augment, self.train_loader.sampler.num_steps
        weights = sum(p.numel() for p in self.task.model.parameters())
        return [
            ("recipe", config.recipe),
            *self.introduction(),
            ("steps", f"{config.epochs} epochs x {steps:,} = {schedule.total_steps:,}"),
            ("batch", f"{config.optim.batch_size} images, {config.micro_batch_size} at once on each device"),
            ("scales", f"shorter side {augment.min_short} to {augment.max_short} px, longer at most "
                       f"{config.data.max_size} px; in use {config.data.image_size} px"),
            ("learning rate", _rate(config, schedule)),
            ("", "\n".join(lr_lines(_rate_at(schedule), schedule.total_steps))),
            ("memory", f"{mib(4 * 4 * weights)} for weights, gradients and optimiser; activations come on top"),
        ]  # fmt: skip

    def conclude(self, run: RunFolder, keeper: RunKeeper, device: torch.device) -> DetectionResult:
        """Evaluate the weights that were kept, write report and figures."""
        keeper.write_model(self.task, run.last_model)
        model = create_detector(run.model).to(device).eval()
        images, part = (self.splits.test, "test") if self.splits.test is not None else (self.splits.val, "validation")
        skipped = dict(keeper.skipped)
        figures, results, bad = self._judge(model, images, device)
        if bad and part == "test":
            skipped["test"] = bad
            write_skipped(skipped, self.images, run.skipped)
        names = dict(zip(images.category_ids.tolist(), images.class_names, strict=True))
        result = DetectionResult(figures, part, names, len(images) - len(bad), environment(device))
        write_atomic(run.results, json.dumps(results).encode())
        record = DetectionRecord(
            config=self.config,
            history=keeper.history,
            result=result,
            images=images,
            skipped=skipped_images(skipped, self.images),
        )
        write_detection_report(record, run, model)
        content = {
            part: result.to_dict(),
            "val": dict(keeper.best),
            "epochs": keeper.history,
            "skipped": {name: len(found) for name, found in skipped.items()},
            "environment": result.environment,
        }
        write_atomic(run.metrics, (json.dumps(content, indent=2) + "\n").encode())  # says that the run is complete
        return result

    def _judge(
        self, model: MaskRCNN, images: CocoSet, device: torch.device
    ) -> tuple[dict[Kind, CocoFigures], list[dict[str, Any]], set[int]]:
        """Return COCO's figures of a set, the results that they are of, and which images could not be decoded."""
        results: list[dict[str, Any]] = []
        bad: set[int] = set()
        loader = eval_loader(EvalDetection(images), min(16, self.eval_batch_size), num_workers=num_workers(self.config))
        with torch.inference_mode():
            for batch in loader:
                wanted = [i for i, decoded in enumerate(batch.decoded.tolist()) if decoded]
                bad |= {int(i) for i in batch.indices[~batch.decoded]}
                pixels = [batch.images[i].to(device) for i in wanted]
                if pixels:
                    results += detected(model, pixels, [int(batch.indices[i]) for i in wanted], images)
        judged = [i for i in range(len(images)) if i not in bad]
        if not judged:
            raise DataError(
                f"{images.file}: none of its images can be decoded; look at them with xcit data check-coco."
            )
        return evaluated(coco_truth(images, judged), results, masks=self.with_masks), results, bad


def build_detector(config: DetectionConfig, train: CocoSet, *, with_masks: bool) -> MaskRCNN:
    """Return the detector with its initial weights, in training mode.

    Raises:
        UnknownNameError, ConfigError, CheckpointError: as ``create_detector``.
    """
    wanted = config.model
    architecture = architecture_of(wanted.name)
    options: dict[str, Any] = {
        "drop_path_rate": wanted.drop_path_rate,
        "min_size": config.data.image_size,
        "max_size": config.data.max_size,
        "score_thresh": wanted.score_thresh,
        "detections_per_img": wanted.max_detections,
        "box_samples": wanted.box_samples,
        "proposals": wanted.proposals,
        "min_anchor_iou": wanted.min_anchor_iou,
        "with_masks": with_masks,
        **backbone_options(wanted.options),
    }
    heads: dict[str, Any] = {
        "out_channels": wanted.out_channels,
        "box_width": wanted.box_width,
        "mask_channels": wanted.mask_channels,
        "mask_convs": wanted.mask_convs,
    }
    num_classes, source = len(train.class_names), wanted.pretrained
    detector = whole_model(source, architecture.id, word="coco", task="detection", read=read_detector)
    if isinstance(detector, str) and detector in CHECKPOINTS:
        model = create_detector(detector, True, num_classes, **options)
    elif detector is not None:
        model = create_detector(architecture.id, detector, num_classes, **options)
    else:
        backbone = backbone_source(source)
        model = create_detector(architecture.id, num_classes=num_classes, backbone=backbone, **heads, **options)
    model.set_grad_checkpointing(wanted.grad_checkpointing)
    return model.train()


def augment_of(config: DetectionConfig) -> DetectionAugment:
    """Return how training images are distorted."""
    a = config.augment
    return DetectionAugment(
        short_sides=tuple(range(a.min_short, a.max_short + 1, a.short_step)),
        max_size=config.data.max_size,
        hflip=a.hflip,
        crop_prob=a.crop_prob,
        crop_short_sides=tuple(range(a.crop_min_short, a.crop_max_short + 1, a.crop_short_step)),
        crop_range=(a.crop_min, a.crop_max),
        jitter=a.jitter,
        hue=a.hue,
        invert=a.invert,
    )


def schedule_of(config: DetectionConfig, steps_per_epoch: int) -> StepSchedule | Schedule:
    """Return the learning rate's plan; the rise takes at most a tenth of the run."""
    optim, total = config.optim, config.epochs * steps_per_epoch
    warmup = min(optim.warmup_steps, total // 10)
    if optim.schedule == "cosine":
        return Schedule(config.lr, optim.min_lr, optim.warmup_ratio * config.lr, warmup, total)
    decays = (round(epochs * steps_per_epoch) for epochs in (optim.first_decay, optim.second_decay))
    return StepSchedule(config.lr, optim.warmup_ratio * config.lr, warmup, tuple(decays), total)


def _rate_at(schedule: StepSchedule | Schedule) -> Any:
    if isinstance(schedule, Schedule):
        return lambda step: lr_at(step, **schedule._asdict())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=schedule.lr)
    plan = build_step_schedule(optimizer, schedule)

    def at(step: int) -> float:
        plan.step_update(num_updates=step)
        return float(optimizer.param_groups[0]["lr"])

    return at


def _rate(config: DetectionConfig, schedule: StepSchedule | Schedule) -> str:
    optim = config.optim
    after = (
        f"a cosine to {optim.min_lr:g}"
        if optim.schedule == "cosine"
        else f"a tenth after {optim.first_decay:g} and {optim.second_decay:g} epochs"
    )
    return f"{config.lr:g}, a rise of {schedule.warmup_steps:,} steps before, {after}"
