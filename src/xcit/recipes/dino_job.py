"""A run of DINO: student, teacher and crops built from its settings; probed on the way, reported at its end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcit.data.multi_crop import CropImages, CropRecipe, MultiCrop
from xcit.data.preprocess import Preprocessing
from xcit.data.unlabelled import UnlabelledData, open_unlabelled
from xcit.errors import ConfigError, DataError, XCiTError
from xcit.evaluate.knn import KS, KNNResult, knn_probe
from xcit.files import write_atomic
from xcit.inference.costs import count_model_costs
from xcit.models.dino_files import save_dino
from xcit.models.dino_head import DINOHead, DINOModel, teacher_of
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT
from xcit.models.zoo import CHECKPOINTS, find
from xcit.recipes.build import GREY, RGB, measure_statistics
from xcit.recipes.checkpointing import RunKeeper, skipped_images
from xcit.recipes.dino_config import DinoConfig
from xcit.recipes.dino_report import DinoRecord, write_dino_report
from xcit.recipes.dry_run import lr_lines, mib, rate_text
from xcit.recipes.job import Fact, Job, Share, num_workers, train_loader
from xcit.recipes.provenance import environment
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import check_config
from xcit.tasks.dino import FLAT, SHARP, DinoSchedule, DinoTask

PATIENT_EPOCHS = 2
"""Epochs in a row, after the warm-up, in which the teacher tells nothing apart before a run counts as collapsed."""
COUNSEL = {
    SHARP: "raise teacher.temp, or lower optim.lr or teacher.center_momentum",
    FLAT: "lower teacher.temp and teacher.warmup_temp, or optim.lr",
}
"""What to change, by how the outputs have collapsed."""

_log = logging.getLogger("xcit")


@dataclass(frozen=True)
class DinoResult:
    """What a run of DINO came to.

    Attributes:
        figures: of the last epoch.
        knn: the probe with each published number of neighbours; None where the data has no labels.
        collapse: how the teacher's outputs had collapsed when the run ended (``DinoJob.collapse``); None if they had
            not.
        environment: versions and machine.
        k: the number of neighbours that was settled on beforehand (probe.k).
    """

    figures: Mapping[str, float]
    knn: KNNResult | None = None
    collapse: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    k: int = 20

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        knn = None
        if self.knn is not None:
            accuracies = {
                str(k): {"accuracy": found.top1, "num_correct": found.num_correct, "num_images": found.num_images}
                for k, found in self.knn.accuracies.items()
            }
            knn = {"num_bank": self.knn.num_bank, "temperature": self.knn.temperature, "k": accuracies}
        return {"figures": dict(self.figures), "knn": knn, "collapse": self.collapse}


class DinoJob(Job):
    """Train a backbone without labels; its last epoch's teacher is what the run leaves.

    Args:
        config: all settings.
        share: which process this is; None for the only one.
        pin_memory: lay batches where CUDA can fetch them.

    Raises:
        ConfigError: settings that are out of range or do not go together, all at once.
        DataError: images that cannot be used.
        UnknownNameError, CheckpointError: a model or file that cannot be had.
    """

    task: DinoTask

    def __init__(self, config: DinoConfig, share: Share | None = None, *, pin_memory: bool = False) -> None:
        check_config(config)
        share = share or Share()
        self.config = config
        self.accumulate = config.optim.accumulate
        data = config.data
        self.data = open_unlabelled(
            data.root,
            data.format,
            val_fraction=data.val_fraction,
            split_seed=data.split_seed,
            in_chans=data.in_chans,
            download=data.download,
        )
        if len(self.data.train) < 2:
            raise DataError(f"There is one image to train on, {self.data.train.names[0]}; DINO needs two or more.")
        self.images = {"train": self.data.train}
        torch.manual_seed(config.seed)
        backbone = build_backbone(config)
        self.preprocessing = _preprocessing(config, backbone, self.data)
        self.train_loader = train_loader(
            config,
            CropImages(self.data.train, MultiCrop(crop_recipe(config), self.preprocessing)),
            share,
            pin_memory=pin_memory,
        )
        head = config.head
        student = DINOModel(
            backbone,
            DINOHead(
                backbone.num_features,
                out_dim=head.out_dim,
                hidden_dim=head.hidden_dim,
                bottleneck_dim=head.bottleneck_dim,
                norm_last_layer=head.norm_last_layer,
            ),
        )
        teacher = teacher_of(student)
        backbone.set_grad_checkpointing(config.model.grad_checkpointing)
        self.task = DinoTask(
            student,
            teacher,
            schedule=schedule_of(config, self.train_loader.sampler.num_steps),
            clip_grad=config.optim.clip_grad,
            freeze_last_layer_steps=round(config.optim.freeze_last_layer * self.train_loader.sampler.num_steps),
            seed=config.seed,
            channels_last=config.compute.channels_last,
            compile=config.compute.compile,
            student_temp=config.teacher.student_temp,
            center_momentum=config.teacher.center_momentum,
        )
        self.task.look = self._look

    # --- what the run asks of it -------------------------------------------------------------------------------------

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the teacher's backbone with its preprocessing."""
        save_checkpoint(model, path, preprocessing=self.preprocessing)

    def introduction(self) -> Iterator[Fact]:
        """Yield what to say before the first step."""
        train, probe, notes = self.data
        asked = (
            f"; k-NN probe with {len(probe):,} labelled others" if probe is not None and self.config.probe.every else ""
        )
        parameters = sum(p.numel() for p in self.task.model.parameters()) / 1e6
        crops = self.config.crops
        local = f" and {crops.num_local} of {crops.local_size} px" if crops.num_local else ""
        yield "data", f"{len(train):,} images, used without labels{asked}"
        yield (
            "model",
            f"{self.config.model.name}, {parameters:.2f} M parameters, head with {self.config.head.out_dim:,} outputs",
        )
        yield "views", f"2 of {crops.global_size} px{local} an image"
        yield from (("note", note) for note in notes)

    def plan(self) -> list[Fact]:
        """Return what the run would do."""
        config, schedule = self.config, self.task.schedule
        size, crops = config.crops.global_size, config.crops
        costs = count_model_costs(self.task.student.backbone, (config.data.in_chans, size, size))
        gmacs = costs.multiply_adds / 1e9
        local = crops.num_local * (crops.local_size / size) ** 2
        views = 3 * (2 + local) + 2
        steps = schedule.steps_per_epoch
        images = config.epochs * steps * config.optim.batch_size
        weights = sum(p.numel() for p in self.task.student.parameters())
        activations = costs.training_bytes * config.micro_batch_size * (2 + local)
        if config.compute.precision != "32":
            activations /= 2
        held = 4 * 5 * weights  # student, gradient, two moments, teacher
        return [
            ("recipe", config.recipe),
            *self.introduction(),
            ("multiply-adds", f"{gmacs:.3f} G of one view of {size} x {size} px, forward"),
            ("steps", f"{config.epochs} epochs x {steps:,} = {schedule.total_steps:,}"),
            ("compute", f"{images * views * gmacs * 1e9:.3g} multiply-adds: {views:.1f} forward passes an image"),
            ("learning rate", rate_text(config.lr, config.optim, schedule.warmup_lr, schedule.warmup_steps)),
            ("", "\n".join(lr_lines(schedule.lr_at, schedule.total_steps))),
            ("teacher", f"momentum {config.teacher.momentum:g} to 1, temperature {_temperatures(config)}"),
            ("memory", f"about {mib(held + activations)}: {mib(held)} for weights, optimiser and teacher, "
                       f"{mib(activations)} for activations"),
        ]  # fmt: skip

    def conclude(self, run: RunFolder, keeper: RunKeeper, device: torch.device) -> DinoResult:
        """Probe what was learned, write report, figures and the checkpoint with both networks and their heads."""
        task = self.task
        save_dino(run.dino, task.student, task.teacher, len(keeper.history), center=task.center)
        model = create_model(str(run.model)).to(device).eval()
        figures = keeper.history[-1]
        probe = self.data.probe
        knn = None
        if probe is not None and self.config.probe.every:
            ks = dict.fromkeys((*KS, self.config.probe.k))
            knn = self._probe(model, sorted(ks))
        result = DinoResult(figures, knn, self.collapse(keeper.history), environment(device), self.config.probe.k)
        skipped = skipped_images(keeper.skipped, self.images)
        record = DinoRecord(
            config=self.config,
            history=keeper.history,
            knn=knn,
            collapse=result.collapse,
            environment=result.environment,
            data=self.data,
            preprocessing=self.preprocessing,
            skipped=skipped,
        )
        write_dino_report(record, run, model)
        content = result.to_dict() | {
            "epochs": keeper.history,
            "skipped": {name: len(found) for name, found in keeper.skipped.items()},
            "environment": result.environment,
        }
        write_atomic(run.metrics, (json.dumps(content, indent=2) + "\n").encode())  # says that the run is complete
        return result

    # --- on the way --------------------------------------------------------------------------------------------------

    def _look(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Warn of a collapse; return the k-NN probe's figure where it is due. All processes call it after an epoch."""
        epoch = self.task.current_epoch + 1
        self._watch(epoch, figures)
        every = self.config.probe.every
        if self.data.probe is None or not every or (epoch % every and epoch != self.config.epochs):
            return {}
        found: dict[str, float] | str = {}
        if self.task.global_rank == 0:
            try:
                accuracies = self._probe(self.task.model, [self.config.probe.k]).accuracies
                found = {"knn_accuracy": next(iter(accuracies.values())).top1}
            except XCiTError as err:  # the others wait for an answer, and get this one
                found = str(err)
        found = self.task.gathered(found)[0]
        if isinstance(found, str):
            raise DataError(f"The k-NN probe failed: {found} Mend it, or begin a run with probe.every=0, without one.")
        return found

    def _probe(self, model: nn.Module, ks: list[int]) -> KNNResult:
        assert self.data.probe is not None
        probe = self.config.probe
        return knn_probe(
            model,
            self.data.train,
            self.data.probe,
            self.preprocessing,
            ks=ks,
            temperature=probe.temperature,
            max_bank=probe.max_images,
            max_queries=probe.max_images,
            max_bad_fraction=self.config.data.max_bad_fraction,
            num_workers=num_workers(self.config),
        )

    def collapse(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Say how a run has collapsed; None if it has not.

        It has if the teacher told less than ``TELLING`` nats about which image is which in each of the last
        ``PATIENT_EPOCHS`` epochs, all of them after the warm-up and after the last layer was frozen.

        Args:
            history: a row an epoch, up to now; the last ones suffice.
        """
        schedule = self.task.schedule
        begun = max(schedule.warmup_steps, self.task.freeze_last_layer_steps) / schedule.steps_per_epoch
        last = [row for row in history[-PATIENT_EPOCHS:] if row["epoch"] > begun]
        kinds = [self.task.collapse(row) for row in last]
        return kinds[-1] if len(kinds) == PATIENT_EPOCHS and all(kinds) else None

    def _watch(self, epoch: int, figures: Mapping[str, float]) -> None:
        before = self.task.recent[-PATIENT_EPOCHS:]
        self.task.recent = recent = [*before, {"epoch": float(epoch), **figures}]
        kind = self.collapse(recent)
        if kind and not self.collapse(before) and self.task.global_rank == 0:
            _log.warning(
                "The run %s has collapsed: %s (teacher entropy %.3f of at most %.3f nats, of the mean output %.3f). "
                "Stop it, and %s.",
                self.config.recipe,
                kind,
                figures["teacher_entropy"],
                math.log(self.config.head.out_dim),
                figures["teacher_spread"],
                COUNSEL[kind],
            )


def build_backbone(config: DinoConfig) -> XCiT:
    """Return the student's backbone with its initial weights, in training mode.

    Raises:
        UnknownNameError, ConfigError, CheckpointError: as ``create_model``.
    """
    wanted = config.model
    if wanted.name.startswith("timm:"):
        raise ConfigError(f"model.name is {wanted.name}; DINO trains XCiTs here: name one of `xcit models`.")
    architecture, released = find(wanted.name)
    if released is not None:
        raise ConfigError(
            f"model.name is {wanted.name}, which means weights; name the architecture {architecture.id}, and the "
            f"weights to begin with by --pretrained {wanted.name}."
        )
    arguments: dict[str, Any] = {
        "num_classes": 0,
        "in_chans": config.data.in_chans,
        "drop_path_rate": wanted.drop_path_rate,
        **wanted.options,
    }
    if wanted.pretrained == "released":
        names = (name for name, file in CHECKPOINTS.items() if file.architecture == architecture.id)
        raise ConfigError(
            f"model.pretrained is released, which says neither by what nor on what images; name the weights, such as "
            f"--pretrained {max(names, key=lambda name: name.startswith('dino_'))}."
        )
    if wanted.pretrained == "none":
        return create_model(wanted.name, **arguments)
    if Path(wanted.pretrained).is_file() or "/" in wanted.pretrained:
        return create_model(wanted.name, pretrained=wanted.pretrained, **arguments)
    origin, _ = find(wanted.pretrained)
    if origin.id != architecture.id:
        raise ConfigError(f"{wanted.pretrained} is of {origin.id}, not of {architecture.id}.")
    return create_model(wanted.pretrained, pretrained=True, **arguments)


def crop_recipe(config: DinoConfig) -> CropRecipe:
    """Return how the views are drawn."""
    crops = config.crops
    return CropRecipe(
        global_size=crops.global_size,
        local_size=crops.local_size,
        num_local=crops.num_local,
        global_scale=(crops.global_min_area, crops.global_max_area),
        local_scale=(crops.local_min_area, crops.local_max_area),
        degrees=crops.degrees,
        hflip=crops.hflip,
        vflip=crops.vflip,
        jitter_prob=crops.jitter_prob,
        brightness=crops.brightness,
        contrast=crops.contrast,
        saturation=crops.saturation,
        hue=crops.hue,
        grey_prob=crops.grey_prob,
        blur_probs=(crops.blur_first, crops.blur_second, crops.blur_local),
        blur_radius=(crops.blur_min_radius, crops.blur_max_radius),
        solarize_prob=crops.solarize,
    )


def schedule_of(config: DinoConfig, steps_per_epoch: int) -> DinoSchedule:
    """Return what changes over the steps of a run."""
    optim, teacher = config.optim, config.teacher
    return DinoSchedule(
        lr=config.lr,
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
        total_steps=config.epochs * steps_per_epoch,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum=teacher.momentum,
        teacher_temp=teacher.temp,
        warmup_teacher_temp=teacher.warmup_temp,
        warmup_teacher_temp_steps=round(teacher.warmup_temp_epochs) * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )


def _preprocessing(config: DinoConfig, backbone: XCiT, data: UnlabelledData) -> Preprocessing:
    """Return how images are prepared: statistics of the weights or of the images."""
    wanted, size = config.data, config.crops.global_size
    cfg = backbone.pretrained_cfg
    mean, std = cfg.get("mean"), cfg.get("std")
    if wanted.normalize == "data":
        mean, std = measure_statistics(data.train, (size, size), wanted.in_chans, wanted.crop_pct)
    elif not mean or not std or len(mean) != wanted.in_chans:
        mean, std = GREY if wanted.in_chans == 1 else RGB
    return Preprocessing((size, size), tuple(mean), tuple(std), in_chans=wanted.in_chans, crop_pct=wanted.crop_pct)


def _temperatures(config: DinoConfig) -> str:
    teacher = config.teacher
    rise = f"{teacher.warmup_temp:g} to " if teacher.warmup_temp_epochs else ""
    return f"{rise}{teacher.temp:g}"
