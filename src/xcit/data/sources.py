"""One way into every data set: a folder, a list, tar shards, a public set by name, or the embedded digits."""

from __future__ import annotations

import difflib
import functools
import glob
import importlib.resources
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xcit.data.folder import folder_parts
from xcit.data.image_set import DataSplits, ImageSet
from xcit.data.images import check_channels
from xcit.data.labels import imagenet_names
from xcit.data.named import NAMED_SETS, array_set, named_parts
from xcit.data.parts import (
    PART_OF_WORD,
    WHOLE,
    WORDS_OF_PART,
    Parts,
    agree,
    canonical,
    listing,
    plural,
    relabel,
    split_off,
)
from xcit.data.shards import COMPRESSED, shard_parts
from xcit.data.table import table_parts
from xcit.errors import ConfigError, DataError, UnknownNameError

if TYPE_CHECKING:
    from xcit.data.digits import Digits

log = logging.getLogger(__name__)

LAYOUTS = ("folder", "csv", "shards")
FORMATS = ("auto", *LAYOUTS, *NAMED_SETS, "digits")

# --- to train on ------------------------------------------------------------------------------------------------------


def open_data(
    root: str | Path,
    format: str = "auto",
    *,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    in_chans: int = 3,
    download: bool = False,
) -> DataSplits:
    """Open a data set to train on, all its parts with the classes of its training part.

    Args:
        root: a folder, a CSV file, a pattern of tar shards, the local copy of a public set; "" for the digits.
        format: one of ``FORMATS``; "auto" finds out a folder, a CSV file or shards.
        val_fraction: share of the training images, more than 0 and less than 1, that validates where the data has no
            val part; of each class in proportion.
        split_seed: which images those are. (The digits' parts are fixed: ``digit_splits``.)
        in_chans: 3 for RGB, 1 for grey.
        download: fetch a public set that is not there.

    Returns:
        Its parts; what is odd about them stands in ``notes``.

    Raises:
        DataError: nothing is there, or it cannot be used; the message says why, and what to do.
        ConfigError: an argument is out of its range or does nothing here.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; it must be more than 0 and less than 1.")
    if format == "digits":
        return _digits(root, val_fraction, in_chans)
    parts = find_parts(root, format, in_chans=in_chans, download=download)
    if "train" not in parts and WHOLE not in parts:
        raise DataError(
            f"{root}: has {_these(parts)} but no train part; name the folder above, or call the part to learn from "
            f"train. (To judge a model on it: xcit eval.)"
        )
    train, notes = parts["train" if "train" in parts else WHOLE]()
    _need_classes(root, train)
    if "val" in parts:
        val, more = parts["val"]()
        notes += more
        val = agree(val, train, "val")
        notes += _uncovered(val, train, "val")
    else:
        train_at, val_at, more = split_off(train, val_fraction, split_seed)
        notes += more
        train, val = train.subset(train_at), train.subset(val_at)
    test = None
    if "test" in parts:
        test, more = parts["test"]()
        notes += more
        test = agree(test, train, "test")
        notes += _uncovered(test, train, "test")
    untrained = [name for name, count in zip(train.class_names, train.class_counts, strict=True) if not count]
    if untrained:
        notes += (f"{plural(len(untrained), 'class')} without a training image: {listing(untrained)}.",)
    return DataSplits(train, val, test, notes)


def find_parts(root: str | Path, format: str = "auto", *, in_chans: int = 3, download: bool = False) -> Parts:
    """Return what opens each part of a data set as it lies there; whether they agree is not looked at.

    Args:
        root: as for ``open_data``.
        format: one of ``FORMATS``.
        in_chans: 3 for RGB, 1 for grey.
        download: fetch a public set that is not there.

    Raises:
        DataError: nothing is there, or not in that format.
        ConfigError: an argument is out of its range or does nothing here.
    """
    check_channels(in_chans)
    if format not in FORMATS:
        raise UnknownNameError("format of data", format, FORMATS, f"There are {', '.join(FORMATS)}.")
    if download and format not in NAMED_SETS:
        raise ConfigError(f"Only public sets can be downloaded ({', '.join(NAMED_SETS)}); the format is {format}.")
    if format == "digits":
        raise ConfigError("The embedded digits are not a folder; xcit data digits writes them as one.")
    if not str(root):
        raise ConfigError("The data's root is empty; name a folder, a CSV file or a pattern of tar shards.")
    path = Path(root).expanduser()
    if format == "auto":
        try:
            format = _recognise(path)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from None
        log.info("%s is read as %s.", path, {"folder": "an image folder", "csv": "a list"}.get(format, "tar shards"))
    if format == "shards":
        return shard_parts(str(path), in_chans)
    if not path.exists() and not (format in NAMED_SETS and download):
        raise DataError(f"{path}: is not there{_nearest(path)}")
    if format == "folder":
        return folder_parts(path, in_chans)
    if format == "csv":
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name the CSV file in it.")
        return table_parts(path, in_chans)
    return named_parts(format, path, in_chans, download)


def _recognise(path: Path) -> str:
    """Tell the layout from what is there."""
    if path.is_file():
        if path.suffix.lower() in (".csv", ".tsv"):
            return "csv"
        if path.name.endswith((".tar", *COMPRESSED)):
            return "shards"
        raise DataError(f"{path}: is a file, but neither a list (.csv, .tsv) nor a shard (.tar).")
    if path.is_dir():
        words = [word for words in WORDS_OF_PART.values() for word in words]
        inner = [path / word for word in words if (path / word).is_dir()]
        entries = list(path.iterdir())
        if not any(e.is_dir() and not e.name.startswith(".") and e.name.lower() not in PART_OF_WORD for e in entries):
            entries += [entry for folder in inner for entry in folder.iterdir()]
        entries = [e for e in entries if not e.name.startswith(".")]
        tars = any(entry.name.endswith((".tar", *COMPRESSED)) for entry in entries)
        folders = any(entry.is_dir() and entry not in inner for entry in entries)
        if tars and folders:
            raise DataError(f"{path}: holds tar files as well as folders; say which of them: format folder, or shards.")
        return "shards" if tars else "folder"
    if glob.has_magic(str(path)) or "{" in str(path):
        return "shards"
    raise DataError(f"{path}: is not there{_nearest(path)}")


def _nearest(path: Path) -> str:
    """End the message about something missing: with a neighbour of nearly the same name, where there is one."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f", nor is the folder {str(path.parent)!r}."
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else "."


def _need_classes(root: str | Path, train: ImageSet) -> None:
    if not train.multi_label and len(train.class_names) < 2:
        raise DataError(f"{root}: all images are of one class ({train.class_names[0]!r}); there is nothing to learn.")


def _uncovered(images: ImageSet, train: ImageSet, part: str) -> tuple[str, ...]:
    """Note classes that are trained but cannot be judged in this part."""
    absent = [
        name
        for name, here, there in zip(train.class_names, images.class_counts, train.class_counts, strict=True)
        if there and not here
    ]
    return (f"{part} has no image of {plural(len(absent), 'class')}: {listing(absent)}.",) if absent else ()


def _these(parts: Parts) -> str:
    return " and ".join(sorted(parts))


def _digits(root: str | Path, val_fraction: float, in_chans: int) -> DataSplits:
    from xcit.data.digits import digit_splits  # with scikit-learn, which only this set needs

    check_channels(in_chans)
    if str(root):
        raise ConfigError(f"The digits are embedded; leave the root empty (it is {str(root)!r}).")
    train, val, test = (digit_set(part, in_chans) for part in digit_splits(val_fraction))
    return DataSplits(train, val, test)


def digit_set(digits: Digits, in_chans: int) -> ImageSet:
    """Return some of the digits as a set of images of 8 x 8 pixels, called by their positions in scikit-learn's data.

    Args:
        digits: which ones.
        in_chans: 3 for RGB, 1 for grey.
    """
    from xcit.data.digits import CLASS_NAMES

    images = array_set(digits.images, digits.indices, digits.labels, CLASS_NAMES, "digits", in_chans)
    return ImageSet(
        images.class_names, images.names, images.labels, images.read, np.arange(len(digits), dtype=np.int64)
    )


# --- to judge a model by ----------------------------------------------------------------------------------------------


def open_eval_set(
    root: str | Path,
    format: str = "auto",
    *,
    split: str | None = None,
    in_chans: int = 3,
    class_names: Sequence[str] | None = None,
) -> ImageSet:
    """Open one part of a data set, under the classes of the model that is to be judged.

    Args:
        root: as for ``open_data``; also a folder of class folders, which is then taken whole.
        format: one of ``FORMATS``.
        split: which part: train, val or test. None takes test, or else val, or else the whole of what is not divided.
        in_chans: 3 for RGB, 1 for grey.
        class_names: the model's. The data's classes are found among them by name. Folders called n01440764 and the
            like stand for ImageNet's classes where the model has those, and folders called by numbers stand for the
            classes of these numbers (ImageNet-V2). None keeps the data's.

    Returns:
        The images, under ``class_names`` if given; the model may have classes that the data has no image of.

    Raises:
        DataError: nothing is there, it has no such part, or classes that the model lacks; the message names them.
        ConfigError: an argument is out of its range.
    """
    if split is not None and split not in PART_OF_WORD:
        raise UnknownNameError("part", split, WORDS_OF_PART, "There are train, val and test.")
    wanted = PART_OF_WORD[split] if split is not None else None
    if format == "digits":
        images = _digits_to_judge(root, wanted, in_chans)
    else:
        parts = find_parts(root, format, in_chans=in_chans)
        chosen = wanted or next((part for part in ("test", "val", WHOLE) if part in parts), None)
        if chosen is None:
            raise DataError(f"{root}: has {_these(parts)}, but neither test nor val; say which part: split train.")
        if chosen not in parts:
            there = "is not divided" if WHOLE in parts else f"has {_these(parts)}"
            raise DataError(f"{root}: {there}; it has no {chosen} part.")
        if wanted is None and chosen != WHOLE:
            log.info("%s has %s; %s is taken.", root, _these(parts), chosen)
        images, notes = parts[chosen]()
        for note in notes:
            log.warning("%s", note)
    return images if class_names is None else match_classes(images, class_names)


def _digits_to_judge(root: str | Path, wanted: str | None, in_chans: int) -> ImageSet:
    if wanted not in (None, "test"):
        raise ConfigError(f"Of the embedded digits only test is the same in every run; the part asked for is {wanted}.")
    test = _digits(root, 0.2, in_chans).test
    assert test is not None
    return test


def match_classes(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Return a set under a model's classes; see ``open_eval_set``.

    Raises:
        DataError: the model lacks some of them, or has two of one name.
    """
    names = [canonical(name) for name in class_names]
    occurring = [name for name, count in zip(images.class_names, images.class_counts, strict=True) if count]
    for how, position in (
        ("", _by_name(names)),
        ("as ImageNet's synsets", _by_synset(names)),
        ("by their numbers", {} if set(occurring) & set(names) else _by_number(occurring, len(names))),
    ):
        if position and all(name in position for name in occurring):
            if how:
                log.info("The data's classes (%s) are matched with the model's %s.", listing(occurring, 3), how)
            twice = [name for name in occurring if position[name] < 0]
            if twice:
                raise DataError(
                    f"The model has two classes called {listing(twice)}, so that it cannot be said which is meant; "
                    f"call the data's classes by their numbers."
                )
            new_label = np.array([position.get(name, -1) for name in images.class_names], dtype=np.int64)
            return relabel(images, new_label, class_names)
    known = set(names)
    missing = [name for name in occurring if name not in known]
    raise DataError(
        f"The model knows {len(occurring) - len(missing):,} of the data's {plural(len(occurring), 'class')}; it lacks "
        f"{listing(missing)}. Its own {len(names):,} are {listing(names)}."
    )


def _by_name(names: list[str]) -> dict[str, int]:
    """Return the class of each name; -1 for a name that two have."""
    position: dict[str, int] = {}
    for number, name in enumerate(names):
        position[name] = -1 if name in position else number
    return position


def _by_synset(names: list[str]) -> dict[str, int]:
    # Not every one: the names of a few have been told apart better since ("crane" and "crane bird").
    if len(names) != 1000 or sum(a == b for a, b in zip(names, imagenet_names(), strict=True)) < 990:
        return {}
    return {wnid: number for number, wnid in enumerate(imagenet_wnids())}


def _by_number(occurring: list[str], num_classes: int) -> dict[str, int]:
    return {name: int(name) for name in occurring if re.fullmatch(r"[0-9]{1,9}", name) and int(name) < num_classes}


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return WordNet's numbers of ImageNet-1k's classes, in the usual order of the classes, which is also theirs."""
    text = importlib.resources.files("xcit.data").joinpath("imagenet_wnids.txt").read_text(encoding="ascii")
    return tuple(text.split())
