"""What the tasks on whole images share, detection and segmentation: averaged weights, and losses that have parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from xcit.tasks.task import Task


def norm_spared_decay(model: nn.Module) -> dict[str, bool]:
    """Return by name whether weight decay applies to a parameter: to all whose name does not hold "norm".

    That is the rule of the released configurations. Batch norms are named otherwise, and decay, as do biases,
    temperatures and LayerScale.
    """
    return {name: "norm" not in name for name, p in model.named_parameters() if p.requires_grad}


class DenseTask(Task):
    """A task whose model gives a loss of several parts in training, and is judged by what it finds in whole images.

    Args:
        model: what is trained.
        weight_decay: of the parameters that ``norm_spared_decay`` names.
        ema_decay: decay a step of the averaged weights; 0 keeps none.
        seed: of the run.

    Attributes:
        decay: by name, whether a parameter decays.
    """

    remedy: ClassVar[str] = "try a lower --lr (a third of it) or a longer warm-up (optim.warmup_steps)"

    def __init__(self, model: nn.Module, *, weight_decay: float, ema_decay: float, seed: int) -> None:
        super().__init__(seed=seed)
        self.model = model
        self.weight_decay = weight_decay
        self.decay = norm_spared_decay(model)
        self.ema = ModelEmaV3(model, decay=ema_decay).requires_grad_(False) if ema_decay else None
        self._parts: dict[str, float | Tensor] = {}
        self.train()

    def train(self, mode: bool = True) -> DenseTask:
        """Switch to training; averaged weights stay in evaluation mode."""
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    def note_parts(self, parts: Mapping[str, Tensor], num_images: int) -> None:
        """Add a step's losses to those of the epoch."""
        for name, value in parts.items():
            exact = value.detach().to(torch.float64 if value.device.type != "mps" else torch.float32)
            self._parts[name] = self._parts.get(name, 0.0) + exact * num_images

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Make a step, then average the weights: before any callback saves the state."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the running epoch has summed up so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["losses_so_far"] = {name: float(value) for name, value in self._parts.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with those sums."""
        super().on_load_checkpoint(checkpoint)
        self._parts = dict(checkpoint["losses_so_far"])

    # --- validation --------------------------------------------------------------------------------------------------

    def judged(self) -> dict[str, Any]:
        """Return the models that are validated, by the prefix of their figures."""
        return {"": self.model} | ({"ema_": self.ema.module} if self.ema is not None else {})

    def take_losses(self, names: Sequence[str]) -> dict[str, float]:
        """Return the epoch's mean losses over all processes, ``train_loss`` and its parts, and begin anew.

        Args:
            names: of the parts, as far as there are any, in this order.

        Raises:
            DivergedError: the weights, or the statistics of batch norms, are not numbers any more.
        """
        count = max(1.0, float(self.over_processes(torch.tensor([float(self._loss_count)]))[0]))
        there = [name for name in names if name in self._parts]
        sums = self.over_processes(torch.tensor([float(self._parts[name]) for name in there], dtype=torch.float64))
        figures = {"train_loss": self.take_train_loss()}
        figures |= {f"train_{name}": value / count for name, value in zip(there, sums.tolist(), strict=True)}
        self._parts = {}
        if not all(bool(torch.isfinite(t).all()) for t in self.model.state_dict().values()):
            self.refuse("weights", math.nan, self.global_step, self.current_epoch, self.lr())
        return figures


def number(value: float) -> float:
    """Return a figure as a number that epochs can be compared by; 0 where there was nothing to judge."""
    return 0.0 if math.isnan(value) else value
