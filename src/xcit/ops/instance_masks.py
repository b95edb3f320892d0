"""Masks of instances: from an image's size to a small square over the instance's box, and back.

Legend: n instances, S side of the square, (H, W) size of the image in pixels. Boxes are x0, y0, x1, y1 in pixels; pixel
(i, j) covers [j, j + 1] x [i, i + 1].
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import roi_align


def crop_masks(
    masks: Float[Tensor, "instances height width"], boxes: Float[Tensor, "instances 4"], side: int
) -> Float[Tensor, "instances side side"]:
    """Return what of each mask lies in its box, on a square grid: 1 where at least half of a cell is covered, else 0.

    A cell's cover is the mean of bilinear samples, about one a pixel.

    Args:
        masks: 0 or 1.
        boxes: one a mask.
        side: S.

    Source: the training targets of the released detectors (mmdetection's ``BitmapMasks.crop_and_resize``).
    """
    if not len(masks):
        return masks.new_zeros((0, side, side))
    index = torch.arange(len(masks), device=boxes.device, dtype=boxes.dtype)
    covered = roi_align(masks[:, None], torch.cat((index[:, None], boxes), 1), side, 1.0, 0, aligned=True)[:, 0]
    return (covered >= 0.5).to(masks.dtype)


def mask_window(box: Float[Tensor, " 4"], size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Return y0, y1, x0, x1 of the pixels that take anything of a box's square, ends exclusive.

    They reach half a cell beyond the box, as far as the image goes; there are none for a box outside it.

    Args:
        box: in pixels.
        size: H, W.
        side: S.
    """
    x0, y0, x1, y1 = box.tolist()
    y, x = (y1 - y0) / side / 2, (x1 - x0) / side / 2
    top, left = max(0, math.floor(y0 - y)), max(0, math.floor(x0 - x))
    bottom, right = min(size[0], math.ceil(y1 + y)), min(size[1], math.ceil(x1 + x))
    return top, max(top, bottom), left, max(left, right)


def paste_mask(
    square: Float[Tensor, "side side"],
    box: Float[Tensor, " 4"],
    window: tuple[int, int, int, int],
) -> Float[Tensor, "rows columns"]:
    """Return a mask's values at the pixels of a window: the square, stretched over its box and sampled bilinearly.

    Value (a, b) of the square stands at the centre of its cell; beyond the outermost centres it fades to 0 within a
    cell's width.

    Args:
        square: values of any range, such as probabilities.
        box: where the square lies.
        window: y0, y1, x0, x1 of ``mask_window``.

    Source: the released detectors (mmdetection's ``_do_paste_mask``), computed separably: exact, and in the memory of
    the window alone.
    """
    top, bottom, left, right = window
    x0, y0, x1, y1 = box.double().unbind()
    rows = _interpolation(top, bottom, y0, y1, square.shape[0]).to(square.dtype)
    columns = _interpolation(left, right, x0, x1, square.shape[1]).to(square.dtype)
    return rows @ square @ columns.T


def paste_masks(
    squares: Float[Tensor, "instances side side"], boxes: Float[Tensor, "instances 4"], size: tuple[int, int]
) -> Float[Tensor, "instances height width"]:
    """Return each square's values at every pixel of the image: 0 outside its box.

    Args:
        squares: values of any range, such as probabilities, of which 0.5 and more make the mask.
        boxes: one a square.
        size: H, W.

    Cost: n H W numbers. For large images take ``mask_window`` and ``paste_mask`` an instance at a time.
    """
    values = squares.new_zeros((len(squares), *size))
    for i, (square, box) in enumerate(zip(squares, boxes, strict=True)):
        top, bottom, left, right = window = mask_window(box, size, squares.shape[-1])
        values[i, top:bottom, left:right] = paste_mask(square, box, window)
    return values


def _interpolation(start: int, end: int, low: Tensor, high: Tensor, side: int) -> Tensor:
    """Return how much of each cell of a side goes into each pixel: (end - start, side), float64."""
    centres = torch.arange(start, end, device=low.device, dtype=torch.float64) + 0.5
    place = (centres - low) / (high - low) * side - 0.5  # in cells; a cell's centre is a whole number
    distance = (place[:, None] - torch.arange(side, device=low.device)).abs()
    return (1 - distance).clamp(min=0)
