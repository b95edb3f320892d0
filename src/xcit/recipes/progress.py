"""How training shows itself: one bar for the whole run on a terminal, a line now and then where there is none."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xcit.data.batches import Crops, LabelledImages
from xcit.data.loading import TrainLoader
from xcit.tasks.task import Task

LINES = 10
"""About how many lines a run prints where there is no terminal, as in a log file."""
REFRESH_SECONDS = 0.25
"""Between two looks at the loss, for which an accelerator must be waited for."""
WINDOW = 40
"""Looks back that rates are averaged over."""
SHOWN = {"val_accuracy": "val accuracy", "val_map": "val mAP", "knn_accuracy": "k-NN accuracy"}
"""Figures of which the one there is is shown."""
MUCH_WAITING = 0.2
"""Share of the time from which waiting for images is shown as a warning."""


class TrainingProgress(Callback):
    """Show epoch, loss, validation figure, learning rate, images a second, waiting for data, and the time left.

    Args:
        console: where to.
        loader: of the training images; it knows how long it was waited for.
    """

    def __init__(self, console: Console, loader: TrainLoader) -> None:
        self.console = console
        self.loader = loader
        self.figure: tuple[str, float] | None = None
        self.loss: float | None = None
        self._bar: Progress | None = None
        self._seen = 0
        self._looks: deque[tuple[float, int, float]] = deque(maxlen=WINDOW)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to show, at the step where a resumed run goes on."""
        self._looks.clear()
        self._look()
        if not self.console.is_terminal or self.console.quiet:
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
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: LabelledImages | Crops,
        batch_idx: int,
    ) -> None:
        """Move the bar."""
        self._seen += len(batch.indices) * trainer.world_size
        if time.perf_counter() - self._looks[-1][0] < REFRESH_SECONDS and self.loss is not None:
            return
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        self._look()
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=trainer.global_step,
                epoch=trainer.current_epoch + 1,
                figures=self._figures(trainer),
            )

    def _look(self) -> None:
        self._looks.append((time.perf_counter(), self._seen, self.loader.wait_seconds))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Task) -> None:  # type: ignore[override]
        """Note the validation figure; print a line where there is no terminal and one is due."""
        figures = pl_module.epoch_figures()
        for name, text in SHOWN.items():
            if name in figures:
                self.figure = text, figures[name]
        self.loss = figures.get("train_loss", self.loss)
        self._look()
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, figures=self._figures(trainer))
        elif epoch * LINES // epochs > (epoch - 1) * LINES // epochs:
            self.console.print(f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {self._figures(trainer)}", soft_wrap=True)

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

    def _figures(self, trainer: lightning.Trainer) -> str:
        (began, seen_before, waited_before), (now, seen, waited) = self._looks[0], self._looks[-1]
        passed = max(1e-9, now - began)
        wait = max(0.0, waited - waited_before) / passed
        parts = ["" if self.loss is None else f"loss {self.loss:.3f}"]
        if self.figure is not None:
            parts.append(f"{self.figure[0]} {100 * self.figure[1]:.1f} %")
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.1e}")
        parts.append(f"{(seen - seen_before) / passed:.0f} img/s")
        if wait >= MUCH_WAITING:
            parts.append(f"[yellow]{100 * wait:.0f} % waiting for images[/yellow]")
        return "  ".join(part for part in parts if part)
