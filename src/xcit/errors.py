"""The exceptions that xcit raises for a user's mistake.

Every message says what arrived, what was expected and why, and what to do next. The command line prints the message
alone (no traceback) and exits with code 2. A traceback therefore always means a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class XCiTError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(XCiTError, ValueError):
    """An option or a combination of options that cannot be honoured."""


class UnknownNameError(XCiTError, ValueError):
    """A name (model, checkpoint, option) that is not known; carries the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
        message = f"Unknown {kind} {name!r}."
        if near:
            message += f" Did you mean {' or '.join(repr(n) for n in near)}?"
        if hint:
            message += f" {hint}"
        super().__init__(message)
        self.name = name
        self.suggestions = near


class ShapeError(XCiTError, ValueError):
    """A tensor or an image whose shape does not fit."""


class CheckpointError(XCiTError, RuntimeError):
    """A weight file that cannot be read, is not safe to read, or does not belong to the model."""


class DataError(XCiTError, ValueError):
    """An image, a folder or a table that cannot be used."""


class BackendError(XCiTError, RuntimeError):
    """A device, a dtype or a runtime that is not available here."""


class ExportError(XCiTError, RuntimeError):
    """An artefact that could not be written or that did not reproduce the model."""
