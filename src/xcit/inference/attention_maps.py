"""Where a classifier looks: the class token's attention over the patches, at the image's size and laid over it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xcit.errors import ShapeError
from xcit.models.xcit import XCiT

HEAT = np.array([(36, 20, 90), (128, 28, 130), (214, 60, 92), (250, 142, 50), (252, 236, 130)], dtype=np.float64)
"""Colours from little attention to much, evenly spaced and ever brighter: violet, purple, red, orange, yellow."""


def attention_maps(
    model: XCiT, images: Float[Tensor, "batch chans height width"], size: tuple[int, int] | None = None
) -> Float[Tensor, "batch heads rows columns"]:
    """Return the attention that the class token pays to each place of the image, in its last layer.

    Args:
        model: on any device; it is run in eval mode and without gradients, and left in the mode it was in.
        images: as the model takes them; they are moved to its device.
        size: height and width of the maps; None for the images' own.

    Returns:
        (B, heads, *size), float32, on the CPU: multiples of even attention. 1 is a place's share if the class token
        attended to all patches evenly, 2 is twice that, 0 is none. Patches are joined by bicubic interpolation.

    Source: figure 4 of the paper shows such maps.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            attention = model.class_attention(images.to(device)).float().cpu()
    finally:
        model.train(was_training)
    multiples = attention / attention.mean(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    maps = F.interpolate(multiples, size=size or tuple(images.shape[-2:]), mode="bicubic", align_corners=False)
    return maps.clamp_min(0)  # bicubic interpolation overshoots


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
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    heat = attention.detach().float().cpu()[None, None]
    if heat.shape[-2:] != pixels.shape[:2]:
        heat = F.interpolate(heat, size=pixels.shape[:2], mode="bicubic", align_corners=False)
    strength = heat[0, 0].clamp_min(0).double().numpy()
    strength /= max(strength.max(), np.finfo(np.float64).tiny)
    steps = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(strength, steps, HEAT[:, channel]) for channel in range(3)], axis=-1)
    alpha = opacity * np.sqrt(strength)[..., None]  # the root lets middling attention show
    return Image.fromarray(np.rint((1 - alpha) * pixels + alpha * colour).astype(np.uint8))
