"""Several processes on one machine: started, told of signals, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

GRACE_SECONDS = 20.0
"""How long the others may take to end by themselves when one process has ended with an error."""
POLL_SECONDS = 0.05


def needs_launch(devices: int) -> bool:
    """Return whether this process has to start the others: several are wanted, and no launcher has done it."""
    return devices > 1 and not {"LOCAL_RANK", "SLURM_PROCID"} & os.environ.keys()


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``python ARGUMENTS`` in so many processes, each of which knows its rank from the environment.

    The first has this process's output. Of the others only what the first of them to fail said is shown, where the
    first process itself did not end for the same reason. Ctrl-C and SIGTERM are passed on.

    Args:
        arguments: for the Python interpreter.
        processes: how many.

    Returns:
        The exit code of the first one that failed, or 0.
    """
    port = _free_port()
    said = [tempfile.TemporaryFile() for _ in range(processes)]  # noqa: SIM115
    started = [_start(arguments, rank, processes, port, said[rank]) for rank in range(processes)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        first = _wait(started)
        codes = [process.wait() for process in started]
        if first and codes[first] != codes[0]:
            said[first].seek(0)
            sys.stderr.write(said[first].read().decode(errors="replace"))
        code = codes[first]
        return 128 - code if code < 0 else code
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for file in said:
            file.close()


def _start(arguments: Sequence[str], rank: int, processes: int, port: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Its own group: a Ctrl-C at the terminal reaches it through us, once, and not twice.
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else said,
    )


def _wait(started: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all, and return which failed first, or 0; when one fails the others get some time to end, too."""
    failed, since = -1, 0.0
    while True:
        codes = [process.poll() for process in started]
        if failed < 0:
            failed = next((rank for rank, code in enumerate(codes) if code), -1)
            since = time.monotonic()
        if all(code is not None for code in codes):
            return max(0, failed)
        if failed >= 0 and time.monotonic() - since > GRACE_SECONDS:
            for process in started:
                process.kill()
        time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
