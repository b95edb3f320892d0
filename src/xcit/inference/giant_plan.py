"""What a giant image will take: where its tokens go and how many rows are at hand, so that a budget is kept.

Estimates are upper bounds of anonymous memory, in bytes; ``tests/inference/test_giant_memory.py`` holds them to what
the operating system counts.

Legend: (h, w) the token grid, C embed_dim, rows those of a band.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from xcit.errors import ConfigError
from xcit.inference.devices import available_bytes, bytes_text
from xcit.inference.giant_layers import NORM_TOKENS
from xcit.inference.room import anonymous_bytes
from xcit.models.folded_inplace import BAND_TOKENS, HALO, MLP_TOKENS
from xcit.models.folded_models import FoldedTrunk

LIBRARIES = 160 << 20
"""What libraries take when they first run: buffers of threads, kernels, scratch space; and what an allocator keeps."""
DRIFT = 16 << 20
"""By which what a process holds may differ from one run to the next: of the least that is said to work."""
SHARE = 0.8
"""Of the memory that is free, where no budget is given."""
LEAST_ROWS = 8
"""Of a band where memory allows: LPI's halo of two rows on each side is computed twice."""
WORTH_ROWS = 4
"""A band lower than this costs more than tokens on the disk do."""
_BASE = 420 << 20  # of a process with PyTorch, where the system does not tell
_UNITS = {"": 1, "b": 1, "k": 2**10, "kib": 2**10, "kb": 10**3, "m": 2**20, "mib": 2**20, "mb": 10**6}
_UNITS |= {"g": 2**30, "gib": 2**30, "gb": 10**9, "t": 2**40, "tib": 2**40, "tb": 10**12}


@dataclass(frozen=True)
class Plan:
    """How an image will be gone through.

    Attributes:
        grid: (h, w) of its tokens.
        budget: bytes of memory that may be taken.
        needed: bytes that will be, about.
        least: the smallest budget that works.
        on_disk: whether the tokens go into files.
        token_bytes: of one copy of the tokens.
        disk_bytes: of the files.
        band: rows of tokens at once.
        stem_band: likewise, in the stem.
        head_rows: of the head's output at once, where there is a head.
    """

    grid: tuple[int, int]
    budget: int
    needed: int
    least: int
    on_disk: bool
    token_bytes: int
    disk_bytes: int
    band: int
    stem_band: int
    head_rows: int

    def lines(self) -> list[tuple[str, str]]:
        """Return what there is to say of it, as names and values."""
        h, w = self.grid
        where = f"on disk ({bytes_text(self.disk_bytes)})" if self.on_disk else "in memory"
        return [
            ("tokens", f"{h * w:,} ({h} x {w}), {bytes_text(self.token_bytes)}, {where}"),
            ("memory", f"about {bytes_text(self.needed)} of {bytes_text(self.budget)}; least {bytes_text(self.least)}"),
            ("rows of tokens at once", f"{self.band} (stem {self.stem_band})"),
        ]


@dataclass(frozen=True)
class Needs:
    """What a plan is made from.

    Attributes:
        trunk: the folded model.
        image_size: (H, W).
        channels: of the image.
        sample_bytes: of one of its samples as it is read.
        held: bytes that reading and writing hold besides.
        kept_grids: copies of the tokens that are kept besides those that go from layer to layer; 2.3 for a pyramid.
        head_row: bytes for each row that a head makes at once; 0 without one.
        head_fixed: bytes that it takes whatever the rows.
        processes: that share the rows.
    """

    trunk: FoldedTrunk
    image_size: tuple[int, int]
    channels: int
    sample_bytes: int
    held: int = 0
    kept_grids: float = 0.0
    head_row: int = 0
    head_fixed: int = 0
    processes: int = 1


def make_plan(needs: Needs, budget: int | None, *, band: int | None = None) -> Plan:
    """Return the fastest way through an image that keeps the budget.

    Args:
        needs: of image, model and task.
        budget: bytes of anonymous memory that the process may take, all that it holds already included; None for
            ``SHARE`` of what is free.
        band: rows at once, whatever they take; for tests and experiments.

    Raises:
        ConfigError: the budget is too small; the message says which is not.
    """
    base = anonymous_bytes() or _BASE
    if budget is None:
        free = available_bytes(torch.device("cpu"))
        budget = base + int(SHARE * free) if free is not None else 2**62
    trunk, p = needs.trunk, needs.trunk.patch_size
    h, w = (-(-side // p) for side in needs.image_size)
    b = next(trunk.parameters()).element_size()
    token_bytes = -(-h // needs.processes) * w * trunk.embed_dim * b
    fixed = base + LIBRARIES + needs.held

    def peak(rows: int, stem: int, head: int) -> int:
        stages = [_layer_bytes(trunk, w, rows, b), _stem_bytes(needs, w, stem, b)]
        if needs.head_row:
            stages.append(needs.head_fixed + head * needs.head_row)
        return fixed + max(stages)

    rows = min(h, max(LEAST_ROWS, -(-BAND_TOKENS // w)))
    stem = min(h, max(1, -(-BAND_TOKENS // (4 * w))))
    head = 32
    kept = int(token_bytes * needs.kept_grids)
    least = peak(1, 1, 1) + DRIFT
    if band is not None:
        rows = stem = band
        on_disk = peak(rows, stem, head) + token_bytes + kept > budget
        return Plan((h, w), budget, peak(rows, stem, head) + (0 if on_disk else token_bytes + kept), least, on_disk,
                    token_bytes, (2 * token_bytes + kept) if on_disk else 0, rows, stem, head)  # fmt: skip
    for on_disk, lowest in ((False, min(rows, WORTH_ROWS)), (True, 1)):
        room = budget - (0 if on_disk else token_bytes + kept)
        while peak(rows, 1, 1) > room and rows > lowest:
            rows = max(lowest, rows * 3 // 4)
        while peak(rows, stem, 1) > room and stem > 1:
            stem = max(1, stem * 3 // 4)
        while peak(rows, stem, head) > room and head > 1:
            head = max(1, head * 3 // 4)
        if peak(rows, stem, head) <= room:
            disk = 2 * token_bytes + kept if on_disk else 0
            needed = budget - room + peak(rows, stem, head)
            return Plan((h, w), budget, needed, least, on_disk, token_bytes, disk, rows, stem, head)
    rounded = -(-least // 2**20)
    raise ConfigError(
        f"{bytes_text(budget)} of memory are too little for an image of {needs.image_size[0]} x {needs.image_size[1]} "
        f"px: {rounded} MiB is the least that works (memory='{rounded}MiB', --memory {rounded}MiB)."
    )


def parse_bytes(text: int | str) -> int:
    """Return an amount of memory: a number of bytes, or "4GiB", "500 MB", "1.5g".

    Raises:
        ConfigError: something else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        amount = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
        if match is None or match[2] not in _UNITS:
            raise ConfigError(f"memory is {text!r}; write an amount such as 4GiB, 1500MB or 800MiB.")
        amount = int(float(match[1]) * _UNITS[match[2]])
    if amount < 1:
        raise ConfigError(f"memory is {text!r}; it must be more than nothing, such as 4GiB.")
    return amount


def _layer_bytes(trunk: FoldedTrunk, w: int, rows: int, b: int) -> int:
    C = trunk.embed_dim
    hidden = trunk.blocks[0].mlp[0].out_features  # type: ignore[index,union-attr]
    band = (rows + 2 * HALO) * w * C * b
    tokens = min(MLP_TOKENS, rows * w)
    feed_forward = tokens * (hidden + C) * b
    moments = min(NORM_TOKENS, rows * w) * C * (b + 2 * max(4, b)) + 8 * C * C * 8
    # source rows, normed, attended, joined; LPI's normed rows and two maps
    return 7 * band + max(feed_forward, moments) + 12 * C * C * 8


def _stem_bytes(needs: Needs, w: int, rows: int, b: int) -> int:
    p = needs.trunk.patch_size
    height, width = (rows + 1) * p, needs.image_size[1]
    total = height * width * needs.channels * (needs.sample_bytes + 3 * b)
    for layer in needs.trunk.patch_embed.modules():
        if isinstance(layer, nn.Conv2d):
            height, width = height // layer.stride[0] + 2, -(-width // layer.stride[0])
            total += int(2.5 * height * width * layer.out_channels * b)
    return total + 3 * rows * w * needs.trunk.embed_dim * b
