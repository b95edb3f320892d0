"""How an image and its mask are distorted for training a segmenter: scaled, cropped, mirrored, recoloured, padded.

Source: the released segmentation configurations, whose steps are mmsegmentation 0.11's. One thing is finer here:
colours stay real numbers once the image is scaled, where those are rounded to 8 bits between the steps, and hues to 2
degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from xcit.data.mask_files import IGNORE
from xcit.errors import ConfigError
from xcit.ops.image_size import scaled_size

NUM_TRIES = 10
"""Crops that are looked at before one is taken unseen."""


@dataclass(frozen=True)
class SegmentationAugment:
    """What is drawn for an image and its mask. torch's global generator draws.

    Attributes:
        crop_size: height and width of what comes out. An image that is smaller after scaling is padded below and on the
            right, with zeros after it is normalised, its mask with ``IGNORE``.
        short_side: length in pixels of the shorter side, before the ratio.
        max_size: the longer side has at most so many pixels, likewise.
        ratio_range: least and most ratio by which both lengths are multiplied.
        cat_max_ratio: a crop in which one class has this share of the pixels that are not ignored, or more, is drawn
            again, up to ``NUM_TRIES`` times; 1 takes the first.
        hflip: probability of mirroring left and right.
        distort: probability of each of the four changes of colour.
        brightness: largest change of the values 0 to 1.
        contrast: largest relative change of the values; before the other changes of colour, or after them.
        saturation: largest relative change of the saturation in HSV.
        hue: largest turn of the colour circle, in turns.
        invert: probability of the negative, where dark on bright and bright on dark mean the same.
        mean: of each channel, which is taken off at the end, for values 0 to 1.
        std: of each channel, by which it is divided then.

    Raises:
        ConfigError: numbers out of their range.
    """

    crop_size: tuple[int, int] = (512, 512)
    short_side: int = 512
    max_size: int = 2048
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    distort: float = 0.5
    brightness: float = 32 / 255
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 18 / 180
    invert: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        low, high = self.ratio_range
        problems = [
            f"{name} is {getattr(self, name)}; it must be {expected}"
            for name, fits, expected in (
                ("crop_size", min(self.crop_size) >= 1, "1 or more"),
                ("short_side", int(self.short_side * low) >= 2, "2 or more after the smallest ratio"),
                ("max_size", self.max_size >= self.short_side, f"short_side, which is {self.short_side}, or more"),
                ("ratio_range", 0 < low <= high, "two numbers above 0, the smaller first"),
                *((name, 0 <= getattr(self, name) <= 1, "from 0 to 1") for name in _SHARES),
                ("hue", 0 <= self.hue <= 0.5, "from 0 to 0.5"),
                ("std", min(self.std) > 0, "above 0"),
            )
            if not fits
        ]
        if problems:
            raise ConfigError("; ".join(problems) + ".")

    def __call__(
        self, image: UInt8[Tensor, "3 height width"], mask: Int[Tensor, "height width"]
    ) -> tuple[Float[Tensor, "3 crop_height crop_width"], Int64[Tensor, "crop_height crop_width"]]:
        """Return image and mask distorted, the image normalised.

        Args:
            image: values 0 to 255.
            mask: classes from 0, or ``IGNORE``.
        """
        ratio = _uniform(*self.ratio_range)
        H, W = image.shape[1:]
        size = scaled_size(H, W, int(self.short_side * ratio), int(self.max_size * ratio))
        scaled, classes = scaled_image(image, size), scaled_mask(mask, size)
        rows, columns = self._window(classes)
        pixels, classes = scaled[:, rows, columns].float() / 255, classes[rows, columns].long()
        if _drawn(self.hflip):
            pixels, classes = pixels.flip(2), classes.flip(1)
        pixels = self._recoloured(pixels)
        if _drawn(self.invert):
            pixels = 1 - pixels
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return _padded((pixels - mean) / std, self.crop_size, 0.0), _padded(classes, self.crop_size, IGNORE)

    def _window(self, classes: Tensor) -> tuple[slice, slice]:
        """Draw the crop from a scaled mask: its rows and its columns."""
        window = self._any_window(classes)
        if self.cat_max_ratio < 1:
            for _ in range(NUM_TRIES):
                if varied(classes[window], self.cat_max_ratio):
                    break
                window = self._any_window(classes)
        return window

    def _any_window(self, classes: Tensor) -> tuple[slice, slice]:
        (H, W), (height, width) = classes.shape, self.crop_size
        top, left = _between(0, max(0, H - height)), _between(0, max(0, W - width))
        return slice(top, top + height), slice(left, left + width)  # which end where the image does

    def _recoloured(self, image: Tensor) -> Tensor:
        """Return the image with its colours changed: values 0 to 1, as they came."""
        if self.brightness and _drawn(self.distort):
            image = (image + _uniform(-self.brightness, self.brightness)).clamp(0, 1)
        contrast = None
        if self.contrast and _drawn(self.distort):
            contrast = _uniform(1 - self.contrast, 1 + self.contrast)
        first = _drawn(0.5)
        if contrast is not None and first:
            image = (image * contrast).clamp(0, 1)
        if self.saturation and _drawn(self.distort):
            image = saturated(image, _uniform(1 - self.saturation, 1 + self.saturation))
        if self.hue and _drawn(self.distort):
            image = turned(image, _uniform(-self.hue, self.hue))
        if contrast is not None and not first:
            image = (image * contrast).clamp(0, 1)
        return image


_SHARES = ("cat_max_ratio", "hflip", "distort", "brightness", "contrast", "saturation", "invert")


def scaled_image(image: UInt8[Tensor, "chans height width"], size: tuple[int, int]) -> UInt8[Tensor, "chans h w"]:
    """Return the image scaled bilinearly to a height and width, without smoothing it before, as OpenCV does."""
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def scaled_mask(mask: Int[Tensor, "height width"], size: tuple[int, int]) -> Int[Tensor, "h w"]:
    """Return the mask scaled to a height and width by the nearest pixel, as OpenCV takes it: rounded down."""
    rows, columns = (torch.arange(new) * old // new for old, new in zip(mask.shape, size, strict=True))
    return mask.index_select(0, rows).index_select(1, columns)


def varied(classes: Int[Tensor, "height width"], max_ratio: float) -> bool:
    """Return whether there are two classes or more, of which the largest has less than this share of the pixels.

    Ignored pixels do not count.
    """
    counts = torch.bincount((classes - IGNORE).flatten())[1:]  # without the first, which counts the ignored
    return int((counts > 0).sum()) > 1 and int(counts.max()) / int(counts.sum()) < max_ratio


def saturated(image: Float[Tensor, "3 height width"], factor: float) -> Float[Tensor, "3 height width"]:
    """Return the image with its saturation in HSV multiplied, up to 1; hue and value stay.

    With V = max(R, G, B) and S = 1 − min(R, G, B) / V, a channel is V · (1 − S · t), where t is a matter of the hue
    alone.
    """
    value = image.amax(0)
    spread = value - image.amin(0)  # V · S
    # V · min(S · factor, 1) over V · S; a grey pixel has no distance from its value, whatever that is
    limit = torch.where(spread > 0, value / spread.clamp(min=1e-12), 1.0)
    return value - (value - image) * limit.clamp(max=factor)


def turned(image: Float[Tensor, "3 height width"], turns: float) -> Float[Tensor, "3 height width"]:
    """Return the image with its hue in HSV turned; saturation and value stay.

    With H from 0 to 6 (red, yellow, green, cyan, blue, magenta) and k = (n + H) mod 6, a channel is
    V · (1 − S · max(0, min(k, 4 − k, 1))) for n = 5 in red, 3 in green, 1 in blue.
    """
    red, green, blue = image
    value = image.amax(0)
    spread = value - image.amin(0)
    safe = spread.clamp(min=1e-12)  # of a grey pixel; its hue makes no difference
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    places = ((hue + 6 * turns + n) % 6 for n in (5, 3, 1))
    return torch.stack([value - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in places])


def _padded(values: Tensor, size: tuple[int, int], filling: float) -> Tensor:
    """Return (..., height, width) with the filling below and on the right, in one piece of memory."""
    height, width = values.shape[-2:]
    if (height, width) == size:
        return values.contiguous()
    whole = torch.full((*values.shape[:-2], *size), filling, dtype=values.dtype)
    whole[..., :height, :width] = values
    return whole


def _drawn(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
