"""What all training tasks share: seeded steps, a loss that is watched, sums over an epoch and its processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import lightning
import torch
from torch import Tensor, nn

from xcit.data.sampling import derive_seed, seed_everything
from xcit.errors import XCiTError


class DivergedError(XCiTError):
    """The loss is not a number any more."""


class Schedule(NamedTuple):
    """The learning rate over the steps: a linear rise, then a cosine."""

    lr: float
    """Its peak."""
    min_lr: float
    """Where the cosine ends."""
    warmup_lr: float
    """Where the rise begins."""
    warmup_steps: int
    """Length of the rise."""
    total_steps: int
    """Length of all."""


class Task(lightning.LightningModule, ABC):
    """A model and a batch give a loss. The random numbers of a step follow from seed, epoch, batch and process alone.

    A task gives each loss to ``watch`` and fills ``figures`` until an epoch ends.

    Attributes:
        model: what is trained, or follows what is trained; its weights are what a run leaves.
        ema: the averaged weights, in ``ema.module``; None where there are none.
        seed: of the run.
        channels_last: whether images are laid out with channels last.
        figures: of the last epoch, by name.
        remedy: what to try when the loss is not a number any more.
    """

    remedy: ClassVar[str] = "try a lower --lr (a third of it) or a longer warm-up (optim.warmup_epochs)"
    model: nn.Module
    ema: Any

    def __init__(self, *, seed: int = 0, channels_last: bool = False) -> None:
        super().__init__()
        self.seed = seed
        self.channels_last = channels_last
        self.ema = None
        self.figures: dict[str, float] = {}
        self._concluded = -1
        self._loss_sum: float | Tensor = 0.0
        self._loss_count = 0
        self._pending: tuple[Tensor, int, int, float] | None = None

    # --- what a run asks of a task -----------------------------------------------------------------------------------

    def epoch_figures(self) -> dict[str, float]:
        """Return the figures of the epoch that ends; all processes call it, as often as they like."""
        if self._concluded != self.current_epoch:
            self.figures = self.conclude_epoch()
            self._concluded = self.current_epoch
        return self.figures

    def conclude_epoch(self) -> dict[str, float]:
        """Put the epoch's figures together, once, over all processes."""
        return self.figures

    @staticmethod
    @abstractmethod
    def merit(row: Mapping[str, float], prefix: str = "") -> tuple[float, ...]:
        """Return what epochs are compared by, from their figures: the greatest one's weights are kept.

        Args:
            row: the epoch's figures.
            prefix: "" of the weights, "ema_" of the averaged ones.
        """

    # --- steps -------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the draws of this step: mixing, stochastic depth, dropout."""
        seed_everything(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the learning rate of the next step."""
        scheduler.step_update(num_updates=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the running epoch has summed up so far."""
        self.check_finite()
        checkpoint["epoch_so_far"] = {
            "loss_sum": self.train_loss_sum(),
            "loss_count": self._loss_count,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with those sums."""
        so_far = checkpoint["epoch_so_far"]
        self._loss_sum, self._loss_count = so_far["loss_sum"], so_far["loss_count"]

    # --- the loss ----------------------------------------------------------------------------------------------------

    def watch(self, loss: Tensor, num_images: int) -> None:
        """Note a step's loss: for the epoch's mean, and to be looked at whether it is a number.

        Raises:
            DivergedError: it is not, or on an accelerator the one before was not.
        """
        self.check_finite()
        self._pending = (loss, self.global_step, self.current_epoch, self.lr())
        if loss.device.type == "cpu":
            self.check_finite()
        self._loss_sum = (
            self._loss_sum + loss.to(torch.float64 if loss.device.type != "mps" else torch.float32) * num_images
        )
        self._loss_count += num_images

    def check_finite(self) -> None:
        """Look at the last step's loss, which on an accelerator is looked at one step late so as not to wait for it.

        Raises:
            DivergedError: it is not a number, naming step, epoch and learning rate.
        """
        if self._pending is not None:
            (loss, step, epoch, lr), self._pending = self._pending, None
            if not bool(torch.isfinite(loss)):
                self.refuse("loss", loss.item(), step, epoch, lr)

    def refuse(self, what: str, value: float, step: int, epoch: int, lr: float) -> None:
        """Raise DivergedError."""
        raise DivergedError(
            f"The {what} became {value} at step {step + 1} (epoch {epoch + 1}), with a learning rate of {lr:.2g}; "
            f"{self.remedy}."
        )

    def take_train_loss(self) -> float:
        """Return the mean training loss of the epoch over all processes, and begin anew."""
        sums = torch.tensor([self.train_loss_sum(), self._loss_count], dtype=torch.float64)
        total, count = self.over_processes(sums).tolist()
        self._loss_sum, self._loss_count = 0.0, 0
        return total / max(1.0, count)

    def train_loss_sum(self) -> float:
        """Return this process's sum of the running epoch's losses, each times its images."""
        return float(self._loss_sum)

    def lr(self) -> float:
        """Return the learning rate of this step."""
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def arranged(self, images: Tensor) -> Tensor:
        """Return images in the layout that the settings ask for."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    # --- all processes together --------------------------------------------------------------------------------------

    def over_processes(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, exactly the values where there is one."""
        if self.trainer.world_size == 1:
            return values
        values = values.to(self.device, torch.float64 if self.device.type != "mps" else torch.float32)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def gathered(self, item: Any) -> list[Any]:
        """Return what all processes hold, in their order."""
        if self.trainer.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(items, item)
        return items
