"""Several files that appear together or not at all: an exported model, what belongs to it, and its proof."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xcit.errors import ExportError
from xcit.files import FULL


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in an empty folder of its own; what is written there appears beside ``path``.

    When the block ends without an error, every file of that folder is brought to the disk and moved to where ``path``
    is to be, ``path`` itself last: while it is missing there is no export, so that no other program takes one file of
    the old export for part of the new one. Whatever goes wrong, Ctrl-C included, nothing is left behind, and a former
    export stays as it was.

    Args:
        path: where to; its folder is made if need be.

    Raises:
        ExportError: an OSError within the block or from moving: no space, no permission, or the like.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", suffix=".partial", dir=path.parent) as folder:
            yield Path(folder) / path.name
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            for file in files:
                with file.open("rb+") as written:
                    os.fsync(written.fileno())
            if len(files) > 1:
                path.unlink(missing_ok=True)
            for file in files:
                file.replace(path.with_name(file.name))
    except OSError as err:
        advice = "make room" if err.errno in FULL else "name a folder that you may write to"
        raise ExportError(f"{path} could not be written: {err.strerror or err}; {advice}.") from err
