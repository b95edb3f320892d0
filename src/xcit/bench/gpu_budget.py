"""Time that is lent: what a measurement will cost, whether it still fits, and a clock that ends what takes too long."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from xcit.bench.gpu_cases import Entry, GpuCase
from xcit.models.zoo import ARCHITECTURES

BUILD_S: dict[str, float] = {"eager": 3.0, "channels-last": 3.0, "compile": 30.0, "graphs": 32.0, "autotune": 140.0}
"""A first guess at the seconds until a model of twelve layers answers, compiling included; rows know better."""
TRAINING = 2.0
"""A training step is compiled twice: forward and backward."""
TIMING_S = 1.0
"""Of one competitor, beside what the rounds take together."""


AGAIN_S = 2.0
"""Between rings of the alarm."""


class OutOfTimeError(BaseException):
    """The budget has ended in the middle of something. Not an Exception, which a compiler might catch."""


class Budget:
    """Seconds that may be spent.

    Args:
        seconds: all of them; None for as many as it takes.
        clock: counts seconds.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    @property
    def left_s(self) -> float:
        """Seconds that are left; infinite without a budget."""
        return float("inf") if self.seconds is None else self.seconds - (self._clock() - self._started)

    def fits(self, seconds: float) -> bool:
        """Return whether something of that length ends in time."""
        return seconds <= self.left_s

    @contextmanager
    def alarm(self, reserve_s: float = 0.0) -> Iterator[None]:
        """End what runs inside when only ``reserve_s`` of the budget are left, by an ``OutOfTimeError``.

        Where there is no alarm clock (another thread than the main one, Windows) the block runs to its end.
        """
        seconds = self.left_s - reserve_s
        can = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self.seconds is None or not can:
            yield
            return
        if seconds <= 0:
            raise OutOfTimeError
        handler = signal.signal(signal.SIGALRM, _ring)
        # rings again, as the first may fall where nothing can be raised
        outer = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *outer)


class Costs:
    """How long competitors take to build: from earlier rows where there are any, else guessed.

    Args:
        known: seconds by case and competitor.
    """

    def __init__(self, known: Mapping[tuple[str, str], float] | None = None) -> None:
        self._known = dict(known or {})
        self._pace: dict[str, list[float]] = {}

    def build_s(self, case: GpuCase, entry: Entry) -> float:
        """Return the seconds that building, compiling and a few calls will take."""
        known = self._known.get((str(case), str(entry)))
        if known is not None:
            return known
        paces = self._pace.get(entry.run) or [pace for paces in self._pace.values() for pace in paces]
        return _guess(case, entry) * (statistics.median(paces) if paces else 1.0)

    def note(self, case: GpuCase, entry: Entry, seconds: float) -> None:
        """Learn from what one took."""
        self._known[str(case), str(entry)] = seconds
        self._pace.setdefault(entry.run, []).append(seconds / _guess(case, entry))


def _guess(case: GpuCase, entry: Entry) -> float:
    known = ARCHITECTURES.get(entry.model)
    layers = (known.depth if known else 12) / 12
    return BUILD_S[entry.run] * layers * (TRAINING if case.mode == "training" else 1.0)


def _ring(signum: int, frame: FrameType | None) -> None:
    raise OutOfTimeError
