"""The int8 part of an export: the images it takes, what is lost on them, and what the proof says of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcit.data.preprocess import Preprocessing
from xcit.deploy import convert
from xcit.deploy.calibration import (
    NUM_IMAGES,
    PreparedImages,
    Validation,
    batch_of,
    calibration_images,
    validation_images,
)
from xcit.deploy.judge import LIMITS, Judge
from xcit.deploy.quantise import Quantised, quantise
from xcit.errors import ConfigError, DataError

Source = str | os.PathLike[str]
NUM_SHOWN = 8
"""Images that the proof takes in turn."""


@dataclass(frozen=True)
class Int8Options:
    """What int8 needs, and what it may lose."""

    calibration: Source | None = None
    """Folder of images to calibrate on."""
    calibration_images: int | None = None
    """How many of them at most; None for ``NUM_IMAGES``."""
    validation: Source | None = None
    """Class folders by which top-1 is measured; of a classifier."""
    max_loss: float | None = None
    """The largest loss in points: of top-1 on the validation images, or else of agreement with the float32 model on the
    calibration images; of features, their mean relative difference in percent. None for ``LIMITS``."""


def check_options(options: Int8Options, dtype: str, task: str | None = None) -> None:
    """Refuse what is missing, and what would do nothing.

    Args:
        options: as given.
        dtype: of the file.
        task: of the model: "classification", "features", "segmentation" or "pyramid"; None while it is not known.

    Raises:
        ConfigError: in one sentence.
    """
    if dtype != "int8":
        if options != Int8Options():
            raise ConfigError(
                f"Images to calibrate or validate on, and the largest loss, are for int8; leave them out for {dtype}."
            )
        return
    if options.calibration is None:
        raise ConfigError(
            "int8 needs images like those that the model will meet, to find the ranges of its activations: name a "
            "folder of some hundreds with --calibration (calibration=...)."
        )
    number, loss = options.calibration_images, options.max_loss
    if number is not None and number < 1:
        raise ConfigError(f"The number of calibration images is {number}; it must be 1 or more.")
    if loss is not None and not 0 <= loss <= 100:
        raise ConfigError(f"max_loss is {loss:g}; it must be percentage points from 0 to 100.")
    if task not in (None, "classification") and options.validation is not None:
        raise ConfigError(
            f"Validation images are class folders, by which a classifier is judged; leave them out for {task}, which "
            f"is compared with the float32 model on the calibration images."
        )


@dataclass(frozen=True)
class Int8Export:
    """Images and limits of one export."""

    options: Int8Options
    images: PreparedImages
    validation: Validation | None
    scores: bool

    def write(
        self,
        ready: nn.Module,
        model: nn.Module,
        example: Tensor,
        path: Path,
        *,
        number: int | None,
        **described: Any,
    ) -> Quantised:
        """Write the file, with layers kept in higher precision until it loses no more than is allowed.

        Args:
            ready: what is written: the folded model.
            model: what it is judged by: the model as it was, float32.
            example: as for ``convert.write_artefact``.
            path: likewise.
            number: of images that the file takes at once; None for any.
            **described: format, dynamic, smallest, output_names and description, likewise.

        Raises:
            ExportError: too much is lost, or it cannot be quantised.
        """
        quantiser = convert.quantiser(ready, example, calibration=self.images, **described)
        judge = Judge(model, self.images, self.validation, scores=self.scores, number=number)
        asked = self.options.max_loss
        limit = LIMITS[judge.kind] if asked is None else asked
        return quantise(quantiser, path, self.images, judge, limit=limit, number=number)

    def batch(self, shape: tuple[int, int, int, int], first: int) -> torch.Tensor:
        """Return images for a proof, such that a few come from all over the folder."""
        spread = [self.images[i * len(self.images) // NUM_SHOWN] for i in range(NUM_SHOWN)]
        return batch_of(spread, shape, first)

    def facts(self, quantised: Quantised) -> dict[str, Any]:
        """Return what stands in the proof under "int8"."""
        calibration = self.options.calibration
        assert calibration is not None
        return {
            "calibration": {
                "folder": _name(calibration),
                "images": len(self.images),
                "unreadable": self.images.skipped,
            },
            "validation": None
            if self.validation is None
            else {
                "folder": self.validation.name,
                "images": len(self.validation.images),
                "unreadable": self.validation.images.skipped,
            },
            **quantised.to_dict(),
        }


def open_images(
    options: Int8Options, cfg: Mapping[str, Any], size: tuple[int, int], names: Sequence[str], *, scores: bool
) -> Int8Export:
    """Read the images that an int8 export takes.

    Args:
        options: checked.
        cfg: the model's ``pretrained_cfg``.
        size: height and width of the images, in pixels.
        names: of the classes; none where nothing is validated.
        scores: whether the model's outputs are class scores.

    Raises:
        DataError: no images, or none that can be read, or other classes than the model's.
        ConfigError: the model does not say how images are prepared.
    """
    assert options.calibration is not None
    preprocessing = replace(Preprocessing.from_cfg(cfg), image_size=size)
    images = calibration_images(options.calibration, preprocessing, options.calibration_images or NUM_IMAGES)
    validation = None
    if options.validation is not None:
        if not names:
            raise DataError("The model has no classes to validate.")
        validation = validation_images(options.validation, preprocessing, names)
    return Int8Export(options, images, validation, scores)


def _name(source: Source) -> str:
    return Path(source).expanduser().resolve().name
