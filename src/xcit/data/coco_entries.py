"""One pass over the entries of a COCO file: what is wrong with each, and the lists with that mended that can be.

Finding and mending are one, so that what is found to be fixable is what is fixed.
"""

from __future__ import annotations

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from xcit.data.coco import box_numbers, clip_box, entry_problem, is_file_name, size_of
from xcit.data.coco_masks import draw_rle, mask_api, polygon_area, usable_segmentation
from xcit.data.json_values import all_finite, in_short, whole_number
from xcit.data.parts import listing, plural

BORDER = 0.01
"""Pixels by which a box may reach out: sums of rounded numbers do."""
MASK_MARGIN = 2.0
"""Pixels by which a mask may reach out of its box on every side."""
MASK_OUTSIDE = 0.1
"""A larger share of a mask outside of that does not belong to the box."""
AREA_MARGIN = 0.05
"""Relative difference that an area may have, and 2 square pixels on top: people measure polygons, or count pixels."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """One of ``coco_check.TITLES``."""
    fixable: bool
    """Whether ``coco_check.fixed_coco`` mends it."""
    text: str
    """A sentence that names the entry."""


class Look(NamedTuple):
    """What the file of an image told: why it cannot be used (kind and sentence), or else its height and width."""

    kind: str = ""
    text: str = ""
    size: tuple[int, int] | None = None


class EntryPass:
    """One pass over a content: what is wrong with it, and the three lists without what can be mended.

    Args:
        content: from ``read_coco``; it is not changed.
        looks: what the files of the images told, by position in the list of images; none of those as listed.

    Attributes:
        findings: all that is wrong, images first, then categories, then annotations.
        images: the list, mended.
        categories: likewise.
        annotations: likewise.
        class_counts: annotations of each category in the mended list, by name.
        notes: what is no fault, but good to know.
    """

    def __init__(self, content: dict[str, Any], looks: Mapping[int, Look]) -> None:
        self.findings: list[Finding] = []
        self.size_of_image: dict[int, tuple[int, int] | None] = {}
        self.dropped: set[int] = set()
        """Ids of images that go, and take their annotations with them."""
        self.images = list(self._images(content["images"], looks))
        self.names: dict[int, str] = {}
        self.categories = list(self._categories(content["categories"]))
        self.seen: set[int] = set()
        taken = {whole_number(one.get("id")) for one in content["annotations"] if isinstance(one, dict)}
        self.free_ids = (number for number in itertools.count(1) if number not in taken)
        self.annotations = list(self._annotations(content["annotations"]))
        per_category = Counter(whole_number(one["category_id"]) for one in self.annotations)
        self.class_counts: dict[str, int] = {}
        for number, name in self.names.items():
            if not per_category[number]:
                self._found("category-empty", False, f"The category {name!r} (id {number}) has no instance.")
            self.class_counts[name] = self.class_counts.get(name, 0) + per_category[number]
        self.notes = list(self._notes())

    def _found(self, kind: str, fixable: bool, text: str) -> None:
        self.findings.append(Finding(kind, fixable, text))

    def _images(self, images: list[Any], looks: Mapping[int, Look]) -> Iterator[dict[str, Any]]:
        listed: dict[int, str] = {}
        usable: set[int] = set()
        files: dict[str, int] = {}
        for position, given in enumerate(images):
            look, called = looks.get(position, Look()), f"Image {position + 1}"
            entry = given
            if isinstance(given, dict) and look.size and size_of(given) is None:
                entry = {**given, "height": look.size[0], "width": look.size[1]}
            problem = entry_problem(entry, "image")
            if problem is None and entry is not given:
                self._found("image-entry", True, f"{called} {entry_problem(given, 'image')}.")
            number = whole_number(entry.get("id")) if isinstance(entry, dict) else None
            if number is None or not is_file_name(entry.get("file_name")):
                self._found("image-entry", True, f"{called} {problem}.")
                if number is not None and number not in usable:
                    self.dropped.add(number)
                    self.size_of_image.setdefault(number, None)
                continue
            name, gone = entry["file_name"], look.kind in ("image-missing", "image-unreadable")
            if number in listed:
                same = listed[number] == name
                what = "with the same file" if same else f"with the file {listed[number]!r}"
                self._found("image-id", same or gone, f"{called} ({name}) has the id {number} of another, {what}.")
                if same:
                    continue
            listed.setdefault(number, name)
            if look.kind:
                self._found(look.kind, gone, look.text)
            if problem:
                self._found("image-entry", gone, f"{called} {problem}.")
            if gone:
                if number not in usable:
                    self.dropped.add(number)
                    self.size_of_image[number] = size_of(entry)
                continue
            yield entry
            if number in usable:
                continue
            usable.add(number)
            self.dropped.discard(number)
            self.size_of_image[number] = size_of(entry)
            path = posixpath.normpath(name)
            if path in files:
                self._found("image-twice", False, f"{name}: is listed as image {files[path]} and as image {number}.")
            files.setdefault(path, number)

    def _categories(self, categories: list[Any]) -> Iterator[dict[str, Any]]:
        numbers: dict[str, int] = {}
        for position, entry in enumerate(categories):
            problem = entry_problem(entry, "category")
            number = whole_number(entry.get("id")) if isinstance(entry, dict) else None
            if problem:
                # without an id no annotation can mean it; without a name somebody must find one
                self._found("category-entry", number is None, f"Category {position + 1} {problem}.")
            if number is None:
                continue
            name = str(entry.get("name") or f"category {number}")
            if number in self.names:
                same = self.names[number] == name
                what = "another of the same name" if same else f"{self.names[number]!r}"
                self._found("category-id", same, f"Category {position + 1} ({name}) has the id {number} of {what}.")
                if not same:
                    yield entry
                continue
            self.names[number] = name
            if not problem and name in numbers:
                self._found("category-name", False, f"The categories {numbers[name]} and {number} are both {name!r}.")
            numbers.setdefault(name, number)
            yield entry

    def _annotations(self, annotations: list[Any]) -> Iterator[dict[str, Any]]:
        for position, entry in enumerate(annotations):
            if not isinstance(entry, dict):
                self._found("annotation-entry", True, f"Annotation {position + 1} is {in_short(entry)}, not an object.")
                continue
            number = whole_number(entry.get("id"))
            image, category = whole_number(entry.get("image_id")), whole_number(entry.get("category_id"))
            called = f"Annotation {position + 1}" if number is None else f"Annotation {number}"
            mended = dict(entry)
            if number is None or number in self.seen:
                what = f"has the id {in_short(entry.get('id'))}"
                what += ", not a whole number" if number is None else " of another"
                self._found("annotation-id", True, f"Annotation {position + 1} {what}.")
                mended["id"] = next(self.free_ids)
            else:
                self.seen.add(number)
            known = True
            if image not in self.size_of_image:
                known = False
                what = f"is of image {in_short(entry.get('image_id'))}, which is not listed"
                self._found("image-unknown", True, f"{called} {what}.")
            if category not in self.names:
                known = False
                what = f"is of category {in_short(entry.get('category_id'))}, which is not listed"
                self._found("category-unknown", True, f"{called} {what}.")
            size = self.size_of_image.get(image) if image is not None else None
            called = f"{called} (image {image})" if image is not None else called
            if self._shape(called, mended, size) and known and image not in self.dropped:
                yield mended

    def _shape(self, called: str, mended: dict[str, Any], size: tuple[int, int] | None) -> bool:
        """Mend the box, the segmentation and the area of an annotation; return whether it can be kept."""
        rle = self._segmentation(called, mended, size) if size and mended.get("segmentation") else None
        box = self._box(called, mended.get("bbox"), size)
        if box is None and rle is not None:
            box = [float(side) for side in mask_api().toBbox(rle)]
        elif box is not None and rle is not None and size is not None:
            self._inside(called, box, rle, size)
        if box is None:
            return False
        mended["bbox"] = box
        if size:
            self._area(called, mended, rle)
        return True

    def _box(self, called: str, box: Any, size: tuple[int, int] | None) -> list[float] | None:
        numbers = box_numbers(box)
        if numbers is None:
            self._found("box", True, f"{called} has the box {in_short(box)}, not four finite numbers.")
            return None
        if numbers[2] <= 0 or numbers[3] <= 0:
            self._found("box-empty", True, f"{called} has the box {in_short(box)}, of no width or height.")
            return None
        if size is None:
            return list(numbers)
        clipped = clip_box(numbers, *size)
        where = f"{called} has the box {in_short(box)}, which"
        if clipped is None:
            self._found("box-outside", True, f"{where} has no part in the image of {size[1]} x {size[0]} px.")
            return None
        x, y, w, h = numbers
        if max(-x, -y, x + w - size[1], y + h - size[0]) <= BORDER:
            return list(numbers)
        self._found("box-partly-outside", True, f"{where} reaches out of the image of {size[1]} x {size[0]} px.")
        return [clipped[0], clipped[1], clipped[2] - clipped[0], clipped[3] - clipped[1]]

    def _segmentation(self, called: str, mended: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
        """Leave only what can be drawn; return its RLE."""
        usable, faults = usable_segmentation(mended["segmentation"], *size)
        noun = {"polygon": "a polygon that", "segmentation": "a segmentation that"}
        for kind, what in faults:
            self._found(kind, True, f"{called} has {noun.get(kind, 'RLE that')} {what}.")
        rle = None
        if usable is not None:
            rle = draw_rle(usable, *size)
            if not int(mask_api().area(rle)):
                self._found("mask-empty", True, f"{called} has a mask that covers no pixel.")
                rle = None
        if rle is None:
            del mended["segmentation"]
        elif faults:
            mended["segmentation"] = usable
        return rle

    def _inside(self, called: str, box: list[float], rle: dict[str, Any], size: tuple[int, int]) -> None:
        x, y, w, h = box
        m = MASK_MARGIN
        left, top, columns, rows = mask_api().toBbox(rle)
        if left >= x - m and top >= y - m and left + columns <= x + w + m and top + rows <= y + h + m:
            return  # as most are; what follows is slow
        grown = [[float(x - m), float(y - m), float(w + 2 * m), float(h + 2 * m)]]
        window = mask_api().frPyObjects(grown, *size)
        whole = int(mask_api().area(rle))
        outside = whole - int(mask_api().area(mask_api().merge([rle, *window], 1)))
        if outside > MASK_OUTSIDE * whole:
            self._found(
                "mask-outside",
                False,
                f"{called} has {outside / whole:.0%} of its mask outside of its box {in_short(box)}.",
            )

    def _area(self, called: str, mended: dict[str, Any], rle: dict[str, Any] | None) -> None:
        segmentation = mended.get("segmentation")
        measured = [float(mended["bbox"][2] * mended["bbox"][3])]
        if rle is not None:
            measured = [float(mask_api().area(rle))]
            if isinstance(segmentation, list):
                measured.append(sum(polygon_area(polygon) for polygon in segmentation))
        area: Any = mended.get("area")
        right = measured[0]
        if all_finite([area]):
            low, high = min(measured), max(measured)
            if low * (1 - AREA_MARGIN) - 2 <= area <= high * (1 + AREA_MARGIN) + 2 and area > 0:
                return
        what = "mask" if rle is not None else "box"
        self._found("area", True, f"{called} has the area {in_short(area)}; that of its {what} is {right:g}.")
        mended["area"] = right

    def _notes(self) -> Iterator[str]:
        annotated = {whole_number(one["image_id"]) for one in self.annotations}
        empty = [one["file_name"] for one in self.images if whole_number(one["id"]) not in annotated]
        if empty:
            yield f"{plural(len(empty), 'image')} without annotations: {listing(empty)}."
        bare = sum(not one.get("segmentation") for one in self.annotations)
        if 0 < bare < len(self.annotations):
            yield f"{plural(bare, 'annotation')} without a segmentation, of {len(self.annotations):,}."
