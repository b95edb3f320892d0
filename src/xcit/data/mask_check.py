"""Looks at every image and mask of a data set before a model does: what does not pair, fit, or mean anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xcit.data.check import CHUNK, num_threads
from xcit.data.mask_files import IGNORE, MaskError
from xcit.data.mask_parts import find_mask_layout
from xcit.data.mask_set import MaskSet, Pairs
from xcit.data.parts import WHOLE
from xcit.errors import DataError

TITLES = {
    "mask-missing": "Images without a mask",
    "image-missing": "Masks without an image",
    "ambiguous": "Files that differ in their ending alone",
    "image-unreadable": "Images that cannot be read",
    "mask-unreadable": "Masks that cannot be read",
    "mask-lossy": "Masks compressed with losses",
    "mask-kind": "Masks of a kind that has no one reading",
    "mask-values": "Masks with unknown values or colours",
    "mask-size": "Masks of another size than their image",
    "mask-ignored": "Masks in which every pixel is ignored",
    "class-empty": "Classes without a pixel",
    "class-untrained": "Classes that are not in the training part",
}
"""Every kind of finding, in the order in which people should read them, with what it is called."""


@dataclass(frozen=True)
class MaskFinding:
    """One thing that is wrong."""

    kind: str
    """One of ``TITLES``."""
    part: str
    """"train", "val", "test", or "all"."""
    text: str
    """A sentence that names the file or the class."""


@dataclass(frozen=True)
class PartPixels:
    """What one part holds; ``part`` is "all" where the data is not divided."""

    part: str
    num_images: int
    """Pairs of an image and a mask."""
    num_usable: int
    """Pairs of which both can be read and belong together; the figures below are of these."""
    num_pixels: int
    ignored_pixels: int
    class_pixels: dict[str, int]
    """Of each class, by name."""
    class_images: dict[str, int]
    """Images in which each class occurs."""

    def share(self, name: str) -> float:
        """Return the part of the pixels that a class has, 0 to 1, of those that are not ignored."""
        return self.class_pixels[name] / max(1, self.num_pixels - self.ignored_pixels)


@dataclass(frozen=True)
class MaskReport:
    """All that was found."""

    root: str
    label_set: str | None
    """"ade20k", or None for the user's own classes."""
    parts: tuple[PartPixels, ...]
    findings: tuple[MaskFinding, ...] = ()
    notes: tuple[str, ...] = ()
    """What is no fault, but good to know."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def counts(self) -> dict[str, int]:
        """Return how many findings there are of each kind that occurs."""
        counts = {kind: sum(finding.kind == kind for finding in self.findings) for kind in TITLES}
        return {kind: count for kind, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, as JSON takes them."""
        parts = []
        for part in self.parts:
            shares = {name: part.share(name) for name in part.class_pixels}
            parts.append({**asdict(part), "class_shares": shares})
        return {
            "clean": self.clean,
            "root": self.root,
            "label_set": self.label_set,
            "parts": parts,
            "counts": self.counts(),
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }


class _Seen(NamedTuple):
    """What one look at an image and its mask tells."""

    counts: np.ndarray | None = None
    """(1 + K,) int64: pixels that are ignored, and of each class; None if the pair cannot be used."""
    kind: str = ""
    text: str = ""


def check_masks(
    root: str | Path,
    *,
    on_total: Callable[[int], None] | None = None,
    on_image: Callable[[], None] | None = None,
) -> MaskReport:
    """Decode every image and every mask of a data set and report what is wrong with them.

    Args:
        root: as for ``open_mask_parts``.
        on_total: called once, with the number of images that have a mask.
        on_image: called after each of them.

    Raises:
        DataError: the data cannot be opened at all: no such folder, none of the layouts, a list of classes that cannot
            be used, or a folder without any image.
    """
    layout = find_mask_layout(root)
    pairs = {part: layout.pairs(part) for part in layout.folders}
    sets = {part: layout.mask_set(each) for part, each in pairs.items()}
    if on_total:
        on_total(sum(map(len, sets.values())))
    parts: list[PartPixels] = []
    findings: list[MaskFinding] = []
    for part, images in sets.items():
        findings += _unpaired(part, pairs[part])
        counts = np.zeros(1 + len(images.class_names), dtype=np.int64)
        occurring, num_usable = np.zeros_like(counts), 0
        for seen in _look_at_all(images):
            if seen.counts is not None:
                counts += seen.counts
                occurring += seen.counts > 0
                num_usable += 1
            if seen.kind:
                findings.append(MaskFinding(seen.kind, part, seen.text))
            if on_image:
                on_image()
        class_pixels, class_images = (
            dict(zip(images.class_names, values[1:].tolist(), strict=True)) for values in (counts, occurring)
        )
        total, ignored = int(counts.sum()), int(counts[0])
        parts.append(PartPixels(part, len(images), num_usable, total, ignored, class_pixels, class_images))
    findings += _classes(parts)
    order = list(TITLES)
    return MaskReport(
        str(layout.root),
        layout.label_set,
        tuple(parts),
        tuple(sorted(findings, key=lambda finding: order.index(finding.kind))),
        layout.notes,
    )


def _unpaired(part: str, pairs: Pairs) -> Iterator[MaskFinding]:
    for path in pairs.images_alone:
        yield MaskFinding("mask-missing", part, f"{path}: there is no mask of that name.")
    for path in pairs.masks_alone:
        yield MaskFinding("image-missing", part, f"{path}: there is no image of that name.")
    for text in pairs.ambiguous:
        yield MaskFinding("ambiguous", part, text)


def _classes(parts: list[PartPixels]) -> Iterator[MaskFinding]:
    """Yield what is wrong with the classes, if any mask could be read at all."""
    if not any(part.num_usable for part in parts):
        return
    train = parts[0]  # or all there is
    for name in train.class_pixels:
        others = [part for part in parts[1:] if part.class_images[name]]
        if train.class_images[name]:
            continue
        if not others:
            yield MaskFinding("class-empty", WHOLE, f"{name!r}: no pixel is of this class.")
        for part in others:
            number = part.class_images[name]
            text = f"{name!r}: is in {number:,} of the {part.part} images, but cannot be learnt from train."
            yield MaskFinding("class-untrained", part.part, text)


def _look_at_all(images: MaskSet) -> Iterator[_Seen]:
    """Yield what each pair tells, in order. Threads are enough: decoding and counting let each other run."""
    with ThreadPoolExecutor(num_threads()) as pool:
        try:
            for start in range(0, len(images), CHUNK):
                yield from pool.map(lambda index: _look(images, index), range(start, min(start + CHUNK, len(images))))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # Ctrl-C waits for the images in hand only


def _look(images: MaskSet, index: int) -> _Seen:
    try:
        _, mask = images.open_pair(index)
    except MaskError as error:
        return _Seen(None, error.kind, str(error))
    except DataError as error:
        return _Seen(None, "image-unreadable", str(error))
    counts = np.bincount((mask - IGNORE).ravel(), minlength=1 + len(images.class_names))
    if not counts[1:].any():
        return _Seen(counts, "mask-ignored", f"{images.mask_path(index)}: every pixel is ignored.")
    return _Seen(counts)
