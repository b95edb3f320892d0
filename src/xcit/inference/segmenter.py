"""A segmenter in use: images of any sizes in, a class for every pixel out, in bounded memory.

An image is read in a thread ahead of the model, looked at whole or by windows, and comes out as ``Segmentation`` in its
own pixels, in the order in which it went in. ``segment_image`` says how.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xcit.data.images import array_to_image, check_channels, convert_image, open_image
from xcit.data.labels import class_names
from xcit.data.mask_files import distinct_colours
from xcit.errors import CheckpointError, ConfigError, DataError, XCiTError
from xcit.inference.devices import choose_device, is_out_of_memory
from xcit.inference.room import Room
from xcit.inference.segment_image import (
    Labelled,
    View,
    check_options,
    default_stride,
    label_type,
    labelled,
    views,
)
from xcit.inference.segment_windows import LEAST, Picture, WindowLogits, low_logits, whole_logits
from xcit.inference.segmentations import Segmentation
from xcit.inference.stream import Source, ahead, each, evaluating
from xcit.models.download import is_url
from xcit.models.factory import create_model
from xcit.models.segmentation import SegmentationModel
from xcit.models.segmenters import create_segmenter
from xcit.models.weights import refuse_not_finite

PIXELS_A_BATCH = 4 * 512 * 2048
"""Where no batch size is given, as many images or windows go into a batch on a graphics card as have so many pixels."""
AT_MOST = 16
"""Images or windows in such a batch."""
AHEAD = 2
"""Images that are read beyond the next batch; they wait at their whole size."""

Mode = Literal["auto", "whole", "slide"]
Opener = Callable[[Path], Image.Image]
"""Reads an image file; raises DataError if it cannot."""

_log = logging.getLogger("xcit")


class _Item(NamedTuple):
    """One image on its way: its pixels, or the reason why there are none."""

    path: Path | None
    name: str
    pictures: tuple[tuple[View, Picture], ...] = ()
    size: tuple[int, int] = (0, 0)
    error: str | None = None


class Segmenter:
    """Give every pixel of images a class, with a segmenter on an XCiT.

    Args:
        model: the path of a segmenter's file (``save_segmenter``), a released segmenter's name
            (``upernet_xcit_small_12_p16``), or a ``SegmentationModel`` itself, which stays the caller's: it is used
            where it lies, and left in the mode that it had.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". For a model that is passed, "auto" is the device it is on.
        mode: "whole" looks at the whole image at once, as published; "slide" by windows that overlap, whose seams are
            blended; "auto" at the whole if it has, scaled, no more pixels than the longest image that the model's own
            sizes allow (512 x 2048 for the released ones) and if the memory suffices, else by windows.
        window: side of a window in pixels of the scaled image, a multiple of 32; None for the model's own shorter side
            (512 for the released ones), the size of the crops that it was trained on.
        stride: pixels from a window to the next at most, a multiple of 4; None for two thirds of the window.
        scales: sizes to look at, in multiples of the one that ``image_size`` or ``native`` gives; their probabilities
            are averaged. Published for several scales: 0.5, 0.75, 1, 1.25, 1.5, 1.75, with ``flip``.
        flip: look at the mirrored image too, and average.
        image_size: images are scaled so that the shorter side has so many pixels,
        max_size: and the longer at most so many. If one of the two is given, the other follows in the model's
            proportion; if none is, the model decides.
        native: images keep their own size instead, for small things in large images.
        batch_size: images, or windows of one, that go through the model at once; 1 on the CPU if None, else as many as
            have 4 x 512 x 2048 pixels together. Only images that are of one size when scaled share a batch.

    Attributes:
        model: the model.
        device: where it runs.
        class_names: one name a class.
        palette: (K, 3) uint8: a colour a class.
        mode: as given.
        window: in effect.
        stride: in effect.
        image_size: in effect; None if ``native``.
        max_size: likewise.
        batch_size: in effect.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: its weights cannot be had, are not those of a segmenter, or are not finite.
        ConfigError: an argument out of its range, or one that does not fit the model or another argument.
        BackendError: the device is not available here.

    Example:
        >>> segmenter = xcit.Segmenter("runs/scenes/model.safetensors")
        >>> (seen,) = segmenter("scene.png")
        >>> seen.labels, seen.scores, seen.areas()
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str = "auto",
        mode: Mode = "auto",
        window: int | None = None,
        stride: int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        image_size: int | None = None,
        max_size: int | None = None,
        native: bool = False,
        batch_size: int | None = None,
    ) -> None:
        _check(mode, window, stride, scales, image_size, max_size, native, batch_size)
        if isinstance(model, nn.Module):
            if not isinstance(model, SegmentationModel):
                raise ConfigError(
                    f"Expected a SegmentationModel, got {type(model).__name__}; create_segmenter builds one, Predictor "
                    f"takes classifiers, Detector detectors."
                )
            self.model = model
            self.device = _device_of(model, device)
            refuse_not_finite(model.state_dict(), "The model", "it segments nothing; training has diverged")
        else:
            self.device = choose_device(device)  # before a download that could turn out useless
            self.model = _load(os.fspath(model)).eval().to(self.device)
        self._in_chans = len(self.model.mean)
        check_channels(self._in_chans)
        label_type(self.model.num_classes)
        self.class_names, self.palette = _classes(self.model)
        self.mode = mode
        self.window = window or max(LEAST, self.model.image_size // LEAST * LEAST)
        # A stride alone is judged by the window that the model gives.
        check_options(image_size=None, max_size=None, scales=(1,), window=self.window, stride=stride, batch_size=None)
        self.stride = stride or default_stride(self.window)
        self.scales, self.flip = tuple(scales), flip
        sides = None if native else _sides(self.model, image_size, max_size)
        self._sides = sides
        self.image_size: int | None = sides and sides[0]
        self.max_size: int | None = sides and sides[1]
        self._largest = self.model.image_size * self.model.max_size
        largest = self.window**2 if mode == "slide" or sides is None else math.prod(sides) * max(scales) ** 2
        fitting = 1 if self.device.type == "cpu" else int(PIXELS_A_BATCH // largest)
        self.batch_size = batch_size or min(AT_MOST, max(1, fitting))
        self._room = Room(self.model)
        self._said = False

    def __call__(self, images: Source | Iterable[Source]) -> list[Segmentation]:
        """Return what is seen in each image.

        Args:
            images: a file, a folder or a pattern (see ``find_images``), a Pillow image, an array (see
                ``array_to_image``), or any number of these. Maps of labels and scores take three bytes a pixel: for
                many large images use ``stream``.

        Returns:
            Segmentations in the images' order. An image that could not be looked at has ``error`` set instead of
            raising.

        Raises:
            ConfigError: an object that is no image, or what does not fit in memory; the message then says what does.
            DataError: an empty folder or a pattern without a match.
        """
        return list(self.stream(images))

    def stream(self, images: Source | Iterable[Source], *, opener: Opener | None = None) -> Iterator[Segmentation]:
        """Yield the segmentations of ``__call__`` as they are made.

        ``images`` is read as far ahead as a batch and a few images, so that it may be endless.

        Args:
            images: see ``__call__``.
            opener: reads files instead of ``open_image``; called from several threads.
        """
        waiting: list[_Item] = []
        num_pictures = 0
        prepare: Any = partial(self._prepare, opener or partial(open_image, in_chans=self._in_chans))
        items: Iterator[Any] = ahead(prepare, each(images), self.batch_size + AHEAD)
        for item in items:
            waiting.append(item)
            num_pictures += item.error is None
            if num_pictures == self.batch_size:
                yield from self._seen(waiting)
                waiting, num_pictures = [], 0
            del item
        if waiting:
            yield from self._seen(waiting)

    # --- one image ----------------------------------------------------------------------------------------------------

    def _prepare(self, opener: Opener, source: tuple[int, Source]) -> _Item:
        index, image = source
        path, name = None, f"image {index}"
        try:
            if isinstance(image, (str, os.PathLike)):
                path, name = Path(image), os.fspath(image)
                image = opener(path)
            elif isinstance(image, np.ndarray):
                image = array_to_image(image)
            image = convert_image(image, self._in_chans)
            return _Item(path, name, self._pictures(image), (image.height, image.width))
        except DataError as error:
            return _Item(path, name, error=str(error) if path else f"{name}: {error}")
        except MemoryError:
            return _Item(path, name, error=f"{name}: is too large for the memory there is; scale it down first.")

    def _pictures(self, image: Image.Image) -> tuple[tuple[View, Picture], ...]:
        """Return what is looked at, scaled already where that takes no more memory than the image itself."""
        array = np.array(image)  # a copy, which PyTorch may write to
        pixels = torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)
        looks = views((image.height, image.width), self._sides, self.scales, self.flip)
        net = self.model
        by_size = {view.size: Picture(pixels, view.size, net.mean, net.std) for view in looks}
        if 4 * sum(max(LEAST, h) * max(LEAST, w) for h, w in by_size) <= array.shape[0] * array.shape[1]:
            by_size = {size: picture.ready() for size, picture in by_size.items()}
        return tuple((view, by_size[view.size]) for view in looks)

    def _segmentation(self, item: _Item, found: Labelled) -> Segmentation:
        if not found.finite:
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            return Segmentation(
                item.path,
                error=f"{item.name}: the model's logits are NaN or infinite, though its weights are finite: something "
                f"overflows in {dtype}; use a wider type.",
            )
        return Segmentation(item.path, item.size, found.labels, found.scores, self.class_names, self.palette)

    # --- a batch ------------------------------------------------------------------------------------------------------

    def _seen(self, items: list[_Item]) -> Iterator[Segmentation]:
        """Yield what is in some items; those of one size go through the model together, if they go whole."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        seen: dict[int, Segmentation] = {}
        by_windows = []
        for i, item in enumerate(items):
            if item.error is None:
                if self._goes_whole(item):
                    alike[item.size].append(i)
                else:
                    by_windows.append(i)
        for group in alike.values():
            found = self._whole([items[i] for i in group])
            if found is None:
                by_windows += group
                continue
            seen.update((i, self._segmentation(items[i], each)) for i, each in zip(group, found, strict=True))
        for i in by_windows:
            seen[i] = self._segmentation(items[i], self._slide(items[i]))
        for i, item in enumerate(items):
            yield seen.pop(i) if item.error is None else Segmentation(item.path, error=item.error)

    def _goes_whole(self, item: _Item) -> bool:
        if self.mode != "auto":
            return self.mode == "whole"
        (nominal,) = {view.size for view in views(item.size, self._sides, (1.0,), False)}
        return math.prod(nominal) <= self._largest

    def _whole(self, items: list[_Item]) -> list[Labelled] | None:
        """Return what is in images of one size, looked at whole; None if the memory wants windows and may have them."""
        size = max((view.size for view, _ in items[0].pictures), key=math.prod)
        images = f"{len(items)} images" if len(items) > 1 else "One image"
        h, w = (max(LEAST, side) for side in size)
        lack = self._room.lack(self._forward, len(items), self._in_chans, (h, w))
        if lack is None:
            try:
                return self._run_whole(items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            takes = f"Out of memory on {self.device} with {images.lower()} of {h} x {w} px"
            fraction = 0.5
        else:
            takes = f"{images} of {h} x {w} px would take {lack}"
            fraction = lack.available / lack.needed
        fit = math.floor(len(items) * fraction)
        if fit:
            raise ConfigError(f"{takes}: use batch_size={fit} (--batch-size) or less.")
        if self.mode == "auto":
            self._say(f"{takes}; images of this size are looked at by windows of {self.window} px.")
            return None
        advice = "use mode='slide' (--mode slide)"
        if self._sides is not None:
            smaller = math.floor(self._sides[0] * math.sqrt(len(items) * fraction)) // LEAST * LEAST
            if smaller >= LEAST:
                advice += f", or image_size={smaller} (--image-size) or less"
        raise ConfigError(f"{takes}: {advice}.")

    def _run_whole(self, items: list[_Item]) -> list[Labelled]:
        with torch.inference_mode(), evaluating(self.model):
            looks = [
                whole_logits(self.model, [item.pictures[n][1] for item in items], flip=view.flip)
                for n, (view, _) in enumerate(items[0].pictures)
            ]
            return [labelled([look[i] for look in looks], item.size) for i, item in enumerate(items)]

    def _slide(self, item: _Item) -> Labelled:
        """Return what is in an image, looked at by windows."""
        lack = self._room.lack(self._forward, self.batch_size, self._in_chans, (self.window, self.window))
        windows = f"{self.batch_size} windows" if self.batch_size > 1 else "One window"
        if lack is None:
            try:
                with torch.inference_mode(), evaluating(self.model):
                    looks = [
                        WindowLogits(
                            self.model, picture, self.window, self.stride, flip=view.flip, batch_size=self.batch_size
                        )
                        for view, picture in item.pictures
                    ]
                    return labelled(looks, item.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            takes = f"Out of memory on {self.device} with {windows.lower()} of {self.window} x {self.window} px"
            fraction = 0.5
        else:
            takes = f"{windows} of {self.window} x {self.window} px would take {lack}"
            fraction = lack.available / lack.needed
        fit = math.floor(self.batch_size * fraction)
        if fit:
            raise ConfigError(f"{takes}: use batch_size={fit} (--batch-size) or less.")
        side = math.floor(self.window * math.sqrt(self.batch_size * fraction)) // LEAST * LEAST
        if side < LEAST:
            raise ConfigError(f"{takes}, and not even the smallest would fit. Use a smaller model or another device.")
        raise ConfigError(f"{takes}: use window={side} (--window) or less.")

    def _forward(self, images: Tensor) -> Tensor:
        with evaluating(self.model):
            return low_logits(self.model, images)

    def _say(self, text: str) -> None:
        if not self._said:
            self._said = True
            _log.info(text)


# --- models and arguments ---------------------------------------------------------------------------------------------


def _load(name: str) -> SegmentationModel:
    if not (Path(name).suffix or "/" in name or os.sep in name or is_url(name)):
        return create_segmenter(name, pretrained=True)
    try:
        return create_segmenter(name)
    except CheckpointError:
        if not _is_backbone(name):
            raise
    raise CheckpointError(
        f"{name} is a classifier or a backbone, not a segmenter: xcit predict uses it, and create_segmenter("
        f"ARCHITECTURE, backbone={name!r}) begins a segmenter with it, to be trained."
    )


def _is_backbone(name: str) -> bool:
    try:
        create_model(name, pretrained=True)
    except XCiTError:
        return False
    return True


def _device_of(model: nn.Module, asked: str) -> torch.device:
    device: torch.device = next(model.parameters()).device
    if device.type == "meta":
        raise ConfigError("The model is on the meta device: it has shapes but no weights to segment with.")
    if asked != "auto" and choose_device(asked) != device and asked != device.type:
        raise ConfigError(f"The model is on {device}, not on {asked}; move it first, with model.to({asked!r}).")
    return device


def _classes(model: SegmentationModel) -> tuple[list[str], np.ndarray]:
    """Return the classes' names and colours: the model's own, those of its label set, or numbers and some colours."""
    cfg: Mapping[str, Any] = model.pretrained_cfg
    palette = cfg.get("palette")
    if cfg.get("label_set") == "ade20k" and not cfg.get("class_names"):
        from xcit.data import ade20k

        cfg = {"class_names": ade20k.CLASS_NAMES}
        palette = ade20k.PALETTE if palette is None else palette
    names = class_names(cfg, model.num_classes)
    if palette is None:
        return names, distinct_colours(model.num_classes)
    colours = np.asarray(palette)
    if colours.shape != (len(names), 3) or colours.min() < 0 or colours.max() > 255:
        raise ConfigError(
            f"The model's palette has the shape {colours.shape}; it must be {len(names)} colours, one a class, of red, "
            f"green and blue from 0 to 255."
        )
    return names, colours.astype(np.uint8)


def _sides(model: SegmentationModel, image_size: int | None, max_size: int | None) -> tuple[int, int]:
    proportion = model.max_size / model.image_size
    if image_size is None and max_size is None:
        return model.image_size, model.max_size
    if image_size is None:
        assert max_size is not None
        return max(LEAST, round(max_size / proportion)), max_size
    return image_size, max_size or round(image_size * proportion)


def _check(
    mode: str,
    window: int | None,
    stride: int | None,
    scales: Sequence[float],
    image_size: int | None,
    max_size: int | None,
    native: bool,
    batch_size: int | None,
) -> None:
    if mode not in ("auto", "whole", "slide"):
        raise ConfigError(f"mode is {mode!r}; it must be 'auto', 'whole' or 'slide'.")
    if mode == "whole" and (window is not None or stride is not None):
        raise ConfigError("window and stride are for the modes 'slide' and 'auto'; 'whole' has no windows.")
    if native and (image_size is not None or max_size is not None):
        raise ConfigError("native keeps each image's own size; leave image_size and max_size out.")
    check_options(
        image_size=image_size, max_size=max_size, scales=scales, window=window, stride=stride, batch_size=batch_size
    )
