"""Annotated images as a data loader takes them, for training a detector and for judging one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.utils.data import Dataset

from xcit.data.coco import CocoSet
from xcit.data.datasets import open_drawn
from xcit.data.detection_augment import DetectionAugment, Example, to_pixels
from xcit.data.sampling import Draw, seeded
from xcit.errors import DataError


class AnnotatedImages(NamedTuple):
    """Images of any sizes with what is in them: one, or a batch."""

    images: tuple[Tensor, ...]
    """Each (3, H, W), values 0 to 1."""
    targets: tuple[dict[str, Tensor], ...]
    """One an image, as ``MaskRCNN`` takes it: boxes (n, 4), labels (n,) from 1, masks (n, H, W) where the set has
    them. Empty in evaluation, which compares with the annotation file."""
    indices: Int64[Tensor, " batch"]
    """Position of each image in its set; of one that was asked for but could not be decoded, its own."""
    decoded: Bool[Tensor, " batch"]
    """Whether it could be. If not, in training another image stands here; in evaluation a small black one does, which
    counts for nothing."""


def collate_annotated(items: Sequence[AnnotatedImages]) -> AnnotatedImages:
    """Return the items as one batch."""
    return AnnotatedImages(
        tuple(image for item in items for image in item.images),
        tuple(target for item in items for target in item.targets),
        torch.cat([item.indices for item in items]),
        torch.cat([item.decoded for item in items]),
    )


class TrainDetection(Dataset[AnnotatedImages]):
    """Annotated images to train on, distorted anew for each draw. Crowds are left out, as the released training did.

    In place of an image that cannot be decoded another one comes, which the draw's seed decides.

    Args:
        images: which ones.
        augment: scales, crops and mirrors.
        with_masks: whether targets have masks; instances without one are then left out.
    """

    collate = staticmethod(collate_annotated)
    check = "xcit data check-coco"

    def __init__(self, images: CocoSet, augment: DetectionAugment, *, with_masks: bool) -> None:
        self.images = images
        self.augment = augment
        self.with_masks = with_masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> AnnotatedImages:
        """Return one drawn image.

        Raises:
            DataError: too many images in a row cannot be decoded; with the reason of the first.
        """
        opened = open_drawn(self.images, draw)
        found = self.images.instances(opened.index, masks=self.with_masks)
        used = ~found.crowd
        masks = None
        if self.with_masks:
            used &= found.has_mask
            assert found.masks is not None
            masks = torch.from_numpy(found.masks[used])
        example = Example(
            to_pixels(np.array(opened.image)),
            torch.from_numpy(found.boxes[used]),
            torch.from_numpy(found.labels[used]) + 1,
            masks,
        )
        with seeded(draw.seed):
            example = self.augment(example)
        target = {"boxes": example.boxes, "labels": example.labels}
        if example.masks is not None:
            target["masks"] = example.masks
        return AnnotatedImages((example.image,), (target,), torch.tensor([draw.index]), torch.tensor([opened.decoded]))


class EvalDetection(Dataset[AnnotatedImages]):
    """Annotated images to judge a detector by, as they are: it scales them itself."""

    collate = staticmethod(collate_annotated)

    def __init__(self, images: CocoSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> AnnotatedImages:
        """Return one image; a small black one if it cannot be decoded."""
        try:
            image, decoded = to_pixels(np.array(self.images.open(index))), True
        except DataError:
            image, decoded = torch.zeros(3, 32, 32), False
        return AnnotatedImages((image,), ({},), torch.tensor([index]), torch.tensor([decoded]))
