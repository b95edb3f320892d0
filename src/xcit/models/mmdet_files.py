"""The names under which mmdetection, and so the released files, store a Mask R-CNN, both ways.

Beyond names one thing differs: there the background is the last row of the classifier, here it is the first. Boxes and
masks have no background in either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TO_OURS = (
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^backbone\.(?!fpn\.|body\.)", "backbone.body."),
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_predictor.fc6."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_predictor.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d+)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.upsample."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.logits."),
)
_TO_THEIRS = (
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^backbone\.body\.", "backbone."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_predictor\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_predictor\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^roi_heads\.mask_head\.(\d+)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^roi_heads\.mask_predictor\.upsample\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask_predictor\.logits\.", "roi_head.mask_head.conv_logits."),
)
_OUR_SCORE = "roi_heads.box_predictor.cls_score."


def is_mmdet(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights bear mmdetection's names of a Mask R-CNN."""
    return any(key.startswith("roi_head.bbox_head.") for key in state)


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under this package's names, the background's row first.

    Names that are not known stay as they are, apart from the pyramid's, so that a strict load reports them.
    """
    ours = {_renamed(key, _TO_OURS): tensor for key, tensor in state.items()}
    return {k: torch.roll(t, 1, 0) if k.startswith(_OUR_SCORE) else t for k, t in ours.items()}


def to_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ``MaskRCNN``'s weights under mmdetection's names, the background's row last."""
    rolled = {k: torch.roll(t, -1, 0) if k.startswith(_OUR_SCORE) else t for k, t in state.items()}
    return {_renamed(key, _TO_THEIRS): tensor for key, tensor in rolled.items()}


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key
