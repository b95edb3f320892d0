"""How training shows itself: one bar for the whole run on a terminal, a line now and then where there is none."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10
"""About how many lines a run prints where there is no terminal, as in a log file."""


class TrainingProgress(Callback):
    """Show epoch, loss, validation accuracy and the time that is left.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.accuracy: float | None = None
        self.loss: float | None = None
        self._bar: Progress | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to show, at the epoch where a resumed run goes on."""
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]:>2}/{task.fields[epochs]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("passed,"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self._bar.start()
        self._bar.add_task(
            "train",
            total=trainer.estimated_stepping_batches,
            completed=trainer.global_step,
            epoch=min(trainer.current_epoch + 1, trainer.max_epochs or 0),
            epochs=trainer.max_epochs,
            figures="",
        )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar by one step."""
        loss = float(outputs["loss"])
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, epoch=trainer.current_epoch + 1, figures=self._figures())

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note the validation accuracy; print a line where there is no terminal and one is due."""
        self.accuracy = trainer.callback_metrics["val_accuracy"].item()
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], figures=self._figures())
        elif epoch * LINES // epochs > (epoch - 1) * LINES // epochs:
            self.console.print(f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {self._figures()}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the full bar on the screen."""
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self) -> str:
        accuracy = "" if self.accuracy is None else f"  val accuracy {100 * self.accuracy:.1f} %"
        return f"loss {self.loss:.3f}{accuracy}"
