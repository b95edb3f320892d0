"""Post-training quantisation to int8, with the layers that cost the most kept in higher precision until it suffices.

At first every layer is quantised that the runtime computes in int8. Where that loses more than is allowed, each layer
is quantised alone, and the layers are ranked by how far that moves the model's outputs. Then the least number of the
worst layers is searched that have to be kept: 1, 2, 4, ... until the loss is met, and by halves between the last two.
Each trial is a file that is written and run in its runtime on all images of the judge.

(NNCF's ``quantize_with_accuracy_control`` does the like for OpenVINO alone. It is not taken: it measures both models in
whatever precision OpenVINO chooses, so that bfloat16's own loss is no part of what it compares, and it does not return
what it kept.)
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from xcit.deploy.judge import Figures, Judge
from xcit.deploy.proof import TOLERANCE_INT8
from xcit.errors import ExportError
from xcit.inference.runtimes import open_session

log = logging.getLogger("xcit")


class Quantiser(ABC):
    """A model that can be written with any of its layers in int8.

    Attributes:
        layers: names of those that can be, in the words of the model's modules.
        packages: name and version of what quantises.
    """

    layers: tuple[str, ...]
    packages: dict[str, str]

    @abstractmethod
    def write(
        self, path: Path, layers: Collection[str], images: Sequence[np.ndarray], number: int | None
    ) -> list[Path]:
        """Write a file in which these layers are in int8.

        Args:
            path: where to.
            layers: of ``layers``.
            images: to calibrate on, float32 (C, H, W) each.
            number: of images that the file takes at once; None for any.

        Returns:
            The files.

        Raises:
            ExportError: the quantiser fails; with its reason.
        """


@dataclass(frozen=True)
class Kept:
    """A layer that is not in int8."""

    name: str
    error: float
    """How far the outputs move when this layer alone is quantised, relative to their size."""


@dataclass(frozen=True)
class Quantised:
    """What came of it."""

    limit: float
    """The largest loss, in points of ``figures.kind``."""
    figures: Figures
    """Of the file."""
    all_in_int8: Figures
    """Of the file with no layer kept; the same where none had to be."""
    kept: tuple[Kept, ...]
    """The costliest first."""
    num_layers: int
    """That could be in int8."""
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return this as JSON holds it."""
        return {
            "limit": self.limit,
            **self.figures.to_dict(),
            "loss_with_no_layer_kept": self.all_in_int8.loss,
            "layers_in_int8": self.num_layers - len(self.kept),
            "layers_kept": [{"name": layer.name, "relative_error_alone": layer.error} for layer in self.kept],
            "packages": self.packages,
        }


def quantise(
    quantiser: Quantiser,
    path: Path,
    images: Sequence[np.ndarray],
    judge: Judge,
    *,
    limit: float,
    number: int | None,
) -> Quantised:
    """Write a file in int8 that loses no more than is allowed.

    Args:
        quantiser: the model.
        path: where to.
        images: to calibrate on.
        judge: says what a file loses.
        limit: the largest loss, in points of ``judge.kind``.
        number: of images that the file takes at once; None for any.

    Raises:
        ExportError: there is nothing to quantise, or too much is lost with all layers but one kept.
    """
    if not quantiser.layers:
        raise ExportError(f"{path.name}: the model has no layer that can be in int8; take --dtype fp32.")
    with TemporaryDirectory(prefix=".tried.", dir=path.parent) as folder:
        trials = _Trials(quantiser, Path(folder), path.name, images, judge, limit, number)
        first = trials.run(())
        kept: tuple[Kept, ...] = ()
        if not trials.suffices(first):
            log.info("int8 loses %s, more than %.3g; the costliest layers are searched.", _said(first), limit)
            kept = _fewest(trials, trials.ranked(), path.name)
        for file in trials.folder_of(len(kept)).iterdir():
            file.replace(path.with_name(file.name))
    return Quantised(limit, trials.figures[len(kept)], first, kept, len(quantiser.layers), dict(quantiser.packages))


class WeightNames:
    """Finds out what a constant of a runtime's graph is called in the module: by its values, which stay when names go.

    Args:
        weights: the module's parameters by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._names: dict[bytes, str] = {}
        for name, tensor in weights.items():
            array = tensor.detach().numpy()
            for each in (array, array.T) if array.ndim == 2 else (array,):
                self._names[_fingerprint(each)] = name.removeprefix("module.").removesuffix("weight").rstrip("._")

    def find(self, values: np.ndarray) -> str | None:
        """Return the name of the weights' module, such as "blocks.3.attn.qkv"; None where they are no module's."""
        return self._names.get(_fingerprint(values))


def _fingerprint(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32).tobytes()).digest()


class _Trials:
    """Files with more or fewer layers kept, each in a folder of its own, and what they lose."""

    def __init__(
        self,
        quantiser: Quantiser,
        folder: Path,
        name: str,
        images: Sequence[np.ndarray],
        judge: Judge,
        limit: float,
        number: int | None,
    ) -> None:
        self._quantiser, self._folder, self._name = quantiser, folder, name
        self._images, self._judge, self._limit, self._number = images, judge, limit, number
        self.figures: dict[int, Figures] = {}

    def folder_of(self, num_kept: int) -> Path:
        return self._folder / str(num_kept)

    def suffices(self, figures: Figures) -> bool:
        return figures.loss <= self._limit and figures.relative <= TOLERANCE_INT8

    def run(self, kept: Sequence[Kept]) -> Figures:
        """Write the file with these layers kept, and judge it."""
        names = {layer.name for layer in kept}
        path = self._write(str(len(kept)), [name for name in self._quantiser.layers if name not in names], self._images)
        self.figures[len(kept)] = self._judge(open_session(path))
        return self.figures[len(kept)]

    def ranked(self) -> list[Kept]:
        """Return all layers, the one first that costs the most when it alone is quantised."""
        found = []
        for number, layer in enumerate(self._quantiser.layers):
            path = self._write(f"alone{number}", [layer], self._judge.samples)
            found.append(Kept(layer, self._judge.error(open_session(path))))
            for file in path.parent.iterdir():
                file.unlink()
        return sorted(found, key=lambda layer: -layer.error)

    def _write(self, folder: str, layers: Sequence[str], images: Sequence[np.ndarray]) -> Path:
        path = self._folder / folder / self._name
        path.parent.mkdir()
        self._quantiser.write(path, layers, images, self._number)
        return path


def _fewest(trials: _Trials, ranked: list[Kept], name: str) -> tuple[Kept, ...]:
    """Return the least number of the costliest layers that have to be kept.

    Raises:
        ExportError: all but one do not suffice.
    """
    failed, number = 0, 1
    while number < len(ranked) and not trials.suffices(trials.run(ranked[:number])):
        failed, number = number, min(2 * number, max(number + 1, len(ranked) - 1))
    if number >= len(ranked):
        last = trials.figures[failed]
        raise ExportError(
            f"{name} loses {_said(last)} in int8 even with {failed} of its {len(ranked)} layers kept in higher "
            f"precision; nothing was kept. Allow more with --max-loss, calibrate on other images, or take --dtype fp32."
        )
    while number - failed > 1:
        middle = (failed + number) // 2
        if trials.suffices(trials.run(ranked[:middle])):
            number = middle
        else:
            failed = middle
    for layer in ranked[:number]:
        log.info("%s is kept in higher precision: alone in int8 it moves the outputs by %.2g.", layer.name, layer.error)
    return tuple(ranked[:number])


def _said(figures: Figures) -> str:
    """Return a loss in words."""
    words = {
        "top-1": "points of top-1",
        "agreement": "points of agreement with the float32 model",
        "features": "% of the features' size",
    }
    return f"{figures.loss:.3g} {words[figures.kind]} (largest difference of an output {figures.relative:.2g})"
