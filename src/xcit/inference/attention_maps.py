"""Where a classifier looks: the class token's attention over the patches, exactly as the forward pass computes it.

Legend: B images, h heads, (Hp, Wp) patch grid, N = Hp * Wp.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xcit.errors import CheckpointError, ConfigError, ShapeError
from xcit.inference.stream import evaluating
from xcit.models.xcit import XCiT

HEAT = np.array([(36, 20, 90), (128, 28, 130), (214, 60, 92), (250, 142, 50), (252, 236, 130)], dtype=np.float64)
"""Colours from little attention to much, evenly spaced and ever brighter: violet, purple, red, orange, yellow."""


class ClassAttention(NamedTuple):
    """How the class token divides its attention."""

    patches: np.ndarray
    """(B, h, Hp, Wp): of what a head pays to patches, the share of each; sums to one over the patches."""
    own: np.ndarray
    """(B, h): of all that a head pays, the share that the class token keeps for itself, 0 to 1. The forward pass gives
    a patch ``patches * (1 - own)``."""

    @property
    def mean(self) -> np.ndarray:
        """(B, Hp, Wp): the heads' mean, which sums to one too."""
        return self.patches.mean(axis=1)


def class_attention(model: XCiT, images: Float[Tensor, "batch chans height width"], layer: int = -1) -> ClassAttention:
    """Return the attention of the class token in one of its layers, on the patch grid.

    Args:
        model: on any device; it is run in eval mode and without gradients, and left in the mode it was in.
        images: as the model takes them, of any size of at least a patch; they are moved to its device and dtype.
        layer: of the class-attention layers, from 0; -1 is the last.

    Returns:
        Float64 arrays, computed in the model's own precision.

    Raises:
        ConfigError: the model has no class attention, or no such layer.
        CheckpointError: the attention is not finite.
    """
    shares = _shares(model, images, layer).double()
    total = shares.sum(dim=(-2, -1), keepdim=True)
    patches = shares / total.clamp_min(torch.finfo(torch.float64).tiny)
    return ClassAttention(patches.numpy(), (1 - total[..., 0, 0]).clamp_min(0).numpy())


def attention_maps(
    model: XCiT,
    images: Float[Tensor, "batch chans height width"],
    size: tuple[int, int] | None = None,
    layer: int = -1,
) -> Float[Tensor, "batch heads rows columns"]:
    """Return the attention that the class token pays to each place of the image, to look at.

    Args:
        model: as for ``class_attention``.
        images: as for ``class_attention``.
        size: height and width of the maps; None for the images' own.
        layer: as for ``class_attention``.

    Returns:
        (B, heads, *size), float32, on the CPU: multiples of even attention. 1 is a place's share if the class token
        attended to all patches evenly, 2 is twice that, 0 is none. Patches are joined by bicubic interpolation.

    Raises:
        ConfigError, CheckpointError: as ``class_attention``.

    Source: figure 4 of the paper shows such maps.
    """
    attention = _shares(model, images, layer).float()
    multiples = attention / attention.mean(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    maps = F.interpolate(multiples, size=size or tuple(images.shape[-2:]), mode="bicubic", align_corners=False)
    return maps.clamp_min(0)  # bicubic interpolation overshoots


def channel_attention(model: XCiT, images: Float[Tensor, "batch chans height width"]) -> list[np.ndarray]:
    """Return the matrices with which XCA mixes each head's channels, as ``XCiT.channel_attention`` defines them.

    Args:
        model: as for ``class_attention``.
        images: as for ``class_attention``.

    Returns:
        One (B, heads, d, d) float64 array a block; its last axis sums to one.
    """
    device, dtype = _place(model)
    with torch.inference_mode(), evaluating(model):
        return [matrix.cpu().double().numpy() for matrix in model.channel_attention(images.to(device, dtype))]


def multiples_of_even(patches: np.ndarray) -> np.ndarray:
    """Return shares (..., Hp, Wp) that sum to one as multiples of the share 1 / (Hp * Wp) that each would have."""
    return patches * (patches.shape[-2] * patches.shape[-1])


def mass_mask(patches: np.ndarray, keep: float = 0.6) -> np.ndarray:
    """Return the fewest patches that together hold a given share of the attention.

    Args:
        patches: (..., Hp, Wp), non-negative; each map by itself, in any unit.
        keep: the share, more than 0 and up to 1.

    Returns:
        bool, of the same shape; at least one patch of each map. Of patches with equal attention, of which not all are
        needed, the first ones are taken.

    Raises:
        ConfigError: the share is out of its range.

    Source: the visualisation of Caron et al., "Emerging properties in self-supervised vision transformers", 2021,
        keeps 60 %.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; it must be more than 0 and at most 1.")
    flat = patches.reshape(*patches.shape[:-2], -1).astype(np.float64)
    order = np.argsort(-flat, axis=-1, kind="stable")
    held = np.take_along_axis(flat, order, axis=-1).cumsum(axis=-1)
    # a patch is needed while those before it hold too little; rounding must not ask for one more
    enough = keep * held[..., -1:] * (1 - 1e-12)
    needed = np.concatenate((np.ones_like(held[..., :1], dtype=bool), held[..., :-1] < enough), axis=-1)
    mask = np.zeros_like(needed)
    np.put_along_axis(mask, order, needed, axis=-1)
    return mask.reshape(patches.shape)


def overlay(image: Image.Image, attention: Float[Tensor, "rows columns"], opacity: float = 0.75) -> Image.Image:
    """Lay one attention map over its image: heat where there is attention, the plain image where there is none.

    Args:
        image: of any mode; the part that the model saw.
        attention: non-negative, of any size; its largest value gets the brightest colour.
        opacity: of the brightest colour, 0 to 1.

    Returns:
        RGB, of the image's size.

    Raises:
        ShapeError: the map is not (rows, columns).
    """
    if attention.ndim != 2:
        raise ShapeError(
            f"An attention map is (rows, columns); got {tuple(attention.shape)}. Choose one image and head."
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    heat = attention.detach().float().cpu()[None, None]
    if heat.shape[-2:] != pixels.shape[:2]:
        # bilinear: bicubic interpolation swings below zero around a peak, which the root below would show as holes
        heat = F.interpolate(heat, size=pixels.shape[:2], mode="bilinear", align_corners=False)
    strength = heat[0, 0].clamp_min(0).numpy()
    strength = strength / max(strength.max(), np.finfo(np.float32).tiny)
    colour = heat_colours(strength)
    alpha = opacity * np.sqrt(strength)[..., None]  # the root lets middling attention show
    return Image.fromarray(np.rint((1 - alpha) * pixels + alpha * colour).astype(np.uint8))


def heat_colours(strength: np.ndarray) -> np.ndarray:
    """Return the colours (..., 3) of strengths from 0 to 1, float32 from 0 to 255."""
    steps = np.linspace(0, 1, len(HEAT))
    table = np.stack([np.interp(np.linspace(0, 1, 1024), steps, HEAT[:, c]) for c in range(3)], axis=-1)
    return table.astype(np.float32)[np.rint(strength * 1023).astype(np.intp)]


def _shares(model: XCiT, images: Tensor, layer: int) -> Tensor:
    """Return what each patch gets of the class token's whole attention, (B, h, Hp, Wp), on the CPU."""
    device, dtype = _place(model)
    with torch.inference_mode(), evaluating(model):
        shares = model.class_attention(images.to(device, dtype), layer).cpu()
    if not shares.isfinite().all():
        raise CheckpointError(
            "The model's attention is NaN or infinite: its training has diverged, its file is damaged, or something "
            "overflows in its dtype."
        )
    return shares


def _place(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
