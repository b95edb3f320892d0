"""From a Pillow image to the tensor that a classifier was evaluated with: resize, centre crop, scale, normalise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xcit.data.images import convert_image
from xcit.errors import ConfigError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

REACH = 3
"""Pixels on each side that the widest of the filters (lanczos) looks at, in units of the coarser grid."""

EXTREME = 32
"""When the resized image would have more than this many times the pixels of the crop, only the crop is resized."""


@dataclass(frozen=True)
class Preprocessing:
    """What the weights expect of an image.

    The image is resized, keeping its proportions, until it just covers ``image_size / crop_pct`` (rounded down);
    its centre of ``image_size`` is cut out, scaled to 0..1, and normalised. A small image is enlarged. For a square
    size this is torchvision's ``Resize(side / crop_pct)``, ``CenterCrop``, ``ToTensor``, ``Normalize`` on Pillow
    images, bit for bit.

    Of an image whose resized form would have more than ``EXTREME`` times the pixels of the crop (a strip of 20,000 x
    30 at 224 pixels: 100 MB) the source region of the crop alone is resized. The result is the same up to rounding;
    more can differ where the filter overshoots black or white, since Pillow clips between its two passes and takes
    the cheaper one first.

    Args:
        image_size: height and width in pixels of what the model gets.
        mean: subtracted per channel, in units of the 0..1 scale.
        std: divided by, per channel, in the same units.
        interpolation: one of ``INTERPOLATIONS``; all but "nearest" are antialiased.
        crop_pct: side of the crop as a fraction of the resized image's, in (0, 1].
        in_chans: 3 for RGB, 1 for grey.

    Raises:
        ConfigError: a value out of its range; all are named at once.

    Source: evaluation transforms of the released code (full crop, bicubic); the keys' meanings are timm's.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    in_chans: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(int(side) for side in self.image_size))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        problems = []
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            problems.append(f"image_size is {self.image_size}; it must be a height and a width of 1 or more")
        if self.in_chans not in (1, 3):
            problems.append(f"in_chans is {self.in_chans}; images are prepared as RGB (3) or grey (1) only")
        elif len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            problems.append(
                f"mean has {len(self.mean)} and std {len(self.std)} values; both need {self.in_chans}, one a channel"
            )
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            problems.append(f"std is {self.std}; it must be more than 0")
        if self.interpolation not in INTERPOLATIONS:
            problems.append(f"interpolation is {self.interpolation!r}; it must be one of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.crop_pct <= 1:
            problems.append(f"crop_pct is {self.crop_pct}; it must be more than 0 and at most 1")
        if problems:
            raise ConfigError("; ".join(problems) + ".")

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """Read the preprocessing out of a model's ``pretrained_cfg``.

        Args:
            cfg: with the keys ``input_size`` [C, H, W], ``mean``, ``std``, and optionally ``interpolation`` (bicubic)
                and ``crop_pct`` (1.0); others are not looked at.

        Raises:
            ConfigError: a key is missing, or a value cannot be used.
        """
        missing = [key for key in ("input_size", "mean", "std") if not cfg.get(key)]
        if missing:
            raise ConfigError(
                f"The model does not say what images it expects ({', '.join(missing)} missing from pretrained_cfg); "
                f"give a Preprocessing yourself, or save the model with one."
            )
        try:
            in_chans, height, width = cfg["input_size"]
        except (TypeError, ValueError):
            raise ConfigError(f"input_size is {cfg['input_size']!r}; it must be channels, height, width.") from None
        return cls(
            image_size=(height, width),
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation=cfg.get("interpolation") or "bicubic",
            crop_pct=cfg.get("crop_pct") or 1.0,
            in_chans=in_chans,
        )

    def to_cfg(self) -> dict[str, Any]:
        """Return the keys that ``from_cfg`` reads, as plain lists and numbers."""
        return {
            "input_size": [self.in_chans, *self.image_size],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }

    def __call__(self, image: Image.Image) -> Float[Tensor, "chans height width"]:
        """Return the image as the model takes it.

        Args:
            image: of any size and mode; what is not "RGB" (or "L") yet is converted by ``convert_image``.

        Returns:
            Normalised float32, (in_chans, *image_size).

        Raises:
            DataError: the image cannot be converted.
        """
        pixels = np.array(self.resize_and_crop(convert_image(image, self.in_chans)), dtype=np.uint8)
        pixels = pixels.reshape(*self.image_size, self.in_chans)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        mean = torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1)
        return tensor.sub_(mean).div_(std)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Return the part of the image that the model sees, at the model's size, before normalisation."""
        H, W = self.image_size
        resample = INTERPOLATIONS[self.interpolation]
        height, width = self._resized(image.height, image.width)
        top, left = round((height - H) / 2), round((width - W) / 2)
        if height * width <= EXTREME * H * W:
            # Image.resize returns a copy even where nothing changes, as torchvision's does.
            return image.resize((width, height), resample).crop((left, top, left + W, top + H))
        return self._resize_region(image, (height, width), (top, left))

    def _resize_region(self, image: Image.Image, resized: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
        """Compute, of the image as if resized, the crop at that corner alone."""
        box, outer = [0.0] * 4, [0] * 4
        for axis, (source, full, first, side) in enumerate(
            zip(image.size, resized[::-1], corner[::-1], self.image_size[::-1], strict=True)
        ):
            scale = source / full  # source pixels a resized one
            start, stop = first * scale, (first + side) * scale
            reach = math.ceil(REACH * max(scale, 1)) + 1  # neighbours that the filter looks at
            outer[axis], outer[axis + 2] = max(0, math.floor(start) - reach), min(source, math.ceil(stop) + reach)
            # Pillow holds a box in float32, whose rounding would shift the picture if it counted from a far corner.
            box[axis], box[axis + 2] = start - outer[axis], min(stop, source) - outer[axis]
        region = image.crop((outer[0], outer[1], outer[2], outer[3]))
        return region.resize(
            self.image_size[::-1], INTERPOLATIONS[self.interpolation], box=(box[0], box[1], box[2], box[3])
        )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size at which an image just covers the crop's surroundings, its longer side rounded down."""
        H, W = (math.floor(side / self.crop_pct) for side in self.image_size)
        if H * width <= W * height:  # the width decides
            return max(H, int(W * height / width)), W
        return H, max(W, int(H * width / height))
