"""Video files by their names; telling them apart needs no decoder."""

from __future__ import annotations

import os
from pathlib import Path

VIDEO_EXTENSIONS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
)  # fmt: skip
"""Endings by which videos are told from images, in any case."""


def is_video(path: str | os.PathLike[str]) -> bool:
    """Tell by a name's ending whether it is a video's."""
    return os.fspath(path).lower().endswith(VIDEO_EXTENSIONS)


def find_videos(folder: Path) -> list[Path]:
    """Return the videos below a folder, at any depth, in the order of their names; hidden ones are passed over."""
    below = (path for path in folder.rglob("*") if is_video(path) and path.is_file())
    return sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(folder).parts))
