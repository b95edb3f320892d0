"""A classifier in use: images in, the likeliest classes out, batch by batch, in bounded memory.

An image file goes through ``open_image``, ``Preprocessing`` (both in a few threads, ahead of the model), the model, a
softmax, and comes out as a ``Prediction``, in the order in which it went in.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from xcit.data.images import array_to_image, check_channels, find_images, open_image
from xcit.data.labels import class_names
from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from xcit.inference.devices import choose_device, is_out_of_memory
from xcit.models.factory import create_model
from xcit.models.weights import bare
from xcit.models.zoo import find

Source = str | os.PathLike[str] | Image.Image | np.ndarray
"""One image, or a folder or a pattern that stands for several."""

PIXELS_A_BATCH = 32 * 224 * 224
"""Where no batch size is given, as many images go into a batch as have this many pixels together."""

DECODERS = min(8, os.cpu_count() or 1)
"""Threads that read and prepare images while the model runs."""


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


class Predictor:
    """Classify images with an XCiT and the preprocessing that its weights expect.

    Args:
        model: what ``create_model`` takes as a name (with ``pretrained=True``: an architecture means its distilled
            weights at 224 px), the path of a checkpoint, or an ``XCiT`` itself, compiled or not. A model that is
            passed stays the caller's: it is used where it lies and is neither moved nor left in another mode. Each
            batch runs in eval mode, after which every module is back in the mode it was in.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". For a model that is passed, "auto" is the device it is on.
        batch_size: images that go through the model at once; None for as many as have the pixels of 32 images of 224.
        image_size: side in pixels (or height and width) of what the model gets, instead of what its weights expect.
            XCiT takes any size of at least one patch; far from the trained one its accuracy falls.
        preprocessing: instead of the one that ``model.pretrained_cfg`` describes.

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
        BackendError: the device is not available here.

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
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more.")
        if isinstance(model, nn.Module):
            self.model = model
            self.device = _device_of(model, device)
        else:
            self.device = choose_device(device)  # before a download that could turn out useless
            _refuse_without_classes(os.fspath(model))
            self.model = create_model(os.fspath(model), pretrained=True).eval().to(self.device)
        xcit = bare(self.model)
        if not xcit.num_classes:
            raise ConfigError("The model has no classifier (num_classes=0), so there are no classes to predict.")
        check_channels(xcit.config["in_chans"])
        self.preprocessing = _preprocessing(xcit.pretrained_cfg, preprocessing, image_size)
        patch_size, in_chans = xcit.config["patch_size"], xcit.config["in_chans"]
        H, W = self.preprocessing.image_size
        if min(H, W) < patch_size:
            raise ConfigError(f"image_size is {H} x {W}; it must be at least one patch of {patch_size} x {patch_size}.")
        if self.preprocessing.in_chans != in_chans:
            raise ConfigError(
                f"The preprocessing makes images of {self.preprocessing.in_chans} channels; the model takes {in_chans}."
            )
        self.class_names = class_names(xcit.pretrained_cfg, xcit.num_classes)
        self.batch_size = batch_size or max(1, PIXELS_A_BATCH // (H * W))

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

    def _batches(self, images: Source | Iterable[Source]) -> Iterator[tuple[list[_Item], Tensor]]:
        """Yield batches in order: some items, and the logits of those among them that have a tensor."""
        waiting: list[_Item] = []
        num_tensors = 0
        for item in _ahead(self._prepare, _each(images), self.batch_size + DECODERS):
            waiting.append(item)
            num_tensors += item.tensor is not None
            if num_tensors == self.batch_size:
                yield waiting, self._forward(waiting)
                waiting, num_tensors = [], 0
        if waiting:
            yield waiting, self._forward(waiting)

    def _prepare(self, source: tuple[int, Source]) -> _Item:
        index, image = source
        path, name = None, f"image {index}"
        try:
            if isinstance(image, (str, os.PathLike)):
                path, name = Path(image), os.fspath(image)
                image = open_image(path, self.preprocessing.in_chans)
            elif isinstance(image, np.ndarray):
                image = array_to_image(image)
            return _Item(path, name, tensor=self.preprocessing(image))
        except DataError as error:
            return _Item(path, name, error=str(error) if path else f"{name}: {error}")
        except MemoryError:
            return _Item(path, name, error=f"{name}: is too large for the memory there is; scale it down first.")

    def _forward(self, items: list[_Item]) -> Tensor:
        tensors = [item.tensor for item in items if item.tensor is not None]
        if not tensors:
            return torch.empty(0, len(self.class_names))
        try:
            return self._run(torch.stack(tensors))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: the error's traceback would keep the failed batch's memory
        raise ConfigError(self._what_fits(tensors[0], len(tensors)))

    def _run(self, batch: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        with torch.inference_mode(), _evaluating(self.model):
            logits = self.model(batch.to(self.device, dtype))
            return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))

    def _predictions(self, items: list[_Item], logits: Tensor, top_k: int) -> Iterator[Prediction]:
        finite = logits.isfinite().all(dim=1).tolist()
        if not all(finite):
            self._check_weights()
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

    def _check_weights(self) -> None:
        for name, tensor in bare(self.model).state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckpointError(
                    f"The model's weights are not finite (first: {name}), so it cannot predict; training has diverged "
                    f"or the file is damaged."
                )

    def _what_fits(self, example: Tensor, num_images: int) -> str:
        """Say what does fit in memory, by trying: halves of the batch first, then halves of the image's side."""
        H, W = example.shape[1:]
        failed = f"Out of memory on {self.device} with {num_images} images of {H} x {W} px at once"
        while num_images > 1:
            num_images //= 2
            if self._fits(num_images, (H, W)):
                return f"{failed}; {num_images} fit (tried just now): use batch_size={num_images} (--batch-size)."
        patch_size = bare(self.model).config["patch_size"]
        while min(H, W) // 2 >= patch_size:
            H, W = (side // 2 // patch_size * patch_size for side in (H, W))
            if self._fits(1, (H, W)):
                size = H if H == W else (H, W)
                return f"{failed}; one of {H} x {W} fits (tried just now): use image_size={size} (--image-size)."
        return f"{failed}; not even one of {H} x {W} fits. Use a smaller model or another device."

    def _fits(self, num_images: int, size: tuple[int, int]) -> bool:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._run(torch.zeros(num_images, self.preprocessing.in_chans, *size))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


class _Item(NamedTuple):
    """One image on its way: prepared, or with the reason why it could not be."""

    path: Path | None
    name: str
    tensor: Tensor | None = None
    error: str | None = None


def _each(images: Source | Iterable[Source]) -> Iterator[tuple[int, Source]]:
    """Number the images one by one, folders and patterns taken apart."""
    alone = isinstance(images, (str, os.PathLike, Image.Image, np.ndarray))
    index = 0
    for source in [images] if alone else images:  # type: ignore[union-attr]
        if isinstance(source, (str, os.PathLike)):
            for path in find_images([source]):
                yield index, path
                index += 1
        elif isinstance(source, (Image.Image, np.ndarray)):
            yield index, source
            index += 1
        else:
            raise ConfigError(
                f"Expected paths, Pillow images or NumPy arrays to predict; got {type(source).__name__}. Of a tensor, "
                f"call the model itself."
            )


def _ahead(
    function: Callable[[tuple[int, Source]], _Item], items: Iterator[tuple[int, Source]], num_ahead: int
) -> Iterator[_Item]:
    """Map in threads, in order, at most ``num_ahead`` results ahead of what was taken."""
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="xcit-decode")
    try:
        pending: deque[Future[_Item]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the caller stops early or Ctrl-C comes
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and each of its modules back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def _device_of(model: nn.Module, asked: str) -> torch.device:
    device = next(bare(model).parameters()).device
    if device.type == "meta":
        raise ConfigError("The model is on the meta device: it has shapes but no weights to predict with.")
    if asked != "auto" and choose_device(asked) != device and asked != device.type:
        raise ConfigError(f"The model is on {device}, not on {asked}; move it first, with model.to({asked!r}).")
    return device


def _preprocessing(
    cfg: dict[str, object], given: Preprocessing | None, image_size: int | tuple[int, int] | None
) -> Preprocessing:
    preprocessing = given or Preprocessing.from_cfg(cfg)
    if image_size is None:
        return preprocessing
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return replace(preprocessing, image_size=size)
