"""A classifier in use: images in, the likeliest classes out, batch by batch, in bounded memory.

An image file goes through ``open_image``, ``Preprocessing`` (both in a few threads, ahead of the model), the model, a
softmax, and comes out as a ``Prediction``, in the order in which it went in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcit.data.labels import class_names
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError, UnknownNameError
from xcit.inference.runtime_model import load_exported
from xcit.inference.runtimes import is_artefact
from xcit.inference.stream import ImageStream, Item, Source
from xcit.models.weights import bare
from xcit.models.xcit import XCiT
from xcit.models.zoo import find


class Label(NamedTuple):
    """A class that an image may belong to."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a label
    """Of the logit, from 0."""
    name: str
    probability: float
    """Softmax of the logits, between 0 and 1."""


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image, or why it could not."""

    path: Path | None
    """The file; None for an image or an array in memory."""
    labels: list[Label] = field(default_factory=list)
    """The likeliest classes, likeliest first; empty when there is an error."""
    error: str | None = None
    """One sentence that names the image."""


class Predictor(ImageStream):
    """Classify images with an XCiT and the preprocessing that its weights expect.

    Args:
        model: what ``create_model`` takes as a name (with ``pretrained=True``: an architecture means its distilled
            weights at 224 px), the path of a checkpoint, that of a file that ``xcit export`` wrote (.onnx, .xml, .pt2,
            .pte), which runs in its own runtime on the CPU, or an ``XCiT`` itself, compiled or not, folded
            (``xcit.deploy.fold``) or not. A model that is passed stays the caller's: it is used where it lies and is
            neither moved nor left in another mode. Each batch runs in eval mode, after which every module is back in
            the mode it was in.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". For a model that is passed, "auto" is the device it is on.
        batch_size: images that go through the model at once; None for as many as have the pixels of 32 images of 224.
        image_size: side in pixels (or height and width) of what the model gets, instead of what its weights expect.
            XCiT takes any size of at least one patch; far from the trained one its accuracy falls.
        preprocessing: instead of the one that ``model.pretrained_cfg`` describes.
        fold: run a folded copy (``xcit.deploy.fold``): the same function in fewer operations, faster on a CPU.

    Attributes:
        model: the model.
        device: where it runs.
        preprocessing: how images are prepared.
        class_names: one name a class.
        batch_size: images in a batch.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: its weights cannot be had.
        ConfigError: a model without classifier or for other than RGB or grey images; one that does not say how to
            prepare images; a batch or image size out of range; a device other than that of the model passed.
        BackendError: the device, or the runtime of an exported file, is not available here.

    Example:
        >>> predictor = xcit.Predictor("xcit_small_12_p16_224_dist")
        >>> predictor("photos/cat.jpg", top_k=1)[0].labels
        [Label(index=281, name='tabby', probability=0.61)]
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str = "auto",
        batch_size: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        fold: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            if is_artefact(model):
                if fold:
                    raise ConfigError(
                        f"{os.fspath(model)} is an exported file, whose graph is what it was written as; fold before "
                        f"the export (it is the export's default), and leave fold out here."
                    )
                model = load_exported(model, device=device, image_size=image_size)
            else:
                _refuse_without_classes(os.fspath(model))
        super().__init__(
            model,
            device=device,
            batch_size=batch_size,
            image_size=image_size,
            preprocessing=preprocessing,
            fold=fold,
        )
        xcit = bare(self.model, or_folded=True)
        self.class_names = class_names(xcit.pretrained_cfg, xcit.num_classes)

    def __call__(self, images: Source | Iterable[Source], top_k: int = 5) -> list[Prediction]:
        """Return the likeliest classes of each image.

        Args:
            images: a file, a folder or a pattern (see ``find_images``), a Pillow image, an array (see
                ``array_to_image``), or any number of these. A file gives one prediction each time it is named.
            top_k: classes to return of each image, at most as many as there are.

        Returns:
            Predictions in the images' order. An image that could not be predicted has ``error`` set instead of
            raising.

        Raises:
            ConfigError: ``top_k`` below 1, an object that is no image, or a batch that does not fit in memory; the
                message then says which does.
            DataError: an empty folder or a pattern without a match.
            CheckpointError: the model's weights are not finite.
        """
        return list(self.stream(images, top_k))

    def stream(self, images: Source | Iterable[Source], top_k: int = 5) -> Iterator[Prediction]:
        """Yield the predictions of ``__call__`` as they are made.

        ``images`` is read as far ahead as two batches and a few images, so that it may be endless.
        """
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; it must be 1 or more.")
        for items, logits in self._batches(images):
            yield from self._predictions(items, logits, top_k)

    def logits(self, images: Source | Iterable[Source]) -> Float[Tensor, "images classes"]:
        """Return the model's logits of the images, float32 (float64 from such a model), on the CPU.

        Raises:
            DataError: an image that cannot be read; none is left out.
        """
        rows = []
        for items, logits in self._batches(images):
            for item in items:
                if item.error:
                    raise DataError(item.error)
            rows.append(logits)
        return torch.cat(rows) if rows else torch.empty(0, len(self.class_names))

    def _check_model(self, model: XCiT) -> None:
        if not model.num_classes:
            raise ConfigError("The model has no classifier (num_classes=0), so there are no classes to predict.")

    def _compute(self, batch: Tensor) -> Tensor:
        logits: Tensor = self.model(batch)
        return logits

    @property
    def _width(self) -> int:
        return len(self.class_names)

    def _predictions(self, items: list[Item], logits: Tensor, top_k: int) -> Iterator[Prediction]:
        finite = logits.isfinite().all(dim=1).tolist()
        if not all(finite):
            self.check_weights()
        probabilities, indices = logits.softmax(dim=1).topk(min(top_k, len(self.class_names)), dim=1)
        rows = zip(finite, probabilities.tolist(), indices.tolist(), strict=True)
        for item in items:
            if item.error:
                yield Prediction(item.path, error=item.error)
                continue
            is_finite, row, classes = next(rows)
            if is_finite:
                labels = [Label(c, self.class_names[c], p) for c, p in zip(classes, row, strict=True)]
                yield Prediction(item.path, labels)
            else:
                dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
                yield Prediction(
                    item.path,
                    error=f"{item.name}: the model's logits are NaN or infinite, though its weights are finite: "
                    f"something overflows in {dtype}; use a wider type.",
                )


def _refuse_without_classes(name: str) -> None:
    """Refuse released weights without a classifier before they are downloaded."""
    try:
        _, checkpoint = find(name)
    except UnknownNameError:
        return  # a file, or a name that create_model refuses
    if checkpoint and checkpoint.task == "self-supervised":
        raise ConfigError(
            f"{name} is a backbone without classifier, so there are no classes to predict; choose a model that was "
            f"trained on labels."
        )
