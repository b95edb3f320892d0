"""Instances drawn into their image: boxes, translucent masks with outlines, and what each is called.

Drawn at the size at which the picture is shown: a large image is scaled down first, a small one enlarged, so that lines
and letters have the same size in every picture. Masks are made at that size too, with smooth edges.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from xcit.errors import ConfigError, ShapeError
from xcit.inference.detections import INSIDE, Detections
from xcit.report.colours import GROUND
from xcit.report.lettering import drawable, font, shortened

MAX_SIDE = 2000
"""Pixels of the longer side of a picture, at most."""
MIN_SIDE = 640
"""A smaller image is enlarged to this."""
NARROW = 120
"""A picture that is narrower stands on a ground of this breadth, so that there is room for words."""
OPACITY = 0.42
"""Of a mask."""
COLOURS = (
    *((230, 57, 70), (29, 120, 240), (255, 159, 28), (22, 163, 94), (155, 81, 224), (0, 178, 202)),
    *((241, 91, 181), (139, 195, 42), (121, 85, 72), (254, 215, 60), (63, 81, 181), (0, 137, 123)),
)
"""Of the first classes or instances; the others' follow by the golden section of the colour circle."""
LIGHT = 0.34
"""Letters on colours of this luminance or more are dark."""
_GOLDEN = (math.sqrt(5) - 1) / 2

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, ends exclusive."""


class _Canvas(NamedTuple):
    """A picture, and where the image lies on it."""

    picture: Image.Image
    image: Rectangle
    line: int
    """Width of a box's line in pixels."""
    letters: int
    """Size of the letters in pixels."""


def draw_detections(
    image: Image.Image,
    detections: Detections,
    *,
    colours: Literal["class", "instance"] = "class",
    max_side: int | None = MAX_SIDE,
) -> Image.Image:
    """Draw what was found in an image.

    Args:
        image: the one that was looked at, upright, of mode "RGB" or one that Pillow converts to it.
        detections: without an error. Of instances that overlap, the larger ones lie below.
        colours: "class" gives all of a class one colour, "instance" each its own, which tells neighbours apart where
            there are few classes.
        max_side: a larger image is drawn scaled down to this longer side, in pixels; None draws any at its own size.
            An image with a longer side below 640 pixels is enlarged to that, or to ``max_side`` if that is less.

    Returns:
        An RGB picture. A very narrow one stands on a light ground, with room for words beside it.

    Raises:
        ConfigError: ``colours`` is another, or ``max_side`` below 64.
        ShapeError: the image has another size than the detections are for.
    """
    if colours not in ("class", "instance"):
        raise ConfigError(f"colours is {colours!r}; it must be 'class' or 'instance'.")
    if max_side is not None and max_side < 64:
        raise ConfigError(f"max_side is {max_side}; it must be 64 or more, or None for the image's own size.")
    if detections.error is not None:
        raise ConfigError(f"There is nothing to draw: {detections.error}")
    if (image.height, image.width) != detections.size:
        raise ShapeError(
            f"The image is {image.height} x {image.width}, the detections are for one of {detections.size[0]} x "
            f"{detections.size[1]}; draw them into the image that was looked at, upright."
        )
    canvas = _canvas(image, max_side)
    x0, y0, x1, y1 = canvas.image
    shown = detections.resized((y1 - y0, x1 - x0))
    kinds = detections.labels.tolist() if colours == "class" else range(len(shown))
    palette = [colour_of(kind) for kind in kinds]
    sides = np.maximum(0, shown.boxes[:, 2:] - shown.boxes[:, :2])
    order = np.argsort(-sides.prod(axis=1), kind="stable").tolist()  # the largest first
    if shown.squares is not None:
        _draw_masks(canvas, shown, palette, order)
    boxes = [_on_canvas(box, canvas) for box in shown.boxes.tolist()]
    _draw_boxes(canvas, boxes, palette, order)
    words = [f"{name} {score:.2f}" for name, score in zip(shown.names, shown.scores.tolist(), strict=True)]
    _draw_words(canvas, boxes, palette, words)
    return canvas.picture


def colour_of(number: int) -> Colour:
    """Return the colour of a class or an instance, red, green and blue from 0 to 255; near numbers differ much."""
    if number < len(COLOURS):
        return COLOURS[number]
    step = number - len(COLOURS)
    red, green, blue = colorsys.hls_to_rgb((0.07 + step * _GOLDEN) % 1, (0.42, 0.56, 0.68)[step % 3], 0.72)
    return round(255 * red), round(255 * green), round(255 * blue)


def _canvas(image: Image.Image, max_side: int | None) -> _Canvas:
    longest = max(image.size)
    limit = longest if max_side is None else max_side
    scale = min(limit, max(longest, MIN_SIDE if max_side is None else min(MIN_SIDE, limit))) / longest
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    picture = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if size != image.size:
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        picture = picture.resize(size, method, reducing_gap=3.0)
    elif picture is image:
        picture = image.copy()
    room = min(NARROW, max(size))
    whole = max(room, size[0]), max(room, size[1])
    left, top = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    if whole != size:
        ground = Image.new("RGB", whole, GROUND)
        ground.paste(picture, (left, top))
        picture = ground
    line = max(2, round(max(size) / 640))
    return _Canvas(picture, (left, top, left + size[0], top + size[1]), line, min(26, max(12, round(max(size) / 64))))


def _on_canvas(box: Sequence[float], canvas: _Canvas) -> Rectangle:
    """Return a box in whole pixels of the picture, at least one pixel large and within the image."""
    left, top, right, bottom = canvas.image
    x0 = min(max(left + round(box[0]), left), right - 1)
    y0 = min(max(top + round(box[1]), top), bottom - 1)
    return x0, y0, min(max(left + round(box[2]), x0 + 1), right), min(max(top + round(box[3]), y0 + 1), bottom)


def _draw_masks(canvas: _Canvas, shown: Detections, palette: list[Colour], order: list[int]) -> None:
    """Lay the masks over the image, the largest first, each with an outline just within it."""
    left, top = canvas.image[:2]
    pixels = np.asarray(canvas.picture.crop(canvas.image)).astype(np.float32)
    for i in order:
        y0, x0, values = shown.cropped_probabilities(i)
        if not values.size:
            continue
        rows, columns = values.shape
        under = pixels[y0 : y0 + rows, x0 : x0 + columns]
        depth = _depth(values)
        inside = (depth + 0.5).clip(0, 1)
        # within half a pixel of either edge of the line it fades
        outline = (canvas.line / 2 + 0.5 - np.abs(depth - canvas.line / 2)).clip(0, 1)
        share = np.maximum(OPACITY * inside, 0.95 * outline)[..., None]
        under += share * (np.array(palette[i], np.float32) - under)
    canvas.picture.paste(Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)), (left, top))


def _depth(values: np.ndarray) -> np.ndarray:
    """Return how far inside the mask's edge each pixel lies, in pixels, negative outside; good near the edge only."""
    if min(values.shape) < 2:
        return np.where(values >= INSIDE, 9.0, -9.0).astype(np.float32)
    slope = np.hypot(*np.gradient(values))
    return ((values - INSIDE) / np.maximum(slope, 1e-4)).clip(-9, 99)


def _draw_boxes(canvas: _Canvas, boxes: list[Rectangle], palette: list[Colour], order: list[int]) -> None:
    draw = ImageDraw.Draw(canvas.picture)
    for i in order:
        x0, y0, x1, y1 = boxes[i]
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=palette[i], width=min(canvas.line, x1 - x0, y1 - y0))


def _draw_words(canvas: _Canvas, boxes: list[Rectangle], palette: list[Colour], words: list[str]) -> None:
    """Write on each instance what it is; the surest last, so that nothing covers it, and first to choose its place."""
    letters = font(canvas.letters)
    pad_x, pad_y = max(3, canvas.letters // 3), max(1, canvas.letters // 6)
    height = round(canvas.letters * 1.2) + 2 * pad_y
    W, H = canvas.picture.size
    texts = [shortened(drawable(each), W - 2 * pad_x, canvas.letters) for each in words]
    taken: list[Rectangle] = []
    for box, text in zip(boxes, texts, strict=True):
        width = min(W, math.ceil(letters.getlength(text)) + 2 * pad_x)
        taken.append(_place(box, width, height, (W, H), taken))
    draw = ImageDraw.Draw(canvas.picture)
    for i in reversed(range(len(taken))):
        x0, y0, x1, y1 = taken[i]
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=palette[i])
        draw.text((x0 + pad_x, y0 + pad_y), texts[i], fill=_readable_on(palette[i]), font=letters)


def _place(box: Rectangle, width: int, height: int, size: tuple[int, int], taken: list[Rectangle]) -> Rectangle:
    """Return the first place around a box where words cover no others, or else the one where they cover least."""
    x0, y0, x1, y1 = box
    candidates = [
        (x, y) for y in (y0 - height, y0, y1, y1 - height) for x in (x0, x1 - width) if 0 <= y <= size[1] - height
    ] or [(x0, min(max(0, y0), max(0, size[1] - height)))]
    places = []
    for x, y in candidates:
        left = min(max(0, x), max(0, size[0] - width))
        places.append((left, y, left + width, y + height))
    return min(places, key=lambda place: sum(_shared(place, other) for other in taken))


def _shared(a: Rectangle, b: Rectangle) -> int:
    """Return how many pixels two rectangles have in common."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _readable_on(colour: Colour) -> Colour:
    """Return white for dark and middling colours, ink for light ones, by WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (255, 255, 255) if luminance < LIGHT else (17, 24, 39)
