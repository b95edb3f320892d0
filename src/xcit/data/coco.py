"""COCO-format instance annotations: one JSON file of images, categories and annotations, and a folder of images.

What a file may hold, and what becomes of it:

=====================================  ================================================================================
category ids                           any whole numbers; class i has the i-th smallest
several polygons, RLE as list or text  one mask an instance, as pycocotools draws it
no segmentation, or an empty one       an instance without a mask
``iscrowd``, ``area``                  as they stand; not a crowd, and computed, where they are missing
a box that reaches over the border     clipped to the image
a box that is empty then, or no box    left out and counted, as is an annotation of an unknown image or category
a segmentation that cannot be used     left out and counted; the instance keeps its box
an image without annotations           kept
=====================================  ================================================================================

Source of the format: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", 2014, and its data page.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xcit.data.coco_images import as_annotated, find_root, wrong_size
from xcit.data.coco_masks import MAX_PIXELS, draw_rle, mask_api, usable_segmentation
from xcit.data.images import open_image
from xcit.data.json_values import all_finite, in_short, whole_number
from xcit.data.parts import Texts, listing, plural, read_text
from xcit.errors import DataError

KEYS = ("images", "annotations", "categories")
ADVICE = "xcit data check-coco FILE lists all that is wrong, and mends most of it with --fix OUT.json."


class Instances(NamedTuple):
    """What is annotated in one image, in the order of the file."""

    boxes: np.ndarray
    """(n, 4) float32: x0, y0, x1, y1 in pixels within the image; x1 > x0 and y1 > y0."""
    labels: np.ndarray
    """(n,) int64: classes from 0."""
    masks: np.ndarray | None
    """(n, H, W) uint8, 0 or 1; all 0 for an instance without a mask. None where no instance of the set has one, or
    none were asked for."""
    has_mask: np.ndarray
    """(n,) bool: whether an instance has a segmentation, and with it at least one pixel."""
    crowd: np.ndarray
    """(n,) bool: a region of many, which is neither learnt from nor counted as missed."""
    areas: np.ndarray
    """(n,) float64: the file's ``area``; where it has none, the mask's pixels, or else the box's area."""
    ids: np.ndarray
    """(n,) int64: of the annotations, no two alike within the set."""


@dataclass(frozen=True, eq=False)
class CocoSet:
    """Images with annotated instances; A of them in N images. Light to copy: arrays and blocks of text.

    Attributes:
        file: the annotation file.
        root: the folder that file names are relative to.
        class_names: K names, by rising category id.
        category_ids: (K,) int64.
        image_ids: (N,) int64.
        file_names: N, as the file has them.
        heights: (N,) int32, in pixels, as the file has them.
        widths: likewise.
        starts: (N + 1,) int64; image i has the annotations from ``starts[i]`` up to ``starts[i + 1]``.
        boxes: (A, 4) float32: x0, y0, x1, y1, clipped.
        labels: (A,) int64.
        crowd: (A,) bool.
        areas: (A,) float64; NaN where the file has none.
        ids: (A,) int64.
        segmentations: A texts, as JSON; "" for none.
        left_out: how many annotations cannot be used, by reason.
        notes: what a user should hear about the file, a sentence each.
    """

    file: str
    root: str
    class_names: tuple[str, ...]
    category_ids: np.ndarray
    image_ids: np.ndarray
    file_names: Sequence[str]
    heights: np.ndarray
    widths: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    segmentations: Sequence[str]
    has_masks: bool
    """Whether any instance has a segmentation."""
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def names(self) -> Sequence[str]:
        """What each image is called in messages: its file's name."""
        return self.file_names

    @property
    def class_counts(self) -> np.ndarray:
        """(K,) int64: instances of each class, crowds included."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def subset(self, positions: Sequence[int] | np.ndarray) -> CocoSet:
        """Return the images at these positions, in this order, with their annotations."""
        chosen = np.asarray(positions, dtype=np.int64)
        spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in chosen]
        kept = np.concatenate([np.zeros(0, np.int64), *spans])
        return replace(
            self,
            image_ids=self.image_ids[chosen],
            file_names=[self.file_names[i] for i in chosen],
            heights=self.heights[chosen],
            widths=self.widths[chosen],
            starts=np.cumsum([0, *map(len, spans)], dtype=np.int64),
            **{name: getattr(self, name)[kept] for name in ("boxes", "labels", "crowd", "areas", "ids")},
            segmentations=[self.segmentations[i] for i in kept],
        )

    def path(self, index: int) -> Path:
        """Return where an image's file lies, whether it exists or not."""
        return Path(self.root, self.file_names[index])

    def missing_images(self) -> list[str]:
        """Return the names of the files that are not there."""
        return [name for name in self.file_names if not os.path.exists(os.path.join(self.root, name))]  # noqa: PTH110, PTH118 (a million of them)

    def open(self, index: int) -> Image.Image:
        """Return an image, in RGB, oriented as its annotations are.

        Camera images may be stored lying and be turned by their EXIF entry. Annotations belong to the upright image
        if the file's width and height are that one's, and to the image as it is stored if they are that one's only.

        Raises:
            DataError: the image cannot be read, or is of another size; the message names the file.
        """
        path, size = self.path(index), (int(self.widths[index]), int(self.heights[index]))
        upright = open_image(path)
        image = as_annotated(upright, path, size)
        if image is None:
            raise DataError(wrong_size(path, upright.size, size))
        return image

    def instances(self, index: int, *, masks: bool = True) -> Instances:
        """Return what is annotated in an image.

        Args:
            index: position of the image.
            masks: whether to draw the masks, which takes n · H · W bytes; ``rles`` has them small.

        Raises:
            BackendError: the set has masks, and faster-coco-eval is not installed.
        """
        span = self._span(index)
        boxes, areas = self.boxes[span].copy(), self.areas[span].copy()
        unknown = np.isnan(areas)
        has_mask = np.zeros(len(boxes), dtype=bool)
        stack = None
        if self.has_masks:
            rles = self.rles(index)
            pixels = np.array([0 if rle is None else mask_api().area(rle) for rle in rles], dtype=np.float64)
            has_mask = pixels > 0
            areas = np.where(unknown & has_mask, pixels, areas)
            unknown &= ~has_mask
            if masks:
                stack = np.zeros((len(boxes), self.heights[index], self.widths[index]), dtype=np.uint8)
                for i in np.flatnonzero(has_mask):
                    stack[i] = mask_api().decode(rles[i])
        sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
        areas = np.where(unknown, sides.prod(axis=1), areas)
        return Instances(
            boxes, self.labels[span].copy(), stack, has_mask, self.crowd[span].copy(), areas, self.ids[span].copy()
        )

    def rles(self, index: int) -> list[dict[str, Any] | None]:
        """Return the masks of an image's instances as compressed RLE; None for one without a segmentation.

        Raises:
            BackendError: faster-coco-eval is not installed.
        """
        size = int(self.heights[index]), int(self.widths[index])
        span = self._span(index)
        texts = [self.segmentations[i] for i in range(span.start, span.stop)]
        return [draw_rle(json.loads(text), *size) if text else None for text in texts]

    def _span(self, index: int) -> slice:
        index = range(len(self))[index]
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


# --- opening ----------------------------------------------------------------------------------------------------------


def open_coco(file: str | Path, images_root: str | Path | None = None) -> CocoSet:
    """Read a COCO file of instances. The images are not opened, and need not all be there.

    Args:
        file: JSON with ``images``, ``annotations`` and ``categories``.
        images_root: the folder that ``file_name`` is relative to. None looks beside the file; for a file
            ``annotations/instances_X.json`` that is, in this order: ``annotations``, its ``images``, ``X`` and
            ``images/X``, then ``X``, ``images/X`` and ``images`` next to it, and the folder that
            holds them all. X is the
            file's name without its ending, or what follows the last "_" of it. Some twenty of the images are looked
            for; the first place that has most of them is taken.

    Returns:
        All images, and the annotations that can be used.

    Raises:
        DataError: no such file, not JSON, not annotations of instances, entries of images or categories that cannot
            be used, no annotation that can, or no image in any of those places.
    """
    file = Path(file)
    content = read_coco(file)
    problems: list[str] = []
    images = list(_entries(content["images"], "image", problems))
    categories = sorted(_entries(content["categories"], "category", problems), key=lambda one: one["id"])
    if problems:
        raise DataError(f"{file}: {'; '.join(problems[:5])}{_more(problems, 5)}. {ADVICE}")
    names = [image["file_name"] for image in images]
    root = find_root(file, names, images_root)
    image_at = {image["id"]: i for i, image in enumerate(images)}
    label_of = {category["id"]: i for i, category in enumerate(categories)}
    kept, left_out, no_mask = _usable(content["annotations"], images, image_at, label_of)
    if not kept:
        reasons = "".join(f"; {count:,} {reason}" for reason, count in left_out.items())
        raise DataError(
            f"{file}: none of its {len(content['annotations']):,} annotations can be used{reasons}. {ADVICE}"
        )
    kept.sort(key=lambda one: one.image)  # stable: an image's own stay in the order of the file
    counts = np.bincount([one.image for one in kept], minlength=len(images))
    given = [one.id for one in kept if one.id is not None]
    numbered = len(set(given)) == len(kept)
    labels = np.array([one.label for one in kept], dtype=np.int64)
    class_names = tuple(category["name"] for category in categories)
    per_class = np.bincount(labels, minlength=len(class_names))
    lonely = [name for name, count in zip(class_names, per_class, strict=True) if not count]
    notes = [f"{file}: left out {plural(count, 'annotation')} {reason}." for reason, count in left_out.items()]
    if no_mask:
        notes.append(f"{file}: {plural(no_mask, 'segmentation')} cannot be used, in part or at all; the boxes are.")
    if not numbered:
        notes.append(f"{file}: annotations without an id of their own; all are numbered anew from 1.")
    if lonely:
        notes.append(f"{file}: {plural(len(lonely), 'class')} without an instance: {listing(lonely)}.")
    if len(set(class_names)) < len(class_names):
        twice = [name for name, count in Counter(class_names).items() if count > 1]
        notes.append(f"{file}: several categories have the same name: {listing(twice)}.")
    return CocoSet(
        file=str(file),
        root=str(root),
        class_names=class_names,
        category_ids=np.array([category["id"] for category in categories], dtype=np.int64),
        image_ids=np.array([image["id"] for image in images], dtype=np.int64),
        file_names=Texts(names),
        heights=np.array([image["height"] for image in images], dtype=np.int32),
        widths=np.array([image["width"] for image in images], dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([one.box for one in kept], dtype=np.float32),
        labels=labels,
        crowd=np.array([one.crowd for one in kept], dtype=bool),
        areas=np.array([one.area for one in kept], dtype=np.float64),
        ids=np.array(given if numbered else np.arange(1, len(kept) + 1), dtype=np.int64),
        segmentations=Texts(one.segmentation for one in kept),
        has_masks=any(one.segmentation for one in kept),
        left_out=dict(left_out),
        notes=tuple(notes),
    )


def read_coco(file: str | Path) -> dict[str, Any]:
    """Return the content of a file of instance annotations as JSON has it: three lists, and whatever else there is.

    Only what kind of file it is is checked; ``open_coco`` and ``coco_check.check_coco`` look into the lists.

    Raises:
        DataError: no such file, not JSON, cut off, or of another kind: results, captions, keypoints, a test list.
    """
    file = Path(file)
    content = _read_json(file)
    needed = "annotations of instances are an object with the lists images, annotations and categories"
    if isinstance(content, list):
        kind = "results (predictions)" if content and isinstance(content[0], dict) else "values"
        raise DataError(f"{file}: is a list of {kind}, but {needed}; name the file that came with the images.")
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds {in_short(content)}, but {needed}.")
    annotations = content.get("annotations")
    keys = {k for one in annotations if isinstance(one, dict) for k in one} if isinstance(annotations, list) else set()
    if not keys & {"bbox", "segmentation"}:
        for key, kind in (("caption", "captions"), ("keypoints", "keypoints only"), ("segments_info", "panoptic maps")):
            if key in keys:
                raise DataError(f"{file}: holds {kind}, without boxes; name the file of instances (instances_*.json).")
    lacking = [key for key in KEYS if not isinstance(content.get(key), list)]
    if lacking == ["annotations"] and "annotations" not in content:
        raise DataError(f"{file}: lists images without annotations, as lists of test images do; {needed}.")
    if lacking:
        raise DataError(f"{file}: has no {' and no '.join(lacking)} (as lists); {needed}.")
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"{file}: its list of {key} is empty.")
    return content


def _read_json(file: Path) -> Any:
    if not file.exists():
        names = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.75)
        raise DataError(f"{file}: there is no such file{f'; did you mean {near[0]!r}?' if near else '.'}")
    if file.is_dir():
        raise DataError(f"{file}: is a folder; name the JSON file with the annotations.")
    text = read_text(file)
    if not text.strip():
        raise DataError(f"{file}: is empty.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = len(text.rstrip())
        if text.lstrip()[0] in "{[" and (error.msg.startswith("Unterminated string") or error.pos >= end - 8):
            raise DataError(f"{file}: is cut off after {end:,} characters; download or copy it again.") from None
        raise DataError(f"{file}: is not JSON (line {error.lineno}, column {error.colno}: {error.msg}).") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists without end
        raise DataError(f"{file}: is not JSON that can be read ({error}).") from None


def _entries(entries: list[Any], kind: str, problems: list[str]) -> Iterable[dict[str, Any]]:
    """Yield images or categories that can be used, and say what is wrong with the others."""
    seen: set[int | None] = set()
    for position, entry in enumerate(entries):
        problem = entry_problem(entry, kind)
        if problem is None and entry["id"] in seen:
            problem = f"has the id {entry['id']} of another"
        if problem is None:
            number = whole_number(entry["id"])
            seen.add(number)
            sizes = dict(zip(("height", "width"), size_of(entry) or (), strict=False)) if kind == "image" else {}
            yield {**entry, "id": number, **sizes}  # 1.0 is 1
        else:
            problems.append(f"{kind} {position + 1} of {len(entries):,} {problem}")


def _more(problems: list[str], shown: int) -> str:
    return f"; and {len(problems) - shown:,} more" if len(problems) > shown else ""


def entry_problem(entry: Any, kind: str) -> str | None:
    """Return what makes the entry of an image or a category useless by itself, if anything does."""
    if not isinstance(entry, dict):
        return f"is {in_short(entry)}, not an object"
    if whole_number(entry.get("id")) is None:
        return f"has the id {in_short(entry.get('id'))}, not a whole number"
    if kind == "image" and not is_file_name(entry.get("file_name")):
        return f"has the file name {in_short(entry.get('file_name'))}, which no file can have"
    if kind == "category" and (not isinstance(entry.get("name"), str) or not entry["name"].strip()):
        return f"has the name {in_short(entry.get('name'))}, not a text"
    if kind == "image" and size_of(entry) is None:
        height, width = (in_short(entry.get(side)) for side in ("height", "width"))
        return f"({entry['file_name']}) has the height {height} and the width {width}"
    return None


def is_file_name(name: Any) -> bool:
    """Tell whether a file can be called so."""
    try:
        return isinstance(name, str) and bool(name.strip()) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character
        return False


def size_of(image: dict[str, Any]) -> tuple[int, int] | None:
    """Return the height and width of an image's entry; None where they are not those of an image."""
    height, width = whole_number(image.get("height")), whole_number(image.get("width"))
    if height is None or width is None or height < 1 or width < 1 or height * width >= MAX_PIXELS:
        return None
    return height, width


# --- annotations ------------------------------------------------------------------------------------------------------


class _Usable(NamedTuple):
    image: int
    label: int
    box: tuple[float, float, float, float]
    crowd: bool
    area: float
    id: int | None
    segmentation: str


def _usable(
    annotations: list[Any], images: list[dict[str, Any]], image_at: dict[int, int], label_of: dict[int, int]
) -> tuple[list[_Usable], Counter[str], int]:
    """Return what can be used, how much cannot by reason, and the number of segmentations that cannot."""
    kept: list[_Usable] = []
    left_out: Counter[str] = Counter()
    no_mask = 0
    for one in annotations:
        one = one if isinstance(one, dict) else {}
        image = image_at.get(whole_number(one.get("image_id")))  # type: ignore[arg-type]
        label = label_of.get(whole_number(one.get("category_id")))  # type: ignore[arg-type]
        numbers = box_numbers(one.get("bbox"))
        if image is None:
            left_out["of an image that is not listed"] += 1
        elif label is None:
            left_out["of a category that is not listed"] += 1
        elif numbers is None:
            left_out["without a box of four numbers"] += 1
        else:
            height, width = images[image]["height"], images[image]["width"]
            box = clip_box(numbers, height, width)
            if box is None:
                left_out["whose box has no area inside its image"] += 1
                continue
            segmentation = None
            if one.get("segmentation"):
                segmentation, faults = usable_segmentation(one["segmentation"], height, width)
                no_mask += bool(faults)
            text = json.dumps(segmentation, separators=(",", ":")) if segmentation else ""
            area = float(one["area"]) if all_finite([one.get("area")]) and one["area"] > 0 else math.nan
            kept.append(_Usable(image, label, box, one.get("iscrowd") == 1, area, whole_number(one.get("id")), text))
    return kept, left_out, no_mask


def box_numbers(box: Any) -> Sequence[float] | None:
    """Return a box as it is if it is a list of four finite numbers, else None."""
    return box if isinstance(box, list | tuple) and len(box) == 4 and all_finite(box) else None


def clip_box(box: Sequence[float], height: int, width: int) -> tuple[float, float, float, float] | None:
    """Return the part of a box (x, y, width, height) within the image as x0, y0, x1, y1; None if nothing is left."""
    x, y, w, h = box
    x0, y0, x1, y1 = min(max(x, 0), width), min(max(y, 0), height), min(x + w, width), min(y + h, height)
    # what is left must also be so in 32 bits, where far from 0 a sliver has no width
    return (x0, y0, x1, y1) if np.float32(x1) > np.float32(x0) and np.float32(y1) > np.float32(y0) else None
