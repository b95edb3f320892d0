"""Many distorted views of an image, large and small, as DINO compares them.

The parts are torchvision's and Pillow's, in the order of the released code's augmentation: crop and resize, mirror,
colour jitter, greyscale, Gaussian blur, solarisation, tensor, normalise. The defaults are its numbers. Rotation, which
it has not, comes first: mirroring and colours suit photographs, small rotations suit writing.

All draws come from the global generators of Python's ``random`` and torch; whoever needs them reproducible seeds both.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021, and "Unsupervised
learning of visual features by contrasting cluster assignments", 2020; facebookresearch/dino, main_dino.py and utils.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from xcit.data.batches import Crops
from xcit.data.datasets import open_drawn
from xcit.data.image_set import ImageSet
from xcit.data.preprocess import INTERPOLATIONS, Preprocessing
from xcit.data.sampling import Draw, seeded
from xcit.errors import ConfigError, DataError

NUM_GLOBAL = 2
SOLARIZE_FROM = 128
"""Values from here on, of 255, are inverted."""

Step = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class CropRecipe:
    """How the views of an image are drawn. Triples and pairs are per kind of view: first global, second global, local.

    Raises:
        ConfigError: values out of their range; all are named at once.
    """

    global_size: int = 224
    """Pixels a side of the two global views."""
    local_size: int = 96
    """Pixels a side of the local ones."""
    num_local: int = 8
    """How many of them; 0 for none."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Least and greatest share of the image's area in a global view. Sides are 3:4 to 4:3."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """The same of a local one."""
    degrees: float = 0.0
    """Each view is of the image turned by at most so many degrees either way; black stands where there is no image."""
    hflip: float = 0.5
    """Probability that a view is mirrored left to right."""
    vflip: float = 0.0
    """Upside down."""
    jitter_prob: float = 0.8
    """Probability of the four changes below, in random order."""
    brightness: float = 0.4
    """The factor's largest distance from 1."""
    contrast: float = 0.4
    """Likewise."""
    saturation: float = 0.2
    """Likewise; not of grey images."""
    hue: float = 0.1
    """Largest shift, of a whole turn of the colour wheel; not of grey images."""
    grey_prob: float = 0.2
    """Probability that colours are lost."""
    blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of a Gaussian blur."""
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """Its least and greatest standard deviation in pixels of the view."""
    solarize_prob: float = 0.2
    """Probability that bright values are inverted, in the second global view."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        problems = [
            f"{name} is {value}; it must be {floor} or more"
            for name, floor in {"global_size": 1, "local_size": 1, "num_local": 0}.items()
            if (value := getattr(self, name)) < floor
        ]
        for name, limit in {"global_scale": 1.0, "local_scale": 1.0, "blur_radius": float("inf")}.items():
            least, most = getattr(self, name)
            if not 0 < least <= most <= limit:
                top = f"at most {limit:g}" if limit == 1 else "the first no greater"
                problems.append(f"{name} is {least}, {most}; both must be more than 0 and {top}, in rising order")
        unit = ("hflip", "vflip", "jitter_prob", "grey_prob", "solarize_prob")
        for name, value in [
            *((name, getattr(self, name)) for name in unit),
            *(("blur_probs", value) for value in self.blur_probs),
        ]:
            if not 0 <= value <= 1:
                problems.append(f"{name} is {value}; it must be between 0 and 1")
        for name, limit in {
            "brightness": 1.0,
            "contrast": 1.0,
            "saturation": 1.0,
            "hue": 0.5,
            "degrees": 180.0,
        }.items():
            if not 0 <= (value := getattr(self, name)) <= limit:
                problems.append(f"{name} is {value}; it must be between 0 and {limit:g}")
        if problems:
            raise ConfigError("; ".join(problems) + ".")


class MultiCrop:
    """A Pillow image to its views, drawn anew on every call. Worker processes get a copy: it can be pickled.

    Args:
        recipe: sizes, shares and probabilities.
        preprocessing: the model's mean, standard deviation, channels and interpolation; its size is not looked at.

    Attributes:
        steps: what makes each kind of view: first global, second global, local.
    """

    def __init__(self, recipe: CropRecipe, preprocessing: Preprocessing) -> None:
        self.recipe = recipe
        self.mode = "RGB" if preprocessing.in_chans == 3 else "L"
        self.steps = tuple(_steps(recipe, preprocessing, kind) for kind in range(NUM_GLOBAL + 1))
        self.mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(preprocessing.std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> tuple[Float[Tensor, "views chans ?height ?width"], ...]:
        """Return the normalised views, float32: (2, C, global_size, global_size), and the local ones if there are any.

        Args:
            image: of any size, upright and in mode "RGB" for 3 channels, "L" for 1, as ``convert_image`` makes it.

        Raises:
            DataError: another mode.
        """
        if image.mode != self.mode:
            raise DataError(f"The image's mode is {image.mode}, not {self.mode}; convert it with convert_image first.")
        views = [torch.stack([self._view(image, kind) for kind in range(NUM_GLOBAL)])]
        if self.recipe.num_local:
            views.append(torch.stack([self._view(image, NUM_GLOBAL) for _ in range(self.recipe.num_local)]))
        return tuple(views)

    def _view(self, image: Image.Image, kind: int) -> Tensor:
        for step in self.steps[kind]:
            image = step(image)
        pixels = np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        return tensor.div_(255).sub_(self.mean).div_(self.std)  # as Preprocessing does, to the last bit


class CropImages(Dataset[Crops]):
    """Images to train on without labels, as several views each, distorted anew for each draw.

    In place of an image that cannot be decoded another one comes, which the draw's seed decides.

    Args:
        images: which ones; their labels are not looked at.
        transform: a Pillow image to its views, with random numbers from the global generators.
    """

    check = "xcit data check"

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], tuple[Tensor, ...]]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Crops:
        """Return the views of one drawn image.

        Raises:
            DataError: too many images in a row cannot be decoded; with the reason of the first.
        """
        opened = open_drawn(self.images, draw)
        with seeded(draw.seed):
            views = self.transform(opened.image)
        return Crops(views, torch.tensor(draw.index), torch.tensor(opened.decoded))


# --- the steps -------------------------------------------------------------------------------------------------------


class _Rotation:
    """Turn the picture. A small one is enlarged first, since its few pixels would not survive it."""

    def __init__(self, degrees: float, side: int, resample: Image.Resampling) -> None:
        self.degrees = degrees
        self.side = side
        self.resample = resample

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.side / math.sqrt(image.width * image.height)
        if scale > 1:
            width, height = (max(1, round(scale * side)) for side in image.size)
            image = image.resize((width, height), self.resample)
        return image.rotate(random.uniform(-self.degrees, self.degrees), Image.Resampling.BILINEAR)


class _Blur:
    """Blur the picture sometimes, by a Gaussian of a random width."""

    def __init__(self, prob: float, radius: tuple[float, float]) -> None:
        self.prob = prob
        self.radius = radius

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radius)))


def _steps(recipe: CropRecipe, preprocessing: Preprocessing, kind: int) -> tuple[Step, ...]:
    colours = preprocessing.in_chans == 3
    is_global = kind < NUM_GLOBAL
    size = recipe.global_size if is_global else recipe.local_size
    steps: list[Step] = []
    if recipe.degrees:
        resample = INTERPOLATIONS[preprocessing.interpolation]
        steps.append(_Rotation(recipe.degrees, recipe.global_size, resample))
    steps.append(
        transforms.RandomResizedCrop(
            size,
            scale=recipe.global_scale if is_global else recipe.local_scale,
            interpolation=transforms.InterpolationMode(preprocessing.interpolation),
        )
    )
    if recipe.hflip:
        steps.append(transforms.RandomHorizontalFlip(recipe.hflip))
    if recipe.vflip:
        steps.append(transforms.RandomVerticalFlip(recipe.vflip))
    hues = (recipe.saturation, recipe.hue) if colours else (0.0, 0.0)
    jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, *hues)
    if recipe.jitter_prob and any((recipe.brightness, recipe.contrast, *hues)):
        steps.append(transforms.RandomApply([jitter], recipe.jitter_prob))
    if recipe.grey_prob and colours:
        steps.append(transforms.RandomGrayscale(recipe.grey_prob))
    if recipe.blur_probs[kind]:
        steps.append(_Blur(recipe.blur_probs[kind], recipe.blur_radius))
    if recipe.solarize_prob and kind == 1:
        steps.append(transforms.RandomSolarize(SOLARIZE_FROM, recipe.solarize_prob))
    return tuple(steps)
