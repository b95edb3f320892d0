"""Where settings become data, model and task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from xcit.data.batches import LabelledImages
from xcit.data.datasets import EvalImages, TrainImages
from xcit.data.image_set import DataSplits, ImageSet
from xcit.data.loading import TrainLoader, default_workers, eval_loader
from xcit.data.preprocess import Preprocessing
from xcit.data.sampling import EpochSampler
from xcit.data.sources import open_data
from xcit.errors import ConfigError, DataError
from xcit.models.factory import create_model
from xcit.models.variants import apply_variant
from xcit.models.weights import save_checkpoint
from xcit.models.zoo import CHECKPOINTS, IMAGENET_MEAN, IMAGENET_STD, find
from xcit.recipes.augment import batch_mixer, train_transform
from xcit.recipes.config import TrainConfig
from xcit.recipes.job import Share
from xcit.recipes.peers import PREFIX, create_peer, save_peer
from xcit.recipes.settings import check_config
from xcit.recipes.teacher import build_teacher
from xcit.tasks.classification import ClassificationTask, Distillation
from xcit.tasks.task import Schedule

EVAL_BATCH_SIZE = 64
"""Images at once in validation at 224 px; fewer at larger sizes."""
MEASURED_IMAGES = 2000
"""At most so many images give mean and standard deviation where these are measured."""
RGB = (IMAGENET_MEAN, IMAGENET_STD)
"""Mean and standard deviation where neither weights nor images give any."""
GREY = ((0.449,), (0.226,))
"""ImageNet's mean and standard deviation of the three channels together."""

_log = logging.getLogger("xcit")


class Parts(NamedTuple):
    """What the settings of a run stand for."""

    splits: DataSplits
    """The images."""
    preprocessing: Preprocessing
    """How they are prepared; goes into the checkpoint."""
    task: ClassificationTask
    """Model, loss, optimiser."""
    train_loader: TrainLoader
    """Batches to learn from."""
    val_loader: DataLoader[LabelledImages]
    """Batches to choose by."""


def build(config: TrainConfig, share: Share | None = None, *, pin_memory: bool = False) -> Parts:
    """Turn settings into data, model and task; the initial weights follow from the seed.

    Args:
        config: all settings.
        share: which process this is; None for the only one.
        pin_memory: lay batches where CUDA can fetch them.

    Raises:
        ConfigError: settings that are out of range or do not go together, all at once.
        DataError: images that cannot be used.
        UnknownNameError, CheckpointError: a model, teacher or file that cannot be had.
    """
    check_config(config)
    share = share or Share()
    splits = open_splits(config)
    classes = splits.train.class_names
    torch.manual_seed(config.seed)
    model = build_model(config, classes)
    preprocessing = choose_preprocessing(config, model, splits.train)

    data, optim = config.data, config.optim
    sampler = EpochSampler(
        len(splits.train),
        optim.batch_size,
        seed=config.seed,
        repeats=config.augment.repeats,
        rank=share.rank,
        world_size=share.world_size,
    )
    workers = default_workers(config.compute.devices) if data.num_workers < 0 else data.num_workers
    train_loader = TrainLoader(
        TrainImages(splits.train, train_transform(config.augment, preprocessing)),
        sampler,
        config.micro_batch_size,
        num_workers=workers,
        max_bad_fraction=data.max_bad_fraction,
        pin_memory=pin_memory,
    )
    val_loader = eval_loader(
        EvalImages(splits.val, preprocessing),
        eval_batch_size(data.image_size),
        num_workers=workers,
        pin_memory=pin_memory,
        rank=share.rank,
        world_size=share.world_size,
    )
    return Parts(splits, preprocessing, build_task(config, model, splits, preprocessing), train_loader, val_loader)


def open_splits(config: TrainConfig) -> DataSplits:
    """Return the images that the settings name.

    Raises:
        DataError: they cannot be used.
        ConfigError: a single class, or settings that the data contradicts.
    """
    data = config.data
    splits = open_data(
        data.root,
        data.format,
        val_fraction=data.val_fraction,
        split_seed=data.split_seed,
        in_chans=data.in_chans,
        download=data.download,
    )
    train = splits.train
    problems = []
    if len(train.class_names) < 2 and not train.multi_label:
        problems.append(f"{data.root} has the single class {train.class_names[0]}; a classifier needs two or more")
    if train.multi_label and config.distill.kind != "none":
        problems.append("distill.kind is for images of one class each; this data has several; set it to none")
    if train.multi_label and data.class_weights != "none":
        problems.append("data.class_weights is for images of one class each; set it to none")
    if train.multi_label and config.augment.mix_prob and (config.augment.mixup or config.augment.cutmix):
        problems.append("mixup and cutmix are for images of one class each; set augment.mixup=0 augment.cutmix=0")
    if problems:
        raise ConfigError(f"Data and settings do not go together: {'; '.join(problems)}.")
    return splits


def build_model(config: TrainConfig, class_names: Sequence[str]) -> nn.Module:
    """Return the model with its initial weights, in training mode.

    Raises:
        UnknownNameError, ConfigError, CheckpointError: as ``create_model``.
    """
    wanted, num_classes, in_chans = config.model, len(class_names), config.data.in_chans
    if wanted.name.startswith(PREFIX):
        if wanted.pretrained not in ("none", "released"):
            raise ConfigError(f"model.pretrained is {wanted.pretrained}; for a model of timm it is none or released.")
        options: dict[str, Any] = dict(wanted.options)
        if wanted.drop_path_rate:
            options["drop_path_rate"] = wanted.drop_path_rate
        model = create_peer(
            wanted.name,
            num_classes=num_classes,
            in_chans=in_chans,
            pretrained=wanted.pretrained == "released",
            options=options,
        )
        if wanted.grad_checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        return model
    architecture, released = find(wanted.name)
    if released is not None:
        raise ConfigError(
            f"model.name is {wanted.name}, which means weights; name the architecture {architecture.id}, and the "
            f"weights to begin with by --pretrained {wanted.name}."
        )
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "drop_path_rate": wanted.drop_path_rate,
        **wanted.options,
    }
    if wanted.pretrained in CHECKPOINTS:
        origin, _ = find(wanted.pretrained)
        if origin.id != architecture.id:
            raise ConfigError(f"{wanted.pretrained} is of {origin.id}, not of {architecture.id}.")
        model = create_model(wanted.pretrained, pretrained=True, **arguments)
    else:
        pretrained: bool | str = {"none": False, "released": True}.get(wanted.pretrained, wanted.pretrained)
        model = create_model(wanted.name, pretrained=pretrained, **arguments)
    known = model.pretrained_cfg.get("class_names")
    if wanted.pretrained != "none" and known and list(known) != list(class_names):
        model.reset_classifier(num_classes)  # as many classes, but others
    if wanted.variant != "none":
        apply_variant(model, wanted.variant)
    if wanted.surgery != "none":
        _copy_stem(model, wanted.surgery)
    model.set_grad_checkpointing(wanted.grad_checkpointing)
    return model


def _copy_stem(model: nn.Module, name: str) -> None:
    """Take the patch embedding of another checkpoint, as the released code's ``--surgery`` does."""
    donor = create_model(name, pretrained=True) if not Path(name).is_file() else create_model(name)
    try:
        model.patch_embed.load_state_dict(donor.patch_embed.state_dict())  # type: ignore[union-attr]
    except RuntimeError:
        raise ConfigError(f"model.surgery: the patch embedding of {name} is of another width or patch size.") from None


def build_task(
    config: TrainConfig, model: nn.Module, splits: DataSplits, preprocessing: Preprocessing
) -> ClassificationTask:
    """Return the task: loss, optimiser and schedule, with the teacher if there is one."""
    optim, train = config.optim, splits.train
    distillation = None
    if config.distill.kind != "none":
        teacher = build_teacher(config.distill.teacher, class_names=train.class_names, student=preprocessing)
        distillation = Distillation(teacher, config.distill.kind, config.distill.alpha, config.distill.tau)
    weights = None
    if config.data.class_weights == "balanced":
        counts = torch.from_numpy(train.class_counts).float()
        weights = counts.sum() / (len(counts) * counts.clamp(min=1))
    return ClassificationTask(
        model,
        schedule=schedule_of(config, len(train)),
        opt=optim.opt,
        weight_decay=optim.weight_decay,
        label_smoothing=optim.label_smoothing,
        mixer=batch_mixer(config.augment, len(train.class_names), optim.label_smoothing),
        class_weights=weights,
        distillation=distillation,
        ema_decay=optim.ema_decay,
        multi_label=train.multi_label,
        compile=config.compute.compile,
        channels_last=config.compute.channels_last,
        freeze=("patch_embed",) if config.model.surgery != "none" else (),
        seed=config.seed,
    )


def schedule_of(config: TrainConfig, num_images: int) -> Schedule:
    """Return the learning rate's plan for so many training images."""
    optim, steps = config.optim, max(1, num_images // config.optim.batch_size)
    return Schedule(
        lr=config.lr,
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_steps=round(optim.warmup_epochs * steps),
        total_steps=config.epochs * steps,
    )


def choose_preprocessing(config: TrainConfig, model: nn.Module, train: ImageSet) -> Preprocessing:
    """Return how images are prepared: the size that is asked for, the statistics of the weights or of the images."""
    data = config.data
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    size = (data.image_size, data.image_size)
    if data.normalize == "data":
        mean, std = measure_statistics(train, size, data.in_chans, data.crop_pct)
    elif not mean or not std or len(mean) != data.in_chans or config.model.pretrained == "none":
        mean, std = GREY if data.in_chans == 1 else RGB
    return Preprocessing(size, tuple(mean), tuple(std), in_chans=data.in_chans, crop_pct=data.crop_pct)


def measure_statistics(
    train: ImageSet, size: tuple[int, int], in_chans: int, crop_pct: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel over images spread evenly through the set, as prepared.

    Raises:
        DataError: none of these images can be decoded.
    """
    unit = Preprocessing(size, (0.0,) * in_chans, (1.0,) * in_chans, in_chans=in_chans, crop_pct=crop_pct)
    chosen = np.unique(np.linspace(0, len(train) - 1, MEASURED_IMAGES).astype(np.int64))
    count = total = squares = torch.zeros(unit.in_chans, dtype=torch.float64)
    for index in chosen.tolist():
        try:
            pixels = unit(train.open(index)).double().flatten(1)
        except DataError:
            continue  # training will count and list it
        count, total, squares = count + pixels.shape[1], total + pixels.sum(1), squares + pixels.square().sum(1)
    if not count.any():
        raise DataError("None of the training images can be decoded; look at them with xcit data check.")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-8).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(max(1e-4, round(v, 4)) for v in std.tolist())


def eval_batch_size(image_size: int) -> int:
    """Return how many images are validated at once."""
    return max(1, min(256, int(EVAL_BATCH_SIZE * (224 / image_size) ** 2)))


def save_model(model: nn.Module, path: Path, *, config: TrainConfig, parts: Parts) -> None:
    """Write a model's weights in the form they are used in.

    Raises:
        ExportError: the file cannot be written.
        CheckpointError: the weights are not numbers any more.
    """
    class_names = parts.splits.train.class_names
    if config.model.name.startswith(PREFIX):
        save_peer(
            model,
            path,
            name=config.model.name,
            options=config.model.options,
            class_names=class_names,
            preprocessing=parts.preprocessing,
        )
    else:
        save_checkpoint(model, path, class_names=class_names, preprocessing=parts.preprocessing)


def trained_tensors(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def no_grad_logits(model: nn.Module, loader: DataLoader[LabelledImages], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a model's logits of every image of a loader and which of them could be decoded, on the CPU."""
    logits, decoded = [], []
    with torch.inference_mode():
        for batch in loader:
            logits.append(model(batch.images.to(device)).float().cpu())
            decoded.append(batch.decoded)
    return torch.cat(logits), torch.cat(decoded)
