"""Files that a verb writes besides what it prints: refused before the work where they cannot be, written after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from xcit.errors import ConfigError


def writable(name: str | None, endings: Sequence[str], option: str) -> Path | None:
    """Refuse a file that cannot be written at the end, hours later."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f"{option} is {name}; its name must end in {' or '.join(endings)}.")
    if path.is_dir():
        raise ConfigError(f"{option} is {name}, which is a folder; name a file in it.")
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "is not a folder" if not parent.is_dir() else "is a folder that you may not write to"
        raise ConfigError(f"{option} {name} cannot be written: {parent} {what}.")
    return path


def write_files(*files: tuple[Path | None, bytes]) -> None:
    """Write the files that were asked for; results are on stdout by then, whatever the disk says."""
    from xcit.files import write_atomic

    sys.stdout.flush()
    for path, content in files:
        if path is not None:
            write_atomic(path, content)
            print(f"xcit: {path} is written.", file=sys.stderr)
