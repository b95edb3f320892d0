"""The anonymous memory of this process as Linux counts it: what no file backs, so that it cannot be given back."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from xcit.errors import BackendError

STATUS = Path("/proc/self/status")
STEP_S = 0.002


def anonymous_bytes() -> int:
    """Return how much there is now.

    Raises:
        BackendError: another system than Linux.
    """
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        raise BackendError("Anonymous memory is read from /proc/self/status, which only Linux has.") from None


class AnonymousPeak:
    """A context manager: looks every 2 ms, from a thread, while the block runs.

    Attributes:
        before: bytes when the block began.
        highest: the most since then.
    """

    def __enter__(self) -> AnonymousPeak:
        self.before = self.highest = anonymous_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.highest = max(self.highest, anonymous_bytes())
            time.sleep(STEP_S)
