"""The embedded digits as files: an image folder, a list, or tar shards, so that every layout can be tried."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xcit.data.digits import CLASS_NAMES, DigitSplits, digit_splits
from xcit.data.preprocess import Preprocessing
from xcit.data.written_folder import make_room, write_manifest
from xcit.errors import ConfigError, ExportError

LAYOUTS = ("folder", "csv", "shards")
COMMAND = "xcit data digits"
MANIFEST = ".xcit-digits.json"
"""Lists what was written, so that it, and nothing else, can be replaced. Hidden, so that no reader takes notice."""
SHARD_SIZE = 500
MAX_SIZE = 1024
"""Pixels a side; enlarging 8 x 8 further only costs space."""

File = tuple[str, bytes]


class WrittenDigits(NamedTuple):
    """What was written."""

    root: Path
    """What a data set's root is to be: the folder, or the list in it."""
    counts: dict[str, int]
    """Images of each part."""


def write_digits(
    folder: str | Path,
    *,
    layout: str = "folder",
    image_size: int = 32,
    val_fraction: float = 0.2,
    overwrite: bool = False,
) -> WrittenDigits:
    """Write the digits as grey PNG files, in the three parts of ``digit_splits``.

    A model that is trained on the files at their size sees the very pixels that one trained on the embedded digits
    sees at this size: both are enlarged by the same bicubic interpolation.

    Args:
        folder: where to; made if need be.
        layout: "folder" (``train/3/0012.png``), "csv" (``images/0012.png``, listed in ``digits.csv``) or "shards"
            (``train-0000.tar``, ..., ``classes.txt``).
        image_size: pixels a side, 8 to ``MAX_SIZE``.
        val_fraction: share of what is not held out that validates, 0.05 to 0.5; the test part is the same always.
        overwrite: replace what an earlier call wrote there.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: the folder holds something already that must not, or may not, be replaced.
        ExportError: it cannot be written.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}.")
    if not 8 <= image_size <= MAX_SIZE:
        raise ConfigError(f"image_size is {image_size}; it must be between 8 and {MAX_SIZE}.")
    splits = digit_splits(val_fraction)
    folder = Path(folder).expanduser()
    files = list({"folder": _as_folder, "csv": _as_csv, "shards": _as_shards}[layout](splits, image_size))
    make_room(folder, MANIFEST, COMMAND, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, MANIFEST, [name for name, _ in files])
        for name, content in files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise ExportError(f"{error.filename or folder}: cannot be written: {error.strerror}.") from None
    counts = {part: len(digits) for part, digits in splits._asdict().items()}
    return WrittenDigits(folder / "digits.csv" if layout == "csv" else folder, counts)


def _pictures(splits: DigitSplits, image_size: int) -> Iterator[tuple[str, str, str, bytes]]:
    """Yield part, class, name and PNG file of each digit."""
    prepare = Preprocessing((image_size, image_size), mean=(0.0,), std=(1.0,), in_chans=1)
    for part, digits in splits._asdict().items():
        for i in range(len(digits)):
            file = io.BytesIO()
            prepare.resize_and_crop(digits.picture(i)).save(file, format="PNG")
            yield part, CLASS_NAMES[digits.labels[i]], f"{digits.indices[i]:04d}", file.getvalue()


def _as_folder(splits: DigitSplits, image_size: int) -> Iterator[File]:
    for part, label, name, content in _pictures(splits, image_size):
        yield f"{part}/{label}/{name}.png", content


def _as_csv(splits: DigitSplits, image_size: int) -> Iterator[File]:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    for part, label, name, content in _pictures(splits, image_size):
        path = f"images/{name}.png"
        writer.writerow([path, label, part])
        yield path, content
    yield "digits.csv", table.getvalue().encode()


def _as_shards(splits: DigitSplits, image_size: int) -> Iterator[File]:
    yield "classes.txt", "".join(f"{name}\n" for name in CLASS_NAMES).encode()
    samples: dict[str, list[tuple[str, str, bytes]]] = {}
    for part, label, name, content in _pictures(splits, image_size):
        samples.setdefault(part, []).append((label, name, content))
    for part, found in samples.items():
        for shard, start in enumerate(range(0, len(found), SHARD_SIZE)):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for label, name, content in found[start : start + SHARD_SIZE]:
                    for member, data in ((f"{name}.png", content), (f"{name}.cls", label.encode())):
                        info = tarfile.TarInfo(member)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            yield f"{part}-{shard:04d}.tar", file.getvalue()
