"""Features of many files, in a run that may be killed at any moment and goes on where it was.

While it runs, finished rows lie in a folder beside the output (``.features.parquet.parts``), in files that are whole or
absent. The same command, repeated, takes them over; so it does with the rows of a finished output. A row stands for a
file of one size and time of change: a file that was changed is read anew.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from xcit.data.images import open_image
from xcit.errors import ConfigError, DataError, ExportError
from xcit.files import write_atomic
from xcit.inference.feature_file import ENDINGS, FeatureTable, Origin, read_features, write_features
from xcit.inference.features import FeatureExtractor

PART_ROWS = 1024
PART_SECONDS = 10.0
"""A part is written when it has so many rows or is so old: what SIGKILL costs at most."""


class Failed(NamedTuple):
    """A file without features."""

    path: str
    error: str
    """One sentence that names the file."""


class Embedded(NamedTuple):
    """What a run gave."""

    num_rows: int
    """Images in the output."""
    num_reused: int
    """Of these, the ones that were finished before."""
    num_gone: int
    """Images of the former output whose files are no longer there."""
    failed: list[Failed]
    """Files that could not be read; they are tried again by each run."""


def embed_files(
    paths: Sequence[Path],
    extractor: FeatureExtractor,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    on_row: Callable[[Failed | None], None] | None = None,
    on_reused: Callable[[int], None] | None = None,
    on_kept: Callable[[int], None] | None = None,
) -> Embedded:
    """Compute the features of files and write them, taking over what an earlier run finished.

    Args:
        paths: the images, each once.
        extractor: makes the features.
        output: ends in .parquet, .npy or .csv.
        overwrite: drop what an earlier run with other settings or other images left there.
        on_row: called after each image that was computed, with what is wrong with it.
        on_reused: called once, before the first image, with how many need not be computed.
        on_kept: called each time that finished rows were written, with how many: these outlive whatever happens next.

    Returns:
        What was done. The output holds the images that could be read, in the order of ``paths``; broken ones are
        listed in a file of the output's name with ``.errors.csv`` after it, which is there only if there are any.

    Raises:
        ConfigError: another ending; an output made with another model or other settings, or with images that are not
            among ``paths`` though they still exist; another run is at work on it.
        DataError: the output exists but is no file of features; none of the images can be read.
        ExportError: no space, no permission, or the like. What was finished before is kept.
        KeyboardInterrupt: Ctrl-C; finished rows are kept for the next run.
    """
    output = Path(output)
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"The output is {output}; its name must end in {' or '.join(ENDINGS)}.")
    if output.is_dir():
        raise ConfigError(f"The output is {output}, which is a folder; name a file in it.")
    origin = Origin(extractor.fingerprint, extractor.settings, os.getcwd())  # noqa: PTH109 (text is wanted)
    lock = output.with_name(f".{output.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # a place where no file can be made would look to the lock as if another held it
        with FileLock(lock, timeout=0):
            try:
                return _Run(paths, extractor, output, origin, overwrite)(on_row, on_reused, on_kept)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ConfigError(f"Another xcit embed is writing {output} at this moment; wait for it.") from None
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror or error} ({output.parent}).") from None


class _Run:
    def __init__(
        self, paths: Sequence[Path], extractor: FeatureExtractor, output: Path, origin: Origin, overwrite: bool
    ) -> None:
        self.extractor, self.output, self.origin = extractor, output, origin
        self.parts = _Parts(output.with_name(f".{output.name}.parts"), origin, extractor.dim)
        self.num_images = len(paths)
        self.failed: list[Failed] = []
        self.files: list[tuple[str, int, int]] = []  # path, size, time of change: of what may become a row
        for path in paths:
            name = os.fspath(path)
            try:
                name.encode()
                stat = path.stat()
            except UnicodeEncodeError:
                self.failed.append(Failed(name, f"{name!a}: its name is not text in UTF-8; rename the file."))
            except OSError:
                self.failed.append(Failed(name, _why_unreadable(path)))
            else:
                self.files.append((name, stat.st_size, stat.st_mtime_ns))
        self.num_gone = 0
        self.former = self._former(overwrite)

    def _former(self, overwrite: bool) -> FeatureTable | None:
        """Return the finished output of an earlier run; refuse one that would be lost."""
        output = self.output
        self.parts.check_or_remove(remove_others=overwrite)
        if not output.exists():
            return None
        if output.suffix.lower() != ".parquet":
            if overwrite:
                return None
            raise ConfigError(f"{output} is there already; name another file, or replace it with --overwrite.")
        former = read_features(output)  # what is no file of features is not replaced either
        if former.origin.fingerprint != self.origin.fingerprint:
            if overwrite:
                return None
            raise ConfigError(former.origin.unlike(self.origin, str(output)) + " Name another file, or --overwrite.")
        named = {self.origin.key(name) for name, _, _ in self.files} | {self.origin.key(f.path) for f in self.failed}
        others = [name for name in former.paths if former.origin.key(name) not in named]
        kept = [name for name in others if Path(former.origin.key(name)).exists()]
        if kept and not overwrite:
            if len(kept) == 1:
                what, they = f"an image that is not named now ({kept[0]})", "it"
            else:
                what, they = f"{len(kept):,} images that are not named now ({kept[0]}, ...)", "them"
            raise ConfigError(
                f"{output} holds {what}; name {they} too, or another file, or drop {they} with --overwrite."
            )
        self.num_gone = len(others) - len(kept)
        return former

    def __call__(
        self,
        on_row: Callable[[Failed | None], None] | None,
        on_reused: Callable[[int], None] | None,
        on_kept: Callable[[int], None] | None,
    ) -> Embedded:
        rows = np.empty((len(self.files), self.extractor.dim), np.float32)
        done = np.zeros(len(self.files), bool)
        where = {self.origin.key(name): i for i, (name, _, _) in enumerate(self.files)}
        for table in [*([self.former] if self.former else []), *self.parts.read()]:
            self._take_over(table, where, rows, done)
        former, self.former = self.former, None
        num_reused = int(done.sum())
        if on_reused is not None:
            on_reused(num_reused)
        missing = np.flatnonzero(~done).tolist()
        if missing:
            self._compute(missing, rows, done, on_row, on_kept)
        if not done.any():
            shutil.rmtree(self.parts.folder, ignore_errors=True)
            if len(self.failed) == self.num_images == 1:
                raise DataError(self.failed[0].error)
            first = f" The first: {self.failed[0].error}" if self.failed else ""
            raise DataError(f"None of the {self.num_images:,} images can be read.{first}")
        self._finish(rows, done, changed=former is None or not self._is_as(former, rows, done))
        return Embedded(int(done.sum()), num_reused, self.num_gone, self.failed)

    def _take_over(self, table: FeatureTable, where: dict[str, int], rows: np.ndarray, done: np.ndarray) -> None:
        """Copy the rows that still hold; a later table wins."""
        for j, name in enumerate(table.paths):
            i = where.get(table.origin.key(name))
            if i is not None and (table.sizes[j], table.mtimes[j]) == self.files[i][1:]:
                rows[i], done[i] = table.features[j], True

    def _is_as(self, former: FeatureTable, rows: np.ndarray, done: np.ndarray) -> bool:
        """Tell whether the former output has these very rows: of the same files, as they are now, in the same order.

        Whether anything was computed does not tell: a killed run's parts may have all that was missing.
        """
        names = [name for (name, _, _), is_done in zip(self.files, done, strict=True) if is_done]
        if list(former.paths) != names or former.origin.folder != self.origin.folder:
            return False
        stats = [file[1:] for file, is_done in zip(self.files, done, strict=True) if is_done]
        if list(zip(former.sizes.tolist(), former.mtimes.tolist(), strict=True)) != stats:
            return False
        return np.array_equal(former.features, rows[done], equal_nan=True)

    def _compute(
        self,
        missing: list[int],
        rows: np.ndarray,
        done: np.ndarray,
        on_row: Callable[[Failed | None], None] | None,
        on_kept: Callable[[int], None] | None,
    ) -> None:
        self.parts.begin()
        waiting: list[int] = []

        def keep() -> None:
            self.parts.write(self._table(rows, waiting))
            done[waiting] = True
            if on_kept is not None:
                on_kept(len(waiting))
            waiting.clear()

        began = time.monotonic()
        stream = self.extractor.stream([Path(self.files[i][0]) for i in missing])
        try:
            for i, features in zip(missing, stream, strict=True):
                failure = None
                if features.vector is None:
                    failure = Failed(self.files[i][0], str(features.error))
                    self.failed.append(failure)
                else:
                    rows[i] = features.vector
                    waiting.append(i)
                if on_row is not None:
                    on_row(failure)
                if len(waiting) >= PART_ROWS or (waiting and time.monotonic() - began >= PART_SECONDS):
                    keep()
                    began = time.monotonic()
        finally:  # Ctrl-C, or an error that is not of one image: what is finished is kept
            if waiting:
                keep()

    def _table(self, rows: np.ndarray, chosen: Sequence[int]) -> FeatureTable:
        files = [self.files[i] for i in chosen]
        return FeatureTable(
            self.origin,
            [name for name, _, _ in files],
            rows[np.asarray(chosen, dtype=np.int64)],
            np.array([size for _, size, _ in files], np.int64),
            np.array([mtime for _, _, mtime in files], np.int64),
        )

    def _finish(self, rows: np.ndarray, done: np.ndarray, changed: bool) -> None:
        """Put the output in its place, then what is no longer needed away: in this order, a kill loses nothing."""
        if changed:
            chosen = np.flatnonzero(done).tolist()
            table = self._table(rows, chosen) if len(chosen) < len(rows) else self._whole(rows)
            write_features(self.output, table)
        _write_errors(self.output.with_name(f"{self.output.name}.errors.csv"), self.failed)
        shutil.rmtree(self.parts.folder, ignore_errors=True)

    def _whole(self, rows: np.ndarray) -> FeatureTable:
        """Return all rows without copying them."""
        none = self._table(rows, [])
        sizes, mtimes = (np.array([file[k] for file in self.files], np.int64) for k in (1, 2))
        return FeatureTable(none.origin, [name for name, _, _ in self.files], rows, sizes, mtimes)


class _Parts:
    """The folder of finished rows."""

    def __init__(self, folder: Path, origin: Origin, dim: int) -> None:
        self.folder, self.origin, self.dim = folder, origin, dim
        self.about = folder / "origin.json"

    def check_or_remove(self, remove_others: bool) -> None:
        """Refuse an unfinished run with other settings, or remove it."""
        if not self.folder.exists():
            return
        try:
            theirs = Origin.from_json(json.loads(self.about.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(self.folder, ignore_errors=True)  # killed before the first row
            return
        if theirs.fingerprint == self.origin.fingerprint:
            return
        if not remove_others:
            raise ConfigError(
                theirs.unlike(self.origin, str(self.folder))
                + " It is an unfinished run: finish it, name another file, or --overwrite."
            )
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        write_atomic(self.about, json.dumps(self.origin.to_json()).encode())

    def read(self) -> list[FeatureTable]:
        """Return what is there and whole, oldest first."""
        tables = []
        for path in sorted(self.folder.glob("[0-9]*.parquet")):
            try:
                table = read_features(path)
            except DataError:  # a disk's doing, since parts are written whole; their rows are computed again
                path.unlink(missing_ok=True)
                continue
            if table.dim == self.dim and table.origin.fingerprint == self.origin.fingerprint:
                tables.append(table)
        return tables

    def write(self, table: FeatureTable) -> None:
        numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.parquet") if path.stem.isdecimal()]
        write_features(self.folder / f"{max(numbers, default=-1) + 1:06d}.parquet", table)


def _why_unreadable(path: Path) -> str:
    try:
        open_image(path)
    except DataError as error:
        return str(error)
    return f"{path}: could not be read the first time, though it can now."


def _write_errors(path: Path, failed: Sequence[Failed]) -> None:
    if not failed:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "error"])
    rows.writerows(failed)
    write_atomic(path, text.getvalue().encode(errors="surrogateescape"))
