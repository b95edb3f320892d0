"""A training run: data, model, task and trainer go through the epochs, and a run folder comes out."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from PIL import Image
from rich.console import Console
from rich.markup import escape

from xcit.errors import BackendError, ConfigError, XCiTError
from xcit.inference.devices import choose_device, describe_device
from xcit.models.layers import XCABlock
from xcit.recipes.checkpointing import AtomicCheckpointIO, RunKeeper, check_state
from xcit.recipes.classification_job import ClassificationJob
from xcit.recipes.config import TrainConfig
from xcit.recipes.detection_config import DetectionConfig
from xcit.recipes.detection_job import DetectionJob
from xcit.recipes.dino_config import DinoConfig
from xcit.recipes.dino_job import DinoJob
from xcit.recipes.interrupts import StopRequest
from xcit.recipes.job import Job, Share
from xcit.recipes.logs import build_loggers
from xcit.recipes.progress import TrainingProgress
from xcit.recipes.provenance import note_session
from xcit.recipes.quiet import quiet_lightning
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.segmentation_config import SegmentationConfig
from xcit.recipes.segmentation_job import SegmentationJob
from xcit.recipes.settings import RunConfig, write_config
from xcit.tasks.task import DivergedError

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
PEER_LOST = re.compile("closed by peer|reset by peer|Broken pipe|remote worker|heartbeat|watchdog", re.IGNORECASE)
"""How the libraries between processes say that the other one is gone."""
TIMEOUT = timedelta(minutes=30)
"""After which processes that wait for one that died give up."""


def open_job(config: RunConfig, share: Share | None = None, *, pin_memory: bool = False) -> Job:
    """Turn settings into what a run is about; the initial weights follow from the seed.

    Args:
        config: all settings, of any task.
        share: which process this is; None for the only one.
        pin_memory: lay batches where CUDA can fetch them.

    Raises:
        ConfigError: settings that are out of range or do not go together, all at once.
        DataError: images that cannot be used.
        UnknownNameError, CheckpointError: a model, teacher or file that cannot be had.
    """
    if isinstance(config, DinoConfig):
        return DinoJob(config, share, pin_memory=pin_memory)
    if isinstance(config, DetectionConfig):
        return DetectionJob(config, share, pin_memory=pin_memory)
    if isinstance(config, SegmentationConfig):
        return SegmentationJob(config, share, pin_memory=pin_memory)
    assert isinstance(config, TrainConfig)
    return ClassificationJob(config, share, pin_memory=pin_memory)


def train(config: RunConfig, run: RunFolder, *, console: Console | None = None) -> Any:
    """Train, evaluate what was learned, and write the run folder.

    A folder that holds the state of a run with these settings is gone on with where it stopped; on a CPU the outcome
    is, bit for bit, that of a run without interruption.

    In a process that a launcher started (RANK, LOCAL_RANK and WORLD_SIZE in the environment: ``xcit train --devices``,
    torchrun, SLURM) this is one of the run's processes; the first writes the folder.

    Args:
        config: all settings.
        run: from ``new_run`` or ``open_run``.
        console: shows what happens; None for silence.

    Returns:
        The figures that the task's job concludes with: of a classifier ``ClassificationMetrics`` or
        ``MultiLabelMetrics`` on the test part, or where the data has none on the part that the epoch was chosen by; of
        DINO ``DinoResult``, of a detector ``DetectionResult``, of a segmenter ``SegmentationResult``. They stand in the
        run's ``metrics.json`` as well. None in all processes of the run but the first.

    Raises:
        ConfigError: settings that are out of range or do not go together.
        BackendError: the device is not available here.
        DataError: the images cannot be used, or too many of them cannot be decoded.
        ExportError, CheckpointError: a file of the run cannot be written or read.
        DivergedError: the loss is not a number any more; the last good state stays.
        StoppedError: Ctrl-C or a polite kill; the state is saved.
        KeyboardInterrupt: a second one; what was last saved stays.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses what is really too large
        return _train(config, run, console)


def _train(config: RunConfig, run: RunFolder, console: Console | None) -> Any:
    share = own_share(config)
    console = console if console is not None and share.rank == 0 else Console(quiet=True)
    device = choose_device(config.compute.device)
    if config.compute.precision == "16" and device.type == "cpu":
        raise BackendError("compute.precision is 16, which is for GPUs; take bf16 or 32 on the CPU.")
    job = open_job(config, share, pin_memory=device.type == "cuda")
    val = job.images.get("val")
    if job.val_loader is not None and val is not None and len(val) < share.world_size:
        raise ConfigError(
            f"The images to validate on are {len(val)}, fewer than the run's {share.world_size} processes; raise "
            f"data.val_fraction, add images, or lower --devices."
        )
    state = run.last if run.resume and run.last.exists() else None
    found = check_state(run, asdict(config)) if state else None  # before anything of the run is replaced
    stop = StopRequest()
    keeper = RunKeeper(
        run,
        job,
        asdict(config),
        stop,
        minutes=config.compute.checkpoint_minutes,
        patience=config.patience,
        sharded=config.compute.strategy == "fsdp",
    )
    if found:
        keeper.load_state_dict(found)
        keeper.saved_step = found["saved_step"]
    if len(keeper.history) < config.epochs and not keeper.exhausted:
        with ExitStack() as stack:
            stack.enter_context(quiet_lightning())
            stack.enter_context(stop.listening())
            trainer = build_trainer(config, run, job, keeper, device, console)
            try:
                # The processes meet. From here on each of them has read its settings and its initial weights, which
                # may be files of the very run that is replaced.
                trainer.strategy.setup_environment()
                if share.rank == 0:
                    trainer.loggers = _begin(config, run, job, device, keeper, console)
                trainer.fit(job.task, job.train_loader, job.val_loader, ckpt_path=state, weights_only=True)
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
    elif share.rank == 0:
        _begin(config, run, job, device, keeper, console)
    if share.rank:
        return None
    return job.conclude(run, keeper, device)


def _begin(
    config: RunConfig, run: RunFolder, job: Job, device: torch.device, keeper: RunKeeper, console: Console
) -> list[Logger]:
    """Make the folder this run's, say what it is about, and return those who are to hear of it."""
    run.clear()
    write_config(config, run.config)
    note_session(run, config, device)
    for name, text in (*job.introduction(), ("device", describe_device(device)), ("folder", str(run.root))):
        console.print(f"  [dim]{name:<8}[/dim]{escape(text)}", highlight=False, soft_wrap=True)
    if keeper.saved_step:
        done = f"{len(keeper.history)} of {config.epochs} epochs"
        console.print(f"  [dim]going on  after {done}[/dim]", highlight=False)
    try:
        return build_loggers(config.log, run.loggers)
    except XCiTError:
        if not run.resume:
            run.clear()  # nothing was begun that another start would have to overwrite
        raise


def _last_good(run: RunFolder, keeper: RunKeeper) -> str:
    if not keeper.saved_step:
        return "No state was saved before."
    weights = f" Its best weights are {run.model}: begin with them by --pretrained." if keeper.history else ""
    return f"The last good state, after step {keeper.saved_step}, is {run.last}.{weights}"


def own_share(config: RunConfig) -> Share:
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
    config: RunConfig, run: RunFolder, job: Job, keeper: RunKeeper, device: torch.device, console: Console
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
        accumulate_grad_batches=job.accumulate,
        gradient_clip_val=job.clip_grad or None,
        plugins=[AtomicCheckpointIO()],
        callbacks=[TrainingProgress(console, job.train_loader), keeper],
        logger=False,  # they come when the run's folder is its own
        log_every_n_steps=1,
        default_root_dir=run.root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
