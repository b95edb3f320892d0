"""Where a detector looks: anchors, how boxes are told relative to them, and the region proposal network.

torchvision's parts with the geometry of the released detectors, which differs in that anchors are not rounded, the
strides are fixed, sizes cannot shrink without limit either, and the loss of the boxes is L1.

Legend: boxes are x0, y0, x1, y1 in pixels of the padded image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

ANCHOR_SCALE = 8
"""Side of a level's square anchor, in strides."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
"""Height by width."""


class Anchors(AnchorGenerator):
    """Anchors of one size and three shapes around the corner of each cell, unrounded.

    Args:
        strides: of the levels in pixels.

    Source: the released configuration: scale 8, ratios 0.5, 1, 2, strides 4 to 64, no offset of the centre.
    """

    def __init__(self, strides: tuple[int, ...]) -> None:
        self.strides = strides
        super().__init__(tuple((ANCHOR_SCALE * stride,) for stride in strides), (ASPECT_RATIOS,) * len(strides))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return the anchors around the origin, (ratios · scales, 4)."""
        side = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        width, height = (side / root[:, None]).flatten(), (side * root[:, None]).flatten()
        return torch.stack((-width, -height, width, height), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of all levels for each image, level by level, row by row: (anchors, 4)."""
        like = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(like.dtype, torch.float32), like.device)
        sizes = [[int(side) for side in level.shape[-2:]] for level in feature_maps]
        strides = [[torch.tensor(s, device=like.device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, strides))
        return [anchors] * len(image_list.image_sizes)


class TwoSidedBoxCoder(BoxCoder):
    """A box told by another: shift of its centre and growth of its sides, neither larger nor smaller than 62.5 times.

    Source: mmdetection's ``DeltaXYWHBBoxCoder``; torchvision bounds the growth only.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return (n, 4 classes) boxes of (n, 4 classes) codes and n reference boxes, in float32 at least.

        Half precision does not tell two neighbouring pixels of a large image apart.
        """
        codes = rel_codes.to(torch.promote_types(rel_codes.dtype, torch.float32)).unflatten(-1, (-1, 4))
        scales = torch.tensor(self.weights, dtype=codes.dtype, device=codes.device)
        sizes = codes[..., 2:].clamp(min=-self.bbox_xform_clip * scales[2:])
        return super().decode_single(torch.cat((codes[..., :2], sizes), dim=-1).flatten(-2), boxes)


class AnchorMatcher(Matcher):
    """Which instance each anchor learns: the one that it overlaps most, if by enough, or the one that it is best for.

    Every instance also gets the anchors that overlap it most, all of them where several do equally, if by ``min_iou``
    at least. Of several instances that an anchor is best for, the last one gets it.

    Args:
        high: IoU from which on an anchor is positive.
        low: below which it is negative.
        min_iou: what an instance's best anchors must have; with 0 every instance has some, however small it is.

    Source: mmdetection's ``MaxIoUAssigner``; torchvision has no ``min_iou``, and leaves an anchor that is the best for
    an instance with the one that it overlaps most itself.
    """

    def __init__(self, high: float, low: float, min_iou: float) -> None:
        super().__init__(high, low, allow_low_quality_matches=True)
        self.min_iou = min_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Write the best anchors of each instance into ``matches``, (anchors,); the IoU are (instances, anchors)."""
        best = match_quality_matrix.amax(dim=1)
        best = best.where(best >= self.min_iou, torch.inf)  # which no anchor has
        # One instance after the other: for all at once, their numbers would take twice the memory of the IoU.
        for i, overlaps in enumerate(match_quality_matrix):
            matches.masked_fill_(overlaps == best[i], i)


class ProposalNetwork(RegionProposalNetwork):
    """Boxes that may hold something, from every level of the pyramid.

    Args:
        channels: of each level.
        strides: of each level in pixels.
        num_proposals: how many are kept of an image; twice as many a level are looked at in training.
        min_iou: overlap from which on an instance's best anchors learn it, where none overlaps it by 0.7.

    Source: the released configuration: 256 anchors an image, half of them positive (IoU of 0.7, below 0.3 negative);
    2,000 a level before non-maximum suppression at 0.7 in training and 1,000 in testing, 1,000 after it.
    """

    def __init__(
        self, channels: int, strides: tuple[int, ...], num_proposals: int = 1000, *, min_iou: float = 0.3
    ) -> None:
        anchors = Anchors(strides)
        super().__init__(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * num_proposals, "testing": num_proposals},
            post_nms_top_n={"training": num_proposals, "testing": num_proposals},
            nms_thresh=0.7,
        )
        self.box_coder = TwoSidedBoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = AnchorMatcher(0.7, 0.3, min_iou)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return cross-entropy of the sampled anchors, and L1 of the positive ones' boxes by the number sampled."""
        positive, negative = (torch.where(torch.cat(x))[0] for x in self.fg_bg_sampler(labels))
        sampled = torch.cat((positive, negative))
        codes = torch.cat(regression_targets)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], codes[positive], reduction="sum") / max(1, len(sampled))
        logits, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / max(1, len(sampled)), box_loss
