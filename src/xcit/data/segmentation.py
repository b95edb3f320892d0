"""Images with masks as a data loader takes them, for training a segmenter and for judging one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from xcit.data.datasets import open_drawn
from xcit.data.mask_set import IGNORE, MaskSet
from xcit.data.sampling import Draw, seeded
from xcit.data.segmentation_augment import SegmentationAugment
from xcit.errors import DataError


class MaskedImages(NamedTuple):
    """Images with the class of each pixel: one, or a batch."""

    images: Tensor | tuple[Tensor, ...]
    """In training (B, 3, H, W) float32, normalised; in evaluation one (3, H, W) uint8 each, at full size."""
    masks: Tensor | tuple[Tensor, ...]
    """In training (B, H, W) int64; in evaluation one (H, W) each. Classes from 0, or ``IGNORE``."""
    indices: Int64[Tensor, " batch"]
    """Position of each image in its set; of one that was asked for but could not be used, its own."""
    decoded: Bool[Tensor, " batch"]
    """Whether it and its mask could be. If not, in training another image stands here; in evaluation a small black one
    does, all of whose pixels are ignored."""


def collate_masked(items: Sequence[MaskedImages]) -> MaskedImages:
    """Return the items as one batch: stacked where they are tensors, side by side where they may differ in size."""
    return MaskedImages(
        _joined([item.images for item in items]),
        _joined([item.masks for item in items]),
        torch.cat([item.indices for item in items]),
        torch.cat([item.decoded for item in items]),
    )


def _joined(values: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
    stacks = [value for value in values if isinstance(value, Tensor)]
    return torch.cat(stacks) if stacks else tuple(one for value in values for one in value)


class TrainSegmentation(Dataset[MaskedImages]):
    """Images with masks to train on, distorted anew for each draw.

    In place of an image that cannot be used, or whose mask cannot, another one comes, which the draw's seed decides.

    Args:
        images: which ones.
        augment: scales, crops, mirrors, recolours, normalises, pads.
    """

    collate = staticmethod(collate_masked)
    check = "xcit data check-masks"

    def __init__(self, images: MaskSet, augment: SegmentationAugment) -> None:
        self.images = images
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> MaskedImages:
        """Return one drawn image, as a batch.

        Raises:
            DataError: too many images in a row cannot be used; with the reason of the first.
        """
        pairs = _Pairs(self.images)
        opened = open_drawn(pairs, draw)
        with seeded(draw.seed):
            image, mask = self.augment(to_bytes(opened.image), torch.from_numpy(pairs.mask))
        return MaskedImages(image[None], mask[None], torch.tensor([draw.index]), torch.tensor([opened.decoded]))


class EvalSegmentation(Dataset[MaskedImages]):
    """Images with masks to judge a segmenter by, as they are: whoever segments scales them."""

    collate = staticmethod(collate_masked)

    def __init__(self, images: MaskSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> MaskedImages:
        """Return one image; a small black one, ignored, if it or its mask cannot be used."""
        try:
            opened, classes = self.images.open_pair(index)
            image, mask, decoded = to_bytes(opened), torch.from_numpy(classes).long(), True
        except DataError:
            image, mask, decoded = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((32, 32), IGNORE), False
        return MaskedImages((image,), (mask,), torch.tensor([index]), torch.tensor([decoded]))


class _Pairs:
    """Opens an image only where its mask can be used too, and keeps that."""

    def __init__(self, images: MaskSet) -> None:
        self.images = images
        self.names = images.names
        self.mask = np.zeros((0, 0), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        image, self.mask = self.images.open_pair(index)
        return image


def to_bytes(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
