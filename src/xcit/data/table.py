"""Images listed in a CSV file: path, label or several labels, and, if wanted, the part that each belongs to."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xcit.data.parts import (
    PART_OF_WORD,
    WHOLE,
    Part,
    canonical,
    file_set,
    listing,
    missing_files,
    plural,
    read_text,
    sorted_classes,
)
from xcit.errors import DataError

EXPECTED = "a header with the columns path and label (or labels, of which | stands between several), and maybe split"
MAX_SHOWN = 5
"""Problems that one message names; who has more of them has the same one often."""


class Row(NamedTuple):
    """One line of the list."""

    line: int
    path: str
    labels: tuple[str, ...]
    part: str


def table_parts(table: Path, in_chans: int) -> dict[str, Callable[[], Part]]:
    """Read a list of images.

    The columns are ``path`` (relative to the list), ``label`` or ``labels``, and optionally ``split`` (train, val,
    test); others are not looked at, and neither are empty lines. Columns are separated by commas; by tabs in a .tsv
    file; by semicolons if the header has those and no comma. Several labels stand in one field, separated by "|", or
    by ";" where that does not separate the columns; a field without any is an image of no class.

    Args:
        table: the list, in UTF-8.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        What opens each part; their classes are all those that the list names, by value if they are whole numbers.

    Raises:
        DataError: not such a list, or contradicting itself; the message names the lines.
    """
    rows, several = _read(table)
    problems = list(_contradictions(rows, several))
    _refuse(table, problems)
    class_names = sorted_classes(label for row in rows for label in row.labels)
    if not class_names:
        raise DataError(f"{table}: no image has a label.")
    return {
        part: partial(_open, table, [row for row in rows if row.part == part], class_names, several, in_chans)
        for part in sorted({row.part for row in rows})
    }


def _open(table: Path, rows: list[Row], class_names: list[str], several: bool, in_chans: int) -> Part:
    number = {name: i for i, name in enumerate(class_names)}
    if several:
        labels = np.zeros((len(rows), len(class_names)), dtype=bool)
        for i, row in enumerate(rows):
            labels[i, [number[label] for label in row.labels]] = True
    else:
        labels = np.array([number[row.labels[0]] for row in rows], dtype=np.int64)
    images = file_set(table.parent, [row.path for row in rows], labels, class_names, in_chans)
    notes = missing_files(images, str(table), f"Paths are relative to {table.parent}/.")
    repeated = len(rows) - len({row.path for row in rows})
    if repeated:
        notes += (f"{table}: {plural(repeated, 'line')} list an image again, which therefore counts more than once.",)
    return Part(images, notes)


def _read(table: Path) -> tuple[list[Row], bool]:
    """Return the rows, and whether they may have several labels."""
    text = read_text(table)
    header_text = text.lstrip("\r\n").partition("\n")[0]
    delimiter = (
        "\t" if table.suffix.lower() == ".tsv" else ";" if ";" in header_text and "," not in header_text else ","
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    problems: list[str] = []
    rows: list[Row] = []
    try:
        header = next((fields for fields in reader if fields), None)
        if header is None:
            raise DataError(f"{table}: is empty; it needs {EXPECTED}.")
        columns = _columns(table, header)
        between = r"\|" if delimiter == ";" else r"[|;]"
        for fields in reader:
            if fields:
                _take(fields, reader.line_num, header, columns, between, rows, problems)
    except csv.Error as error:
        raise DataError(f"{table}: line {reader.line_num}: is not valid CSV ({error}).") from None
    _refuse(table, problems)
    if not rows:
        raise DataError(f"{table}: lists no image below its header.")
    return rows, "labels" in columns


def _columns(table: Path, header: list[str]) -> dict[str, int]:
    """Return where the columns are that matter."""
    names = [name.strip().lower() for name in header]
    twice = [name for name in ("path", "label", "labels", "split") if names.count(name) > 1]
    columns: dict[str, int] = {n: names.index(n) for n in ("path", "label", "labels", "split") if n in names}
    if "path" not in columns or ("label" in columns) == ("labels" in columns) or twice:
        raise DataError(f"{table}: its first line has the columns {listing(names, 10)}; it needs {EXPECTED}.")
    return columns


def _take(
    fields: list[str],
    line: int,
    header: list[str],
    columns: dict[str, int],
    between: str,
    rows: list[Row],
    problems: list[str],
) -> None:
    """Turn one line into a row, or into a problem."""
    if len(fields) != len(header):
        problems.append(f"line {line} has {plural(len(fields), 'field')} where the header has {len(header)}")
        return
    cells = {name: fields[column].strip() for name, column in columns.items()}
    if "labels" in cells:
        labels = tuple(
            dict.fromkeys(canonical(part.strip()) for part in re.split(between, cells["labels"]) if part.strip())
        )
    else:
        labels = (canonical(cells["label"]),)
    part = PART_OF_WORD.get(cells["split"].lower(), "") if "split" in cells else WHOLE
    if not cells["path"]:
        problems.append(f"line {line} has no path")
    elif labels == ("",):
        problems.append(f"line {line} has no label")
    elif not part:
        problems.append(f"line {line} has the split {cells['split']!r}, which must be train, val or test")
    else:
        rows.append(Row(line, cells["path"], labels, part))


def _contradictions(rows: list[Row], several: bool) -> Iterator[str]:
    """Yield what two lines say differently of one image."""
    first: dict[str, Row] = {}
    for row in rows:
        earlier = first.setdefault(row.path, row)
        again = f"line {row.line} lists {row.path!r} again (line {earlier.line})"
        if row.part != earlier.part:
            yield f"{again}, in {row.part} as well as in {earlier.part}"
        elif set(row.labels) != set(earlier.labels):
            yield (
                f"{again}, with other labels"
                if several
                else f"{again}, with another label; for several, call the column labels and write a|b"
            )


def _refuse(table: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MAX_SHOWN:,} more lines" if len(problems) > MAX_SHOWN else ""
        raise DataError(f"{table}: {'; '.join(problems[:MAX_SHOWN])}{more}.")
