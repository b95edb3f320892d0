"""A detector in use: images of any sizes in, instances out, in bounded memory.

An image is read in a thread ahead of the model, scaled to the size at which the model looks, found instances in, and
comes out as ``Detections`` in its own pixels, in the order in which it went in.

Scaling: as the model says. The released ones make the shorter side 800 pixels, the longer at most 1333; a photo of
12,000 x 9,000 is looked at as 1067 x 800, one of 3 x 5 is enlarged. Of a large image only the pixels that its smaller
version is made of are converted to numbers.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xcit.data.images import array_to_image, check_channels, convert_image, open_image
from xcit.data.labels import class_names
from xcit.errors import CheckpointError, ConfigError, DataError, UnknownNameError, XCiTError
from xcit.inference.detections import Detections
from xcit.inference.devices import choose_device, is_out_of_memory
from xcit.inference.room import Room
from xcit.inference.stream import DECODERS, Source, ahead, each, evaluating
from xcit.models.detectors import create_detector
from xcit.models.download import is_url
from xcit.models.factory import create_model
from xcit.models.mask_rcnn import SIZE_DIVISIBLE, MaskRCNN
from xcit.models.weights import refuse_not_finite
from xcit.ops.image_size import scaled_size

SCORE = 0.5
"""Detections that are less sure are dropped where nothing else is said: what suits looking at pictures. Average
precision is measured from 0.05 on."""
OTHERS = "*"
"""Stands, among thresholds of classes, for every class that is not named."""
PIXELS_A_BATCH = 4 * 800 * 1333
"""Where no batch size is given, as many images go into a batch on a graphics card as have this many pixels together."""
STRIP = 2**20
"""Pixels of an image that are converted at once."""
AT_MOST = 32
"""Images in such a batch."""

Opener = Callable[[Path], Image.Image]
"""Reads an image file; raises DataError if it cannot."""


class _Item(NamedTuple):
    """One image on its way: scaled, or with the reason why it could not be."""

    path: Path | None
    name: str
    tensor: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    error: str | None = None


class Detector:
    """Find instances in images with a Mask R-CNN on an XCiT.

    Args:
        model: the path of a detector's file (``save_detector``), a released detector's name
            (``maskrcnn_xcit_small_12_p16``, or its architecture's), or a ``MaskRCNN`` itself, which stays the caller's:
            it is used where it lies, and left in the mode and with the settings that it had.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". For a model that is passed, "auto" is the device it is on.
        batch_size: images that go through the model at once, 1 on the CPU if None, else 4 of 800 x 1333 pixels or as
            many as have so many together. Only images of the same size after padding share a batch, so that what is
            found in one does not depend on its neighbours.
        score_threshold: detections are kept if their score is above this, for all classes or by class name; ``"*"``
            then stands for the classes that are not named, which otherwise have 0.5.
        max_detections: in an image; None for as many as the model says (100 in the released ones). They are the best
            above the lowest threshold; those below their own class's are then dropped.
        min_size: images are scaled so that the shorter side has so many pixels,
        max_size: and the longer at most so many. If one of the two is given, the other follows in the model's
            proportion; if none is, the model decides. Larger than trained at finds smaller things and may miss large
            ones.

    Attributes:
        model: the model.
        device: where it runs.
        class_names: one name a class.
        category_ids: one number a class for COCO's results: 1 to 90, with gaps, for COCO's own classes, else 1 to K.
        has_masks: whether it finds masks too.
        batch_size: images in a batch.
        min_size: in effect.
        max_size: likewise.
        thresholds: (K,) float32, of the score, by class.
        max_detections: in effect.

    Raises:
        UnknownNameError: no such model, or a threshold for a class that it does not know.
        CheckpointError: its weights cannot be had, are not those of a detector, or are not finite.
        ConfigError: an argument out of its range, or one that does not fit the model.
        BackendError: the device is not available here.

    Example:
        >>> detector = xcit.Detector("runs/digits/detector.safetensors", score_threshold={"7": 0.3})
        >>> (found,) = detector("scene.png")
        >>> found.names, found.boxes, found.mask(0)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str = "auto",
        batch_size: int | None = None,
        score_threshold: float | Mapping[str, float] = SCORE,
        max_detections: int | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> None:
        _check(batch_size, score_threshold, max_detections, min_size, max_size)
        if isinstance(model, nn.Module):
            if not isinstance(model, MaskRCNN):
                raise ConfigError(
                    f"Expected a MaskRCNN, got {type(model).__name__}; create_detector builds one, Predictor takes "
                    f"classifiers."
                )
            self.model = model
            self.device = _device_of(model, device)
            refuse_not_finite(model.state_dict(), "The model", "it finds nothing; training has diverged")
        else:
            self.device = choose_device(device)  # before a download that could turn out useless
            self.model = _load(os.fspath(model)).eval().to(self.device)
        self._in_chans = len(self.model.transform.mean)
        check_channels(self._in_chans)
        self.has_masks = bool(self.model.roi_heads.has_mask())
        self.class_names, self.category_ids = _classes(self.model)
        self.thresholds = _thresholds(score_threshold, self.class_names)
        self.max_detections = int(max_detections or self.model.roi_heads.detections_per_img)
        self.min_size, self.max_size = _sides(self.model.transform, min_size, max_size)
        fitting = 1 if self.device.type == "cpu" else PIXELS_A_BATCH // (self.min_size * self.max_size)
        self.batch_size = batch_size or min(AT_MOST, max(1, fitting))
        self._room, self._is_tight = Room(self.model), False

    def __call__(self, images: Source | Iterable[Source]) -> list[Detections]:
        """Return what is found in each image.

        Args:
            images: a file, a folder or a pattern (see ``find_images``), a Pillow image, an array (see
                ``array_to_image``), or any number of these.

        Returns:
            Detections in the images' order. An image that could not be looked at has ``error`` set instead of raising.

        Raises:
            ConfigError: an object that is no image, or a batch that does not fit in memory; the message then says which
                does.
            DataError: an empty folder or a pattern without a match.
        """
        return list(self.stream(images))

    def stream(self, images: Source | Iterable[Source], *, opener: Opener | None = None) -> Iterator[Detections]:
        """Yield the detections of ``__call__`` as they are made.

        ``images`` is read as far ahead as two batches and a few images, so that it may be endless.

        Args:
            images: see ``__call__``.
            opener: reads files instead of ``open_image``, such as one that turns images as their annotations have them;
                called from several threads.
        """
        waiting: list[_Item] = []
        num_tensors = 0
        with evaluating(self.model):  # if there is room for the largest image that there can be, none is looked at
            self._is_tight = (
                self._room.lack(self._levels, 1, self._in_chans, (self.min_size, self.max_size)) is not None
            )
        prepare: Any = partial(self._prepare, opener or partial(open_image, in_chans=self._in_chans))
        items: Iterator[Any] = ahead(prepare, each(images), self.batch_size + DECODERS)
        for item in items:
            waiting.append(item)
            num_tensors += item.tensor is not None
            if num_tensors == self.batch_size:
                yield from self._found(waiting)
                waiting, num_tensors = [], 0
        if waiting:
            yield from self._found(waiting)

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
            size = image.height, image.width
            scaled = scaled_size(*size, self.min_size, self.max_size)
            if self._is_tight:  # scaling it would take memory already
                self._check_room(1, scaled)
            return _Item(path, name, to_tensor(image, scaled), size)
        except DataError as error:
            return _Item(path, name, error=str(error) if path else f"{name}: {error}")
        except MemoryError:
            return _Item(path, name, error=f"{name}: is too large for the memory there is; scale it down first.")

    def _detections(self, item: _Item, found: dict[str, Tensor], is_finite: bool) -> Detections:
        if not is_finite:
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            return Detections(
                item.path,
                error=f"{item.name}: the model's features are NaN or infinite, though its weights are finite: "
                f"something overflows in {dtype}; use a wider type.",
            )
        assert item.tensor is not None
        values = {key: value.cpu().numpy() for key, value in found.items()}
        kept = values["scores"] > self.thresholds[values["labels"] - 1]
        labels = values["labels"][kept] - 1
        (H, W), (h, w) = item.size, item.tensor.shape[1:]
        boxes = values["boxes"][kept].astype(np.float32) * np.array([W / w, H / h, W / w, H / h], np.float32)
        return Detections(
            item.path,
            item.size,
            boxes.clip(0, np.array([W, H, W, H], np.float32)),
            labels,
            [self.class_names[label] for label in labels],
            values["scores"][kept].astype(np.float32),
            values["masks"][kept, 0].astype(np.float32) if self.has_masks else None,
        )

    # --- a batch ------------------------------------------------------------------------------------------------------

    def _found(self, items: list[_Item]) -> Iterator[Detections]:
        """Yield what is in some items; those that have the same size when padded go through the model together."""
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, item in enumerate(items):
            if item.tensor is not None:
                alike[tuple(math.ceil(side / SIZE_DIVISIBLE) for side in item.tensor.shape[1:])].append(i)
        found: dict[int, Detections] = {}
        for group in alike.values():
            tensors = [tensor for i in group if (tensor := items[i].tensor) is not None]
            for i, (raw, is_finite) in zip(group, self._forward(tensors), strict=True):
                found[i] = self._detections(items[i], raw, is_finite)
        for i, item in enumerate(items):
            yield found[i] if i in found else Detections(item.path, error=item.error)

    def _forward(self, tensors: list[Tensor]) -> list[tuple[dict[str, Tensor], bool]]:
        if len(tensors) > 1:
            with evaluating(self.model):
                self._check_room(len(tensors), (int(tensors[0].shape[1]), int(tensors[0].shape[2])))
        try:
            return self._run(tensors, self.min_size, self.max_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # outside of the handler: the error's traceback would keep the failed batch's memory
        raise ConfigError(self._what_fits(tensors))

    def _run(self, tensors: list[Tensor], min_size: int, max_size: int) -> list[tuple[dict[str, Tensor], bool]]:
        """Return what the model finds in images that are scaled already, and whether its features are finite."""
        dtype = next(self.model.parameters()).dtype
        finite: list[bool] = []

        def look(module: nn.Module, inputs: Any, levels: dict[str, Tensor]) -> None:
            finite.extend(torch.stack([x.isfinite().flatten(1).all(1) for x in levels.values()]).all(0).tolist())

        hook = self.model.backbone.register_forward_hook(look)
        try:
            with torch.inference_mode(), evaluating(self.model), self._settings(min_size, max_size):
                found = self.model.detect([tensor.to(self.device, dtype) for tensor in tensors])
        finally:
            hook.remove()
        return list(zip(found, finite, strict=True))

    @contextmanager
    def _settings(self, min_size: int, max_size: int) -> Iterator[None]:
        """Let the model look at this size and drop no more than this detector does, then as it did before."""
        transform, heads = self.model.transform, self.model.roi_heads
        former = transform.min_size, transform.max_size, heads.score_thresh, heads.detections_per_img
        transform.min_size, transform.max_size = min_size, max_size
        heads.score_thresh, heads.detections_per_img = float(self.thresholds.min()), self.max_detections
        try:
            yield
        finally:
            transform.min_size, transform.max_size, heads.score_thresh, heads.detections_per_img = former

    # --- memory -------------------------------------------------------------------------------------------------------

    def _levels(self, images: Tensor) -> object:
        """Run what takes the most memory: all before the proposals, whose number is bounded."""
        return self.model.rpn.head(list(self.model.backbone(images).values()))

    def _check_room(self, num_images: int, size: tuple[int, int]) -> None:
        """Refuse what the memory would not hold: a system that is asked for too much does not say so, it kills.

        Raises:
            ConfigError: with how much it would take, how much there is, and what would fit.
        """
        padded = (
            math.ceil(size[0] / SIZE_DIVISIBLE) * SIZE_DIVISIBLE,
            math.ceil(size[1] / SIZE_DIVISIBLE) * SIZE_DIVISIBLE,
        )
        lack = self._room.lack(self._levels, num_images, self._in_chans, padded)
        if lack is None:
            return
        H, W = size
        images = f"An image of {H} x {W} px" if num_images == 1 else f"{num_images} images of {H} x {W} px at once"
        takes = f"{images} would take {lack}"
        fit = math.floor(num_images * lack.available / lack.needed)
        if fit:
            raise ConfigError(f"{takes}: use batch_size={fit} (--batch-size) or less.")
        scale = math.sqrt(num_images * lack.available / lack.needed)
        short = math.floor(min(H, W) * scale) // SIZE_DIVISIBLE * SIZE_DIVISIBLE
        if short < SIZE_DIVISIBLE:
            raise ConfigError(f"{takes}, and not even the smallest size fits. Use a smaller model or another device.")
        raise ConfigError(f"{takes}: use min_size={short} (--min-size) or less.")

    def _what_fits(self, tensors: list[Tensor]) -> str:
        """Say what does fit in memory, by trying: halves of the batch first, then halves of the images' sides."""
        count, (H, W) = len(tensors), tensors[0].shape[1:]
        failed = f"Out of memory on {self.device} with {count} {'image' if count == 1 else 'images'} of {H} x {W} px"
        while count > 1:
            count //= 2
            if self._fits(tensors[:count], self.min_size, self.max_size):
                return f"{failed} at once; {count} fit (tried just now): use batch_size={count} (--batch-size)."
        low, high = self.min_size, self.max_size
        while min(low, high) // 2 >= SIZE_DIVISIBLE:
            low, high = low // 2, high // 2
            smaller = F.interpolate(tensors[0][None], scaled_size(H, W, low, high))[0]
            if self._fits([smaller], low, high):
                return f"{failed}; min_size={low} (--min-size) fits (tried just now)."
        return f"{failed}; not even the smallest size fits. Use a smaller model or another device."

    def _fits(self, tensors: list[Tensor], min_size: int, max_size: int) -> bool:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._run(tensors, min_size, max_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return an image scaled bilinearly, (C, h, w) float32 from 0 to 1.

    The same as ``F.interpolate`` of the whole image (``align_corners=False``, no antialiasing: that is how the released
    detectors were trained), but only the four neighbours of each new pixel are converted to floating point.

    Args:
        image: of mode "RGB" or "L".
        size: h, w.
    """
    (above, below, y), (left, right, x) = (
        _neighbours(old, new) for old, new in ((image.height, size[0]), (image.width, size[1]))
    )
    x, y = x[:, None], y[:, None, None]
    scaled = np.empty((*size, len(image.getbands())), np.float32)
    # A strip of the image after the other: as an array, all of it would be in memory a second time.
    step = max(1, STRIP * size[0] // (image.width * image.height))
    for start in range(0, size[0], step):
        rows = slice(start, start + step)
        top, bottom = int(above[start]), int(below[rows][-1]) + 1
        strip = np.asarray(image.crop((0, top, image.width, bottom)))
        strip = strip[..., None] if strip.ndim == 2 else strip
        upper, lower = strip[above[rows] - top], strip[below[rows] - top]
        scaled[rows] = (1 - y[rows]) * ((1 - x) * upper[:, left] + x * upper[:, right])
        scaled[rows] += y[rows] * ((1 - x) * lower[:, left] + x * lower[:, right])
    return torch.from_numpy(scaled).permute(2, 0, 1) / 255


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each place of a scaled side, the two between which it lies and the share of the second."""
    place = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    first = np.floor(place).astype(np.int64)
    return first, np.minimum(first + 1, old - 1), (place - first).astype(np.float32)


# --- models and arguments ---------------------------------------------------------------------------------------------


def coco_categories() -> dict[int, str]:
    """Return COCO's 80 categories of things, by their ids, 1 to 90 with gaps.

    Source: the metadata that torchvision publishes with its detection weights.
    """
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(names) if name not in ("__background__", "N/A")}


def _load(name: str) -> MaskRCNN:
    if not (Path(name).suffix or "/" in name or os.sep in name or is_url(name)):
        return create_detector(name, pretrained=True)
    try:
        return create_detector(name)
    except CheckpointError:
        if not _is_backbone(name):
            raise
    raise CheckpointError(
        f"{name} is a classifier or a backbone, not a detector: xcit predict uses it, and create_detector("
        f"ARCHITECTURE, backbone={name!r}) begins a detector with it, to be trained."
    )


def _device_of(model: nn.Module, asked: str) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ConfigError("The model is on the meta device: it has shapes but no weights to find anything with.")
    if asked != "auto" and choose_device(asked) != device and asked != device.type:
        raise ConfigError(f"The model is on {device}, not on {asked}; move it first, with model.to({asked!r}).")
    return device


def _is_backbone(name: str) -> bool:
    try:
        create_model(name, pretrained=True)
    except XCiTError:
        return False
    return True


def _classes(model: MaskRCNN) -> tuple[list[str], list[int]]:
    cfg = model.pretrained_cfg
    if cfg.get("label_set") == "coco" and not cfg.get("class_names") and model.num_classes == 80:
        categories = coco_categories()
        return list(categories.values()), list(categories)
    return class_names(cfg, model.num_classes), list(range(1, model.num_classes + 1))


def _thresholds(given: float | Mapping[str, float], names: list[str]) -> np.ndarray:
    """Return the threshold of each class; classes of one name share theirs."""
    if not isinstance(given, Mapping):
        return np.full(len(names), given, np.float32)
    for name in given:
        if name not in names and name != OTHERS:
            raise UnknownNameError("class", name, names, f"The model knows {_listed(names)}.")
    return np.array([given.get(name, given.get(OTHERS, SCORE)) for name in names], np.float32)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _sides(transform: Any, min_size: int | None, max_size: int | None) -> tuple[int, int]:
    proportion = transform.max_size / transform.min_size
    if min_size is None and max_size is None:
        return transform.min_size, transform.max_size
    if min_size is None:
        assert max_size is not None
        return max(SIZE_DIVISIBLE, round(max_size / proportion)), max_size
    return min_size, max_size or round(min_size * proportion)


def _check(
    batch_size: int | None,
    score_threshold: float | Mapping[str, float],
    max_detections: int | None,
    min_size: int | None,
    max_size: int | None,
) -> None:
    counts = {"batch_size": (batch_size, 1), "max_detections": (max_detections, 1)}
    counts |= {"min_size": (min_size, SIZE_DIVISIBLE), "max_size": (max_size, SIZE_DIVISIBLE)}
    problems = [
        f"{name} is {value}; it must be {least} or more"
        for name, (value, least) in counts.items()
        if value is not None and value < least
    ]
    by_class = score_threshold if isinstance(score_threshold, Mapping) else {"": score_threshold}
    problems += [
        f"score_threshold{f' of {name!r}' if name else ''} is {value}; it must be between 0 and 1"
        for name, value in by_class.items()
        if not 0 <= value <= 1
    ]
    if min_size is not None and max_size is not None and max_size < min_size:
        problems.append(f"max_size is {max_size}, less than min_size, {min_size}")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
