"""Fold a trained model for inference: the same function, with fewer steps.

Exactly, and in one pass over the model:

* layer norms lose scale and shift to the projections and convolutions that follow;
* batch norms go into the convolutions beside them, with the zero-padded border of the LPI's as it was;
* LayerScale goes into the output projections of attention, LPI and feed-forward network;
* XCA takes the form that costs less (``xcit.ops.xca``);
* class attention makes neither keys nor values, and its last layer leaves the patch tokens as they are;
* the positional encoding of named sizes is a table.

On a CPU the layers of a folded model then run over their own tokens, band by band (``xcit.models.folded_inplace``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xcit.deploy.fold_report import FoldReport, count_multiply_adds, count_values, relative_difference
from xcit.errors import ConfigError, ExportError
from xcit.models.folded_copy import foldable_backbone, folded_copy
from xcit.models.folded_layers import FoldedClassBlock, FoldedLPI, FoldedPosition
from xcit.models.folded_models import FoldedTrunk, FoldedXCiT
from xcit.models.folded_xca import SMALL_TERMS
from xcit.models.layers import XCA
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmentation import SegmentationModel
from xcit.models.xcit import XCiT
from xcit.ops.xca_form import FORMS, Form

CHECK_SIZES = ((96, 96), (75, 130))
"""On which a folded model is compared with its original where no sizes are named: a square of whole patches, and a size
that is neither."""


class Folded(NamedTuple):
    """What ``fold`` returns."""

    model: nn.Module
    """Takes the same images as the original and returns the same; for inference alone."""
    report: FoldReport
    """What was folded, what it saves, how much it changes; ``print`` shows it."""


def fold(
    model: nn.Module,
    *,
    form: Form = "auto",
    small_terms: torch.dtype = torch.float32,
    image_sizes: Sequence[tuple[int, int]] = (),
    check_sizes: Sequence[tuple[int, int]] = (),
) -> Folded:
    """Fold a model for inference. It computes the same function as the original in eval mode, up to rounding.

    Args:
        model: an ``XCiT``, an ``XCiTPyramid``, a segmenter or a ``MaskRCNN``; of the latter two a copy on a folded
            backbone comes back, every method of which works but those for training. It is not changed.
        form: of XCA: "auto" takes what costs less (where sizes are symbolic: "tokens"), or "tokens", or "covariance".
        small_terms: precision of the covariance form's small products: torch.float32, which every runtime has, or
            torch.float64.
        image_sizes: heights and widths in pixels for which the positional encoding is kept ready. Other sizes work too.
        check_sizes: heights and widths of the random images on which both models are compared; without any
            ``image_sizes``, and without those either ``CHECK_SIZES``.

    Returns:
        The folded model, a module of its own (``FoldedXCiT``, ``FoldedPyramid``) or a copy, in eval mode, with the
        original's type and device; and the report.

    Raises:
        ConfigError: something else than a model; an option out of its range; an image smaller than the model takes.
        ExportError: a variant or a replaced part that cannot be folded exactly; values that are not finite; a folded
            model that differs from the original by more than rounding.

    Example:
        >>> folded = fold(xcit.create_model("xcit_small_12_p16", pretrained=True))
        >>> print(folded.report)
        >>> logits = folded.model(images)
    """
    backbone = foldable_backbone(model)
    _check_options(backbone, form, small_terms)
    sizes = _checked_sizes("image_sizes", image_sizes, backbone)
    checked = _checked_sizes("check_sizes", check_sizes, backbone) or sizes or CHECK_SIZES
    folded = folded_copy(model, form=form, small_terms=small_terms, image_sizes=sizes)
    trunk = _trunk(folded)

    original = copy.deepcopy(model).eval() if any(module.training for module in model.modules()) else model
    before, after = _images_to_tensors(original), _images_to_tensors(folded)
    weight = _weight(backbone)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, backbone.config["in_chans"], *size, generator=generator).to(weight) for size in checked]
    difference = relative_difference(after, before, images)
    limit = torch.finfo(weight.dtype).eps ** 0.5
    if not difference <= limit:
        raise ExportError(
            f"The folded model differs from the original by {difference:.1e} of its largest output, more than rounding "
            f"explains ({limit:.1e} in {str(weight.dtype).removeprefix('torch.')}); fold it in a wider type, or run it "
            f"unfolded."
        )
    size = sizes[0] if sizes else _expected_size(backbone)
    shape = (1, backbone.config["in_chans"], *size)
    report = FoldReport(
        folded=_counts(trunk, model, folded),
        image_size=size,
        multiply_adds_before=count_multiply_adds(before, shape, weight),
        multiply_adds_after=count_multiply_adds(after, shape, weight),
        num_values_before=count_values(model),
        num_values_after=count_values(folded),
        max_relative_difference=difference,
        checked_sizes=tuple(checked),
        dtype=weight.dtype,
    )
    return Folded(folded, report)


def _check_options(backbone: XCiT | XCiTPyramid, form: str, small_terms: torch.dtype) -> None:
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; XCA has the forms {', '.join(FORMS)}.")
    if small_terms not in SMALL_TERMS:
        raise ConfigError(f"small_terms is {small_terms}; it must be torch.float32 or torch.float64.")
    if any(tensor.is_meta for tensor in backbone.parameters()):
        raise ConfigError("The model is on the meta device: it has shapes but no weights to fold.")


def _checked_sizes(name: str, sizes: Sequence[tuple[int, int]], backbone: XCiT | XCiTPyramid) -> list[tuple[int, int]]:
    """Return sizes as pairs of whole numbers that the model takes, each once."""
    patch = backbone.patch_embed.patch_size
    # the pyramid's coarsest level needs one cell
    least = patch if isinstance(backbone, XCiT) else backbone.strides[-1] - patch + 1
    checked: list[tuple[int, int]] = []
    for size in sizes:
        try:
            height, width = (index(side) for side in size)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name} holds {size!r}; each must be a height and a width in whole pixels, such as (224, 224)."
            ) from None
        if min(height, width) < least:
            raise ConfigError(f"{name} holds {height} x {width}; the model takes images of {least} px a side or more.")
        checked.append((height, width))
    return list(dict.fromkeys(checked))


def _trunk(folded: nn.Module) -> FoldedTrunk:
    (trunk,) = (module for module in folded.modules() if isinstance(module, FoldedTrunk))
    return trunk


def _images_to_tensors(model: nn.Module) -> Callable[[Tensor], Any]:
    """Return what is compared and counted: of a detector its pyramid, since which boxes come out hangs on a hair."""
    if isinstance(model, MaskRCNN):
        return model.backbone.body
    return model.forward_low if isinstance(model, SegmentationModel) else model


def _expected_size(backbone: XCiT | XCiTPyramid) -> tuple[int, int]:
    _, height, width = backbone.pretrained_cfg.get("input_size") or (3, 224, 224)
    return height, width


def _weight(backbone: XCiT | XCiTPyramid) -> Tensor:
    attn = backbone.blocks[0].attn
    assert isinstance(attn, XCA)
    return attn.qkv.weight


def _counts(trunk: FoldedTrunk, model: nn.Module, folded: nn.Module) -> dict[str, int]:
    """Count what went where, by what the folded model is made of; what there is none of is left out."""
    blocks, lpis = len(trunk.blocks), sum(isinstance(m, FoldedLPI) for m in trunk.modules())
    cls_blocks = sum(isinstance(m, FoldedClassBlock) for m in trunk.modules())
    final = isinstance(trunk, FoldedXCiT) and trunk.head is not None
    batch_norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    position = trunk.pos_embeder
    counts = {
        "layer-norm affines into the linear layer after it": 2 * blocks + cls_blocks + final,
        "layer-norm affines into the convolution after it": lpis,
        "batch norms into the convolution before or after it": batch_norms,
        "LayerScales into the layer before it": 2 * blocks + lpis + 2 * cls_blocks,
        "class-attention layers without keys and values": cls_blocks,
        "positional encodings into a table": len(position.grids) if isinstance(position, FoldedPosition) else 0,
    }
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    return {what: count for what, count in counts.items() if count}
