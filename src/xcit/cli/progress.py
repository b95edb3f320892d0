"""A progress bar for commands that go through images and print what they find."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def image_progress(verb: str, total: int, format: str, *, to_file: bool = False) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr if that is a terminal; yield what moves it on by one.

    JSON and CSV that go to a terminal are left alone there: above a bar, long lines would be broken.

    Args:
        verb: what is going on, such as "detecting".
        total: images.
        format: of what is printed.
        to_file: it goes to a file instead.
    """
    if not sys.stderr.isatty() or (not to_file and format != "table" and sys.stdout.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda: progress.advance(task)
