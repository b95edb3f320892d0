"""Folders that a command writes and may write anew: a list in them tells its files from those of others."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from xcit.data.shard_index import index_of
from xcit.errors import DataError, ExportError
from xcit.files import write_atomic

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial(\.\w+)$")
"""What is left of a file if the process is killed while ``write_atomic`` writes it."""


def write_manifest(folder: Path, manifest: str, names: Iterable[str]) -> None:
    """Write the list of what belongs to a folder, before anything else: even of an unfinished copy it is known then.

    Args:
        folder: made if need be.
        manifest: name of the list; hidden, so that no reader takes notice.
        names: files that will be written, relative to the folder, with "/" between their parts.

    Raises:
        ExportError: it cannot be written.
    """
    write_atomic(folder / manifest, json.dumps({"files": list(names)}).encode())


def make_room(folder: Path, manifest: str, command: str, *, overwrite: bool) -> None:
    """Remove what an earlier call wrote into a folder; refuse, and remove nothing, if anything else is there.

    Args:
        folder: may be missing.
        manifest: name of the list that ``write_manifest`` wrote.
        command: what people call, such as "xcit data digits"; its last word is what it writes.
        overwrite: whether anything may be removed at all.

    Raises:
        DataError: the folder is a file, or holds something that must not, or may not, be removed.
        ExportError: it cannot be removed.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise DataError(f"{folder}: is a file; name a folder.")
        if not any(folder.iterdir()):
            return
        if not overwrite:
            things = command.rpartition(" ")[2]
            raise DataError(
                f"{folder}: is not empty; name a new folder, or overwrite the {things} in it with --overwrite."
            )
        _remove(folder, manifest, command)
    except OSError as error:
        raise ExportError(f"{error.filename or folder}: cannot be replaced: {error.strerror}.") from None


def _remove(folder: Path, manifest: str, command: str) -> None:
    ours, present = _written_earlier(folder, manifest, command), set(_found(folder))
    ours |= {name for name in present if _whole_name(name) in ours}
    foreign = sorted(present - ours)
    if foreign:
        raise DataError(
            f"{folder}: holds files that {command} did not write, such as {foreign[0]!r}, and will not be "
            f"overwritten; name another folder."
        )
    # The list stays till another takes its place, so that a call that is killed meanwhile can be made again.
    for name in sorted(present - {manifest}):
        (folder / name).unlink(missing_ok=True)
    for parent, _, _ in sorted(os.walk(folder), reverse=True):
        if Path(parent) != folder:
            Path(parent).rmdir()


def _found(folder: Path) -> Iterator[str]:
    """Yield the names of all files in the folder, and of links to folders, which are not gone into."""
    for parent, folders, files in os.walk(folder):
        for name in (*files, *(one for one in folders if Path(parent, one).is_symlink())):
            yield Path(parent, name).relative_to(folder).as_posix()


def _written_earlier(folder: Path, manifest: str, command: str) -> set[str]:
    """Return the names in the list, with those of the indices that reading shards leaves beside them."""
    try:
        names = json.loads((folder / manifest).read_bytes())["files"]
        paths = [path for path in map(PurePosixPath, names) if not path.is_absolute() and ".." not in path.parts]
    except FileNotFoundError:
        raise DataError(f"{folder}: was not written by {command}; name another folder.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: {manifest} in it is damaged; remove the folder, or name another.") from None
    indices = {index_of(Path(path)).as_posix() for path in paths if path.suffix == ".tar"}
    return {manifest, *indices, *(path.as_posix() for path in paths)}


def _whole_name(name: str) -> str:
    """Return the name of the file that another was to become."""
    path = PurePosixPath(name)
    partial = PARTIAL.match(path.name)
    return path.with_name(partial[1] + partial[2]).as_posix() if partial else name
