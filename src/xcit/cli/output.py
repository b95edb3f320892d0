"""Tables and lists of facts on stdout: bold heads on a terminal, plain aligned text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table under its title, and an empty line.

    Args:
        title: stands above it.
        columns: their heads; one that begins with ">" is aligned to the right.
        rows: one text a column.
    """
    rows = [list(row) for row in rows]
    heads = [column.lstrip(">") for column in columns]
    widths = [max(cell_len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            " " * (width - cell_len(cell)) + cell if column.startswith(">") else set_cell_size(cell, width)
            for column, cell, width in zip(columns, cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    print(_bold(title), _dim(line(heads)), *(line(row) for row in rows), "", sep="\n")


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """Print names and what they are, one a line, under a title, and an empty line."""
    facts = list(facts)
    width = max(cell_len(name) for name, _ in facts)
    print(_bold(title), *(f"  {set_cell_size(name, width)}  {text}".rstrip() for name, text in facts), "", sep="\n")


def mib(num_bytes: float) -> str:
    """Return a number of bytes in MiB, as text."""
    return f"{num_bytes / 2**20:,.1f} MiB"


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if _styled() else text


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if _styled() else text


def _styled() -> bool:
    import os

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
