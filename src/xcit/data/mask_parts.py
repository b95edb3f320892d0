"""A data set with semantic masks: found by how its folders are called, with the same classes in each part.

======================================================  ===============================================================
``images/training``, ``annotations/training``           ADE20k, its 150 classes; likewise ``validation``; a folder
                                                        ``ADEChallengeData2016`` around them may be left out
``classes.txt``, ``images``, ``masks``                  a set that is not divided
``classes.txt``, ``train/images``, ``train/masks``      parts: ``train``, ``val`` (or ``valid``, ``validation``) and
                                                        ``test``
``classes.txt``, ``images/train``, ``masks/train``      likewise
======================================================  ===============================================================

An image and its mask have the same name but for the ending, in folders within those too. ``mask_files`` says what
``classes.txt`` and masks may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xcit.data import ade20k
from xcit.data.mask_files import IGNORE, ClassList, read_classes
from xcit.data.mask_set import MaskSet, Pairs, find_pairs
from xcit.data.parts import MAX_MISSING, WHOLE, WORDS_OF_PART, Texts, listing, plural
from xcit.errors import DataError

CLASSES_FILE = "classes.txt"
ADE_FOLDER = "ADEChallengeData2016"
NUM_TRIED = 20
"""Masks that are looked at when a set is opened: what is wrong with all of them is wrong with the set."""
ADVICE = "xcit data check-masks DIR lists all that is wrong."


class MaskSplits(NamedTuple):
    """A data set in its parts, all with the same classes in the same order."""

    train: MaskSet
    """What the weights are fitted to."""
    val: MaskSet
    """What choices are made on: the step that is kept."""
    test: MaskSet | None
    """Looked at once, when all choices are made; None where the data has no such part."""
    notes: tuple[str, ...]
    """What a user should hear about the data, a sentence each."""


@dataclass(frozen=True)
class MaskLayout:
    """Where the files of a data set lie, and what its masks mean.

    Attributes:
        root: the folder that names are relative to.
        classes: names, colours, values.
        folders: of each part ("train", "val", "test", or ``WHOLE``), the folders with images and with masks.
        label_set: "ade20k" or None.
        notes: what a user should hear, a sentence each.
    """

    root: Path
    classes: ClassList
    folders: dict[str, tuple[Path, Path]]
    label_set: str | None = None
    notes: tuple[str, ...] = ()

    def pairs(self, part: str) -> Pairs:
        """Return the files of a part; DataError if one of its folders holds none."""
        return find_pairs(*self.folders[part], self.root)

    def mask_set(self, pairs: Pairs) -> MaskSet:
        """Return pairs of files as a set."""
        names, palette, coding = self.classes
        return MaskSet(str(self.root), Texts(pairs.images), Texts(pairs.masks), names, palette, coding, self.label_set)


def open_mask_parts(root: str | Path, *, val_fraction: float = 0.1, split_seed: int = 0) -> MaskSplits:
    """Open a data set with semantic masks. But for a few masks no file is read yet.

    An image without a mask, and a mask without an image, is left out and noted, as long as nine of ten have theirs.

    Args:
        root: a folder in one of the layouts above.
        val_fraction: share of the training images that validates where there is no part for it.
        split_seed: which images those are.

    Raises:
        DataError: no such folder, none of those layouts, a list of classes that cannot be used, files that do not pair,
            masks of which none can be used, or too few images to set some aside.
    """
    layout = find_mask_layout(root)
    notes, sets = list(layout.notes), {}
    for part in layout.folders:
        pairs = layout.pairs(part)
        notes += unpaired(pairs, layout.folders[part])
        sets[part] = layout.mask_set(pairs)
    train = sets["train"] if "train" in sets else sets[WHOLE]
    notes += _tried(train)
    for part in sets.keys() - {"train", WHOLE}:
        _tried(sets[part])  # now, not after the training
    val = sets.get("val")
    if val is None:
        order = np.random.default_rng(split_seed).permutation(len(train))
        num_val = max(1, round(val_fraction * len(train)))
        if num_val >= len(train):
            raise DataError(
                f"{train.root}: has {plural(len(train), 'image')} with a mask, of which none would be left to train on "
                f"where {num_val:,} validate; add images."
            )
        val, train = train.subset(np.sort(order[:num_val])), train.subset(np.sort(order[num_val:]))
        were = "was" if num_val == 1 else "were"
        notes.append(f"There is no part to validate on: {plural(num_val, 'training image')} {were} set aside.")
    return MaskSplits(train, val, sets.get("test"), tuple(notes))


# --- where files lie --------------------------------------------------------------------------------------------------


def find_mask_layout(root: str | Path) -> MaskLayout:
    """Find out how a data set is laid out, without looking at its images.

    Raises:
        DataError: no such folder, none of the layouts, or a list of classes that cannot be used.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        what = "is a file; name the folder that holds it" if root.is_file() else "there is no such folder; name one"
        raise DataError(f"{root}: {what} with images and masks.")
    file = root / CLASSES_FILE
    if file.is_file():
        classes = read_classes(file)
        folders, notes = _own_folders(root)
        return MaskLayout(root, classes, folders, notes=notes)
    for place in (root, root / ADE_FOLDER):
        folders = {
            part: (place / "images" / word, place / "annotations" / word)
            for part, word in (("train", "training"), ("val", "validation"))
            if (place / "images" / word).is_dir() and (place / "annotations" / word).is_dir()
        }
        if "train" in folders:
            classes = ClassList(ade20k.CLASS_NAMES, ade20k.PALETTE, ade20k.CODING)
            return MaskLayout(place, classes, folders, ade20k.LABEL_SET)
    raise DataError(
        f"{root}: holds no {CLASSES_FILE}, which names the classes of the masks, a line each; nor is it ADE20k, with "
        f"images/training and annotations/training."
    )


def _own_folders(root: Path) -> tuple[dict[str, tuple[Path, Path]], tuple[str, ...]]:
    """Return the folders of each part of a user's set, and notes."""
    found: dict[str, list[tuple[Path, Path]]] = {}
    for part, words in WORDS_OF_PART.items():
        for word in words:
            for images, masks in (
                (root / word / "images", root / word / "masks"),
                (root / "images" / word, root / "masks" / word),
            ):
                if images.is_dir():
                    found.setdefault(part, []).append((images, masks))
    for part, places in found.items():
        if len(places) > 1:
            both = " and ".join(str(images) for images, _ in places)
            raise DataError(f"{both} are both there for {part}; leave one.")
    folders = {part: places[0] for part, places in found.items()}
    if not folders:
        if (root / "images").is_dir() and (root / "masks").is_dir():
            return {WHOLE: (root / "images", root / "masks")}, ()
        raise DataError(
            f"{root}: has a {CLASSES_FILE}, but neither images and masks, nor train/images and train/masks, nor "
            f"images/train and masks/train."
        )
    if "train" not in folders:
        raise DataError(f"{root}: has {' and '.join(folders)}, but no part to train on; call its folder train.")
    notes = []
    for part, (images, masks) in list(folders.items()):
        if not masks.is_dir() and part == "train":
            raise DataError(f"{masks}: there is no such folder, but {images}; the masks of its images belong there.")
        if not masks.is_dir():
            notes.append(f"{part} is left out: there is {images}, but no {masks}.")
            del folders[part]
    return folders, tuple(notes)


# --- what is wrong at first sight -------------------------------------------------------------------------------------


def unpaired(pairs: Pairs, folders: tuple[Path, Path]) -> list[str]:
    """Return notes on files without their other; DataError if those are many."""
    if pairs.ambiguous:
        more = f" (and {len(pairs.ambiguous) - 1:,} more)" if len(pairs.ambiguous) > 1 else ""
        raise DataError(f"{pairs.ambiguous[0].rstrip('.')}{more}. {ADVICE}")
    notes = []
    for alone, folder, what in (
        (pairs.images_alone, folders[0], ("image", "mask")),
        (pairs.masks_alone, folders[1], ("mask", "image")),
    ):
        if not alone:
            continue
        total = len(alone) + len(pairs.images)
        text = f"{folder}: {len(alone):,} of {plural(total, what[0])} have no {what[1]} of that name"
        if len(alone) > MAX_MISSING * total:
            raise DataError(
                f"{text} ({listing(alone)}); an image and its mask must be called the same but for the ending. {ADVICE}"
            )
        notes.append(f"{text}: {listing(alone)}. They are left out.")
    return notes


def _tried(images: MaskSet) -> list[str]:
    """Look at a few masks and return notes; DataError if none can be used or has a class."""
    positions: Sequence[int] = np.unique(np.linspace(0, len(images) - 1, NUM_TRIED).round().astype(int)).tolist()
    seen: set[int] = set()
    errors = []
    for position in positions:
        try:
            seen |= set(np.unique(images.open_mask(position)).tolist())
        except DataError as error:
            errors.append(str(error))
    if len(errors) == len(positions):
        raise DataError(f"None of {plural(len(positions), 'mask')} that were tried can be used. The first: {errors[0]}")
    classes = seen - {IGNORE}
    if not classes:
        raise DataError(
            f"{images.mask_path(0).parent}: in the {plural(len(positions), 'mask')} that were tried every pixel is "
            f"ignored; {images.coding.described}."
        )
    if len(classes) == 1 and IGNORE in seen and images.coding.colours is None and images.label_set is None:
        return [
            f"In the {plural(len(positions), 'mask')} that were tried there is {images.class_names[classes.pop()]!r} "
            f"alone, and all else is ignored. If white stands for a class, say so in {CLASSES_FILE}: a colour behind "
            f"each name, such as 0 0 0 and 255 255 255."
        ]
    return []
