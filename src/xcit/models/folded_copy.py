"""A model's folded copy, unchecked. ``xcit.deploy.fold`` compares the two and reports; who runs one may do without."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xcit.errors import ConfigError
from xcit.models.folded_layers import conv_with_batch_norm
from xcit.models.folded_models import FoldedPyramid, FoldedTrunk, FoldedXCiT
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmentation import ConvNorm, SegmentationModel
from xcit.models.xcit import XCiT
from xcit.ops.xca_form import Form


def foldable_backbone(model: nn.Module) -> XCiT | XCiTPyramid:
    """Return the part of a model that is folded.

    Raises:
        ConfigError: something else than an ``XCiT``, an ``XCiTPyramid``, a segmenter or a ``MaskRCNN``.
    """
    if isinstance(model, (XCiT, XCiTPyramid)):
        return model
    inner = model.backbone if isinstance(model, SegmentationModel) else None
    if isinstance(model, MaskRCNN):
        inner = model.backbone.body
    if isinstance(inner, XCiTPyramid):
        return inner
    if isinstance(model, FoldedTrunk) or isinstance(inner, FoldedTrunk):
        raise ConfigError("The model is folded already; fold the one that it was made of.")
    raise ConfigError(
        f"Only an XCiT, an XCiTPyramid, a segmenter or a MaskRCNN can be folded; got {type(model).__name__}. Of a "
        f"compiled or wrapped model, fold the one inside and wrap the result."
    )


def folded_copy(
    model: nn.Module,
    *,
    form: Form = "auto",
    small_terms: torch.dtype = torch.float32,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> nn.Module:
    """Return a model's folded copy, in eval mode: a ``FoldedXCiT``, a ``FoldedPyramid``, or a head on the latter.

    Args:
        model: as of ``foldable_backbone``; it is not changed.
        form: of XCA.
        small_terms: as of ``xcit.models.folded_xca.covariance_graph``.
        image_sizes: for which the positional encoding is kept as a table.

    Raises:
        ConfigError: no such model.
        ExportError: a part whose folding would not be exact.
    """
    backbone = foldable_backbone(model)
    make: Any = FoldedXCiT if isinstance(backbone, XCiT) else FoldedPyramid
    trunk: FoldedTrunk = make(backbone, form, small_terms, image_sizes)
    if model is backbone:
        return trunk
    memo: dict[int, Any] = {id(backbone): trunk}  # what deepcopy takes for the backbone's copy
    folded = copy.deepcopy(model, memo)
    for module in folded.modules():
        if isinstance(module, ConvNorm):
            module.conv = conv_with_batch_norm(module.conv, module.bn)
            module.bn = nn.Identity()  # type: ignore[assignment]
    return folded.eval().requires_grad_(False)
