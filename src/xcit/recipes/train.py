"""Where settings become model, task, data and trainer, and a run folder comes out."""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import lightning
import torch
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from xcit.data.batches import LabelledImages
from xcit.data.digits import (
    CLASS_NAMES,
    DigitImages,
    Digits,
    DigitSplits,
    digit_augmentation,
    digit_preprocessing,
    digit_splits,
)
from xcit.data.preprocess import Preprocessing
from xcit.evaluate.classification import ClassificationMetrics, classification_metrics
from xcit.inference.devices import choose_device, describe_device
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT
from xcit.recipes.checkpointing import AtomicCheckpointIO, RunKeeper, check_state
from xcit.recipes.config import TrainConfig, check_config, write_config
from xcit.recipes.digits_report import RunRecord, write_report
from xcit.recipes.progress import TrainingProgress
from xcit.recipes.quiet import quiet_lightning
from xcit.recipes.run_folder import RunFolder, epochs_done, write_atomic
from xcit.tasks.classification import ClassificationTask

EVAL_BATCH_SIZE = 256
PACKAGES = ("xcit", "torch", "torchvision", "lightning", "timm", "scikit-learn", "numpy")


class Parts(NamedTuple):
    """What the settings of a run stand for."""

    splits: DigitSplits
    preprocessing: Preprocessing
    task: ClassificationTask
    train_loader: DataLoader[LabelledImages]
    val_loader: DataLoader[LabelledImages]


def build(config: TrainConfig) -> Parts:
    """Turn settings into data, model and task; the initial weights follow from the seed.

    Raises:
        ConfigError: settings that are out of range or do not go together.
    """
    check_config(config)
    torch.manual_seed(config.seed)
    model = XCiT(**asdict(config.model), in_chans=1, num_classes=len(CLASS_NAMES))
    optim, augment = asdict(config.optim), asdict(config.augment)
    task = ClassificationTask(model, **optim, mixup=augment.pop("mixup"), seed=config.seed)

    splits = digit_splits(config.data.val_fraction)
    preprocessing = digit_preprocessing(splits.train, config.data.image_size)
    black = -preprocessing.mean[0] / preprocessing.std[0]
    train_images = DigitImages(splits.train, preprocessing, digit_augmentation(**augment, black=black))
    train_loader = DataLoader(
        train_images,
        batch_size=config.data.batch_size,
        # An order that seed and epoch decide, so that a resumed run sees the images as the uninterrupted one would.
        sampler=DistributedSampler(train_images, num_replicas=1, rank=0, seed=config.seed),
        drop_last=True,
        generator=torch.Generator(),  # the loader's own draws leave the global generator alone
    )
    val_loader = DataLoader(
        DigitImages(splits.val, preprocessing), batch_size=EVAL_BATCH_SIZE, generator=torch.Generator()
    )
    return Parts(splits, preprocessing, task, train_loader, val_loader)


def train(
    config: TrainConfig, run: RunFolder, *, device: str = "auto", console: Console | None = None
) -> ClassificationMetrics:
    """Train, evaluate the best epoch's weights once on the held-out part, and write the run folder.

    A folder that holds the state of a run with these settings is gone on with after its last whole epoch; on a CPU
    the outcome is that of a run without interruption.

    Args:
        config: all settings.
        run: from ``new_run`` or ``open_run``.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        console: shows what happens; None for silence.

    Returns:
        The figures on the held-out part, which stand in the run's ``metrics.json`` as well.

    Raises:
        ConfigError: settings that are out of range or do not go together.
        BackendError: the device is not available here.
        ExportError, CheckpointError: a file of the run cannot be written or read.
        XCiTError: the loss is not a number any more; what the last whole epoch left stays.
        KeyboardInterrupt: stopped by the user; likewise.
    """
    console = console or Console(quiet=True)
    where = choose_device(device)
    parts = build(config)
    run.clear()
    write_config(config, run.config)
    _introduce(config, parts, where, run, console)

    save_model = partial(save_checkpoint, class_names=CLASS_NAMES, preprocessing=parts.preprocessing)
    keeper = RunKeeper(run, save_model, settings=asdict(config))
    with quiet_lightning(), _interruptible():
        trainer = lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(where.type, where.type),
            devices=[where.index or 0] if where.type == "cuda" else 1,
            max_epochs=config.epochs,
            plugins=[AtomicCheckpointIO()],
            callbacks=[TrainingProgress(console), keeper],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        resume_from = run.last if run.last.exists() else None
        if resume_from:
            check_state(run, settings=asdict(config))
            console.print(f"  [dim]going on after epoch {epochs_done(run)} of {config.epochs}[/dim]")
        trainer.fit(parts.task, parts.train_loader, parts.val_loader, ckpt_path=resume_from, weights_only=True)

    # The figures are those of the file that was written, read back the way a user reads it.
    model = create_model(str(run.model), pretrained=True).to(where).eval()
    logits = predict_logits(model, parts.splits.test, parts.preprocessing)
    metrics = classification_metrics(logits, torch.from_numpy(parts.splits.test.labels), CLASS_NAMES)
    record = RunRecord(
        config=config,
        history=keeper.history,
        best=dict(keeper.best),
        metrics=metrics,
        environment=environment(where),
        splits=parts.splits,
        preprocessing=parts.preprocessing,
    )
    write_report(record, run, model, logits)
    # Last: this file says that the run is complete.
    content = {
        "test": metrics.to_dict(),
        "val": record.best,
        "epochs": keeper.history,
        "environment": record.environment,
    }
    write_atomic(run.metrics, (json.dumps(content, indent=2) + "\n").encode())
    return metrics


def predict_logits(model: XCiT, digits: Digits, preprocessing: Preprocessing) -> Float[Tensor, "images classes"]:
    """Return a model's logits for digits, on the CPU."""
    device = next(model.parameters()).device
    images = DigitImages(digits, preprocessing).images
    with torch.inference_mode():
        return torch.cat([model(batch.to(device)).cpu() for batch in images.split(EVAL_BATCH_SIZE)])


def environment(device: torch.device) -> dict[str, str]:
    """Return what a result depends on besides the settings: versions and machine."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "device": describe_device(device),
    }


def _introduce(config: TrainConfig, parts: Parts, device: torch.device, run: RunFolder, console: Console) -> None:
    train, val, test = parts.splits
    size, patch = config.data.image_size, config.model.patch_size
    parameters = sum(p.numel() for p in parts.task.model.parameters()) / 1e6
    for name, text in (
        ("data", f"{len(train):,} digits to train on, {len(val)} to choose by, {len(test)} held out"),
        ("model", f"XCiT of {config.model.depth} blocks, {config.model.embed_dim} wide: {parameters:.2f} M parameters"),
        ("images", f"enlarged from 8 to {size} px a side, {(-(-size // patch)) ** 2} patches of {patch} px"),
        ("device", describe_device(device)),
        ("folder", f"{run.root}"),
    ):
        console.print(f"  [dim]{name:<8}[/dim]{escape(text)}", highlight=False, soft_wrap=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block as a KeyboardInterrupt, and be heard again afterwards.

    Lightning answers it by ignoring all further ones and leaving the program.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
