"""Label maps drawn over their image: translucent colours with outlines, and a legend of the classes that are there.

Drawn at the size at which the picture is shown: a large image is scaled down first, a small one enlarged, so that lines
and letters have the same size in every picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from xcit.errors import ConfigError, ShapeError
from xcit.inference.segmentations import class_counts
from xcit.report.colours import GREY, GROUND, INK
from xcit.report.detections import MAX_SIDE, _Canvas, _canvas
from xcit.report.lettering import drawable, font, shortened

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Shares of red, green and blue in how bright a pixel is (ITU-R BT.601)."""
OPACITY = 0.55
"""Of the colours over the image."""
OUTLINE = 0.95
"""Likewise, where a class meets another."""
NARROW = 240
"""A legend is at least so broad, in pixels; a narrower picture stands in the middle above it."""
MOST = 40
"""Classes of a legend; those with less of the image are counted together."""
STRIP = 2**20
"""Pixels that are coloured at once."""


class _Entry(NamedTuple):
    """A line of the legend."""

    name: str
    share: str
    colour: tuple[int, int, int] | None


def draw_segmentation(
    image: Image.Image,
    labels: np.ndarray,
    class_names: Sequence[str],
    palette: np.ndarray,
    *,
    opacity: float = OPACITY,
    legend: bool = True,
    max_side: int | None = MAX_SIDE,
) -> Image.Image:
    """Draw a map of classes over its image, which is grey where it is coloured.

    Args:
        image: upright, of mode "RGB" or one that Pillow converts to it.
        labels: (H, W) classes from 0, of any integer type: what a segmenter saw, or a mask. A negative label means that
            the pixel is ignored: it stays as it is.
        class_names: K names.
        palette: (K, 3) uint8: red, green and blue of each class.
        opacity: of the colours, 0 to 1. Outlines are nearly opaque.
        legend: whether name, colour and share of the image stand below the picture, the largest first.
        max_side: a larger image is drawn scaled down to this longer side, in pixels; None draws any at its own size.
            An image with a longer side below 640 pixels is enlarged to that, or to ``max_side`` if that is less. The
            legend comes on top of it.

    Returns:
        An RGB picture. A very narrow one stands on a light ground.

    Raises:
        ConfigError: ``opacity`` outside 0 to 1, or ``max_side`` below 64.
        ShapeError: image and labels have different sizes, or there are labels without a name or a colour.
    """
    if not 0 <= opacity <= 1:
        raise ConfigError(f"opacity is {opacity}; it must be between 0 and 1.")
    if max_side is not None and max_side < 64:
        raise ConfigError(f"max_side is {max_side}; it must be 64 or more, or None for the image's own size.")
    if labels.shape != (image.height, image.width):
        raise ShapeError(
            f"The image is {image.height} x {image.width}, the labels are {' x '.join(map(str, labels.shape))}; draw "
            f"them into the image that they are of, upright."
        )
    K = len(class_names)
    palette = np.asarray(palette)
    if palette.shape != (K, 3) or int(labels.max()) >= K:
        raise ShapeError(
            f"There are {K} class_names, a palette of the shape {palette.shape}, and labels up to {labels.max()}; each "
            f"label needs a name and a colour."
        )
    canvas = _canvas(image, max_side)
    _colour(canvas, labels, palette, opacity)
    return _with_legend(canvas, _entries(labels, class_names, palette)) if legend else canvas.picture


def _colour(canvas: _Canvas, labels: np.ndarray, palette: np.ndarray, opacity: float) -> None:
    """Lay the colours over the image, a strip of rows after the other."""
    x0, y0, x1, y1 = canvas.image
    width, height = x1 - x0, y1 - y0
    H, W = labels.shape
    rows = ((np.arange(height) + 0.5) * (H / height)).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * (W / width)).astype(np.int64)
    colours = np.vstack([palette, [[0, 0, 0]]]).astype(np.float32)  # the last, -1, is not used
    reach = max(1, canvas.line // 2)
    step = max(1, STRIP // width)
    for start in range(0, height, step):
        end = min(height, start + step)
        above, below = max(0, start - reach), min(height, end + reach)
        shown = labels[rows[above:below, None], columns].astype(np.int32)
        edges = _edges(shown, reach)[start - above : end - above]
        shown = shown[start - above : end - above]
        place = (x0, y0 + start, x1, y0 + end)
        pixels = np.asarray(canvas.picture.crop(place)).astype(np.float32)
        share = np.where(edges, np.float32(max(opacity, OUTLINE)), np.float32(opacity))
        share[shown < 0] = 0
        if opacity:  # grey below: a colour of the image's own would make another of the class's
            pixels = np.where((shown >= 0)[..., None], (pixels @ LUMA)[..., None], pixels)
        pixels += share[..., None] * (colours[np.maximum(shown, -1)] - pixels)
        canvas.picture.paste(Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)), place[:2])


def _edges(labels: np.ndarray, reach: int) -> np.ndarray:
    """Return which pixels have another class at most so many pixels away, up, down or sideways; of the same shape."""
    edges = np.zeros(labels.shape, bool)
    for distance in range(1, reach + 1):
        down = labels[distance:] != labels[:-distance]
        edges[distance:] |= down
        edges[:-distance] |= down
        across = labels[:, distance:] != labels[:, :-distance]
        edges[:, distance:] |= across
        edges[:, :-distance] |= across
    return edges


def _entries(labels: np.ndarray, class_names: Sequence[str], palette: np.ndarray) -> list[_Entry]:
    """Return the legend's lines: the classes that are there, the largest first."""
    ignored = labels < 0
    num_ignored = int(ignored.sum()) if labels.dtype.kind == "i" else 0
    counts = class_counts(labels[~ignored] if num_ignored else labels, len(class_names))
    order = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]
    if len(order) > MOST:
        order, rest = order[: MOST - 1], order[MOST - 1 :]
    else:
        rest = []
    entries = []
    for k in order:
        red, green, blue = palette[k].tolist()
        entries.append(_Entry(class_names[k], _percent(counts[k] / labels.size), (red, green, blue)))
    if rest:
        entries.append(_Entry(f"{len(rest)} more classes", _percent(counts[rest].sum() / labels.size), None))
    if num_ignored:
        entries.append(_Entry("(ignored)", _percent(num_ignored / labels.size), None))
    return entries


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _with_legend(canvas: _Canvas, entries: Sequence[_Entry]) -> Image.Image:
    """Return the picture with a legend below it, in as many columns as fit side by side."""
    picture = canvas.picture
    width = max(NARROW, picture.width)
    letters = min(canvas.letters, max(12, width // 24))  # below a long narrow picture they must not be too large
    face = font(letters)
    line, gap = round(letters * 1.6), letters
    swatch = letters
    inner = width - 2 * gap
    numbers = max(math.ceil(face.getlength(entry.share)) for entry in entries)
    beside = swatch + letters // 2 + letters + numbers
    names = [drawable(entry.name) for entry in entries]
    longest = min(max(math.ceil(face.getlength(name)) for name in names), max(1, inner - beside), 16 * letters)
    column = beside + longest
    num_columns = max(1, min(len(entries), (inner + 2 * gap) // (column + 2 * gap)))
    num_rows = math.ceil(len(entries) / num_columns)
    sheet = Image.new("RGB", (width, picture.height + 2 * gap + num_rows * line), GROUND)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (entry, name) in enumerate(zip(entries, names, strict=True)):
        x = gap + i // num_rows * (column + 2 * gap)
        y = picture.height + gap + i % num_rows * line
        top = y + (line - swatch) // 2
        if entry.colour is not None:
            box = (x, top, x + swatch - 1, top + swatch - 1)
            draw.rectangle(box, fill=entry.colour, outline=GREY)
        ink = GREY if entry.colour is None else INK
        middle = y + line / 2
        draw.text(
            (x + swatch + letters // 2, middle), shortened(name, longest, letters), fill=ink, font=face, anchor="lm"
        )
        draw.text((x + column, middle), entry.share, fill=GREY, font=face, anchor="rm")
    return sheet
