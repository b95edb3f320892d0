"""Data sets of image retrieval in their published layout: Revisited Oxford and Paris, and Copydays."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xcit.data.images import EXTENSIONS
from xcit.errors import DataError

REVISITED = ("roxford5k", "rparis6k")
LABELS = ("easy", "hard", "junk")

STRONG = "strong"
BLOCKS = (
    STRONG,
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
"""Folders of Copydays beside ``original``."""
SAME_SCENE = 4
"""Characters at the beginning of a strongly attacked image's name that it shares with its original."""


@dataclass(frozen=True)
class RevisitedQuery:
    """What is searched for, and what counts as found.

    Attributes:
        path: the image.
        box: left, top, right, bottom in pixels of what is searched for in it.
        labels: positions in the database of "easy", "hard" and "junk" images.
    """

    path: Path
    box: tuple[float, float, float, float]
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class RevisitedSet:
    """Revisited Oxford or Paris.

    Attributes:
        images: the database, in the order that the labels count in. The queries are not among them.
        queries: 70 in the published sets.
    """

    images: Sequence[Path]
    queries: Sequence[RevisitedQuery]


@dataclass(frozen=True)
class CopySet:
    """Copydays.

    Attributes:
        originals: the database.
        blocks: of each kind of attack, the attacked images, each with the positions of its originals.
        absent: kinds whose folders are not there.
    """

    originals: Sequence[Path]
    blocks: dict[str, list[tuple[Path, list[int]]]]
    absent: tuple[str, ...]


def open_revisited(root: str | os.PathLike[str], name: str) -> RevisitedSet:
    """Open Revisited Oxford or Paris as published.

    Args:
        root: holds ``gnd_<name>.pkl`` and ``jpg/``; or a folder called ``name`` that does.
        name: one of ``REVISITED``.

    Raises:
        DataError: a file is missing, or the ground truth is damaged, holds code, or contradicts itself.

    Source: Radenović et al., "Revisiting Oxford and Paris", CVPR 2018; the authors' package revisitop.
    """
    root = Path(root).expanduser()
    file = next((f for f in (root / f"gnd_{name}.pkl", root / name / f"gnd_{name}.pkl") if f.is_file()), None)
    if file is None:
        raise DataError(f"{root}: has no gnd_{name}.pkl, nor a folder {name} with one; it must also hold jpg/.")
    truth = read_plain_pickle(file)
    try:
        images = [_image(file.parent, each) for each in truth["imlist"]]
        names = [_image(file.parent, each) for each in truth["qimlist"]]
        queries = [_query(path, each, len(images)) for path, each in zip(names, truth["gnd"], strict=True)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{file}: is not the ground truth of {name} ({type(error).__name__}: {error}); it must have imlist, "
            f"qimlist and gnd with bbx, easy, hard and junk."
        ) from None
    if not images or not queries:
        raise DataError(f"{file}: lists {len(images)} images and {len(queries)} queries.")
    missing = [path for path in (*images, *names) if not path.is_file()]
    if missing:
        raise DataError(
            f"{file.parent / 'jpg'}: {len(missing)} of {len(images) + len(names)} images that {file.name} lists are "
            f"not there, such as {missing[0].name}."
        )
    return RevisitedSet(images, queries)


def _image(folder: Path, name: Any) -> Path:
    name = str(name)
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"{name!r} is no name of an image")
    return folder / "jpg" / f"{name}.jpg"


def _query(path: Path, truth: Any, num_images: int) -> RevisitedQuery:
    left, top, right, bottom = (float(value) for value in truth["bbx"])
    if not (left < right and top < bottom):
        raise ValueError(f"the box of {path.name} is empty")
    labels = {}
    for label in LABELS:
        positions = np.asarray(truth[label]).reshape(-1)
        if positions.size == 0:
            positions = positions.astype(np.int64)
        if not np.issubdtype(positions.dtype, np.integer):
            raise TypeError(f"the {label} images of {path.name} are not numbers")
        if positions.size and not (positions.min() >= 0 and positions.max() < num_images):
            raise ValueError(f"the {label} images of {path.name} are not all among the {num_images}")
        labels[label] = positions.astype(np.int64)
    return RevisitedQuery(path, (left, top, right, bottom), labels)


def open_copydays(root: str | os.PathLike[str]) -> CopySet:
    """Open Copydays as published.

    An image under ``jpegqual/`` and ``crops/`` stands for the original of the same place in alphabetical order, one
    under ``strong/`` for the originals whose names begin with the same four characters.

    Args:
        root: holds ``original/`` and one or more of ``BLOCKS``.

    Raises:
        DataError: no originals, no attacked ones, or such as have no original.

    Source: Douze et al., "Evaluation of GIST descriptors for web-scale image search", CIVR 2009; [dino]
    eval_copy_detection.py.
    """
    root = Path(root).expanduser()
    originals = _images_in(root / "original")
    if not originals:
        raise DataError(f"{root}: has no images in original/; Copydays has 157 there, beside strong/, crops/ and more.")
    blocks: dict[str, list[tuple[Path, list[int]]]] = {}
    for block in BLOCKS:
        images = _images_in(root / block)
        if not images:
            continue
        if block != STRONG:
            if len(images) != len(originals):
                raise DataError(
                    f"{root / block}: holds {len(images)} images, and original/ {len(originals)}; there must be one of "
                    f"each."
                )
            blocks[block] = [(path, [i]) for i, path in enumerate(images)]
            continue
        blocks[block] = []
        for path in images:
            stem = path.name[:SAME_SCENE]
            positives = [i for i, original in enumerate(originals) if original.name[:SAME_SCENE] == stem]
            if not positives:
                raise DataError(f"{path}: there is no original whose name begins with {stem!r}.")
            blocks[block].append((path, positives))
    if not blocks:
        raise DataError(f"{root}: has original/ but none of {', '.join(BLOCKS[:3])}, ... with attacked images.")
    return CopySet(originals, blocks, tuple(block for block in BLOCKS if block not in blocks))


def _images_in(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.name.lower().endswith(EXTENSIONS) and p.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}.") from None


# --- pickles without code ---------------------------------------------------------------------------------------------


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for what older pickles spell bytes with."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand in for what older pickles spell empty bytes with."""
    return b""


def _allowed() -> dict[tuple[str, str], Any]:
    from numpy._core import multiarray, numeric

    found: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
        ("__builtin__", "bytes"): _no_bytes,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        found[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
        found[f"{core}.multiarray", "scalar"] = multiarray.scalar
        found[f"{core}.numeric", "_frombuffer"] = numeric._frombuffer  # type: ignore[attr-defined]
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, text, numbers and NumPy arrays; all else, which is how a pickle runs code, is refused."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle may name."""
        try:
            return self.allowed[module, name]
        except KeyError:
            raise _RefusedName(f"{module}.{name}") from None


class _RefusedName(pickle.UnpicklingError):
    """A pickle names what it must not."""


def read_plain_pickle(path: Path) -> Any:
    """Return what a pickle of plain data holds; nothing in it can run.

    Raises:
        DataError: it cannot be read, is damaged, or names anything but NumPy's arrays.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except _RefusedName as error:
        raise DataError(
            f"{path}: is refused: reading it would import {error}, and the published ground truth holds plain data "
            f"only. Download it again."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    except Exception as error:  # a parser meeting damaged bytes may fail in any way
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(f"{path}: is truncated or damaged ({reason}); download it again.") from None
