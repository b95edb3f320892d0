"""What is counted over a validation set, so that figures are exact over batches and processes of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision


class ValidationTotals:
    """Sums of a classifier's losses and of what it gets right.

    Args:
        multi_label: an image may have several classes. Then all logits are kept, since mean average precision is no
            sum over images.
    """

    def __init__(self, multi_label: bool) -> None:
        self.multi_label = multi_label
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._loss: float | Tensor = 0.0
        self._correct: int | Tensor = 0
        self._count = 0
        self._kept: list[tuple[Tensor, Tensor]] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (n, classes).
            labels: (n,) classes, or (n, classes) zeros and ones.
        """
        logits = logits.float()
        self._count += len(logits)
        if self.multi_label:
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
            self._kept.append((logits.cpu(), labels.cpu()))
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
            self._correct = self._correct + (logits.argmax(dim=1) == labels).sum()
        self._loss = self._loss + losses.double().sum()

    def compute(
        self, over_processes: Callable[[Tensor], Tensor], gathered: Callable[[Any], list[Any]]
    ) -> dict[str, float]:
        """Return ``val_loss`` and ``val_accuracy`` or ``val_map``.

        Args:
            over_processes: sums a tensor over all processes.
            gathered: collects an object from each of them.
        """
        sums = torch.tensor([float(self._loss), float(self._correct), float(self._count)], dtype=torch.float64)
        loss, correct, count = over_processes(sums).tolist()
        count = max(1.0, count)
        if not self.multi_label:
            return {"val_loss": loss / count, "val_accuracy": correct / count}
        pairs = [pair for kept in gathered(self._kept) for pair in kept]
        logits, labels = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        precision = multilabel_average_precision(logits.sigmoid(), labels.long(), num_labels=labels.shape[1])
        return {"val_loss": loss / count, "val_map": float(precision)}
