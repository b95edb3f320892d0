"""How much a quantised file loses: its decisions against the float32 model's, on images.

Legend: B batch, C channels, H x W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xcit.deploy.calibration import Validation, batches
from xcit.inference.runtimes import Session

Kind = Literal["top-1", "agreement", "features"]
LIMITS: dict[Kind, float] = {"top-1": 0.5, "agreement": 1.0, "features": 5.0}
"""Largest losses unless told otherwise, in points. Without labels a changed decision counts as lost, although about as
many get better as worse; hence a wider limit."""
NUM_COMPARED = 16
"""Images whose outputs are compared number by number."""
NUM_DENSE = 32
"""Images at most of a segmenter, each of which decides for every pixel."""


@dataclass(frozen=True)
class Figures:
    """What a quantised file makes of the images."""

    kind: Kind
    """"top-1" on labelled images, "agreement" of the likeliest class with the float32 model's, or "features"."""
    compared: int
    """Decisions: one an image, or one a pixel; images where there are no classes."""
    before: int | None
    """Of these, right in the float32 model; None without labels."""
    after: int | None
    """Right in the file, or the same as the float32 model's; None without classes."""
    to_wrong: int | None
    """Right before and wrong after; None without labels."""
    to_right: int | None
    """Wrong before and right after; None without labels."""
    loss: float
    """In percentage points: of top-1, or of agreement; without classes the outputs' mean relative difference in %."""
    relative: float
    """The largest difference of an output from the float32 model's, over the largest magnitude."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them; top-1 and agreement in percent."""
        found: dict[str, Any] = {"kind": self.kind, "compared": self.compared}
        if self.before is not None:
            found |= {"top1_before": 100 * self.before / self.compared}
        if self.after is not None:
            found |= {"top1_after" if self.kind == "top-1" else "agreement": 100 * self.after / self.compared}
        if self.to_wrong is not None:
            found |= {"changed_to_wrong": self.to_wrong, "changed_to_right": self.to_right}
        return found | {"loss": self.loss, "max_relative_error": self.relative}


class Judge:
    """Holds what the float32 model says of the images, and compares files with it.

    Args:
        model: images to outputs, float32, in eval mode.
        calibration: images, float32 (C, H, W) each.
        validation: labelled images, which then decide; of a classifier.
        scores: whether the outputs are class scores along axis 1.
        number: of images that the files take at once; None for any.

    Attributes:
        kind: of the figures.
        samples: the images whose outputs are compared number by number.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Sequence[np.ndarray],
        validation: Validation | None,
        *,
        scores: bool,
        number: int | None,
    ) -> None:
        self._number = number
        self.kind: Kind = "top-1" if validation else "agreement" if scores else "features"
        self.samples = _spread(calibration, NUM_COMPARED)
        self._outputs = self._run_model(model, self.samples)
        self._images: Sequence[np.ndarray] = validation.images if validation else calibration
        self._labels = validation.labels if validation else None
        if self.kind == "features":
            self._images = self.samples
        elif self._outputs[0].ndim > 2:
            self._images = _spread(calibration, NUM_DENSE)
        self._wanted = None if self.kind == "features" else self._decisions(_Model(model))

    def __call__(self, session: Session) -> Figures:
        """Return a file's figures."""
        outputs = self._run_session(session)
        # of several outputs, such as a pyramid's maps, the worst counts
        relative = max(
            _over(np.abs(ours - theirs).max(), np.abs(theirs).max())
            for ours, theirs in zip(outputs, self._outputs, strict=True)
        )
        if self._wanted is None:
            return Figures(
                "features", len(self.samples), None, None, None, None, 100 * self.difference(outputs), relative
            )
        decided = self._decisions(session)
        total = decided.size
        if self._labels is None:
            same = int((decided == self._wanted).sum())
            return Figures("agreement", total, None, same, None, None, 100 * (total - same) / total, relative)
        before, after = self._wanted == self._labels, decided == self._labels
        loss = 100 * (int(before.sum()) - int(after.sum())) / total
        return Figures(
            "top-1", total, int(before.sum()), int(after.sum()), int((before & ~after).sum()),
            int((~before & after).sum()), loss, relative,
        )  # fmt: skip

    def error(self, session: Session) -> float:
        """Return the mean of ‖ours − theirs‖ / ‖theirs‖ of a file's outputs for ``samples``."""
        return self.difference(self._run_session(session))

    def difference(self, outputs: Sequence[np.ndarray]) -> float:
        """Return the same of outputs that are there."""
        errors = [
            _over(float(np.linalg.norm(ours[i] - theirs[i])), float(np.linalg.norm(theirs[i])))
            for ours, theirs in zip(outputs, self._outputs, strict=True)
            for i in range(len(theirs))
        ]
        return float(np.mean(errors))

    def _decisions(self, run: Any) -> np.ndarray:
        """Return the likeliest classes of all images, an integer each image or pixel."""
        found = [run(images)[0].argmax(axis=1)[:new] for images, new in batches(self._images, self._number)]
        return np.concatenate(found).astype(np.int32)

    def _run_session(self, session: Session) -> list[np.ndarray]:
        parts = [[o[:new] for o in session(images)] for images, new in batches(self.samples, self._number)]
        outputs = [np.concatenate(each) for each in zip(*parts, strict=True)]
        # what is not finite is as wrong as can be, and must not hide in a comparison with NaN
        return [np.where(np.isfinite(output), output, np.finfo(np.float32).max) for output in outputs]

    def _run_model(self, model: nn.Module, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        parts = [[o[:new] for o in _Model(model)(each)] for each, new in batches(images, self._number)]
        return [np.concatenate(each).astype(np.float64) for each in zip(*parts, strict=True)]


class _Model:
    """The float32 model, called as a session is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            outputs = self._model(torch.from_numpy(images))
        return tuple(o.numpy() for o in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def _spread(images: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Return so many of the images at most, at even distances."""
    taken = min(number, len(images))
    return [images[i * len(images) // taken] for i in range(taken)]


def _over(difference: float, size: float) -> float:
    return float(difference / size) if size > 0 else float(difference)
