"""What all layouts share: names that weigh little, files behind them, parts that agree on classes, parts split off."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from PIL import Image

from xcit.data.image_set import ImageSet
from xcit.data.images import open_image
from xcit.errors import DataError

WORDS_OF_PART = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""How folders, tables and shards may call the parts of a data set."""

PART_OF_WORD = {word: part for part, words in WORDS_OF_PART.items() for word in words}

WHOLE = "all"
"""Key of a data set that is not divided."""

MAX_MISSING = 0.1
"""A list of which a larger share of the files is not there was not made for this folder."""


class Part(NamedTuple):
    """A part of a data set as it lies there; the classes of two parts need not agree yet."""

    images: ImageSet
    notes: tuple[str, ...] = ()


Parts = Mapping[str, Callable[[], Part]]
"""Of each part that there is ("train", "val", "test", or ``WHOLE``), what opens it."""


class Texts(Sequence[str]):
    """Many texts in one block of memory, which worker processes share instead of copying it bit by bit."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return the text at a position, or a list of those in a range."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self._ends[position - 1] if position else 0
        return self._bytes[start : self._ends[position]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class FileReader:
    """Reads image files by number.

    Attributes:
        folder: what the names are relative to.
        names: paths, with "/" between their parts.
        in_chans: 3 for RGB, 1 for grey.
    """

    folder: str
    names: Sequence[str]
    in_chans: int

    def __call__(self, number: int) -> Image.Image:
        """Return the decoded image; DataError if it cannot be."""
        return open_image(self.path(number), self.in_chans)

    def path(self, number: int) -> Path:
        """Return where the file lies."""
        return Path(self.folder, self.names[number])

    def content(self, number: int) -> bytes:
        """Return the file as it is.

        Raises:
            OSError: it cannot be read.
        """
        return self.path(number).read_bytes()


def file_set(
    folder: Path, names: Sequence[str], labels: np.ndarray, class_names: Sequence[str], in_chans: int
) -> ImageSet:
    """Return a set of image files.

    Args:
        folder: what the names are relative to.
        names: paths.
        labels: (n,) int64, or (n, classes) bool.
        class_names: in the order of the labels.
        in_chans: 3 for RGB, 1 for grey.
    """
    texts = Texts(names)
    return ImageSet(
        tuple(class_names),
        texts,
        labels,
        FileReader(str(folder), texts, in_chans),
        np.arange(len(texts), dtype=np.int64),
    )


def missing_files(images: ImageSet, source: str, advice: str) -> tuple[str, ...]:
    """Return a note on the listed files that are not there, if any; they count as images that cannot be decoded.

    Args:
        images: of files.
        source: the list, as messages call it.
        advice: a sentence on what the paths are relative to.

    Raises:
        DataError: more than ``MAX_MISSING`` of them are missing.
    """
    reader = images.read
    assert isinstance(reader, FileReader)
    missing = [
        name
        for name, number in zip(images.names, images.numbers, strict=True)
        if not os.path.exists(reader.path(number))  # noqa: PTH110 (Path.exists raises for a name that is too long)
    ]
    if not missing:
        return ()
    count = f"{source} lists {len(images):,} files of which {len(missing):,} do not exist"
    if len(missing) > MAX_MISSING * len(images):
        raise DataError(f"{count} ({listing(missing)}). {advice}")
    return (f"{count}: {listing(missing)}. They are skipped and counted like images that cannot be decoded.",)


def read_text(path: Path) -> str:
    """Return the text of a list: UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise DataError(f"{path}: is not a text (it holds a byte 0); save it as UTF-8.")
    return text


def listing(names: Iterable[str], limit: int = 5) -> str:
    """Return names for a message: the first few, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit:,} more" if len(names) > limit else shown


def plural(count: int, thing: str) -> str:
    """Return the number and the thing, such as "1 image" or "1,200 images"."""
    ending = "" if count == 1 else "es" if thing.endswith("s") else "s"
    return f"{count:,} {thing}{ending}"


# --- classes ----------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """Return a name in the one form of its accents that is compared: file systems write them in two."""
    return unicodedata.normalize("NFC", name)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Return labels of a list as classes: by value if all are whole numbers, else in the order of their characters."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def relabel(images: ImageSet, new_label: np.ndarray, class_names: Sequence[str]) -> ImageSet:
    """Return the set under other classes.

    Args:
        images: any set.
        new_label: (old classes,) int64, the class that each becomes; -1 for one that no image has.
        class_names: the new classes.
    """
    if not images.multi_label:
        return replace(images, labels=new_label[images.labels], class_names=tuple(class_names))
    labels = np.zeros((len(images), len(class_names)), dtype=bool)
    for old, new in enumerate(new_label):
        if new >= 0:
            labels[:, new] |= images.labels[:, old]
    return replace(images, labels=labels, class_names=tuple(class_names))


def agree(images: ImageSet, train: ImageSet, part: str) -> ImageSet:
    """Return a part with the classes of the training part, which must hold examples of all that occur.

    Raises:
        DataError: a class occurs that has no training image; or one part allows several classes an image, one does not.
    """
    if images.multi_label != train.multi_label:
        raise DataError(f"train and {part} differ: in one an image has one class, in the other it may have several.")
    trained = {name for name, count in zip(train.class_names, train.class_counts, strict=True) if count}
    occurring = [name for name, count in zip(images.class_names, images.class_counts, strict=True) if count]
    unknown = [name for name in occurring if name not in trained]
    if unknown:
        raise DataError(
            f"{part} has {plural(len(unknown), 'class')} without an image in train: {listing(unknown)} (train has "
            f"{listing(sorted_classes(trained))}). Both parts need the same classes under the same names."
        )
    position = {name: i for i, name in enumerate(train.class_names)}
    new_label = np.array([position.get(name, -1) for name in images.class_names], dtype=np.int64)
    return relabel(images, new_label, train.class_names)


# --- splitting --------------------------------------------------------------------------------------------------------


def split_off(images: ImageSet, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Divide a set for training and validation, each class in the same proportion.

    Who goes where follows from the seed and the images' names alone, not from where they lie, nor from the order in
    which they were found; and a set that grows keeps most of its division. A class of two or more images has at least
    one on either side; the only image of a class is trained on.

    Args:
        images: any set.
        fraction: share for validation, more than 0 and less than 1.
        seed: which images those are.

    Returns:
        Positions of the training images, positions of the validation images (both in rising order), and notes.

    Raises:
        DataError: a part would be empty.
    """
    ranks = np.array(
        [
            int.from_bytes(
                hashlib.blake2b(f"{seed}\0{canonical(name)}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
            )
            for name in images.names
        ],
        dtype=np.uint64,
    )
    order = np.argsort(ranks, kind="stable")
    if images.multi_label:
        chosen = _choose_multi(images.labels[order], fraction)
    else:
        chosen = _choose_single(images.labels[order], fraction)
    val, train = np.sort(order[chosen]), np.sort(order[~chosen])
    if not len(val) or not len(train):
        raise DataError(
            f"{plural(len(images), 'image')} in {plural(len(images.class_names), 'class')} cannot be divided for "
            f"training and validation; a class needs two images or more, or make a val part yourself."
        )
    notes = [
        f"{len(val):,} of {plural(len(images), 'image')} ({len(val) / len(images):.1%}) were split off for validation: "
        f"by class, with seed {seed}."
    ]
    lonely = [name for name, count in zip(images.class_names, images.class_counts, strict=True) if count == 1]
    if lonely and not images.multi_label:
        notes.append(f"The only image of {plural(len(lonely), 'class')} is trained on: {listing(lonely)}.")
    return train, val, tuple(notes)


def _share(count: int, fraction: float) -> int:
    """Return how many of a class are for validation."""
    return min(max(int(count * fraction + 0.5), 1), count - 1) if count > 1 else 0


def _choose_single(labels: np.ndarray, fraction: float) -> np.ndarray:
    chosen = np.zeros(len(labels), dtype=bool)
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    for start, count in zip(np.cumsum(counts) - counts, counts, strict=True):
        chosen[by_class[start : start + _share(int(count), fraction)]] = True
    return chosen


def _choose_multi(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Decide for the images of the rarest class first: where classes meet in an image, the rare one is hard to fill."""
    chosen, open_ = np.zeros(len(labels), dtype=bool), np.ones(len(labels), dtype=bool)
    counts = labels.sum(axis=0)
    for label in np.argsort(counts, kind="stable"):
        mine = labels[:, label]
        candidates = np.flatnonzero(mine & open_)
        wanted = _share(int(counts[label]), fraction) - int((mine & chosen).sum())
        chosen[candidates[: max(wanted, 0)]] = True
        open_[candidates] = False
    rest = np.flatnonzero(open_)  # images without any class
    chosen[rest[: int(len(rest) * fraction + 0.5)]] = True
    return chosen
