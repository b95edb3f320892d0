"""Whether there is room in memory for what a model is about to do: asked before it is begun, and of each place.

A system that is asked for more memory than it has does not refuse, it kills. Hence the need is estimated: the model's
is counted once (``peak_bytes``) and taken to grow with the pixels, that of preparing and drawing images was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xcit.inference import devices
from xcit.inference.devices import bytes_text

AMPLE = 2048
"""Bytes a pixel that no released model comes near (XCiT-L24/8, the largest, takes about 600): where so much is free,
nothing is counted, which takes a second."""
PREPARING = 24
"""Bytes a pixel that the preparation of an RGB image takes at most: 22.1 were measured at 4096 x 4096 px."""
MARGIN = 1.1
"""On top of what is counted: an allocator's rounding, a library's scratch space, whatever else the process does."""


def anonymous_bytes() -> int | None:
    """Return the memory that this process holds and no file backs; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


class Lack(NamedTuple):
    """More is needed than there is."""

    needed: float
    """Bytes, about."""
    available: int
    """Bytes."""
    device: torch.device
    """Where."""

    def __str__(self) -> str:
        return (
            f"about {bytes_text(self.needed)} of memory on {self.device}, where {bytes_text(self.available)} are free"
        )


class Room:
    """Compares what images of a model take with what there is.

    Args:
        model: what is run; on any device.
    """

    def __init__(self, model: nn.Module) -> None:
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self._a_pixel: float | None = None

    def lack(
        self,
        function: Callable[[Tensor], object],
        batch: int,
        chans: int,
        size: tuple[int, int],
        *,
        on_host: float = 0.0,
        enlarged: float = 1.0,
    ) -> Lack | None:
        """Return what lacks for a batch of images, or None if there is room, or nothing is known of how much there is.

        Args:
            function: what is run of the model, images to whatever; always the same.
            batch: images at once.
            chans: of each.
            size: height and width that the model sees.
            on_host: bytes that something else takes on the CPU before or after the model runs, not meanwhile.
            enlarged: how many times as many pixels the function makes of an image before the model sees it, at most.
        """
        pixels = batch * size[0] * size[1]
        host = torch.device("cpu")
        free = {device: devices.available_bytes(device) for device in {host, self.device}}
        if all(n is None or n >= max(MARGIN * on_host, AMPLE * pixels * enlarged) for n in free.values()):
            return None
        if self._a_pixel is None:
            from xcit.inference.costs import peak_bytes

            peak = peak_bytes(function, (batch, chans, *size), dtype=self.dtype, device=self.device)
            self._a_pixel = peak / pixels
        needs = {host: max(PREPARING * pixels, on_host)}
        needs[self.device] = max(needs.get(self.device, 0.0), self._a_pixel * pixels)
        lacks = [
            Lack(MARGIN * need, available, device)
            for device, need in needs.items()
            if (available := free[device]) is not None and MARGIN * need > available
        ]
        return max(lacks, key=lambda lack: lack.needed / max(1, lack.available), default=None)
