"""Images in tar files, as the WebDataset format lays them: members that share a name up to its first dot are a sample.

``0001.jpg`` and ``0001.cls`` (the class's number), or ``0001.json`` with the entry ``label`` or ``cls``, make a sample.
Each shard is read through once for an index of where its images lie; from then on any image is one seek and one read.
So the order of training is as free, and a run resumes and divides over processes as exactly, as with single files.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xcit.data import images as image_files
from xcit.data.image_set import ImageSet
from xcit.data.images import convert_image
from xcit.data.parts import (
    PART_OF_WORD,
    WHOLE,
    WORDS_OF_PART,
    Part,
    Texts,
    canonical,
    listing,
    plural,
    read_text,
    sorted_classes,
)
from xcit.data.shard_index import MAX_CLASSES, Sample, index_of, index_shard
from xcit.errors import DataError

log = logging.getLogger(__name__)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


# --- which files ------------------------------------------------------------------------------------------------------


def find_shards(source: str) -> list[Path]:
    """Return the tar files that a folder or a pattern stands for.

    Args:
        source: a tar file; a folder with tar files in it, or in its folders train, val and test; or a pattern such as
            ``train-{0000..0009}.tar``, ``{train,val}-*.tar`` or ``*.tar``.

    Raises:
        DataError: none are found, one of a pattern's range is missing, or they are compressed.
    """
    if Path(source).is_dir():
        words = [word for words in WORDS_OF_PART.values() for word in words]
        folders = [Path(source), *(Path(source, word) for word in words)]
        found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
        shards = [path for path in found if path.name.endswith(".tar") and not path.name.startswith(".")]
        compressed = [path for path in found if path.name.endswith(COMPRESSED)]
        if compressed and not shards:
            raise _compressed(compressed[0])
        if not shards:
            raise DataError(f"{source}: holds no tar file, nor do folders train, val and test in it.")
        return shards
    names = list(dict.fromkeys(name for pattern in _expand(source) for name in _matches(pattern)))
    shards = [Path(name) for name in names]
    for path in shards:
        if path.name.endswith(COMPRESSED):
            raise _compressed(path)
    missing = [str(path) for path in shards if not path.is_file()]
    if missing:
        of = f"{len(missing):,} of {plural(len(shards), 'shard')}" if len(shards) > 1 else "The shard"
        raise DataError(f"{of} of {source!r} {'does' if len(missing) == 1 else 'do'} not exist: {listing(missing)}.")
    return shards


def _expand(pattern: str) -> Iterator[str]:
    """Yield what the braces of a pattern stand for: {a,b} and {0000..0009}."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if last < first or last - first > MAX_CLASSES:
            raise DataError(f"{pattern!r}: the range {match[0]} must rise, and by no more than {MAX_CLASSES:,}.")
        width = len(ends[1]) if ends[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise DataError(f"{pattern!r}: {match[0]} must be a range such as {{0000..0009}}, or a choice such as {{a,b}}.")
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :])


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (takes absolute ones)
    if not found:
        raise DataError(f"The pattern {pattern!r} matches no file.")
    return found


def _compressed(path: Path) -> DataError:
    return DataError(
        f"{path}: is compressed, so that no image in it can be read by itself; unpack it to a plain .tar (images are "
        f"compressed already)."
    )


def _part_of(path: Path) -> str:
    """Tell a shard's part by a word in its name, or by its folder's whole name."""
    words = re.findall(r"[a-z]+", path.name.removesuffix(".tar").lower())
    parts = {PART_OF_WORD[word] for word in words if word in PART_OF_WORD}
    if len(parts) > 1:
        raise DataError(f"{path}: its name speaks of {' and '.join(sorted(parts))}; name it after one part.")
    return parts.pop() if parts else PART_OF_WORD.get(path.parent.name.lower(), WHOLE)


# --- the images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardReader:
    """Reads images out of tar files by number.

    No file stays open between two images: workers, however they are started, share nothing, and a thousand shards need
    no thousand handles.

    Attributes:
        root: the folder that the names are seen from.
        shards: paths of the tar files.
        shard_of: (n,) the shard of each image.
        offsets: (n,) where its bytes begin.
        sizes: (n,) how many they are.
        names: what each image is called: its shard and its key.
        in_chans: 3 for RGB, 1 for grey.
    """

    root: str
    shards: tuple[str, ...]
    shard_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: Sequence[str]
    in_chans: int

    def __call__(self, number: int) -> Image.Image:
        """Return the decoded image; DataError if it cannot be."""
        where = Path(self.root, self.names[number])
        try:
            content = self.content(number)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror or error}.") from None
        if len(content) < self.sizes[number]:
            raise DataError(f"{where}: the shard has become shorter since it was opened; start again.")
        image = image_files.decode(io.BytesIO(content), where)
        try:
            return convert_image(image, self.in_chans)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def content(self, number: int) -> bytes:
        """Return the image's bytes as they are.

        Raises:
            OSError: they cannot be read.
        """
        with Path(self.shards[self.shard_of[number]]).open("rb", buffering=0) as file:
            file.seek(int(self.offsets[number]))
            content = b""
            wanted = int(self.sizes[number])
            while len(content) < wanted and (more := file.read(wanted - len(content))):
                content += more
            return content


def shard_parts(source: str, in_chans: int) -> dict[str, Callable[[], Part]]:
    """Find the parts of a sharded data set.

    Args:
        source: as ``find_shards`` takes it.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        What opens each part. A shard's part is told by a word in its name (``train-0000.tar``,
        ``imagenet-validation-12.tar``) or by its folder's; without such words the set is undivided. Classes that are
        numbers are named by ``classes.txt`` (a line a class) or ``classes.json`` (a list) beside the shards, and else
        by their number.

    Raises:
        DataError: no such shards; some names with and some without a part.
    """
    shards = find_shards(source)
    by_part: dict[str, list[Path]] = {}
    for path in shards:
        by_part.setdefault(_part_of(path), []).append(path)
    if WHOLE in by_part and len(by_part) > 1:
        raise DataError(
            f"{source}: some shards are named after a part ({listing(sorted(set(by_part) - {WHOLE}))}), others are "
            f"not: {listing(str(path) for path in by_part[WHOLE])}."
        )
    folders = dict.fromkeys([*([Path(source)] if Path(source).is_dir() else []), *(path.parent for path in shards)])
    class_names = _class_names(list(folders))
    root = Path(os.path.commonpath([path.parent for path in shards]))
    return {part: partial(_open, root, paths, class_names, in_chans) for part, paths in sorted(by_part.items())}


def _open(root: Path, shards: list[Path], class_names: list[str] | None, in_chans: int) -> Part:
    found: list[list[Sample]] = []
    not_kept = []
    fresh = sum(not index_of(path).exists() for path in shards)
    if fresh:
        log.info("%s read through for an index, once.", plural(fresh, "shard"))
    for path in shards:
        samples, why = index_shard(path)
        found.append(samples)
        not_kept += [why] if why else []
    names = Texts(
        f"{path.relative_to(root).as_posix()}/{key}"
        for path, samples in zip(shards, found, strict=True)
        for key, _, _, _ in samples
    )
    samples = list(itertools.chain.from_iterable(found))
    labels, class_names = _number_classes(shards, found, [sample[3] for sample in samples], class_names)
    reader = ShardReader(
        str(root),
        tuple(map(str, shards)),
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(samples) for samples in found]),
        np.array([sample[1] for sample in samples], dtype=np.int64),
        np.array([sample[2] for sample in samples], dtype=np.int64),
        names,
        in_chans,
    )
    images = ImageSet(tuple(class_names), names, labels, reader, np.arange(len(samples), dtype=np.int64))
    if not_kept:
        log.warning(
            "The index of %s cannot be kept beside them and is made in each run (%s).",
            plural(len(not_kept), "shard"),
            not_kept[0],
        )
    return Part(images)


def _number_classes(
    shards: list[Path], found: list[list[Sample]], labels: list[int | str], class_names: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Return the labels as numbers, and the classes."""

    def refuse(index: int, why: str) -> DataError:
        for path, samples in zip(shards, found, strict=True):
            if index < len(samples):
                return DataError(f"{path}: the label of the sample {samples[index][0]!r} is {labels[index]!r}, {why}.")
            index -= len(samples)
        raise AssertionError(index)

    numbered = isinstance(labels[0], int)
    for index, label in enumerate(labels):
        if isinstance(label, int) != numbered:
            raise refuse(index, f"and the first one is {labels[0]!r}; take either numbers or names in all shards")
    if numbered:
        numbers = np.array(labels, dtype=np.int64)
        names = class_names or [str(number) for number in range(int(numbers.max()) + 1)]
        if numbers.max() >= len(names):
            raise refuse(int(numbers.argmax()), f"but there are {len(names)} class names (0 to {len(names) - 1})")
        return numbers, names
    names = class_names or sorted_classes(str(label) for label in labels)
    position = {name: number for number, name in enumerate(names)}
    for index, label in enumerate(labels):
        if label not in position:
            raise refuse(index, "which is none of the class names beside the shards")
    return np.array([position[str(label)] for label in labels], dtype=np.int64), names


def _class_names(folders: list[Path]) -> list[str] | None:
    """Return the class names that lie beside the shards, if any do."""
    for folder in folders:
        text, listed = folder / "classes.txt", folder / "classes.json"
        names: Any
        if text.is_file():
            path, names = text, [line.strip() for line in read_text(text).splitlines() if line.strip()]
        elif listed.is_file():
            path = listed
            try:
                names = json.loads(read_text(listed))
            except ValueError as error:
                raise DataError(f"{listed}: is not valid JSON ({error}).") from None
        else:
            continue
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"{path}: must list the names of the classes, the class of number 0 first.")
        names = [canonical(name) for name in names]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise DataError(f"{path}: names two classes alike: {listing(twice)}.")
        return names
    return None
