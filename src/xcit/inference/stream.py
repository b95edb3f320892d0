"""Images through a model, whatever the model makes of them: read ahead in threads, in batches, in bounded memory.

The predictor and the feature extractor build on this: it opens and prepares images while the model runs, keeps their
order, carries broken ones along with the reason, and says what would fit when the memory does not suffice.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xcit.data.images import array_to_image, check_channels, find_images, open_image
from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, DataError
from xcit.inference.devices import choose_device, is_out_of_memory
from xcit.inference.room import Room
from xcit.models.factory import create_model
from xcit.models.folded_copy import folded_copy
from xcit.models.weights import bare
from xcit.models.xcit import XCiT

Source = str | os.PathLike[str] | Image.Image | np.ndarray
"""One image, or a folder or a pattern that stands for several."""

PIXELS_A_BATCH = 32 * 224 * 224
"""Where no batch size is given, as many images go into a batch as have this many pixels together."""

PIXELS_AHEAD = 4 * PIXELS_A_BATCH
"""Images that are prepared beyond the next batch have so many pixels together at most; of larger ones none is."""

DECODERS = min(8, os.cpu_count() or 1)
"""Threads that read and prepare images while the model runs."""


class Item(NamedTuple):
    """One image on its way: prepared, or with the reason why it could not be."""

    path: Path | None
    name: str
    tensor: Tensor | None = None
    error: str | None = None


class ImageStream(ABC):
    """A model in use, and the way of images to it. What it computes of a batch is the subclass's.

    Args:
        model: what ``create_model`` takes as a name (with ``pretrained=True``), the path of a checkpoint, or an
            ``XCiT`` itself, which stays the caller's: neither moved nor left in another mode.
        device: "auto" or a device's name. For a model that is passed, "auto" is the device it is on.
        batch_size: images at once; None for as many as have the pixels of 32 images of 224.
        image_size: instead of what the weights expect.
        preprocessing: instead of the one that ``model.pretrained_cfg`` describes.
        fold: run a folded copy of the model.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: its weights cannot be had.
        ConfigError: an argument out of its range, or one that does not fit the model.
        BackendError: the device is not available here.
    """

    scales: Sequence[float] = (1.0,)
    """In multiples of the image's size, those at which the model sees it."""

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str,
        batch_size: int | None,
        image_size: int | tuple[int, int] | None,
        preprocessing: Preprocessing | None,
        fold: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more.")
        if isinstance(model, nn.Module):
            self.model = model
            self.device = _device_of(model, device)
        else:
            self.device = choose_device(device)  # before a download that could turn out useless
            self.model = create_model(os.fspath(model), pretrained=True).eval().to(self.device)
        if fold:
            self.model = folded_copy(bare(self.model, or_folded=True))
        xcit = bare(self.model, or_folded=True)
        self._check_model(xcit)
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
        self.batch_size = batch_size or max(1, PIXELS_A_BATCH // (H * W))
        self._room = Room(xcit)

    # --- what a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def _check_model(self, model: XCiT) -> None:
        """Refuse a model that this is not for."""

    @abstractmethod
    def _compute(self, batch: Tensor) -> Tensor:
        """Return one row of ``_width`` numbers an image, of a batch on the model's device and in its dtype."""

    @property
    @abstractmethod
    def _width(self) -> int:
        """Numbers a row."""

    # --- what it has --------------------------------------------------------------------------------------------------

    def _batches(self, images: Source | Iterable[Source]) -> Iterator[tuple[list[Item], Tensor]]:
        """Yield batches in order: some items, and the rows of those among them that have a tensor."""
        waiting: list[Item] = []
        num_tensors = 0
        self._check_room(1)  # before the first is read
        H, W = self.preprocessing.image_size
        num_ahead = min(DECODERS, PIXELS_AHEAD // (H * W))
        for item in ahead(self._prepare, each(images), self.batch_size + num_ahead if num_ahead else 0):
            waiting.append(item)
            num_tensors += item.tensor is not None
            if num_tensors == self.batch_size:
                yield waiting, self._forward(waiting)
                waiting, num_tensors = [], 0
        if waiting:
            yield waiting, self._forward(waiting)

    def _check_room(self, num_images: int) -> None:
        """Refuse what the memory would not hold: a system that is asked for too much does not say so, it kills.

        Raises:
            ConfigError: with how much it would take, how much there is, and what would fit.
        """
        size, chans = self.preprocessing.image_size, self.preprocessing.in_chans
        lack = self._room.lack(self._compute, num_images, chans, size, enlarged=max(1.0, *self.scales) ** 2)
        if lack is None:
            return
        H, W = size
        images = f"One image of {H} x {W} px" if num_images == 1 else f"{num_images} images of {H} x {W} px at once"
        takes = f"{images} would take {lack}"
        fit = math.floor(num_images * lack.available / lack.needed)
        if fit:
            raise ConfigError(f"{takes}: use batch_size={fit} (--batch-size) or less.")
        patch = bare(self.model, or_folded=True).config["patch_size"]
        scale = math.sqrt(num_images * lack.available / lack.needed)
        H, W = (math.floor(side * scale) // patch * patch for side in size)
        if min(H, W) < patch:
            raise ConfigError(f"{takes}, and not even one patch would fit. Use a smaller model or another device.")
        fits = H if H == W else (H, W)
        raise ConfigError(f"{takes}: use image_size={fits} (--image-size) or less.")

    def _prepare(self, source: tuple[int, Source]) -> Item:
        index, image = source
        path, name = None, f"image {index}"
        try:
            if isinstance(image, (str, os.PathLike)):
                path, name = Path(image), os.fspath(image)
                image = open_image(path, self.preprocessing.in_chans)
            elif isinstance(image, np.ndarray):
                image = array_to_image(image)
            return Item(path, name, tensor=self.preprocessing(image))
        except DataError as error:
            return Item(path, name, error=str(error) if path else f"{name}: {error}")
        except MemoryError:
            return Item(path, name, error=f"{name}: is too large for the memory there is; scale it down first.")

    def _forward(self, items: list[Item]) -> Tensor:
        tensors = [item.tensor for item in items if item.tensor is not None]
        if not tensors:
            return torch.empty(0, self._width)
        try:
            self._check_room(len(tensors))
            return self._run(torch.stack(tensors))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: the error's traceback would keep the failed batch's memory
        raise ConfigError(self._what_fits(tensors[0], len(tensors)))

    def _run(self, batch: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        with torch.inference_mode(), evaluating(self.model):
            rows = self._compute(batch.to(self.device, dtype))
            return rows.to("cpu", torch.promote_types(rows.dtype, torch.float32))

    def check_weights(self) -> None:
        """Find out why what came out is not finite.

        Raises:
            CheckpointError: the weights are not finite either.
        """
        for name, tensor in bare(self.model, or_folded=True).state_dict().items():
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
        patch_size = bare(self.model, or_folded=True).config["patch_size"]
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and each of its modules back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def each(images: Source | Iterable[Source]) -> Iterator[tuple[int, Source]]:
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


def ahead(
    function: Callable[[tuple[int, Source]], Item], items: Iterator[tuple[int, Source]], num_ahead: int
) -> Iterator[Item]:
    """Map in threads, in order, at most ``num_ahead`` results ahead of what was taken."""
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="xcit-decode")
    try:
        pending: deque[Future[Item]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the caller stops early or Ctrl-C comes
        pool.shutdown(wait=False, cancel_futures=True)


def _device_of(model: nn.Module, asked: str) -> torch.device:
    device = next(bare(model, or_folded=True).parameters()).device
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
