"""A run of semantic segmentation: built from its settings, judged by the overlap of classes, reported at its end."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from xcit.data.image_set import NamedImages
from xcit.data.loading import eval_loader
from xcit.data.mask_parts import open_mask_parts
from xcit.data.mask_set import MaskSet
from xcit.data.parts import plural
from xcit.data.segmentation import EvalSegmentation, MaskedImages, TrainSegmentation
from xcit.data.segmentation_augment import SegmentationAugment
from xcit.errors import ConfigError, DataError
from xcit.evaluate.segmentation import SegmentationFigures, segmentation_figures
from xcit.files import write_atomic
from xcit.models.segmentation import SegmentationModel
from xcit.models.segmenters import create_segmenter, read_segmenter, save_segmenter
from xcit.models.zoo import CHECKPOINTS
from xcit.recipes.checkpointing import RunKeeper, skipped_images, write_skipped
from xcit.recipes.dry_run import lr_lines, mib
from xcit.recipes.initial_weights import architecture_of, backbone_options, backbone_source, whole_model
from xcit.recipes.job import Fact, Job, Share, num_workers, train_loader
from xcit.recipes.provenance import environment
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.segmentation_config import SegmentationConfig
from xcit.recipes.segmentation_report import SegmentationRecord, write_segmentation_report
from xcit.recipes.settings import check_config
from xcit.tasks.segmentation import PolySchedule, SegmentationTask, counted

HEAD_NAMES = {"upernet": "UperNet", "sem_fpn": "Semantic FPN"}
"""What people call the heads."""


@dataclass(frozen=True)
class SegmentationResult:
    """What a run of segmentation came to.

    Attributes:
        overlap: the figures, of all pixels of the part.
        part: "test", or "validation" where the data has no test part.
        class_names: one a class.
        num_images: that were judged.
        environment: versions and machine.
    """

    overlap: SegmentationFigures
    part: str
    class_names: tuple[str, ...]
    num_images: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return self.overlap.to_dict(self.class_names) | {"num_images": self.num_images}


class SegmentationJob(Job):
    """Train a segmenter, and evaluate its best epoch's weights once on the test part.

    Args:
        config: all settings.
        share: which process this is; None for the only one.
        pin_memory: lay batches where CUDA can fetch them.

    Raises:
        ConfigError: settings that are out of range or do not go together, all at once.
        DataError: a data set that cannot be used.
        UnknownNameError, CheckpointError: a model or file that cannot be had.
    """

    task: SegmentationTask
    images: Mapping[str, NamedImages]

    def __init__(self, config: SegmentationConfig, share: Share | None = None, *, pin_memory: bool = False) -> None:
        check_config(config)
        share = share or Share()
        self.config = config
        data, optim = config.data, config.optim
        self.accumulate, self.clip_grad = optim.accumulate, optim.clip_grad
        self.splits = open_mask_parts(data.root, val_fraction=data.val_fraction, split_seed=data.split_seed)
        train, val, test, _ = self.splits
        self.images = {"train": train, "val": val} | ({"test": test} if test is not None else {})
        torch.manual_seed(config.seed)
        model = build_segmenter(config, train)
        self.train_loader = train_loader(
            config,
            TrainSegmentation(train, augment_of(config, model)),
            share,
            pin_memory=pin_memory,
            steps=optim.steps_per_epoch,
        )
        self.val_loader = self._eval_loader(val, share)
        self.task = SegmentationTask(
            model,
            schedule=schedule_of(config, self.train_loader.sampler.num_steps),
            weight_decay=optim.weight_decay,
            auxiliary_weight=optim.auxiliary_weight,
            class_weights=weights_of(data.class_weights, train.class_names),
            ema_decay=optim.ema_decay,
            seed=config.seed,
        )

    def _eval_loader(self, images: MaskSet, share: Share) -> DataLoader[Any]:
        """Return a loader of whole images, one at a time: they may be of any size."""
        return eval_loader(
            EvalSegmentation(images),
            1,
            num_workers=num_workers(self.config),
            rank=share.rank,
            world_size=share.world_size,
        )

    # --- what the run asks of it -------------------------------------------------------------------------------------

    def save(self, model: nn.Module, path: Path) -> None:
        """Write a segmenter with its classes and their colours."""
        assert isinstance(model, SegmentationModel)
        train = self.splits.train
        save_segmenter(model, path, class_names=train.class_names, palette=train.palette.tolist())

    def introduction(self) -> Iterator[Fact]:
        """Yield what to say before the first step."""
        train, val, test, notes = self.splits
        held_out = f", {len(test):,} held out" if test is not None else ""
        parameters = sum(p.numel() for p in self.task.model.parameters()) / 1e6
        yield (
            "data",
            f"{len(train.class_names)} classes: {len(train):,} images to train on, {len(val):,} to choose by{held_out}",
        )
        head = HEAD_NAMES[self.task.model.head]
        yield "model", f"{head} on {self.config.model.name}, {parameters:.2f} M parameters"
        yield from (("note", note) for note in notes)

    def plan(self) -> list[Fact]:
        """Return what the run would do."""
        config, schedule = self.config, self.task.schedule
        data, augment, steps = config.data, config.augment, self.train_loader.sampler.num_steps
        weights = sum(p.numel() for p in self.task.model.parameters())
        return [
            ("recipe", config.recipe),
            *self.introduction(),
            ("steps", f"{config.epochs} epochs x {steps:,} = {schedule.total_steps:,}"),
            ("batch", f"{config.optim.batch_size} images, {config.micro_batch_size} at once on each device"),
            ("scales", f"shorter side {data.image_size * augment.min_ratio:.0f} to "
                       f"{data.image_size * augment.max_ratio:.0f} px, of which {augment.crop_size} x "
                       f"{augment.crop_size} px are cropped; in use {data.image_size} px"),
            ("learning rate", f"{config.lr:g}, falling with power {schedule.power:g} to {schedule.min_lr:g}, a rise of "
                              f"{plural(schedule.warmup_steps, 'step')} before"),
            ("", "\n".join(lr_lines(schedule.at, schedule.total_steps))),
            ("memory", f"{mib(4 * 4 * weights)} for weights, gradients and optimiser; activations come on top"),
        ]  # fmt: skip

    def conclude(self, run: RunFolder, keeper: RunKeeper, device: torch.device) -> SegmentationResult:
        """Evaluate the weights that were kept, write report and figures."""
        keeper.write_model(self.task, run.last_model)
        model = create_segmenter(run.model).to(device).eval()
        images, part = (self.splits.test, "test") if self.splits.test is not None else (self.splits.val, "validation")
        skipped = dict(keeper.skipped)
        overlap, bad = self._judge(model, images)
        if bad and part == "test":
            skipped["test"] = bad
            write_skipped(skipped, self.images, run.skipped)
        result = SegmentationResult(overlap, part, images.class_names, len(images) - len(bad), environment(device))
        record = SegmentationRecord(
            config=self.config,
            history=keeper.history,
            result=result,
            images=images,
            skipped=skipped_images(skipped, self.images),
        )
        write_segmentation_report(record, run, model)
        content = {
            part: result.to_dict(),
            "val": dict(keeper.best),
            "epochs": keeper.history,
            "skipped": {name: len(found) for name, found in skipped.items()},
            "environment": result.environment,
        }
        write_atomic(run.metrics, (json.dumps(content, indent=2) + "\n").encode())  # says that the run is complete
        return result

    def _judge(self, model: SegmentationModel, images: MaskSet) -> tuple[SegmentationFigures, set[int]]:
        """Return the figures of a set, and which images could not be used."""
        matrix = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
        bad: set[int] = set()
        batch: MaskedImages
        for batch in self._eval_loader(images, Share()):
            bad |= {int(i) for i in batch.indices[~batch.decoded]}
            matrix += counted(model, batch)
        if len(bad) == len(images):
            raise DataError(
                f"{images.root}: no image can be used with its mask; look at them with xcit data check-masks."
            )
        return segmentation_figures(matrix), bad


def build_segmenter(config: SegmentationConfig, train: MaskSet) -> SegmentationModel:
    """Return the segmenter with its initial weights, in training mode.

    Raises:
        UnknownNameError, ConfigError, CheckpointError: as ``create_segmenter``.
    """
    wanted = config.model
    architecture = architecture_of(wanted.name)
    options: dict[str, Any] = {
        "head": wanted.head,
        "drop_path_rate": wanted.drop_path_rate,
        "dropout": wanted.dropout,
        "image_size": config.data.image_size,
        "max_size": config.data.max_size,
        **backbone_options(wanted.options),
    }
    num_classes, source = len(train.class_names), wanted.pretrained
    segmenter = whole_model(source, architecture.id, word="ade20k", task="segmentation", read=read_segmenter)
    widths = {"channels": wanted.channels, "fpn_channels": wanted.fpn_channels}
    widths = {name: width for name, width in widths.items() if width}
    if isinstance(segmenter, str) and segmenter in CHECKPOINTS:
        model = create_segmenter(segmenter, True, num_classes, **options)
    elif segmenter is not None:
        model = create_segmenter(architecture.id, segmenter, num_classes, **options)
    else:
        options |= widths
        if wanted.head == "upernet":
            options["auxiliary_channels"] = wanted.auxiliary_channels
        model = create_segmenter(architecture.id, num_classes=num_classes, backbone=backbone_source(source), **options)
    for name, width in widths.items():
        theirs = model.config.get(name)
        if theirs != width:
            raise ConfigError(f"model.{name} is {width}, but the heads that {source} brings have {theirs}; take 0.")
    model.set_grad_checkpointing(wanted.grad_checkpointing)
    return model.train()


def weights_of(factors: Mapping[str, float], class_names: Sequence[str]) -> list[float] | None:
    """Return the factor on the loss of each class's pixels; None if all are 1.

    Raises:
        ConfigError: a class is named that the data does not have.
    """
    for name in factors:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1)
            shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            hint = f" (did you mean {near[0]}?)" if near else f"; its classes are {shown}"
            raise ConfigError(f"data.class_weights names {name!r}, a class that the data does not have{hint}.")
    weights = [factors.get(name, 1.0) for name in class_names]
    return weights if set(weights) != {1.0} else None


def augment_of(config: SegmentationConfig, model: SegmentationModel) -> SegmentationAugment:
    """Return how training images are distorted, and normalised as the model wants them."""
    a = config.augment
    return SegmentationAugment(
        crop_size=(a.crop_size, a.crop_size),
        short_side=config.data.image_size,
        max_size=config.data.max_size,
        ratio_range=(a.min_ratio, a.max_ratio),
        cat_max_ratio=a.cat_max_ratio,
        hflip=a.hflip,
        distort=a.distort,
        brightness=a.brightness,
        contrast=a.contrast,
        saturation=a.saturation,
        hue=a.hue,
        invert=a.invert,
        mean=model.mean,
        std=model.std,
    )


def schedule_of(config: SegmentationConfig, steps_per_epoch: int) -> PolySchedule:
    """Return the learning rate's plan; the rise takes at most a tenth of the run."""
    optim, total = config.optim, config.epochs * steps_per_epoch
    warmup = min(optim.warmup_steps, total // 10)
    return PolySchedule(config.lr, optim.min_lr, optim.power, optim.warmup_ratio, warmup, total)
