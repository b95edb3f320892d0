"""The command `xcit`: find the verb, call it, turn what happens into an exit status.

Status 0: done. 1: done in part. 2: a mistake that the user can mend; one sentence on stderr says which. 130: Ctrl-C.
141: whoever read the output went away (`| head`). A traceback is always a bug of ours.

Nothing heavy is imported here or at the top of a verb's file, so that `xcit --help` answers at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import tyro

from xcit import __version__
from xcit.errors import XCiTError

VERBS = (
    *("predict", "detect", "segment", "train", "eval", "probe", "embed", "index", "search", "duplicates", "retrieval"),
    *("attend", "giant", "export", "bench", "data", "quickstart", "models", "info", "doctor"),
)
"""Each is the function of that name in the file of that name."""

DESCRIPTION = """\
XCiT, the Cross-Covariance Image Transformer: predict with the released weights or your own, train, measure.

xcit VERB --help explains a verb, xcit --version prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: without the program's name; None for the process's own.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"xcit {__version__}")
        return 0
    with _log_on_stderr():
        try:
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
        except XCiTError as error:
            print(f"xcit: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("xcit: interrupted.", file=sys.stderr)
            return 130
        except BrokenPipeError:
            _discard_stdout()
            return 141


def _dispatch(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in VERBS:
            verb, *rest = arguments
            return tyro.cli(_function(verb), prog=f"xcit {verb}", args=rest) or 0
        # The overview: each verb's first line. tyro also answers a verb that does not exist.
        app = tyro.extras.SubcommandApp()
        for verb in VERBS:
            function = _function(verb)
            app.command(name=verb, help=(function.__doc__ or "").partition("\n")[0])(function)
        return app.cli(prog="xcit", description=DESCRIPTION, args=arguments or ["--help"]) or 0
    except SystemExit as end:  # tyro's way to end after --help (0) and on arguments that it refuses (2)
        return end.code if isinstance(end.code, int) else 2


def _function(verb: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"xcit.cli.{verb}"), verb)


class _Stderr(logging.Handler):
    """Print log lines to what stderr is at that moment: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"xcit: {self.format(record)}", file=sys.stderr)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    log = logging.getLogger("xcit")
    handler, level = _Stderr(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _discard_stdout() -> None:
    """Let the interpreter's last flush go nowhere instead of failing a second time."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
