"""Ctrl-C and a polite kill during training: heard at once, answered when the state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """Training was asked to stop, and its state is saved.

    Attributes:
        signal: which signal asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """What a program that this signal ended exits with: 130 or 143."""
        return 128 + self.signal


class StopRequest:
    """Whether somebody asked to stop.

    Attributes:
        signal: 0, or the number of the signal.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Note the first Ctrl-C or SIGTERM within the block; a second one ends it at once as a KeyboardInterrupt.

        Outside the main thread, where signals do not arrive, nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        former = {number: signal.getsignal(number) for number in SIGNALS}
        self.claim()
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def claim(self) -> None:
        """Take the signals, from Lightning too, whose own handler of SIGTERM talks to other processes at once."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
