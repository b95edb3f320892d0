"""From a segmenter's logits at stride 4 to a label and a probability for every pixel, in bounded memory.

As published: an image is scaled so that its shorter side is 512 px, the longer at most 2048; its logits are brought to
that size and then to the image's own, bilinearly; each pixel gets the class with the highest. With several scales, or
mirrored images too, the probabilities are averaged at the image's own size.

K logits for every pixel of a large image would not fit in memory (13 GiB for 150 classes of 6000 x 4000 px). Hence they
are made for a strip of rows after the other; every row comes out as though all had been made at once.

Legend: as in ``segment_windows``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xcit.errors import ConfigError, ShapeError
from xcit.inference.segment_windows import (
    LEAST,
    STRIDE,
    LowLogits,
    Picture,
    WindowLogits,
    whole_logits,
)
from xcit.inference.stream import evaluating
from xcit.models.row_maps import between
from xcit.models.segmentation import SegmentationModel
from xcit.ops.image_size import scaled_size

STRIP_BYTES = 2**26
"""Of logits that are brought to the image's size at once."""
OVERLAP = 1 / 3
"""Of a window with the next, where no stride is given."""


class View(NamedTuple):
    """One look at an image."""

    size: tuple[int, int]
    """h, w in pixels."""
    flip: bool
    """Whether it is mirrored."""


class Labelled(NamedTuple):
    """Every pixel of an image, (H, W)."""

    labels: np.ndarray
    """uint8, from 256 classes on uint16: the most probable class."""
    scores: np.ndarray
    """float16: its probability."""
    finite: bool
    """Whether the logits of every pixel's class were finite."""


def segment_image(
    model: SegmentationModel,
    image: Tensor,
    *,
    image_size: int | None = None,
    max_size: int | None = None,
    native: bool = False,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> Labelled:
    """Segment one image; without options as published.

    Args:
        model: used where it lies and left in the mode that it had.
        image: (C, H, W) uint8, of any size, on the CPU.
        image_size: the image is scaled so that its shorter side has so many pixels; None for the model's own.
        max_size: and its longer at most so many; None for the model's own.
        native: the image keeps its own size instead.
        scales: of that size, of which the probabilities are averaged.
        flip: average with the mirrored image's too.
        window: go through the scaled image by windows of this side, a multiple of 32 px; None for the whole at once.
        stride: from a window to the next, a multiple of 4 px; None for two thirds of the window.
        batch_size: windows at once.

    Raises:
        ConfigError: an option out of its range.
        ShapeError: an image that is none.
    """
    check_options(
        image_size=image_size, max_size=max_size, scales=scales, window=window, stride=stride, batch_size=batch_size
    )
    if image.ndim != 3 or image.dtype != torch.uint8 or 0 in image.shape:
        raise ShapeError(f"Expected an image (C, H, W) of uint8; got {tuple(image.shape)} of {image.dtype}.")
    H, W = image.shape[1:]
    sides = None if native else (image_size or model.image_size, max_size or model.max_size)
    looks: list[LowLogits] = []
    with torch.inference_mode(), evaluating(model):
        for view in views((H, W), sides, scales, flip):
            picture = Picture(image, view.size, model.mean, model.std)
            if window is None:
                looks += whole_logits(model, [picture], flip=view.flip)
            else:
                step = stride or default_stride(window)
                looks.append(WindowLogits(model, picture, window, step, flip=view.flip, batch_size=batch_size))
        return labelled(looks, (H, W))


def views(size: tuple[int, int], sides: tuple[int, int] | None, scales: Sequence[float], flip: bool) -> list[View]:
    """Return the looks at an image.

    Args:
        size: H, W.
        sides: its shorter side becomes the first, its longer at most the second, in pixels; None for its own size.
        scales: of that.
        flip: each mirrored too.
    """
    found = []
    for scale in scales:
        if sides is None:
            h, w = (max(1, math.floor(side * scale + 0.5)) for side in size)
        else:
            low, high = (max(1, math.floor(side * scale + 0.5)) for side in sides)
            h, w = scaled_size(*size, low, high)
        found += [View((h, w), False)] + [View((h, w), True)] * flip
    return found


def default_stride(window: int) -> int:
    """Return the stride of windows where none is given: two thirds of the window, a multiple of 4."""
    return int(window * (1 - OVERLAP)) // STRIDE * STRIDE


def labelled(looks: Sequence[LowLogits], size: tuple[int, int], *, strip_bytes: int = STRIP_BYTES) -> Labelled:
    """Return the most probable class of every pixel and its probability.

    Args:
        looks: as of ``labelled_strips``.
        size: likewise.
        strip_bytes: likewise.
    """
    labels = np.empty(size, label_type(looks[0].shape[0]))
    scores = np.empty(size, np.float16)
    finite = True
    for begin, strip in labelled_strips(looks, size, strip_bytes=strip_bytes):
        rows = slice(begin, begin + len(strip.labels))
        labels[rows], scores[rows] = strip.labels, strip.scores
        finite = finite and strip.finite
    return Labelled(labels, scores, finite)


def labelled_strips(
    looks: Sequence[LowLogits],
    size: tuple[int, int],
    *,
    strip_bytes: int = STRIP_BYTES,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[tuple[int, Labelled]]:
    """Yield the most probable class of every pixel and its probability, a strip of rows after the other.

    Args:
        looks: the logits of the image; of several, the probabilities are averaged.
        size: H, W of the image.
        strip_bytes: that the logits of a strip may take; no less than one row is made at once.
        begin: the first row.
        end: behind the last; None for all.

    Yields:
        The first row of the strip, and the strip.
    """
    H, W = size
    K = looks[0].shape[0]
    dtype = label_type(K)
    widest = max(W, *(look.extent[1] for look in looks))
    step = max(1, strip_bytes // (4 * K * widest))
    end = H if end is None else end
    for first in range(begin, end, step):
        rows = first, min(end, first + step)
        top, label, score = _best(strip_logits(look, size, *rows) for look in looks)
        finite = bool(top.isfinite().all())
        yield first, Labelled(label.cpu().numpy().astype(dtype), score.half().cpu().numpy(), finite)


def strip_logits(look: LowLogits, size: tuple[int, int], begin: int, end: int) -> Tensor:
    """Return the logits of some rows of an image at its own size, (K, end - begin, W).

    What ``interpolate(interpolate(low, extent)[..., :h, :w], (H, W))`` has in these rows.

    Args:
        look: the logits at stride 4.
        size: H, W.
        begin: the first row.
        end: behind the last row.
    """
    upper, lower, t = between(torch.arange(begin, end), look.size[0], size[0])
    first, last = (begin, end - 1) if look.size[0] == size[0] else (int(upper[0]), int(lower[-1]))
    above, below, s = between(torch.arange(first, last + 1), look.shape[1], look.extent[0])
    start = int(above[0])
    strip = look.rows(start, int(below[-1]) + 1)
    # Rows before columns: that is before the strip has its whole width.
    strip = _mixed(strip, above - start, below - start, s)
    if look.size[0] != size[0]:
        strip = _mixed(strip, upper - first, lower - first, t)
    strip = _widened(strip, look.extent[1])[..., : look.size[1]]
    return _widened(strip, size[1])


def check_options(
    *,
    image_size: int | None,
    max_size: int | None,
    scales: Sequence[float],
    window: int | None,
    stride: int | None,
    batch_size: int | None,
) -> None:
    """Refuse options out of their range, all at once.

    Raises:
        ConfigError: which, and what they must be.
    """
    counts = {"image_size": (image_size, LEAST), "max_size": (max_size, LEAST), "batch_size": (batch_size, 1)}
    problems = [
        f"{name} is {value}; it must be {least} or more"
        for name, (value, least) in counts.items()
        if value is not None and value < least
    ]
    if image_size is not None and max_size is not None and image_size > max_size >= LEAST:
        problems.append(f"max_size is {max_size}, less than image_size, {image_size}")
    listed = isinstance(scales, Sequence) and not isinstance(scales, str)
    if not listed or not all(isinstance(scale, Real) for scale in scales):
        problems.append(f"scales is {scales!r}; it must be a list of numbers, such as [0.5, 1.0]")
    elif not scales:
        problems.append("scales is empty; it must have one number or more")
    else:
        problems += [
            f"scales has {scale}; each must be above 0 and at most 8"
            for scale in scales
            if not (math.isfinite(scale) and 0 < scale <= 8)
        ]
    if window is not None and (window < LEAST or window % LEAST):
        problems.append(f"window is {window}; it must be a multiple of {LEAST} px, such as {_multiple(window)}")
    elif stride is not None and window is not None:
        most = window * 7 // 8 // STRIDE * STRIDE
        if stride % STRIDE or not STRIDE <= stride <= most:
            problems.append(
                f"stride is {stride}; it must be a multiple of {STRIDE} px, at most {most} with windows of {window} px,"
                f" which overlap so that no seams are seen"
            )
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def label_type(num_classes: int) -> type[np.uint8] | type[np.uint16]:
    """Return the type of label maps: uint8, or uint16 from 256 classes on.

    The highest value of either is left free: in files of masks it stands for pixels that are ignored.

    Raises:
        ConfigError: more than 65,535 classes, which no file of masks holds.
    """
    if num_classes >= 2**16:
        raise ConfigError(f"The model has {num_classes:,} classes; maps of labels hold at most {2**16 - 1:,}.")
    return np.uint8 if num_classes < 2**8 else np.uint16


def _best(strips: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest logit (or mean probability), its class and its probability, each (rows, W)."""
    first = next(strips)
    second = next(strips, None)
    if second is None:
        top, label = first.max(dim=0)
        return top, label, first.sub(top).exp_().sum(dim=0).reciprocal_()
    total, count = first.softmax(dim=0) + second.softmax(dim=0), 2
    del first, second
    for strip in strips:
        total += strip.softmax(dim=0)
        count += 1
    top, label = total.div_(count).max(dim=0)
    return top, label, top


def _mixed(strip: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    device = strip.device
    a, b = strip.index_select(1, first.to(device)), strip.index_select(1, second.to(device))
    return torch.lerp(a, b, share.to(strip)[:, None])


def _widened(strip: Tensor, width: int) -> Tensor:
    K, rows, columns = strip.shape
    if columns == width:
        return strip
    wider = F.interpolate(strip.reshape(1, K * rows, columns), width, mode="linear", align_corners=False)
    return wider.view(K, rows, width)


def _multiple(window: int) -> int:
    return max(1, round(window / LEAST)) * LEAST
