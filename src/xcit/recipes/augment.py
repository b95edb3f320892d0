"""How a training image is distorted, and how the images of a batch are mixed.

The parts are timm's and torchvision's, in the order of timm's training transform: crop, mirror, affine map, RandAugment
or colour jitter, tensor, normalise, erase. With the paper's settings and the same generators' states the result is
that of ``timm.data.create_transform``, bit for bit (but for the rare draws at which that one fails with current
Pillow). Without any distortion it is the image of evaluation.

All draws come from the global generators of Python's ``random``, NumPy and torch; whoever needs them reproducible seeds
all three.

Source: Cubuk et al., "RandAugment", 2020; Zhong et al., "Random erasing", 2020; Zhang et al., "mixup", 2018; Yun et
al., "CutMix", 2019; the released code's datasets.py and main.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from xcit.data.preprocess import INTERPOLATIONS, Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.recipes.config import AugmentConfig

ASPECT = (3 / 4, 4 / 3)
"""Widths over heights of a random part."""
PADDING = 4
"""Pixels that ``crop="pad"`` adds on every side."""
BLACK = 0
"""What an affine map uncovers is filled with."""
TRANSLATE_SHARE = 0.45
"""RandAugment's largest absolute shift, of the side; its relative shifts have a limit of their own."""

_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|t(weights|3a|3aw)))*"
)

Step = Callable[[Image.Image], Image.Image]


def train_transform(augment: AugmentConfig, preprocessing: Preprocessing) -> TrainTransform:
    """Return what turns an image into a distorted tensor, anew on every call.

    Args:
        augment: what is done to it.
        preprocessing: the model's size, mean, standard deviation, channels and interpolation.

    Raises:
        ConfigError: ``rand_augment`` is not in timm's notation.
    """
    return TrainTransform(augment, preprocessing)


class TrainTransform:
    """A Pillow image to the tensor that a model is trained on. Worker processes get a copy: it can be pickled.

    Args:
        augment: see ``train_transform``.
        preprocessing: likewise.

    Attributes:
        steps: what happens to the picture, in this order.
        erase: what happens to the tensor in the end; None for nothing.

    Raises:
        ConfigError: ``rand_augment`` is not in timm's notation.
    """

    def __init__(self, augment: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.in_chans = preprocessing.in_chans
        self.mode = "RGB" if preprocessing.in_chans == 3 else "L"
        self.image_size = preprocessing.image_size
        self.steps: list[Step] = [_crop(augment, preprocessing)]
        if augment.hflip:
            self.steps.append(transforms.RandomHorizontalFlip(augment.hflip))
        if augment.vflip:
            self.steps.append(transforms.RandomVerticalFlip(augment.vflip))
        if augment.degrees or augment.translate or augment.scale or augment.shear:
            self.steps.append(_affine(augment))
        if augment.rand_augment:
            self.steps.append(_rand_augment(augment.rand_augment, preprocessing))
        elif augment.color_jitter:
            self.steps.append(transforms.ColorJitter(*[augment.color_jitter] * 3))
        self.erase = RandomErasing(augment.erase, mode="pixel", device="cpu") if augment.erase else None
        self.mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(preprocessing.std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> Float[Tensor, "chans height width"]:
        """Return the distorted image, normalised, float32, (in_chans, *image_size).

        Args:
            image: upright and in mode "RGB" for 3 channels, "L" for 1, as ``convert_image`` makes it, which whoever
                decoded it has called: a second time would cost a twentieth of the whole.

        Raises:
            DataError: another mode.
        """
        if image.mode != self.mode:
            raise DataError(f"The image's mode is {image.mode}, not {self.mode}; convert it with convert_image first.")
        for step in self.steps:
            image = step(image)
        pixels = np.array(image, dtype=np.uint8).reshape(*self.image_size, self.in_chans)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        tensor.div_(255).sub_(self.mean).div_(self.std)  # as Preprocessing does, to the last bit
        return tensor if self.erase is None else self.erase(tensor)

    def __repr__(self) -> str:
        names = [type(step).__name__.lstrip("_") for step in (*self.steps, self.erase) if step is not None]
        return f"TrainTransform({' -> '.join(names)})"


def batch_mixer(augment: AugmentConfig, num_classes: int, label_smoothing: float) -> BatchMixer | None:
    """Return what mixes the images of a batch in pairs, or None where neither mixup nor cutmix is on.

    Args:
        augment: how much, and how often.
        num_classes: width of the targets.
        label_smoothing: share of every target that is spread over all classes, in batches that are not mixed as well.
    """
    if not augment.mix_prob or not (augment.mixup or augment.cutmix):
        return None
    return BatchMixer(augment, num_classes, label_smoothing)


class BatchMixer:
    """Mixup or CutMix of a whole batch with its reverse, with one proportion for all pairs (timm's batch mode).

    The draws come from NumPy's global generator.

    Args:
        augment: see ``batch_mixer``.
        num_classes: likewise.
        label_smoothing: likewise.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, label_smoothing: float) -> None:
        self.mixup = Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mix_prob,
            switch_prob=augment.cutmix_share,
            mode="batch",
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Float[Tensor, "batch chans height width"], labels: Tensor
    ) -> tuple[Float[Tensor, "batch chans height width"], Float[Tensor, "batch num_classes"]]:
        """Return mixed images, which take the place of the given ones in memory, and their soft targets.

        Args:
            images: an even number of them.
            labels: (B,) class numbers, one an image.

        Raises:
            ConfigError: an odd number of images, or images with several classes each.
        """
        if len(images) % 2:
            raise ConfigError(
                f"mixup pairs the images of a batch, and {len(images)} are odd; take an even batch size on each "
                f"device, or augment.mixup=0 augment.cutmix=0."
            )
        if labels.ndim != 1:
            raise ConfigError(
                "mixup and cutmix are for images of one class each; set augment.mixup=0 augment.cutmix=0."
            )
        return self.mixup(images, labels)


# --- the steps -------------------------------------------------------------------------------------------------------


class _RandomPart:
    """A random part of the picture, resized. timm draws it; a picture of few pixels does not lose its last one."""

    def __init__(self, augment: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.size = preprocessing.image_size[::-1]
        self.resample = INTERPOLATIONS[preprocessing.interpolation]
        self.area = (augment.min_area, 1.0)

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.area, ASPECT)
        height, width = max(height, 1), max(width, 1)
        top, left = min(top, image.height - height), min(left, image.width - width)
        return image.crop((left, top, left + width, top + height)).resize(self.size, self.resample)


class _Whole:
    """What evaluation sees, or a shift of it within a black border."""

    def __init__(self, preprocessing: Preprocessing, padding: int = 0) -> None:
        self.preprocessing = preprocessing
        self.shift = transforms.RandomCrop(preprocessing.image_size, padding=padding) if padding else None

    def __call__(self, image: Image.Image) -> Image.Image:
        image = self.preprocessing.resize_and_crop(image)
        return image if self.shift is None else self.shift(image)


def _crop(augment: AugmentConfig, preprocessing: Preprocessing) -> Step:
    if augment.crop == "resized":
        return _RandomPart(augment, preprocessing)
    return _Whole(preprocessing, PADDING if augment.crop == "pad" else 0)


def _affine(augment: AugmentConfig) -> Step:
    return transforms.RandomAffine(
        augment.degrees,
        translate=(augment.translate, augment.translate),
        scale=(1 - augment.scale, 1 + augment.scale),
        shear=(-augment.shear, augment.shear, -augment.shear, augment.shear),
        interpolation=transforms.InterpolationMode.BILINEAR,
        fill=BLACK,
    )


def _rand_augment(notation: str, preprocessing: Preprocessing) -> RandAugment:
    # timm passes over words that it does not know, so that a slip of the pen would go unnoticed.
    if not _RAND_AUGMENT.fullmatch(notation):
        raise ConfigError(
            f"augment.rand_augment is {notation!r}; it must be timm's notation, such as rand-m9-mstd0.5-inc1: "
            f"magnitude m, number of operations n, probability p, spread of the magnitude mstd, its limit mmax, inc1 "
            f"for operations that grow with it, a set of operations tweights, t3a or t3aw. Leave it empty for none."
        )
    grey = tuple(min(255, round(255 * mean)) for mean in preprocessing.mean)
    options = {
        "translate_const": math.floor(min(preprocessing.image_size) * TRANSLATE_SHARE),
        "img_mean": grey if preprocessing.in_chans == 3 else grey[0],
        "interpolation": INTERPOLATIONS[preprocessing.interpolation],
    }
    chosen = rand_augment_transform(notation, options)
    for op in chosen.ops:
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return chosen


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep the upper bits of every value. At its full magnitude timm keeps none, which current Pillow refuses.

    Pillow made a black picture of it when the released models were trained.
    """
    return posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)
