"""Measurements on disk: CSV files that only grow, one row a competitor and case, each saying where it was taken."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from xcit.errors import DataError
from xcit.files import write_atomic

ENVIRONMENT = ("device", "hardware", "threads", "python", "torch", "timm", "xcit")
"""Columns that every file has, after its own."""


def environment(device_type: str) -> dict[str, str]:
    """Where and with what this process measures, one value a column of ``ENVIRONMENT``."""
    import torch

    return {
        "device": device_type,
        "hardware": torch.cuda.get_device_name() if device_type == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "xcit": version("xcit"),
    }


def now() -> str:
    """The date that all rows of one run share, to the second, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def append(path: Path, rows: Iterable[Mapping[str, str]], columns: tuple[str, ...]) -> None:
    """Add rows to a file, or begin it; a crash at any moment leaves the old file or the new one.

    Args:
        path: the CSV file; its folder is made.
        rows: one mapping a row with exactly ``columns`` as its keys.
        columns: the header.

    Raises:
        DataError: the file has another header: its rows and these do not mean the same.
        ExportError: the file cannot be written.
    """
    old = ""
    if path.exists():
        header = _header(path)
        if header != columns:
            raise DataError(
                f"{path} has the columns {', '.join(header)}; this version writes {', '.join(columns)}. "
                "Move the old file away and measure again."
            )
        old = path.read_text(encoding="utf-8")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not old:
        writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, (old + text.getvalue()).encode())


def read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """All rows of a file, oldest first; none if there is no file.

    Raises:
        DataError: the file's header is not ``columns``.
    """
    if not path.exists():
        return []
    header = _header(path)
    if header != columns:
        raise DataError(f"{path} has the columns {', '.join(header)}; expected {', '.join(columns)}.")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _header(path: Path) -> tuple[str, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(next(csv.reader(file), ()))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} CPUs"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
