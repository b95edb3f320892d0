"""What `xcit detect` writes: a table or JSON on stdout, COCO's results, CSV; and whose ids COCO's results bear."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len, set_cell_size

from xcit.cli.formats import printable, shortened
from xcit.errors import ConfigError, DataError, XCiTError

if TYPE_CHECKING:
    from PIL import Image

    from xcit.inference.detections import Detections
    from xcit.inference.detector import Detector

NAMED = 5
"""Files or classes that a message names."""


class Sink(ABC):
    """Takes detections one image at a time; what was written is valid after ``close``, whenever that comes."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    @abstractmethod
    def write(self, index: int, found: Detections) -> None:
        """Write what was found in the image at this place, or why it could not be looked at."""

    def close(self) -> None:  # noqa: B027 (some formats need nothing)
        """Write what must stand at the end."""


class _Array(Sink):
    """A JSON array, a line an entry."""

    before = "[\n"

    def _put(self, entry: dict[str, Any]) -> None:
        self.file.write(self.before + json.dumps(entry))
        self.before = ",\n"

    def close(self) -> None:
        """Close the array."""
        self.file.write("[]\n" if self.before == "[\n" else "\n]\n")


class JsonSink(_Array):
    """An object an image: {"file", "height", "width", "detections": [{"label", "name", "score", "box"}], "error"}.

    Labels count from 0, a box is x0, y0, x1, y1 in pixels.
    """

    def write(self, index: int, found: Detections) -> None:
        """Write one object."""
        height, width = found.size if found.error is None else (None, None)
        self._put(
            {
                "file": str(found.path),
                "height": height,
                "width": width,
                "detections": [
                    {"label": label, "name": name, "score": _short(score), "box": [round(side, 2) for side in box]}
                    for label, name, score, box in _rows(found)
                ],
                "error": found.error,
            }
        )


class CocoSink(_Array):
    """COCO's results: an object an instance, {"image_id", "category_id", "bbox", "score", "segmentation"}.

    Args:
        file: where to write.
        image_ids: of each image.
        category_ids: of each class; None for one that is left out.
    """

    def __init__(self, file: TextIO, image_ids: Sequence[int], category_ids: Sequence[int | None]) -> None:
        super().__init__(file)
        self.image_ids, self.category_ids = image_ids, category_ids

    def write(self, index: int, found: Detections) -> None:
        """Write an object an instance."""
        for result in found.to_coco(self.image_ids[index], self.category_ids):
            self._put(result)


class CocoImages(Sink):
    """The images of COCO's results, as a set without annotations; written at the end.

    Args:
        file: where to write.
        image_ids: of each image.
        categories: ids and names.
    """

    def __init__(self, file: TextIO, image_ids: Sequence[int], categories: Sequence[tuple[int, str]]) -> None:
        super().__init__(file)
        self.image_ids, self.categories = image_ids, categories
        self.images: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []

    def write(self, index: int, found: Detections) -> None:
        """Take note of an image."""
        entry: dict[str, Any] = {"id": self.image_ids[index], "file_name": str(found.path)}
        if found.error is None:
            self.images.append(entry | {"height": found.size[0], "width": found.size[1]})
        else:
            self.failed.append(entry | {"error": found.error})

    def close(self) -> None:
        """Write the file."""
        content = {
            "images": self.images,
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in self.categories],
            "failed": self.failed,
        }
        self.file.write(json.dumps(content, indent=1) + "\n")


class CsvSink(Sink):
    """A row an instance: file, label, name, score, x0, y0, x1, y1, error; one row for an image with an error."""

    HEAD = ("file", "label", "name", "score", "x0", "y0", "x1", "y1", "error")

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self.rows = csv.writer(file, lineterminator="\n")
        self.rows.writerow(self.HEAD)

    def write(self, index: int, found: Detections) -> None:
        """Write a row an instance."""
        if found.error is not None:
            self.rows.writerow([found.path, *[""] * 7, found.error])
        for label, name, score, box in _rows(found):
            self.rows.writerow([found.path, label, name, _short(score), *(f"{side:.2f}" for side in box), ""])


class TableSink(Sink):
    """Aligned columns for people; an image's name stands before its surest instance. Images with an error are left out.

    Args:
        file: where to write.
        paths: all that will come, for the width of the first column.
        width: of the terminal; names are shortened in their middle to fit. None for no limit.
    """

    HEAD = "  score    left     top   right  bottom  class"
    ROOM_FOR_CLASS = 20

    def __init__(self, file: TextIO, paths: Sequence[Path], width: int | None) -> None:
        super().__init__(file)
        longest = max((cell_len(printable(path)) for path in paths), default=0)
        limit = longest if width is None else max(12, width - len(self.HEAD) - self.ROOM_FOR_CLASS)
        self.name_width = max(len("file"), min(longest, limit))
        self.width = width
        self.begun = False

    def write(self, index: int, found: Detections) -> None:
        """Write a line an instance."""
        if found.error is not None:
            return
        lines = [] if self.begun else [set_cell_size("file", self.name_width) + self.HEAD]
        self.begun = True
        name = set_cell_size(shortened(printable(found.path), self.name_width), self.name_width)
        if not len(found):
            lines.append(f"{name}      -  nothing found")
        for _, kind, score, box in _rows(found):
            lines.append(f"{name}  {score:5.2f}  {'  '.join(f'{side:6.0f}' for side in box)}  {kind}")
            name = " " * self.name_width
        if self.width is not None:
            lines = [
                set_cell_size(line, self.width).rstrip() if cell_len(line) > self.width else line for line in lines
            ]
        self.file.write("\n".join(lines) + "\n")


def _rows(found: Detections) -> list[tuple[int, str, float, list[float]]]:
    return list(zip(found.labels.tolist(), found.names, found.scores.tolist(), found.boxes.tolist(), strict=True))


def _short(score: float) -> float:
    return float(f"{score:.6g}")


# --- ids --------------------------------------------------------------------------------------------------------------


class Listing:
    """The images and categories of a COCO file, by which results get their ids.

    Args:
        file: JSON with ``images`` and ``categories``; it need not have annotations, as lists of test images do not.
        paths: the images that will be looked at. Each must end in the ``file_name`` of one of the file's.

    Attributes:
        image_ids: of each path.
        categories: ids and names, by rising id.

    Raises:
        DataError: the file cannot be used, or images are not listed in it.
    """

    def __init__(self, file: str, paths: Sequence[Path]) -> None:
        from xcit.data.coco import entry_problem

        self.name = file
        content = _listed(Path(file).expanduser())
        problems = [
            f"{kind} {position + 1} of {len(content[key]):,} {problem}"
            for key, kind in (("images", "image"), ("categories", "category"))
            for position, entry in enumerate(content[key])
            if (problem := entry_problem(entry, kind))
        ]
        if problems:
            more = f"; and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
            raise DataError(f"{file}: {'; '.join(problems[:NAMED])}{more}. xcit data check-coco lists all.")
        entries = {entry["file_name"].removeprefix("./"): entry for entry in content["images"]}
        found = [_entry_of(path, entries) for path in paths]
        missing = [str(path) for path, entry in zip(paths, found, strict=True) if entry is None]
        if missing:
            raise DataError(
                f"{len(missing):,} of {len(paths):,} images are not listed in {file}, such as {_some(missing)}; an "
                f"image's path must end in its file_name there, such as {next(iter(entries))!r}."
            )
        self._entries = {path: entry for path, entry in zip(paths, found, strict=True) if entry is not None}
        self.image_ids = [int(self._entries[path]["id"]) for path in paths]
        twice = [number for number, count in Counter(self.image_ids).items() if count > 1]
        if twice:
            same = [str(path) for path, number in zip(paths, self.image_ids, strict=True) if number == twice[0]]
            raise DataError(f"{file}: its image {twice[0]} is given more than once: {_some(same)}; give it once.")
        self.categories = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])

    def open(self, path: Path) -> Image.Image:
        """Return an image oriented as its annotations are: upright if its listed size is that one's, else as stored.

        Raises:
            DataError: it cannot be read, or is of another size.
        """
        from xcit.data.coco_images import as_annotated, wrong_size
        from xcit.data.images import open_image

        entry = self._entries[path]
        size = int(entry["width"]), int(entry["height"])
        upright = open_image(path)
        image = as_annotated(upright, path, size)
        if image is None:
            raise DataError(wrong_size(path, upright.size, size))
        return image

    def category_ids(self, names: Sequence[str]) -> tuple[list[int | None], list[str]]:
        """Return the category of each of a model's classes, by name, and the names of classes that have none.

        Classes in the file's own order, or a model whose classes have numbers for names, are taken one by one.

        Raises:
            ConfigError: no class has a category.
        """
        theirs = [name for _, name in self.categories]
        nameless = list(names) == [str(i) for i in range(len(names))] and len(names) == len(theirs)
        if list(names) == theirs or (nameless and not set(names) & set(theirs)):
            return [number for number, _ in self.categories], []
        by_name = {name: number for number, name in reversed(self.categories)}
        unknown = [name for name in names if name not in by_name]
        if len(unknown) == len(names):
            raise ConfigError(
                f"None of the model's classes ({_some(names)}) is a category of {self.name} ({_some(theirs)}); the "
                f"results would be empty."
            )
        return [by_name.get(name) for name in names], unknown


def own_ids(detector: Detector, paths: Sequence[Path]) -> tuple[list[int], list[tuple[int, str]]]:
    """Return ids for images that nobody has numbered, 1 to n in their order, and the categories' ids and names."""
    return list(range(1, len(paths) + 1)), list(zip(detector.category_ids, detector.class_names, strict=True))


def _listed(file: Path) -> dict[str, Any]:
    from xcit.data.coco import read_coco
    from xcit.data.parts import read_text

    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError, XCiTError):
        content = None
    lists = [content.get(key) for key in ("images", "categories")] if isinstance(content, dict) else []
    if lists and all(isinstance(each, list) and each for each in lists):
        return dict(content)
    return read_coco(file)  # which says what is wrong


def _entry_of(path: Path, entries: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the image whose file name is the longest end of a path."""
    parts = path.absolute().parts
    names = ("/".join(parts[start:]) for start in range(1, len(parts)))
    return next((entries[name] for name in names if name in entries), entries.get(str(path)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
