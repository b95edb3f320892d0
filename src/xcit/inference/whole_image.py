"""A whole image for a model to look at, at a size that fits its patches: nothing is cropped."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xcit.data.images import convert_image
from xcit.data.preprocess import INTERPOLATIONS, Preprocessing
from xcit.errors import ConfigError

MAX_PIXELS = 1024 * 1024
"""Larger images are scaled down to this many, unless their own size is asked for by name."""

MAX_PICTURE = 4 * MAX_PIXELS
"""Pictures that are drawn of larger images have so many pixels."""

Size = Literal["original"] | int | tuple[int, int] | None
"""What size an image is looked at; see ``WholeImage``."""


@dataclass(frozen=True)
class WholeImage:
    """Prepares whole images, of any proportions, for a model.

    Args:
        preprocessing: the model's own; its interpolation, mean and standard deviation are used.
        patch_size: of the model, in pixels; heights and widths are rounded to multiples of it, at least one.
        size: None for each image's own size, within limits: one whose shorter side is below that of the model's
            preprocessing is enlarged to it, one of more than ``MAX_PIXELS`` is scaled down to so many. "original" for
            its own size whatever it is, a number for the shorter side in pixels, (H, W) for that very size, whatever
            it does to the proportions.

    Raises:
        ConfigError: the size is less than one patch.
    """

    preprocessing: Preprocessing
    patch_size: int
    size: Size = None

    def __post_init__(self) -> None:
        if self.size is None or self.size == "original":
            return
        sides = (self.size,) if isinstance(self.size, int) else tuple(self.size)
        if min(sides) < self.patch_size:
            shown = " x ".join(map(str, sides))
            raise ConfigError(f"size is {shown} px; it must be at least one patch, which is {self.patch_size} px.")

    def seen_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width at which the model sees an image of this size."""
        rows: float
        columns: float
        if isinstance(self.size, tuple):
            rows, columns = self.size
        else:
            if self.size is None:
                least = min(self.preprocessing.image_size)
                scale = max(1.0, least / min(height, width))
                scale = min(scale, math.sqrt(MAX_PIXELS / (height * width)))
            else:
                scale = 1.0 if self.size == "original" else self.size / min(height, width)
            rows, columns = height * scale, width * scale
        patch = self.patch_size
        return max(1, round(rows / patch)) * patch, max(1, round(columns / patch)) * patch

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of pictures of an image of this size: its own, within limits.

        At most ``MAX_PICTURE`` pixels (unless the size is "original"), and not fewer than the model sees.
        """
        seen = self.seen_size(height, width)
        if height * width < seen[0] * seen[1]:
            return seen
        scale = 1.0 if self.size == "original" else min(1.0, math.sqrt(MAX_PICTURE / (height * width)))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def shown(self, image: Image.Image) -> Image.Image:
        """Return an RGB image at its ``shown_size``."""
        size = self.shown_size(image.height, image.width)[::-1]
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image) -> Float[Tensor, "chans height width"]:
        """Return the image as the model takes it.

        Raises:
            DataError: the image's mode or values have no one reading.
        """
        image = convert_image(image, self.preprocessing.in_chans)
        seen = self.seen_size(image.height, image.width)
        resized = image.resize(seen[::-1], INTERPOLATIONS[self.preprocessing.interpolation])
        return replace(self.preprocessing, image_size=seen, crop_pct=1.0)(resized)
