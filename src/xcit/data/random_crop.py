"""The plain distortion of a training image, with torchvision alone: a random part of it, resized, perhaps mirrored."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision import transforms

from xcit.data.images import convert_image
from xcit.data.preprocess import Preprocessing


class RandomCrop:
    """A Pillow image to the tensor that a probe is trained on. Worker processes get a copy: it can be pickled.

    All draws come from torch's global generator.

    Args:
        preprocessing: size, mean, standard deviation and channels.
        min_area: smallest share of the image that a part may have, more than 0 to 1.
        hflip: probability of a mirror image, 0 to 1.
        interpolation: of the resizing. The published linear probe trains with torchvision's default, bilinear, and is
            judged with bicubic interpolation.

    Source: [dino] eval_linear.py.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        min_area: float = 0.08,
        hflip: float = 0.5,
        interpolation: str = "bilinear",
    ) -> None:
        self.in_chans = preprocessing.in_chans
        self.image_size = preprocessing.image_size
        mode = transforms.InterpolationMode(interpolation)
        self.crop = transforms.RandomResizedCrop(preprocessing.image_size, scale=(min_area, 1.0), interpolation=mode)
        self.flip = transforms.RandomHorizontalFlip(hflip)
        self.mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(preprocessing.std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> Float[Tensor, "chans height width"]:
        """Return a part of the image, normalised, float32, (in_chans, *image_size).

        Raises:
            DataError: the image cannot be converted.
        """
        part = self.flip(self.crop(convert_image(image, self.in_chans)))
        pixels = np.array(part, dtype=np.uint8).reshape(*self.image_size, self.in_chans)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        return tensor.sub_(self.mean).div_(self.std)
