"""Looks at every image of a data set before a model does: what cannot be read, what is there twice, what is missing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xcit.data.image_set import ImageSet
from xcit.data.parts import WHOLE, listing, plural
from xcit.data.sources import find_parts
from xcit.errors import DataError

CHUNK = 1024
"""Images that are waited for together, so that a million of them are not queued at once."""


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: int
    median: float
    max: int


@dataclass(frozen=True)
class PartSummary:
    """What one part holds; ``part`` is "all" where the data is not divided."""

    part: str
    num_images: int
    class_counts: dict[str, int]
    """Images of each class, unreadable ones included."""
    num_unreadable: int
    width: Spread | None
    """Of the images that can be read, upright; None if there are none."""
    height: Spread | None


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    part: str
    name: str
    reason: str


@dataclass(frozen=True)
class Place:
    """Where an image lies, and as what."""

    part: str
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Duplicate:
    """One image that is there several times."""

    places: tuple[Place, ...]
    same_file: bool
    """Whether the files are equal byte by byte; if not, their pixels are."""
    across_parts: bool
    """Whether it lies in several parts, so that a model is judged by what it learnt."""
    labels_differ: bool
    """Whether it is of one class here and of another there."""


@dataclass(frozen=True)
class DataReport:
    """All that was found."""

    root: str
    parts: tuple[PartSummary, ...]
    unreadable: tuple[Unreadable, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    mismatches: tuple[str, ...] = ()
    """How the classes of two parts differ, a sentence each."""
    notes: tuple[str, ...] = ()
    """What else is odd: empty class folders, files that are left out, lines that are repeated."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.unreadable or self.duplicates or self.mismatches or self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, as JSON takes them."""
        return {"clean": self.clean, **asdict(self)}


class _Seen(NamedTuple):
    """What one look at an image tells."""

    size: tuple[int, int] | None = None
    pixels: bytes = b""
    content: bytes = b""
    error: str = ""


@dataclass
class _Group:
    """The places of equal pixels, as positions in the list of all images."""

    positions: list[int] = field(default_factory=list)
    contents: set[bytes] = field(default_factory=set)


def check_data(
    root: str | Path,
    format: str = "auto",
    *,
    on_image: Callable[[], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> DataReport:
    """Decode every image of a data set and report what is wrong with it.

    Args:
        root: as for ``open_data``.
        format: likewise, but not the embedded digits.
        on_image: called after each image.
        on_total: called once, with the number of images.

    Raises:
        DataError: the data cannot be opened at all.
        ConfigError: an argument is out of its range.
    """
    parts = find_parts(root, format)
    opened = {part: parts[part]() for part in (WHOLE, "train", "val", "test") if part in parts}
    sets = {part: images for part, (images, _) in opened.items()}
    if on_total:
        on_total(sum(map(len, sets.values())))
    summaries, unreadable = [], []
    places: list[tuple[ImageSet, str, int]] = []
    groups: dict[bytes, _Group] = {}
    for part, images in sets.items():
        sizes, bad = [], 0
        for index, seen in enumerate(_look_at_all(images)):
            if seen.size is None:
                bad += 1
                unreadable.append(Unreadable(part, images.names[index], seen.error))
            else:
                sizes.append(seen.size)
                group = groups.setdefault(seen.pixels, _Group())
                group.positions.append(len(places))
                group.contents.add(seen.content)
            places.append((images, part, index))
            if on_image:
                on_image()
        counts = dict(zip(images.class_names, images.class_counts.tolist(), strict=True))
        widths, heights = ([size[axis] for size in sizes] for axis in (0, 1))
        summaries.append(PartSummary(part, len(images), counts, bad, _spread(widths), _spread(heights)))
    duplicates = [_duplicate(group, places) for group in groups.values() if len(group.positions) > 1]
    # the worst first: what spoils the verdict, then what teaches nonsense
    duplicates.sort(key=lambda duplicate: (not duplicate.across_parts, not duplicate.labels_differ))
    return DataReport(
        str(root),
        tuple(summaries),
        tuple(unreadable),
        tuple(duplicates),
        tuple(_mismatches(sets)),
        tuple(note for _, notes in opened.values() for note in notes),
    )


def _look_at_all(images: ImageSet) -> Iterator[_Seen]:
    """Yield what each image tells, in order. Threads are enough: decoding and hashing let each other run."""
    pool = ThreadPoolExecutor(num_threads())
    try:
        for start in range(0, len(images), CHUNK):
            yield from pool.map(lambda index: _look(images, index), range(start, min(start + CHUNK, len(images))))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # Ctrl-C waits for the images in hand only


def num_threads() -> int:
    """Return how many threads look at images: as many as the processor can run, 32 at most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 32)


def _look(images: ImageSet, index: int) -> _Seen:
    try:
        image = images.open(index)
        read: Any = images.read
        content = hashlib.blake2b(read.content(int(images.numbers[index])), digest_size=16).digest()
    except DataError as error:
        return _Seen(error=str(error))
    except OSError as error:
        return _Seen(error=f"{images.names[index]}: cannot be read: {error.strerror or error}.")
    pixels = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    pixels.update(image.tobytes())
    return _Seen(image.size, pixels.digest(), content)


def _spread(numbers: list[int]) -> Spread | None:
    return Spread(min(numbers), float(np.median(numbers)), max(numbers)) if numbers else None


def _duplicate(group: _Group, places: list[tuple[ImageSet, str, int]]) -> Duplicate:
    where = []
    for position in group.positions:
        images, part, index = places[position]
        row = np.flatnonzero(images.labels[index]) if images.multi_label else [images.labels[index]]
        where.append(Place(part, images.names[index], tuple(images.class_names[label] for label in row)))
    return Duplicate(
        tuple(where),
        same_file=len(group.contents) == 1,
        across_parts=len({place.part for place in where}) > 1,
        labels_differ=len({frozenset(place.labels) for place in where}) > 1,
    )


def _mismatches(sets: dict[str, ImageSet]) -> Iterator[str]:
    """Yield how the classes of val and test differ from those of train."""
    if "train" not in sets:
        if WHOLE not in sets:
            yield "There is no train part."
        return
    have = {
        part: {name for name, count in zip(images.class_names, images.class_counts, strict=True) if count}
        for part, images in sets.items()
    }
    for part, names in have.items():
        if sets[part].multi_label != sets["train"].multi_label:
            yield f"In one of train and {part} an image has one class, in the other it may have several."
        for extra, here, there in (
            (names - have["train"], part, "train"),
            (have["train"] - names, "train", part),
        ):
            if extra:
                yield f"{plural(len(extra), 'class')} in {here} but not in {there}: {listing(sorted(extra))}."
