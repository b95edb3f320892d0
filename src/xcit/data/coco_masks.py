"""Masks of instances as COCO has them, polygons and run lengths (RLE): what can be drawn of one, and drawing it.

RLE goes down the columns, one after another, and begins with what is 0. Compressed, its run lengths are a text.
What draws, decodes and encodes is faster-coco-eval's code; it trusts what it is given, so what it is given is looked
at first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from xcit.data.json_values import all_finite, in_short
from xcit.data.parts import plural
from xcit.errors import BackendError, DataError, ShapeError

REACH = 10
"""A polygon may reach this many image sides out of the image; drawing one that reaches further takes any memory."""
MAX_PIXELS = 2**32
"""Run lengths count pixels in 32 bits."""
_MAX_DIGITS = 7
"""Characters of a run length in compressed RLE: 35 bits."""


# --- what can be drawn ------------------------------------------------------------------------------------------------


def usable_segmentation(segmentation: Any, height: int, width: int) -> tuple[Any, list[tuple[str, str]]]:
    """Return what of a segmentation can be drawn, and what is wrong with it.

    Args:
        segmentation: a list of polygons, or RLE.
        height: of the image in pixels.
        width: likewise.

    Returns:
        The segmentation, without the polygons that cannot be drawn, or None if nothing is left; and kinds ("polygon",
        "rle", "rle-size", "segmentation") with what is wrong, such as "has 2 points".
    """
    if isinstance(segmentation, dict):
        fault = _rle_fault(segmentation, height, width)
        return (segmentation, []) if fault is None else (None, [fault])
    if not isinstance(segmentation, list):
        return None, [("segmentation", f"is {in_short(segmentation)}, neither polygons nor RLE")]
    if segmentation and all_finite(segmentation):
        return None, [("segmentation", "is one list of numbers, not a list of polygons")]
    faults = [_polygon_fault(polygon, REACH * max(height, width)) for polygon in segmentation]
    good = [polygon for polygon, fault in zip(segmentation, faults, strict=True) if fault is None]
    return good or None, [("polygon", fault) for fault in faults if fault]


def _polygon_fault(polygon: Any, reach: float) -> str | None:
    if not isinstance(polygon, list) or not all_finite(polygon):
        return "is not a list of finite numbers"
    if len(polygon) % 2:
        return f"has {len(polygon):,} numbers, which are not pairs"
    if len(polygon) < 6:
        return f"has {plural(len(polygon) // 2, 'point')}, fewer than 3"
    if max(polygon) > reach or min(polygon) < -reach:
        return "reaches far out of the image"
    return None if polygon_area(polygon) > 1e-6 else "has no area"


def polygon_area(polygon: Sequence[float]) -> float:
    """Return the area that a polygon x, y, x, y, ... encloses (the shoelace formula); lines that cross may cancel."""
    xs, ys = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
    xs, ys = xs - xs[0], ys - ys[0]  # small numbers, small errors; and nothing from the last point to the first
    return abs(float(xs[:-1] @ ys[1:] - ys[:-1] @ xs[1:])) / 2


def _rle_fault(rle: dict[str, Any], height: int, width: int) -> tuple[str, str] | None:
    size = rle.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all_finite(size):
        return "rle", f"has the size {in_short(size)}, not a height and a width"
    if tuple(size) != (height, width):
        return "rle-size", f"is for {in_short(size[1])} x {in_short(size[0])} px, the image has {width} x {height} px"
    runs = run_lengths(rle.get("counts"))
    if runs is None:
        return "rle", "has counts that are no run lengths"
    if int(runs.sum()) != height * width:
        return "rle", f"counts {int(runs.sum()):,} pixels, the image has {height * width:,}"
    return None


def run_lengths(counts: Any) -> np.ndarray | None:
    """Return the run lengths of RLE, compressed or not, as (n,) int64; None if they cannot be.

    In compressed RLE a number takes five bits a character, the lowest first, with a sixth that says whether another
    follows, as character 48 and up; from the fourth on it is the difference to the one before the last.
    """
    if isinstance(counts, list):
        whole = set(map(type, counts)) <= {int} and all(0 <= run < MAX_PIXELS for run in counts)
        return np.array(counts, dtype=np.int64) if whole and counts else None
    if not isinstance(counts, str | bytes) or not counts:
        return None
    characters = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(characters, dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > _MAX_DIGITS:
        return None
    place = np.arange(len(codes)) - np.repeat(begins, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * place, begins)
    runs -= (codes[ends] >> 4 & 1) << 5 * lengths  # the highest bit is the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs if runs.min() >= 0 else None


# --- drawing ----------------------------------------------------------------------------------------------------------


def mask_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return a segmentation as compressed RLE, {"size": [H, W], "counts": text}, which JSON takes.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...] in pixels, of which the mask is what any of them covers; or RLE
            with a list of run lengths, or compressed as text or bytes.
        height: of the image in pixels.
        width: likewise.

    Raises:
        DataError: it cannot be drawn, or is for another size.
        BackendError: faster-coco-eval is not installed.
    """
    _, faults = usable_segmentation(segmentation, height, width)
    if faults or not segmentation:
        what = f"{faults[0][0].partition('-')[0]} {faults[0][1]}" if faults else "is empty"
        raise DataError(f"A segmentation cannot be drawn: {what}.")
    return draw_rle(segmentation, height, width)


def draw_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return what ``usable_segmentation`` let through as ``mask_rle`` does."""
    if isinstance(segmentation, list):
        # The library takes four numbers for a box, and the type of the first polygon's for that of all.
        polygons = [[float(number) for number in polygon] for polygon in segmentation]
        rles = mask_api().frPyObjects(polygons, height, width)
        rle = rles[0] if len(rles) == 1 else mask_api().merge(rles)  # which is slow
    elif isinstance(segmentation["counts"], list):
        rle = mask_api().frPyObjects({"size": [height, width], "counts": segmentation["counts"]}, height, width)
    else:
        rle = segmentation
    counts = rle["counts"]
    return {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return a segmentation as (height, width) uint8, 1 within and 0 without; ``mask_rle`` says what it may be.

    Raises:
        DataError: it cannot be drawn, or is for another size.
        BackendError: faster-coco-eval is not installed.
    """
    return np.ascontiguousarray(mask_api().decode(mask_rle(segmentation, height, width)))


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask as compressed RLE, {"size": [H, W], "counts": text}, as files of results have it.

    Args:
        mask: (H, W), bool or numbers; what is not 0 is within.

    Raises:
        ShapeError: another number of axes, or no pixels.
        BackendError: faster-coco-eval is not installed.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.size:
        raise ShapeError(f"A mask is (H, W) with at least one pixel; this has the shape {mask.shape}.")
    rle = mask_api().encode(np.asfortranarray(mask != 0).astype(np.uint8, order="F"))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


@functools.cache
def mask_api() -> Any:
    """Return faster-coco-eval's functions on compressed RLE: area, decode, encode, frPyObjects, merge, toBbox.

    Raises:
        BackendError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise BackendError(
            'Masks need faster-coco-eval, which is not installed: pip install "xcit[detection]"'
        ) from None
    return mask
