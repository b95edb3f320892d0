"""How predictions are written down: a table for people; CSV, JSON and JSON lines for programs. All as they come."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from xcit.inference.predictor import Prediction


class Writer(ABC):
    """Writes predictions one at a time; what was written is valid after ``close``, whenever that comes."""

    @abstractmethod
    def write(self, prediction: Prediction) -> None:
        """Write one prediction."""

    def close(self) -> None:  # noqa: B027 (most formats need nothing)
        """Write what must stand at the end."""


class TableWriter(Writer):
    """Aligned columns; an image's name stands before its likeliest class. Images with an error are left out.

    Args:
        file: where to write.
        paths: all that will come, for the width of the first column.
        width: of the terminal; names are shortened in their middle to fit. None for no limit.
    """

    RIGHT = "  rank  probability  index  class"
    ROOM_FOR_CLASS = 24

    def __init__(self, file: TextIO, paths: Sequence[Path], width: int | None) -> None:
        self.file = file
        longest = max((cell_len(printable(path)) for path in paths), default=0)
        limit = longest if width is None else max(12, width - len(self.RIGHT) - self.ROOM_FOR_CLASS)
        self.name_width = max(len("file"), min(longest, limit))
        self.width = width
        self.begun = False

    def write(self, prediction: Prediction) -> None:
        """Write one line a class."""
        if prediction.error:
            return
        lines = [] if self.begun else [set_cell_size("file", self.name_width) + self.RIGHT]
        self.begun = True
        name = shortened(printable(prediction.path), self.name_width)
        for rank, label in enumerate(prediction.labels, 1):
            percent = f"{100 * label.probability:.1f} %"
            lines.append(
                f"{set_cell_size(name, self.name_width)}  {rank:>4}  {percent:>11}  {label.index:>5}  {label.name}"
            )
            name = ""
        if self.width is not None:
            lines = [
                set_cell_size(line, self.width).rstrip() if cell_len(line) > self.width else line for line in lines
            ]
        self.file.write("\n".join(lines) + "\n")


class CsvWriter(Writer):
    """One row a class: file, rank (from 1), index, name, probability, error; one row for an image with an error."""

    def __init__(self, file: TextIO) -> None:
        self.rows = csv.writer(file, lineterminator="\n")
        self.begun = False

    def write(self, prediction: Prediction) -> None:
        """Write one row a class, after the head if it is the first."""
        if not self.begun:
            self.rows.writerow(["file", "rank", "index", "name", "probability", "error"])
            self.begun = True
        if prediction.error:
            self.rows.writerow([prediction.path, "", "", "", "", prediction.error])
        for rank, label in enumerate(prediction.labels, 1):
            self.rows.writerow([prediction.path, rank, label.index, label.name, f"{label.probability:.6g}", ""])


class JsonLinesWriter(Writer):
    """One object a line and image: {"file", "predictions": [{"index", "name", "probability"}, ...], "error"}."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, prediction: Prediction) -> None:
        """Write one line."""
        self.file.write(json.dumps(_as_json(prediction)) + "\n")


class JsonWriter(Writer):
    """One array of the objects of JSON lines."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.before = "[\n"

    def write(self, prediction: Prediction) -> None:
        """Write one object, after a comma where there was one before."""
        self.file.write(self.before + json.dumps(_as_json(prediction)))
        self.before = ",\n"

    def close(self) -> None:
        """Close the array."""
        self.file.write("[]\n" if self.before == "[\n" else "\n]\n")


def _as_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "file": None if prediction.path is None else str(prediction.path),
        "predictions": [
            {"index": label.index, "name": label.name, "probability": float(f"{label.probability:.6g}")}
            for label in prediction.labels
        ],
        "error": prediction.error,
    }


def printable(path: Path | None) -> str:
    """Return a name that takes one line: a file's name may hold any byte."""
    name = str(path)
    return name if name.isprintable() else repr(name)[1:-1]


def shortened(name: str, width: int) -> str:
    """Return a name that is at most so many columns wide, with a dot for its middle."""
    if cell_len(name) <= width:
        return name
    # The end says more than the beginning.
    tail = (width - 1) * 2 // 3
    end = name
    while cell_len(end) > tail:
        end = end[1:]
    return set_cell_size(name, width - 1 - cell_len(end)) + "…" + end
