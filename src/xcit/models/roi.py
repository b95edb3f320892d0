"""What an instance is: its class, its box and its mask, from the pyramid's features in a proposal.

torchvision's heads with the geometry of the released detectors: RoIAlign without the half-pixel shift, as many samples
as the region has pixels of its level, one set of box codes and one mask a foreground class, L1 for the boxes.

Legend: n regions of all images, K foreground classes (labels 1 to K; 0 is background), S = 28 side of a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from xcit.models.proposals import TwoSidedBoxCoder
from xcit.ops.instance_masks import crop_masks

FINEST_SIDE = 56
"""Regions of a side up to twice this, in pixels, are looked at on the finest level; each doubling is a level more."""


class RegionPooler(nn.Module):
    """Features of each region, from the level that suits its size, on a square grid.

    Args:
        side: of the grid.
        strides: of the levels in pixels.

    Source: mmdetection's ``SingleRoIExtractor``: level floor(log2(side / 56 + 1e-6)), RoIAlign with ``aligned`` and
    adaptive sampling.
    """

    def __init__(self, side: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.side, self.strides = side, strides

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return (n, C, side, side); ``features`` may hold more levels than are used here, after them.

        Samples are taken in float32 at least, whatever the features are: their places need it.
        """
        levels = list(features.values())[: len(self.strides)]
        every = torch.cat(boxes)
        index = torch.repeat_interleave(
            torch.arange(len(boxes), device=every.device), torch.tensor([len(b) for b in boxes], device=every.device)
        )
        regions = torch.cat((index[:, None].to(every.dtype), every), dim=1)
        side = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).sqrt()
        chosen = torch.log2(side / FINEST_SIDE + 1e-6).floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros((len(every), levels[0].shape[1], self.side, self.side))
        for number, (level, stride) in enumerate(zip(levels, self.strides, strict=True)):
            (mine,) = torch.where(chosen == number)
            values = _wide(level)
            part = roi_align(values, regions[mine].to(values.dtype), self.side, 1 / stride, 0, aligned=True)
            pooled = pooled.index_put((mine,), part.to(pooled.dtype))
        return pooled


class BoxHead(nn.Module):
    """Two linear layers on a region's features, then its class and a box for each foreground class.

    Args:
        channels: of a level.
        side: of a region's grid.
        width: of the linear layers.
        num_classes: K.
    """

    def __init__(self, channels: int, side: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * side**2, width)
        self.fc7 = nn.Linear(width, width)
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * num_classes)
        for layer in (self.fc6, self.fc7):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.fc6, self.fc7, self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, K + 1), background first, and codes (n, 4 + 4 K), of which the first four are zeros.

        Background has no box; torchvision's heads want one, which they do not use.
        """
        x = F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))
        return self.cls_score(x), F.pad(self.bbox_pred(x), (4, 0))


class MaskPredictor(nn.Module):
    """A mask for each foreground class, of twice the grid's side."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.logits = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu")
        # The released training drew these by the fan-out rule too, which with few classes begins at huge logits.
        nn.init.normal_(self.logits.weight, std=0.001)
        for layer in (self.upsample, self.logits):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, K, S, S): class k + 1 has mask k."""
        return self.logits(F.relu(self.upsample(x)))


class InstanceHeads(RoIHeads):
    """Classes, boxes and masks of proposals.

    Args:
        channels: of a level.
        strides: of the levels that regions are looked at on.
        num_classes: K.
        box_width: of the box head's linear layers.
        mask_channels: of the mask head's convolutions.
        mask_convs: how many there are.
        with_masks: False for boxes alone, where the data has no masks.
        box_samples: regions an image that are learned from.
        score_thresh: detections below it are dropped.
        nms_thresh: of two detections of a class that overlap more than this the lesser is dropped.
        detections_per_img: at most so many are kept.

    Source: the released configuration: 512 regions an image, a quarter of them positive (IoU of 0.5), ground truth
    among the proposals; score above 0.05, non-maximum suppression at 0.5 a class, 100 detections.
    """

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        *,
        box_width: int = 1024,
        mask_channels: int = 256,
        mask_convs: int = 4,
        with_masks: bool = True,
        box_samples: int = 512,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
    ) -> None:
        super().__init__(
            box_roi_pool=RegionPooler(7, strides),
            box_head=nn.Identity(),
            box_predictor=BoxHead(channels, 7, box_width, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=box_samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            mask_roi_pool=RegionPooler(14, strides) if with_masks else None,
            mask_head=MaskRCNNHeads(channels, (mask_channels,) * mask_convs, dilation=1) if with_masks else None,
            mask_predictor=MaskPredictor(mask_channels, num_classes) if with_masks else None,
        )
        self.box_coder = TwoSidedBoxCoder((10.0, 10.0, 5.0, 5.0))

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections and no losses in evaluation, losses and no detections in training.

        A detection's mask is (1, S, S) probabilities over its box.
        """
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        logits, codes = self.box_predictor(self.box_roi_pool(features, proposals, image_shapes))
        boxes, scores, labels = self.postprocess_detections(_wide(logits), _wide(codes), proposals, image_shapes)
        found = [{"boxes": b, "labels": c, "scores": s} for b, c, s in zip(boxes, labels, scores, strict=True)]
        if not self.has_mask():
            return found, {}
        masks = self._mask_logits(features, boxes, image_shapes)
        of_class = masks[torch.arange(len(masks), device=masks.device), torch.cat(labels) - 1]
        squares = _wide(of_class).sigmoid()[:, None].split([len(b) for b in boxes])
        return [detection | {"masks": square} for detection, square in zip(found, squares, strict=True)], {}

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        regions, matched, labels, codes = self.select_training_samples(proposals, targets)
        logits, predicted = self.box_predictor(self.box_roi_pool(features, regions, image_shapes))
        losses = box_losses(logits, predicted, torch.cat(labels), torch.cat(codes))
        if not self.has_mask():
            return losses
        positive = [torch.where(label > 0)[0] for label in labels]
        boxes = [region[p] for region, p in zip(regions, positive, strict=True)]
        squares = self._mask_logits(features, boxes, image_shapes)
        side = squares.shape[-1]
        truth = [
            crop_masks(target["masks"][index[p]].to(box.dtype), box, side)
            for target, index, p, box in zip(targets, matched, positive, boxes, strict=True)
        ]
        classes = torch.cat([label[p] for label, p in zip(labels, positive, strict=True)])
        losses["loss_mask"] = mask_loss(squares, torch.cat(truth), classes)
        return losses


def _wide(x: Tensor) -> Tensor:
    """Return half-precision values as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def box_losses(logits: Tensor, codes: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return cross-entropy of the classes, and L1 of the positive regions' codes by the number of all regions.

    Args:
        logits: (n, K + 1).
        codes: (n, 4 + 4 K).
        labels: (n,) int64.
        targets: (n, 4), the codes that would be right.
    """
    (positive,) = torch.where(labels > 0)
    mine = codes.unflatten(1, (-1, 4))[positive, labels[positive]]
    count = max(1, len(labels))
    return {
        "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
        "loss_box_reg": F.l1_loss(mine, targets[positive], reduction="sum") / count,
    }


def mask_loss(logits: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """Return binary cross-entropy over the cells of each region's mask of its own class; 0 where there are none.

    Args:
        logits: (n, K, S, S).
        truth: (n, S, S), 0 or 1.
        labels: (n,) int64, 1 to K.
    """
    if not len(labels):
        return logits.sum() * 0  # so that every process has a gradient for every weight
    mine = logits[torch.arange(len(labels), device=logits.device), labels - 1]
    return F.binary_cross_entropy_with_logits(mine, truth.to(mine.dtype))
