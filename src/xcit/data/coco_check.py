"""Finds what is wrong with a COCO file of instances and its images, and mends what has one way to be mended."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcit.data.check import CHUNK, num_threads
from xcit.data.coco import is_file_name, read_coco, size_of
from xcit.data.coco_entries import EntryPass, Finding, Look
from xcit.data.coco_images import as_annotated, find_root, wrong_size
from xcit.data.coco_masks import mask_api
from xcit.data.images import open_image
from xcit.errors import ConfigError, DataError

TITLES = {
    "image-missing": "Images that are not there",
    "image-unreadable": "Images that cannot be read",
    "image-size": "Images of another size than listed",
    "image-entry": "Entries of images that cannot be used",
    "image-id": "Ids of several images",
    "image-twice": "Files that are listed more than once",
    "category-entry": "Entries of categories that cannot be used",
    "category-id": "Ids of several categories",
    "category-name": "Names of several categories",
    "category-empty": "Categories without instances",
    "annotation-entry": "Annotations that are none",
    "annotation-id": "Annotations without an id of their own",
    "image-unknown": "Annotations of images that are not listed",
    "category-unknown": "Annotations of categories that are not listed",
    "box": "Boxes that are not four numbers",
    "box-empty": "Boxes of no or negative size",
    "box-outside": "Boxes outside their image",
    "box-partly-outside": "Boxes that reach out of their image",
    "segmentation": "Segmentations that are neither polygons nor RLE",
    "polygon": "Polygons that are none",
    "rle": "RLE that cannot be decoded",
    "rle-size": "RLE of another size than the image",
    "mask-empty": "Masks without a pixel",
    "mask-outside": "Masks outside their box",
    "area": "Areas that are missing or wrong",
}
"""Every kind of finding, in the order in which people should read them, with what it is called."""


@dataclass(frozen=True)
class CocoReport:
    """All that was found."""

    file: str
    root: str
    """The folder of the images; "" if none was found, and none needed."""
    num_images: int
    num_annotations: int
    class_counts: dict[str, int]
    """Annotations of each category that can be used, mended or not, by name."""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    """What is no fault, but good to know."""
    looks: Mapping[int, Look] = field(default_factory=dict, repr=False)
    """By position in the list of images: of those whose file is not as listed."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    @property
    def num_fixable(self) -> int:
        """How many of the findings ``fixed_coco`` mends."""
        return sum(finding.fixable for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, as JSON takes them."""
        return {
            "clean": self.clean,
            "file": self.file,
            "root": self.root,
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "num_fixable": self.num_fixable,
            "class_counts": self.class_counts,
            "findings": [vars(finding) for finding in self.findings],
            "notes": list(self.notes),
        }


def check_coco(
    file: str | Path,
    images_root: str | Path | None = None,
    *,
    decode_images: bool = True,
    on_total: Callable[[int], None] | None = None,
    on_image: Callable[[], None] | None = None,
) -> CocoReport:
    """Look at every entry of a COCO file of instances, and at every image.

    Args:
        file: as for ``open_coco``.
        images_root: likewise.
        decode_images: whether to read the images; else only whether their files are there is looked at, and not even
            that if no folder is named and none found.
        on_total: called once, with the number of images.
        on_image: called after each image.

    Raises:
        DataError: the file is no such file at all, or the images' folder is not found.
        BackendError: faster-coco-eval is not installed, which decodes the masks.
    """
    file = Path(file)
    content = read_coco(file)
    mask_api()
    images = content["images"]
    if on_total:
        on_total(len(images))
    notes = []
    root: Path | None = None
    names = [one["file_name"] for one in images if isinstance(one, dict) and is_file_name(one.get("file_name"))]
    try:
        if names:
            root = find_root(file, names, images_root)
    except DataError as error:
        if decode_images or images_root is not None:
            raise
        notes.append(f"The images were not looked at. {error}")
    looks = {}
    for position, look in enumerate(_look_at_all(images, root, decode_images)):
        if look != Look():
            looks[position] = look
        if on_image:
            on_image()
    result = EntryPass(content, looks)
    return CocoReport(
        str(file),
        "" if root is None else str(root),
        len(images),
        len(content["annotations"]),
        result.class_counts,
        tuple(sorted(result.findings, key=lambda finding: list(TITLES).index(finding.kind))),
        (*notes, *result.notes),
        looks,
    )


def fixed_coco(content: dict[str, Any], report: CocoReport) -> dict[str, Any]:
    """Return the content of a checked file with all mended that has one way to be mended.

    Dropped: annotations of unknown images or categories; images that are missing or cannot be read, with their
    annotations; a second entry of the same image or category; polygons and RLE that cannot be drawn (the instance
    keeps its box); instances whose box cannot be used, unless their mask gives one. Boxes are clipped to the image,
    wrong and missing areas computed, annotations without an id of their own given the smallest free ones. What was
    mended so has nothing left to mend. All the rest stays, such as two categories of one name.

    Args:
        content: of the file, from ``read_coco``; it is not changed, and what needed no mending is shared with it.
        report: from ``check_coco`` on the same file.

    Raises:
        ConfigError: the report is on another file.
        DataError: no image or no category would be left.
    """
    counts = len(content["images"]), len(content["annotations"])
    if counts != (report.num_images, report.num_annotations):
        raise ConfigError(
            f"The report is on {report.num_images:,} images and {report.num_annotations:,} annotations, the content "
            f"has {counts[0]:,} and {counts[1]:,}; check it again."
        )
    result = EntryPass(content, report.looks)
    for key, left in (("image", result.images), ("category", result.categories)):
        if not left:
            raise DataError(f"{report.file}: nothing would be left of it: no {key} can be used.")
    return {
        **content,
        "images": result.images,
        "annotations": result.annotations,
        "categories": result.categories,
    }


# --- files ------------------------------------------------------------------------------------------------------------


def _look_at_all(images: list[Any], root: Path | None, decode: bool) -> Iterator[Look]:
    """Yield what each image's file tells, in order."""
    if root is None:
        yield from itertools.repeat(Look(), len(images))
        return
    with ThreadPoolExecutor(num_threads()) as pool:
        try:
            for start in range(0, len(images), CHUNK):
                yield from pool.map(lambda entry: _look(entry, root, decode), images[start : start + CHUNK])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # Ctrl-C waits for the images in hand only


def _look(entry: Any, root: Path, decode: bool) -> Look:
    """Look at one file; an empty Look is one that is as listed."""
    if not isinstance(entry, dict) or not is_file_name(entry.get("file_name")):
        return Look()  # which is found in the entry itself
    path, listed = Path(root, entry["file_name"]), size_of(entry)
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        return Look("image-missing", f"{path}: there is no such file.")
    if not decode:
        return Look()
    try:
        upright = open_image(path)
        if listed is None:
            return Look(size=(upright.height, upright.width))
        if as_annotated(upright, path, (listed[1], listed[0])) is None:
            return Look("image-size", wrong_size(path, upright.size, (listed[1], listed[0])))
    except DataError as error:
        return Look("image-unreadable", str(error))
    return Look()
