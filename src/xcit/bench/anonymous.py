"""The peak of this process's anonymous memory: what no file backs, so that the system cannot take it back."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from xcit.errors import BackendError
from xcit.inference.room import anonymous_bytes

STEP_S = 0.002


class AnonymousPeak:
    """A context manager: looks every 2 ms, from a thread, while the block runs.

    Attributes:
        before: bytes when the block began.
        highest: the most since then.

    Raises:
        BackendError: another system than Linux.
    """

    def __enter__(self) -> AnonymousPeak:
        self.before = self.highest = self._now()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.highest = max(self.highest, self._now())
            time.sleep(STEP_S)

    @staticmethod
    def _now() -> int:
        held = anonymous_bytes()
        if held is None:
            raise BackendError("Anonymous memory is read from /proc/self/status, which only Linux has.")
        return held
