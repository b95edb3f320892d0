"""A training run: data, model, task and trainer go through the epochs, and a run folder comes out."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from rich.console import Console
from rich.markup import escape
from torch import nn

from xcit.data.datasets import EvalImages
from xcit.data.image_set import ImageSet
from xcit.data.loading import eval_loader
from xcit.errors import BackendError, DataError, XCiTError
from xcit.evaluate.classification import ClassificationMetrics, classification_metrics
from xcit.evaluate.multi_label import MultiLabelMetrics, multi_label_metrics
from xcit.files import write_atomic
from xcit.inference.devices import choose_device, describe_device
from xcit.models.factory import create_model
from xcit.models.layers import XCABlock
from xcit.recipes.build import Parts, Share, build, eval_batch_size, no_grad_logits, save_model
from xcit.recipes.checkpointing import AtomicCheckpointIO, RunKeeper, check_state, skipped_images, write_skipped
from xcit.recipes.config import TrainConfig, write_config
from xcit.recipes.interrupts import StopRequest
from xcit.recipes.logs import build_loggers
from xcit.recipes.peers import PREFIX, load_peer
from xcit.recipes.progress import TrainingProgress
from xcit.recipes.provenance import environment, note_session
from xcit.recipes.quiet import quiet_lightning
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.run_report import RunRecord, write_report
from xcit.tasks.task import DivergedError

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
PEER_LOST = re.compile("closed by peer|reset by peer|Broken pipe|remote worker|heartbeat|watchdog", re.IGNORECASE)
"""How the libraries between processes say that the other one is gone."""
TIMEOUT = timedelta(minutes=30)
"""After which processes that wait for one that died give up."""


def train(
    config: TrainConfig, run: RunFolder, *, console: Console | None = None
) -> ClassificationMetrics | MultiLabelMetrics | None:
    """Train, evaluate the best epoch's weights once on the test part, and write the run folder.

    A folder that holds the state of a run with these settings is gone on with where it stopped; on a CPU the outcome
    is, bit for bit, that of a run without interruption.

    In a process that a launcher started (RANK, LOCAL_RANK and WORLD_SIZE in the environment: ``xcit train --devices``,
    torchrun, SLURM) this is one of the run's processes; the first writes the folder.

    Args:
        config: all settings.
        run: from ``new_run`` or ``open_run``.
        console: shows what happens; None for silence.

    Returns:
        The figures on the test part, or where the data has none on the part that the epoch was chosen by. They stand
        in the run's ``metrics.json`` as well. None in all processes of the run but the first.

    Raises:
        ConfigError: settings that are out of range or do not go together.
        BackendError: the device is not available here.
        DataError: the images cannot be used, or too many of them cannot be decoded.
        ExportError, CheckpointError: a file of the run cannot be written or read.
        DivergedError: the loss is not a number any more; the last good state stays.
        StoppedError: Ctrl-C or a polite kill; the state is saved.
        KeyboardInterrupt: a second one; what was last saved stays.
    """
    share = own_share(config)
    console = console if console is not None and share.rank == 0 else Console(quiet=True)
    device = choose_device(config.compute.device)
    if config.compute.precision == "16" and device.type == "cpu":
        raise BackendError("compute.precision is 16, which is for GPUs; take bf16 or 32 on the CPU.")
    parts = build(config, share, pin_memory=device.type == "cuda")
    if share.rank == 0:
        run.clear()
        write_config(config, run.config)
        note_session(run, config, device)
        _introduce(config, parts, device, run, console)

    saver = partial(save_model, config=config, parts=parts)
    stop = StopRequest()
    keeper = RunKeeper(
        run,
        parts,
        saver,
        asdict(config),
        stop,
        minutes=config.compute.checkpoint_minutes,
        patience=config.patience,
        sharded=config.compute.strategy == "fsdp",
    )
    state = run.last if run.resume and run.last.exists() else None
    if state:
        found = check_state(run, asdict(config))
        keeper.load_state_dict(found)
        keeper.saved_step = found["saved_step"]
        done = f"{len(keeper.history)} of {config.epochs} epochs"
        console.print(f"  [dim]going on  after {done}[/dim]", highlight=False)
    if len(keeper.history) < config.epochs and not keeper.exhausted:
        with ExitStack() as stack:
            stack.enter_context(quiet_lightning())
            stack.enter_context(stop.listening())
            try:
                trainer = build_trainer(config, run, parts, keeper, device, console)
            except XCiTError:
                if share.rank == 0 and not run.resume:
                    run.clear()  # nothing was begun that another start would have to overwrite
                raise
            try:
                trainer.fit(parts.task, parts.train_loader, parts.val_loader, ckpt_path=state, weights_only=True)
            except DivergedError as err:
                raise DivergedError(f"{err} {_last_good(run, keeper)}") from None
            except SystemExit as end:  # Lightning's answer to a second Ctrl-C
                if isinstance(end.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise
            except RuntimeError as err:
                if share.world_size > 1 and PEER_LOST.search(str(err)):
                    raise BackendError(f"Another process of the run ended. {_last_good(run, keeper)}") from None
                raise
    if share.rank:
        return None
    keeper.write_model(parts.task, run.last_model)
    return _conclude(config, run, parts, keeper, device)


def _last_good(run: RunFolder, keeper: RunKeeper) -> str:
    if not keeper.saved_step:
        return "No state was saved before."
    weights = f" Its best weights are {run.model}: begin with them by --pretrained." if keeper.history else ""
    return f"The last good state, after step {keeper.saved_step}, is {run.last}.{weights}"


def own_share(config: TrainConfig) -> Share:
    """Return which of the run's processes this one is, from what its launcher put into the environment.

    Raises:
        BackendError: it did not start as many as the settings say.
    """
    started = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) if _launched() else "1")
    if started != config.world_size:
        raise BackendError(
            f"The launcher started {started} processes, but compute.devices x compute.num_nodes is "
            f"{config.world_size}; make them equal."
        )
    return Share(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if started > 1 else 0, started)


def _launched() -> bool:
    return "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ


def build_trainer(
    config: TrainConfig, run: RunFolder, parts: Parts, keeper: RunKeeper, device: torch.device, console: Console
) -> lightning.Trainer:
    """Return Lightning's trainer for these settings, with all that Lightning would write by itself switched off."""
    compute = config.compute
    several = config.world_size > 1
    strategy: Any = "auto"
    if compute.strategy == "fsdp":
        if device.type != "cuda":
            raise BackendError("compute.strategy is fsdp, which needs CUDA devices; take ddp.")
        strategy = FSDPStrategy(auto_wrap_policy={XCABlock}, state_dict_type="full", timeout=TIMEOUT)
    elif several:
        strategy = DDPStrategy(
            process_group_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=TIMEOUT,
            gradient_as_bucket_view=True,
        )
    elif device.type != "cuda":
        strategy = SingleDeviceStrategy(device)
    return lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=compute.devices if several else ([device.index or 0] if device.type == "cuda" else 1),
        num_nodes=compute.num_nodes,
        strategy=strategy,
        precision=PRECISIONS[compute.precision],  # type: ignore[arg-type]
        sync_batchnorm=several and device.type == "cuda",  # torch has none for the CPU
        use_distributed_sampler=False,
        max_epochs=config.epochs,
        accumulate_grad_batches=config.optim.accumulate,
        gradient_clip_val=config.optim.clip_grad or None,
        plugins=[AtomicCheckpointIO()],
        callbacks=[TrainingProgress(console, parts.train_loader), keeper],
        logger=build_loggers(config.log, run.loggers) or False,
        log_every_n_steps=1,
        default_root_dir=run.root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _conclude(
    config: TrainConfig, run: RunFolder, parts: Parts, keeper: RunKeeper, device: torch.device
) -> ClassificationMetrics | MultiLabelMetrics:
    """Evaluate the weights that were kept, as a user reads them, and write report and figures."""
    model = read_model(config, run).to(device).eval()
    part: Literal["test", "validation"] = "test" if parts.splits.test is not None else "validation"
    images = parts.splits.test or parts.splits.val
    metrics, logits, judged = evaluate_part(config, model, images, parts, device)
    skipped = dict(keeper.skipped)
    known = set(judged.names)
    if part == "test" and len(judged) < len(images):
        skipped["test"] = {index for index, name in enumerate(images.names) if name not in known}
        write_skipped(skipped, parts, run.skipped)
    record = RunRecord(
        config=config,
        history=keeper.history,
        best=dict(keeper.best),
        metrics=metrics,
        part=part,
        environment=environment(device),
        splits=parts.splits,
        preprocessing=parts.preprocessing,
        skipped=skipped_images(skipped, parts),
    )
    write_report(record, run, model, judged, logits)
    # Last: this file says that the run is complete.
    content = {
        part: metrics.to_dict(),
        "val": record.best,
        "epochs": keeper.history,
        "skipped": {name: len(found) for name, found in skipped.items()},
        "environment": record.environment,
    }
    write_atomic(run.metrics, (json.dumps(content, indent=2) + "\n").encode())
    return metrics


def read_model(config: TrainConfig, run: RunFolder) -> nn.Module:
    """Return the model whose weights the run keeps."""
    if config.model.name.startswith(PREFIX):
        return load_peer(run.model).model
    return create_model(str(run.model))


def evaluate_part(
    config: TrainConfig, model: nn.Module, images: ImageSet, parts: Parts, device: torch.device
) -> tuple[ClassificationMetrics | MultiLabelMetrics, torch.Tensor, ImageSet]:
    """Return the figures on a part of the data, the logits, and the images that they are of.

    Raises:
        DataError: none of the images can be decoded.
    """
    loader = eval_loader(
        EvalImages(images, parts.preprocessing),
        eval_batch_size(config.data.image_size),
        num_workers=parts.train_loader.num_workers,
    )
    logits, decoded = no_grad_logits(model, loader, device)
    if not decoded.any():
        raise DataError("None of the images to evaluate on can be decoded; look at them with xcit data check.")
    judged = images.subset(decoded.nonzero().flatten().numpy())
    labels = torch.from_numpy(judged.labels)
    measure = multi_label_metrics if images.multi_label else classification_metrics
    return measure(logits[decoded], labels, images.class_names), logits[decoded], judged


def _introduce(config: TrainConfig, parts: Parts, device: torch.device, run: RunFolder, console: Console) -> None:
    train, val, test, notes = parts.splits
    parameters = sum(p.numel() for p in parts.task.model.parameters()) / 1e6
    held_out = f", {len(test):,} held out" if test is not None else ""
    size = config.data.image_size
    for name, text in (
        (
            "data",
            f"{len(train.class_names)} classes: {len(train):,} images to train on, {len(val):,} to choose by{held_out}",
        ),
        ("model", f"{config.model.name}, {parameters:.2f} M parameters, images of {size} x {size} px"),
        ("device", describe_device(device)),
        ("folder", f"{run.root}"),
        *(("note", note) for note in notes),
    ):
        console.print(f"  [dim]{name:<8}[/dim]{escape(text)}", highlight=False, soft_wrap=True)
