"""What a run keeps while it trains: the weights to use, the state to go on from, and its history."""

from __future__ import annotations

import copy
import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from xcit.data.image_set import NamedImages
from xcit.data.loading import TrainLoader
from xcit.errors import CheckpointError, ConfigError, DataError
from xcit.files import write_atomic
from xcit.models.storage import read_file
from xcit.recipes.interrupts import StoppedError, StopRequest
from xcit.recipes.job import Job
from xcit.recipes.logs import MetricsLog
from xcit.recipes.run_folder import RunFolder
from xcit.tasks.task import Task

LOG_EVERY = 10
"""Steps between two lines of the log."""
AGREE_EVERY = 8
"""Steps between two times that several processes ask each other whether to save or to stop."""
UNCHECKED = ("compute", "log")
"""Parts of the settings that may change when a run is gone on with: they do not decide what is computed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints so that a kill at any moment leaves the last good one readable.

    Lightning's own way copies a file from the system's temporary folder, which is not atomic where that is another
    disk, and does not wait for the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            ExportError: the file cannot be written; the former one stays.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), buffer.getvalue())


class RunKeeper(Callback):
    """Note the figures, save the state, and keep the weights that are the best so far.

    The state is saved after every epoch, and within it every so many minutes and before a stop that was asked for.

    Args:
        run: where to.
        job: what is trained on what.
        settings: of the run; they go into its state, for ``check_state``.
        stop: whether somebody asked to stop.
        minutes: between two saves within an epoch; 0 for none.
        patience: epochs without a better figure after which the run ends; 0 for never.
        sharded: no process holds the whole model while it trains.

    Attributes:
        history: a row an epoch.
        best: the row whose weights are kept.
        skipped: positions of images that could not be decoded, by part of the data.
        saved_step: steps that the last saved state has behind it; 0 where there is none.
    """

    def __init__(
        self,
        run: RunFolder,
        job: Job,
        settings: dict[str, Any],
        stop: StopRequest,
        *,
        minutes: float = 0.0,
        patience: int = 0,
        sharded: bool = False,
    ) -> None:
        self.run = run
        self.job = job
        self.settings = settings
        self.stop = stop
        self.minutes = minutes
        self.patience = patience
        self.template = copy.deepcopy(job.task.model) if sharded else None
        self.history: list[dict[str, float]] = []
        self.skipped: dict[str, set[int]] = {part: set() for part in job.images if part != "test"}
        self.lines: MetricsLog | None = None
        self.saved_step = 0
        self._position: Any = None
        self._within_epoch = False
        self._saved = self._epoch_began = self._lines_began = time.perf_counter()
        self._waited = 0.0
        self._steps_in_line = 0

    @property
    def loader(self) -> TrainLoader:
        """Where the training batches come from."""
        return self.job.train_loader

    @property
    def best(self) -> Mapping[str, float]:
        """The row of the epoch whose weights are kept."""
        return max(self.history, key=self.job.task.merit)

    @property
    def exhausted(self) -> bool:
        """Whether so many epochs brought nothing better that the run ends early."""
        return bool(self.patience and self.history) and len(self.history) - self.best["epoch"] >= self.patience

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Task) -> None:  # type: ignore[override]
        """Write the best weights once more if the state is theirs: the run may have been killed just before it did."""
        if trainer.is_global_zero:
            self.lines = MetricsLog(self.run.log)
            self.lines.rewind(self._position or 0)
            if not self._within_epoch:
                self._keep_best(pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._start_clock()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen, now that Lightning has set its handlers, and start the clock: a resumed epoch has no other start."""
        self.stop.claim()
        self._start_clock()

    def _start_clock(self) -> None:
        self._epoch_began = self._lines_began = time.perf_counter()
        self._epoch_waited = self._waited = self.loader.wait_seconds
        self._steps_in_line = self._epoch_images = 0

    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: lightning.Trainer,
        pl_module: Task,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, save and stop where it is time to.

        Raises:
            StoppedError: it was asked for, and the state is saved.
        """
        accumulate = trainer.accumulate_grad_batches
        self._epoch_images += len(batch.indices) * trainer.world_size
        self._steps_in_line += 1
        if (batch_idx + 1) % accumulate:
            return  # gradients that are summed up are in no state
        if trainer.global_step % LOG_EVERY == 0 and self.lines is not None:
            self._log_step(trainer, outputs, batch)
        if batch_idx + 1 == len(self.loader):
            return  # the epoch's own end is near, with its figures
        stop, due = self._agree(trainer, batch_idx)
        if stop or due:
            self._save(trainer)
        if stop:
            raise StoppedError(stop)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.run.last)
        self._saved, self.saved_step = time.perf_counter(), trainer.global_step

    def _agree(self, trainer: lightning.Trainer, batch_idx: int) -> tuple[int, bool]:
        """Return the signal to stop for and whether to save, the same in all processes."""
        due = bool(self.minutes) and time.perf_counter() - self._saved >= 60 * self.minutes
        if trainer.world_size == 1:
            return self.stop.signal, due
        if batch_idx % AGREE_EVERY:
            return 0, False
        wanted = torch.tensor([self.stop.signal, int(due)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        stop, due_somewhere = wanted.tolist()
        return int(stop), bool(due_somewhere)

    def _log_step(self, trainer: lightning.Trainer, outputs: Any, batch: Any) -> None:
        assert self.lines is not None
        now, waited = time.perf_counter(), self.loader.wait_seconds
        passed = max(1e-9, now - self._lines_began)
        self.lines.log(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch + 1,
                "loss": float(outputs["loss"]) * trainer.accumulate_grad_batches,
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            },
            timing={
                "images_per_second": self._steps_in_line * len(batch.indices) * trainer.world_size / passed,
                "data_wait": (waited - self._waited) / passed,
            },
        )
        self._lines_began, self._waited, self._steps_in_line = now, waited, 0

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note what could not be decoded."""
        if not bool(batch.decoded.all()):
            self.skipped["val"].update(batch.indices[~batch.decoded].tolist())

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Task) -> None:  # type: ignore[override]
        """Note, keep and save.

        Raises:
            DataError: too many of the validation images cannot be decoded.
            StoppedError: it was asked for, and the state is saved.
        """
        seconds = max(1e-9, time.perf_counter() - self._epoch_began)
        self._gather_skipped(trainer)
        row = {
            "epoch": trainer.current_epoch + 1,
            **pl_module.epoch_figures(),
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "seconds": seconds,
            "images_per_second": self._epoch_images / seconds,
            "data_wait": (self.loader.wait_seconds - self._epoch_waited) / seconds,
        }
        self.history.append(row)
        if self.lines is not None:
            timing = {name: row[name] for name in ("seconds", "images_per_second", "data_wait")}
            self.lines.log({name: value for name, value in row.items() if name not in timing}, timing=timing)
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "epoch"}, trainer.global_step)
        self._save(trainer)
        if trainer.is_global_zero:
            self._keep_best(pl_module)
            write_history(self.history, self.run.history)
        stop, _ = self._agree(trainer, 0)
        if stop and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise StoppedError(stop)
        if self.exhausted:
            trainer.should_stop = True

    def _gather_skipped(self, trainer: lightning.Trainer) -> None:
        self.skipped["train"] |= self.loader.bad
        if trainer.world_size > 1:
            found: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(found, self.skipped)
            self.skipped = {part: set().union(*(each[part] for each in found)) for part in self.skipped}
        val, share = self.job.images.get("val"), self.loader.max_bad_fraction
        if val is not None and len(self.skipped["val"]) > share * len(val):
            raise DataError(
                f"{len(self.skipped['val'])} of {len(val)} validation images cannot be used, more than "
                f"data.max_bad_fraction={share:g} allows (one is {val.names[min(self.skipped['val'])]}). Look at them "
                f"with {self.loader.dataset.check}, or allow more."
            )
        if trainer.is_global_zero and any(self.skipped.values()):
            write_skipped(self.skipped, self.job.images, self.run.skipped)

    def _keep_best(self, task: Task) -> None:
        if not self.history:
            return
        if self.best is self.history[-1]:
            self.write_model(task, self.run.model)
        if task.ema is not None and max(self.history, key=lambda row: task.merit(row, "ema_")) is self.history[-1]:
            self.job.save(task.ema.module, self.run.ema_model)

    def write_model(self, task: Task, path: Path) -> None:
        """Write the model's weights; sharded ones as they stand in the state that was just saved, where they are whole.

        Raises:
            ExportError, CheckpointError: the file cannot be written.
        """
        if self.template is None:
            self.job.save(task.model, path)
            return
        state = read_file(self.run.last).content["state_dict"]
        self.template.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        self.job.save(self.template, path)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into the checkpoint."""
        return {
            "history": self.history,
            "settings": self.settings,
            "skipped": {part: sorted(found) for part, found in self.skipped.items()},
            "log": self.lines.position() if self.lines is not None else None,
            "within_epoch": self.loader.state_dict()["batches"] > 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the checkpoint."""
        self.history = list(state_dict["history"])
        self.skipped = {part: set(found) for part, found in state_dict["skipped"].items()}
        self._position = state_dict["log"]
        self._within_epoch = state_dict["within_epoch"]


def check_state(run: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the state that a run is to go on from, before Lightning stumbles over it.

    Returns:
        What ``RunKeeper.state_dict`` gave.

    Raises:
        CheckpointError: the file cannot be read, or is something else.
        ConfigError: the state is of other settings.
    """
    content = read_file(run.last).content
    try:
        state: dict[str, Any] = content["callbacks"][RunKeeper.__qualname__]
        state["saved_step"] = content["global_step"]
        trained_with = state["settings"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{run.last} is not the state of a run; start anew with --overwrite.") from None
    changed = [part for part in settings if part not in UNCHECKED and trained_with.get(part) != settings[part]]
    if changed:
        raise ConfigError(
            f"The settings in {run.config} ({', '.join(changed)}) are not those that {run.last} was trained with; "
            f"restore them, or start anew with --overwrite."
        )
    return state


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one row an epoch as CSV.

    Raises:
        ExportError: the file cannot be written.
    """
    text = io.StringIO()
    columns = dict.fromkeys(name for row in history for name in row)  # some figures are not of every epoch
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in history
    )
    write_atomic(path, text.getvalue().encode())


def write_skipped(skipped: Mapping[str, set[int]], images: Mapping[str, NamedImages], path: Path) -> None:
    """Write which images could not be decoded, and why.

    Raises:
        ExportError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "image", "reason"))
    writer.writerows(skipped_images(skipped, images))
    write_atomic(path, text.getvalue().encode())


def skipped_images(skipped: Mapping[str, set[int]], images: Mapping[str, NamedImages]) -> list[tuple[str, str, str]]:
    """Return part, name and reason of each image that could not be decoded, by trying once more."""
    rows = []
    for part, found in images.items():
        opened = getattr(found, "open_pair", found.open)  # where masks may be broken too
        for index in sorted(skipped.get(part, ())):
            try:
                opened(index)
                reason = "could be decoded at another time"
            except DataError as err:
                reason = str(err)
            rows.append((part, found.names[index], reason))
    return rows
