"""What `xcit segment` writes: a table or JSON on stdout, label maps, and the areas as CSV; and where files go."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from rich.cells import cell_len, set_cell_size

from xcit.cli.formats import printable, shortened
from xcit.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from xcit.inference.segmentations import Segmentation

MAP, OVERLAY = "_classes.png", "_overlay.png"
"""Ends of the names of an image's label map and picture, after its own."""
AREAS = "areas.csv"


class Targets(NamedTuple):
    """Where the files of --out go."""

    maps: list[Path]
    """One an image."""
    overlays: list[Path]
    areas: Path
    """The table, if it has no other place."""


def targets_of(paths: Sequence[Path], out: str, overwrite: bool, *, areas: bool) -> Targets:
    """Return where the files of --out go; refuse what would replace a file.

    Args:
        paths: the images.
        out: the folder, as given.
        overwrite: files that are there already may be replaced; the images never.
        areas: whether the table goes there too.

    Raises:
        ConfigError: a file is there already, or is an image that is to be looked at, or the folder cannot be one.
    """
    from xcit.cli.result_files import writable
    from xcit.inference.attention_names import output_stems

    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; name a folder.")
    writable(str(folder / f"a{MAP}"), (), "--out")
    stems = output_stems(paths, folder)
    maps, overlays = ([stem.with_name(stem.name + end) for stem in stems] for end in (MAP, OVERLAY))
    inputs = {path.resolve() for path in paths}
    for target in [*maps, *overlays, *([folder / AREAS] if areas else [])]:
        if target.is_dir():
            raise ConfigError(f"{target} is a folder, where a file is to be; name another --out.")
        if target.exists() and target.resolve() in inputs:
            raise ConfigError(f"{target} would be replaced, and is an input; name another --out.")
        if target.exists() and not overwrite:
            raise ConfigError(f"{target} is there already; name another --out, or replace it with --overwrite.")
    return Targets(maps, overlays, folder / AREAS)


def label_png(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """Return a label map as a PNG file whose values are the labels.

    Args:
        labels: (H, W) uint8, which gets the palette, or uint16, which becomes 16-bit grey: a palette has 256 colours.
        palette: (K, 3) uint8.
    """
    from PIL import Image

    picture = Image.fromarray(labels)
    if labels.dtype.itemsize == 1:
        picture.putpalette(palette.tobytes())  # which makes it of mode "P" and leaves the values alone
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


class Sink(ABC):
    """Takes segmentations one at a time; what was written is valid after ``close``, whenever that comes."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    @abstractmethod
    def write(self, seen: Segmentation) -> None:
        """Write what was seen in an image, or why it could not be looked at."""

    def close(self) -> None:  # noqa: B027 (some formats need nothing)
        """Write what must stand at the end."""


class JsonSink(Sink):
    """An array of ``Segmentation.to_dict``, a line an image."""

    before = "[\n"

    def write(self, seen: Segmentation) -> None:
        """Write one object."""
        self.file.write(self.before + json.dumps(seen.to_dict()))
        self.before = ",\n"

    def close(self) -> None:
        """Close the array."""
        self.file.write("[]\n" if self.before == "[\n" else "\n]\n")


class CsvSink(Sink):
    """A row a class that is there, the largest first; one row for an image with an error."""

    HEAD = ("file", "label", "name", "pixels", "share", "error")

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self.rows = csv.writer(file, lineterminator="\n")
        self.rows.writerow(self.HEAD)

    def write(self, seen: Segmentation) -> None:
        """Write a row a class."""
        if seen.error is not None:
            self.rows.writerow([seen.path, "", "", "", "", seen.error])
            return
        for area in seen.areas():
            self.rows.writerow([seen.path, area.label, area.name, area.num_pixels, f"{area.share:.6g}", ""])


class TableSink(Sink):
    """Aligned columns for people; an image's name stands before its largest class. Images with an error are left out.

    Args:
        file: where to write.
        paths: all that will come, for the width of the first column.
        width: of the terminal; names are shortened in their middle to fit. None for no limit.
    """

    HEAD = "     area        pixels  class"
    ROOM_FOR_CLASS = 20

    def __init__(self, file: TextIO, paths: Sequence[Path], width: int | None) -> None:
        super().__init__(file)
        longest = max((cell_len(printable(path)) for path in paths), default=0)
        limit = longest if width is None else max(12, width - len(self.HEAD) - self.ROOM_FOR_CLASS)
        self.name_width = max(len("file"), min(longest, limit))
        self.width = width
        self.begun = False

    def write(self, seen: Segmentation) -> None:
        """Write a line a class."""
        if seen.error is not None:
            return
        lines = [] if self.begun else [set_cell_size("file", self.name_width) + self.HEAD]
        self.begun = True
        name = set_cell_size(shortened(printable(seen.path), self.name_width), self.name_width)
        for area in seen.areas():
            lines.append(f"{name}  {100 * area.share:5.1f} %  {area.num_pixels:12,}  {area.name}")
            name = " " * self.name_width
        if self.width is not None:
            lines = [
                set_cell_size(line, self.width).rstrip() if cell_len(line) > self.width else line for line in lines
            ]
        self.file.write("\n".join(lines) + "\n")
