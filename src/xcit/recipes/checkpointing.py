"""What a run keeps while it trains: the weights to use, the state to go on from, and its history."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from xcit.errors import CheckpointError, ConfigError
from xcit.models.storage import read_file
from xcit.recipes.run_folder import RunFolder, write_atomic
from xcit.tasks.classification import ClassificationTask

COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy", "lr", "seconds")
"""Of a history: the epoch counted from 1, what ``ClassificationTask`` logs, and the epoch's duration."""


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
    """At the end of every epoch: note its figures, save the state, keep its weights if they are the best so far.

    Best is the highest validation accuracy, and of equals the lowest validation loss: on a few hundred images many
    epochs get the same number right.

    Args:
        run: where to.
        save_model: writes a model's weights, in the form they are used in, to a path.
        settings: of the run; they go into its state, for ``check_state``.

    Attributes:
        history: a row an epoch, with the keys ``COLUMNS``.
        best: the row whose weights are kept.
    """

    def __init__(
        self, run: RunFolder, save_model: Callable[[torch.nn.Module, Path], Any], settings: dict[str, Any]
    ) -> None:
        self.run = run
        self.settings = settings
        self.save_model = save_model
        self.history: list[dict[str, float]] = []
        self._began = 0.0

    @property
    def best(self) -> Mapping[str, float]:
        """The row of the epoch whose weights are kept."""
        return max(self.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: ClassificationTask) -> None:  # type: ignore[override]
        """Write the best weights once more if the state is theirs: the run may have been killed just before it did."""
        self._keep_best(pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: ClassificationTask) -> None:  # type: ignore[override]
        """Note, keep and save."""
        logged = trainer.callback_metrics
        self.history.append(
            {
                "epoch": trainer.current_epoch + 1,
                **{name: logged[name].item() for name in ("train_loss", "val_loss", "val_accuracy")},
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "seconds": time.perf_counter() - self._began,
            }
        )
        trainer.save_checkpoint(self.run.last)
        self._keep_best(pl_module)
        write_history(self.history, self.run.history)

    def _keep_best(self, task: ClassificationTask) -> None:
        if self.history and self.best is self.history[-1]:
            self.save_model(task.model, self.run.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into the checkpoint."""
        return {"history": self.history, "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the checkpoint."""
        self.history = list(state_dict["history"])


def check_state(run: RunFolder, settings: dict[str, Any]) -> None:
    """Refuse a state that cannot be gone on from, before Lightning stumbles over it.

    Raises:
        CheckpointError: the file cannot be read, or is something else.
        ConfigError: the state is of other settings.
    """
    content = read_file(run.last).content
    try:
        trained_with = content["callbacks"][RunKeeper.__qualname__]["settings"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{run.last} is not the state of a run; start anew with --overwrite.") from None
    if trained_with != settings:
        raise ConfigError(
            f"The settings in {run.config} are not those that {run.last} was trained with; restore them, or start "
            f"anew with --overwrite."
        )


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one row an epoch as CSV.

    Raises:
        ExportError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in history
    )
    write_atomic(path, text.getvalue().encode())
