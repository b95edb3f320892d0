"""Images to learn from without labels; where there are labels they serve to look at what was learned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xcit.data.image_set import ImageSet
from xcit.data.images import EXTENSIONS, check_channels, find_images
from xcit.data.parts import WORDS_OF_PART, file_set
from xcit.data.shards import COMPRESSED
from xcit.data.sources import open_data
from xcit.errors import ConfigError, DataError

NO_CLASSES = ("images",)
"""What stands for the classes of images without labels."""


class UnlabelledData(NamedTuple):
    """Images to learn from, and where they have labels, others of the same classes."""

    train: ImageSet
    """What is learned from. Its labels are for the probe alone; there are none where ``probe`` is None."""
    probe: ImageSet | None
    """Labelled images that are not learned from, each of which the training images are to tell the class of; None where
    there are no labels, or several an image."""
    notes: tuple[str, ...] = ()
    """What a user should hear about the data, a sentence each."""


def open_unlabelled(
    root: str | Path,
    format: str = "auto",
    *,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    in_chans: int = 3,
    download: bool = False,
) -> UnlabelledData:
    """Open images to learn from without labels.

    A folder is searched to any depth. With "auto" its folders count as classes, for the probe, where there are two or
    more and no image lies beside them; of a folder that is divided into train/, val/ and test/ only train/ is learned
    from.

    Args:
        root: a folder, a CSV file, a pattern of tar shards, the local copy of a public set; "" for the digits.
        format: "images" (a folder, without labels), or as for ``open_data``.
        val_fraction: share of the labelled training images that the probe asks about, where the data has no val part.
        split_seed: which images those are.
        in_chans: 3 for RGB, 1 for grey.
        download: fetch a public set that is not there.

    Raises:
        DataError: nothing is there, or it cannot be used.
        ConfigError: an argument is out of its range or does nothing here.
    """
    path = Path(root).expanduser()
    if format == "images" or (format == "auto" and str(root) and _without_labels(path)):
        if download:
            raise ConfigError(f"Only public sets can be downloaded; the format is {format}.")
        return _all_images(path, in_chans)
    try:
        train, val, _, notes = open_data(
            root, format, val_fraction=val_fraction, split_seed=split_seed, in_chans=in_chans, download=download
        )
    except DataError as error:
        if format != "auto" or not str(root) or not path.is_dir():
            raise
        raise DataError(
            f"{error} (If its folders are no classes, data.format=images takes all images below it.)"
        ) from None
    if train.multi_label:
        notes += ("An image may have several classes, which the k-NN probe is not for; it is left out.",)
        return UnlabelledData(train, None, notes)
    return UnlabelledData(train, val, notes)


def _without_labels(path: Path) -> bool:
    """Tell whether a folder's own folders cannot be classes."""
    if not path.is_dir():
        return False
    base = _training_part(path)
    try:
        entries = [entry for entry in base.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from None
    if any(entry.name.endswith((".tar", *COMPRESSED)) for entry in entries):
        return False
    loose = any(entry.suffix.lower() in EXTENSIONS and entry.is_file() for entry in entries)
    return loose or sum(entry.is_dir() for entry in entries) < 2


def _training_part(path: Path) -> Path:
    found = [path / word for word in WORDS_OF_PART["train"] if (path / word).is_dir()]
    return found[0] if found else path


def _all_images(path: Path, in_chans: int) -> UnlabelledData:
    check_channels(in_chans)
    if not path.is_dir():
        raise DataError(f"{path}: is not a folder of images.")
    base = _training_part(path)
    names = [_relative(found, path) for found in find_images([base])]
    notes = () if base == path else (f"Only the images in {base} are learned from.",)
    images = file_set(path, names, np.zeros(len(names), dtype=np.int64), NO_CLASSES, in_chans)
    return UnlabelledData(images, None, notes)


def _relative(found: Path, folder: Path) -> str:
    """Return a file's path relative to a folder, with "/" between its parts."""
    return os.path.relpath(found, folder).replace(os.sep, "/")
