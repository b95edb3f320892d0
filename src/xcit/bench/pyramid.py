"""A pyramid of features at a detector's size: ours (``xcit.models.pyramid``) and the same on timm's XCiT.

timm has no pyramid, but a verb that gives the features of chosen blocks. Its competitor is what one would build on
that: those features, through deconvolutions and poolings of the same weights as ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.bench.cases import PyramidCase
from xcit.models.factory import from_timm
from xcit.models.pyramid import XCiTPyramid

MULTIPLE = 32
"""Images are padded with zeros, below and to the right, to multiples of the coarsest stride, as detectors do."""


class TimmPyramid(nn.Module):
    """timm's XCiT, tapped at the blocks of one of our pyramids, with copies of that one's operations.

    Args:
        model: a ``timm.models.xcit.Xcit``.
        like: says which blocks, and has the deconvolutions and poolings.
    """

    def __init__(self, model: Any, like: XCiTPyramid) -> None:
        super().__init__()
        # named as in ours, so that gradients can be compared by name; of two names, the first one counts
        self.patch_embed = model.patch_embed
        self.pos_embeder = model.pos_embed
        self.blocks = model.blocks
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = copy.deepcopy(operations(like))
        self.model = model
        self.taps = like.taps

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four maps, the finest first."""
        indices = sorted(set(self.taps))
        features = self.model.forward_intermediates(
            x, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return [
            operation(features[indices.index(tap)]) for operation, tap in zip(operations(self), self.taps, strict=True)
        ]


def operations(pyramid: XCiTPyramid | TimmPyramid) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Return what brings each of the four levels to its stride."""
    return pyramid.fpn1, pyramid.fpn2, pyramid.fpn3, pyramid.fpn4


def make_pyramids(
    reference: nn.Module, names: tuple[str, ...], randomize: Callable[[nn.Module], None]
) -> dict[str, nn.Module]:
    """Build competitors of equal weights on one of timm's models.

    Args:
        reference: timm's, with its weights.
        names: "timm" and forms of XCA.
        randomize: fills what timm's model does not have, the deconvolutions.
    """
    like = XCiTPyramid(from_timm(reference))
    for operation in operations(like):
        randomize(operation)
    modules: dict[str, nn.Module] = {}
    for name in names:
        if name == "timm":
            modules[name] = TimmPyramid(reference, like)
            continue
        model = from_timm(reference)
        model.set_attn_form(name)  # type: ignore[arg-type]
        modules[name] = XCiTPyramid(model)
        modules[name].load_state_dict(like.state_dict())
    return modules


def make_images(case: PyramidCase, draw: torch.Generator) -> Tensor:
    """Return a batch of noise of the case's size, padded."""
    images = torch.randn(case.batch_size, 3, case.height, case.width, generator=draw)
    return F.pad(images, (0, -case.width % MULTIPLE, 0, -case.height % MULTIPLE))


def only_rounding(module: nn.Module) -> frozenset[str]:
    """Return the parameters whose exact gradient is zero: a bias before a batch norm, which takes it out again.

    What is left of it is rounding, which no two competitors share.
    """
    fine = module.fpn1
    normed = isinstance(fine, nn.Sequential) and any(isinstance(part, nn.BatchNorm2d) for part in fine)
    return frozenset({"fpn1.0.bias"} if normed else ())


def training_step(
    module: nn.Module, call: Callable[..., Any], x: Tensor, draw: torch.Generator, clear: Callable[[], None]
) -> Callable[[], list[Tensor]]:
    """Return forward and backward passes as one call; the gradients of the levels are drawn once."""
    with torch.no_grad():
        shapes = [level.shape for level in copy.deepcopy(module).eval()(x)]
    cotangents = [torch.randn(shape, generator=draw).to(x) for shape in shapes]

    def step() -> list[Tensor]:
        clear()
        levels = call(x)
        torch.autograd.backward(levels, cotangents)
        return [level.detach() for level in levels]

    return step
