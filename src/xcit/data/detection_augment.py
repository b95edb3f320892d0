"""How images with instances are distorted for training a detector: mirrored, scaled, cropped, recoloured.

Source: the released detection configurations: one of two policies an image, either a random scale, or a random scale,
a crop and another random scale; both behind a mirroring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter

from xcit.ops.image_size import scaled_size


class Example(NamedTuple):
    """An image and the instances in it."""

    image: Float[Tensor, "chans height width"]
    """Values 0 to 1."""
    boxes: Float[Tensor, "instances 4"]
    """x0, y0, x1, y1 in pixels."""
    labels: Int64[Tensor, " instances"]
    """Classes from 1; 0 is background."""
    masks: UInt8[Tensor, "instances height width"] | None
    """0 or 1; None in a set without masks."""


@dataclass(frozen=True)
class DetectionAugment:
    """What is drawn for an image. torch's global generator draws.

    Attributes:
        short_sides: lengths in pixels, one of which the shorter side gets.
        max_size: the longer side has at most so many pixels.
        hflip: probability of mirroring left and right.
        crop_prob: probability of the second policy, which crops between two scalings.
        crop_short_sides: lengths of the shorter side before the crop.
        crop_range: least and most side of the crop, as far as the image reaches.
        jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        hue: largest turn of the colour circle.
        invert: probability of the negative, where dark on bright and bright on dark mean the same.
    """

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int = 1333
    hflip: float = 0.5
    crop_prob: float = 0.5
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    jitter: float = 0.0
    hue: float = 0.0
    invert: float = 0.0

    def __call__(self, example: Example) -> Example:
        """Return the image distorted; instances of which the crop leaves nothing are dropped."""
        if _drawn(self.hflip):
            example = mirrored(example)
        if _drawn(self.crop_prob):
            example = scaled(example, _one_of(self.crop_short_sides), self.max_size)
            example = cropped(example, *self._window(*example.image.shape[1:]))
        example = scaled(example, _one_of(self.short_sides), self.max_size)
        image = example.image
        if self.jitter or self.hue:
            j = self.jitter
            image = ColorJitter(brightness=j, contrast=j, saturation=j, hue=self.hue)(image)
        if _drawn(self.invert):
            image = 1 - image
        return example._replace(image=image)

    def _window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw the crop: y0, x0, height, width."""
        h, w = (_between(min(side, self.crop_range[0]), min(side, self.crop_range[1])) for side in (height, width))
        return _between(0, height - h), _between(0, width - w), h, w


def mirrored(example: Example) -> Example:
    """Return the example mirrored left and right."""
    image, boxes, labels, masks = example
    x0, y0, x1, y1 = boxes.unbind(1)
    width = image.shape[2]
    boxes = torch.stack((width - x1, y0, width - x0, y1), dim=1)
    return Example(image.flip(2), boxes, labels, None if masks is None else masks.flip(2))


def scaled(example: Example, short_side: int, max_size: int) -> Example:
    """Return the example scaled so that its shorter side has so many pixels, its longer at most ``max_size``.

    Images bilinearly, masks by the nearest pixel, as mmdetection does.
    """
    image, boxes, labels, masks = example
    H, W = image.shape[1:]
    size = scaled_size(H, W, short_side, max_size)
    if size == (H, W):
        return example
    image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    ratio = torch.tensor([size[1] / W, size[0] / H] * 2, dtype=boxes.dtype)
    if masks is not None:
        masks = F.interpolate(masks[:, None], size, mode="nearest")[:, 0] if len(masks) else masks.new_zeros((0, *size))
    return Example(image, boxes * ratio, labels, masks)


def cropped(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """Return a window of the example: boxes are shifted and cut, and dropped where nothing of them is left."""
    image, boxes, labels, masks = example
    inside = slice(top, top + height), slice(left, left + width)
    limit = torch.tensor([width, height] * 2, dtype=boxes.dtype)
    boxes = (boxes - torch.tensor([left, top] * 2, dtype=boxes.dtype)).clamp(min=0).minimum(limit)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Example(
        image[:, inside[0], inside[1]],
        boxes[kept],
        labels[kept],
        None if masks is None else masks[kept][:, inside[0], inside[1]],
    )


def _drawn(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _one_of(values: tuple[int, ...]) -> int:
    return values[_between(0, len(values) - 1)]


def to_pixels(image: np.ndarray) -> Float[Tensor, "chans height width"]:
    """Return (H, W, 3) uint8 as a tensor of values 0 to 1."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255
