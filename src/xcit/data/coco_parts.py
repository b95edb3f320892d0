"""The parts of a COCO-format data set: found by where their annotation files lie, with the same classes in each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from xcit.data.coco import CocoSet, open_coco
from xcit.data.parts import plural
from xcit.errors import DataError

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What each part is called by those who publish data sets."""
FILES = (
    "{part}/annotations.json",  # `xcit data scenes`
    "{part}/_annotations.coco.json",  # Roboflow
    "annotations/instances_{part}2017.json",  # COCO
    "annotations/instances_{part}.json",
    "annotations/{part}.json",
    "{part}.json",
)
"""Where its annotations may lie."""


class CocoSplits(NamedTuple):
    """A data set in its parts, all with the same classes in the same order."""

    train: CocoSet
    """What the weights are fitted to."""
    val: CocoSet
    """What choices are made on: the epoch that is kept."""
    test: CocoSet | None
    """Looked at once, when all choices are made; None where the data has no such part."""
    notes: tuple[str, ...]
    """What a user should hear about the data, a sentence each."""


def open_coco_parts(root: str | Path, *, val_fraction: float = 0.1, split_seed: int = 0) -> CocoSplits:
    """Open a data set in COCO format.

    Args:
        root: a folder with annotation files in one of the places of ``FILES``, or one such file, to train on.
        val_fraction: share of the training images that validates where there is no part for it.
        split_seed: which images those are.

    Raises:
        DataError: no such folder, no annotations in it, a file that cannot be used, parts with other classes, or too
            few images to set some aside.
    """
    root = Path(root).expanduser()
    found = {"train": root} if root.is_file() else _annotation_files(root)
    sets = {part: open_coco(file) for part, file in found.items()}
    train = sets["train"]
    for other in sets.values():
        if list(other.category_ids) != list(train.category_ids) or other.class_names != train.class_names:
            raise DataError(
                f"{other.file}: its categories are not those of {train.file}: {_difference(train, other)}. All parts "
                f"need the same ids and names."
            )
    notes = [f"{part}: {note}" for part, each in sets.items() for note in each.notes]
    val = sets.get("val")
    if val is None:
        order = np.random.default_rng(split_seed).permutation(len(train))
        num_val = max(1, round(val_fraction * len(train)))
        if num_val >= len(train):
            raise DataError(
                f"{train.file}: has {plural(len(train), 'image')}, of which none would be left to train on; add images."
            )
        val, train = train.subset(np.sort(order[:num_val])), train.subset(np.sort(order[num_val:]))
        were = "was" if num_val == 1 else "were"
        notes.append(f"There is no part to validate on: {plural(num_val, 'training image')} {were} set aside.")
    for part, each in (("train", train), ("val", val)):
        if not (~each.crowd).any():
            raise DataError(f"{each.file}: none of the {part} images has an instance; there is nothing to learn.")
    absent = [name for name, count in zip(train.class_names, train.class_counts, strict=True) if not count]
    if absent:
        shown = ", ".join(absent[:5]) + (" and more" if len(absent) > 5 else "")
        notes.append(f"{plural(len(absent), 'class')} without an instance to train on, never found: {shown}.")
    return CocoSplits(train, val, sets.get("test"), tuple(notes))


def _annotation_files(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"{root}: there is no such file or folder; name a COCO-format data set.")
    found = {}
    for part, names in PARTS.items():
        places = [root / place.format(part=name) for name in names for place in FILES]
        there = [place for place in places if place.is_file()]
        if there:
            found[part] = there[0]
    if "train" not in found:
        looked = ", ".join(place.format(part="train") for place in FILES)
        raise DataError(
            f"{root}: holds no annotations to train on; looked for {looked}. Name the annotation file itself if it is "
            f"called otherwise."
        )
    return found


def _difference(a: CocoSet, b: CocoSet) -> str:
    ours, theirs = (dict(zip(x.category_ids.tolist(), x.class_names, strict=True)) for x in (a, b))
    wrong = [id for id in sorted(ours.keys() | theirs.keys()) if ours.get(id) != theirs.get(id)]
    id = wrong[0]
    return f"id {id} is {theirs.get(id, 'missing')!r}, there it is {ours.get(id, 'missing')!r}"
