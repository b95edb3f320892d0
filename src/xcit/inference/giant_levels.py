"""A pyramid's levels of a giant image: what is kept of the layers, and what the head that follows will need.

Legend: (h, w) the token grid, C embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from xcit.errors import ConfigError
from xcit.inference.giant_heads import is_kept_small, level_of, low_rows
from xcit.inference.giant_plan import Needs
from xcit.inference.giant_run import Run
from xcit.inference.giant_stream import put
from xcit.inference.giant_tokens import GridRows, TokenGrid
from xcit.models.folded_models import FoldedPyramid
from xcit.models.row_maps import RowMap, pooled_evenly, step_bytes
from xcit.models.segmentation import SegmentationModel


def run_to_levels(run: Run, margin: int) -> list[RowMap]:
    """Run the layers and return the pyramid's levels.

    Args:
        run: the image.
        margin: rows of the coarsest level beyond a process's own that are needed.
    """
    trunk, device = run.setup.trunk, run.setup.device
    assert isinstance(trunk, FoldedPyramid)
    (h, w), p = run.plan.grid, trunk.patch_size
    strides = [max(p, stride) for stride in trunk.strides]  # of what is kept
    heights = [kept_size(trunk, i, h, w)[0] for i in range(len(strides))]
    shares = [run.share(*each) for each in zip(strides, heights, strict=True)]
    kept: list[TokenGrid] = [
        run.stream.grid(f"level{i}", end - begin, kept_size(trunk, i, h, w)[1]) for i, (begin, end) in enumerate(shares)
    ]

    def keep(levels: list[int], tokens: TokenGrid) -> None:
        for i in levels:
            x = GridRows(tokens, device)
            put(level_of(trunk, i, x) if is_kept_small(trunk, i) else x, kept[i], run.plan.band)
            kept[i].keep()

    at: dict[int, list[int]] = {}
    for level, block in enumerate(trunk.taps):
        at.setdefault(block, []).append(level)
    taps: dict[int, Callable[[TokenGrid], None]] = {block: partial(keep, levels) for block, levels in at.items()}
    run.stream.run(len(trunk.blocks), taps)
    maps: list[RowMap] = []
    for grid, stride, height, own in zip(kept, strides, heights, shares, strict=True):
        more = 0 if run.stream.processes.size == 1 else margin * trunk.strides[-1] // stride + 2
        wanted = max(0, own[0] - more), min(height, own[1] + more)
        wide = run.stream.processes.widened(grid, own, wanted, partial(run.stream.grid, f"wide{len(maps)}"))
        maps.append(GridRows(wide, device, height, wanted[0]))
    return [each if is_kept_small(trunk, i) else level_of(trunk, i, each) for i, each in enumerate(maps)]


def with_head(needs: Needs, model: nn.Module, rows: RowMap) -> Needs:
    """Return the needs with those of what comes after the layers, which its maps are asked for.

    Raises:
        ConfigError: a model without a pyramid, or an image too small for it.
    """
    trunk = needs.trunk
    if not isinstance(trunk, FoldedPyramid):
        raise ConfigError("The model has no pyramid; create_pyramid and create_segmenter make models that do.")
    p, C = trunk.patch_size, trunk.embed_dim
    h, w = (-(-side // p) for side in (rows.height, rows.width))
    least = trunk.strides[-1] // p
    if min(h, w) < least:
        raise ConfigError(
            f"The image gives a grid of {h} x {w} patches; the pyramid's coarsest level needs {least} x {least}."
        )
    kept = sum(min(1.0, (p / stride) ** 2) for stride in trunk.strides)
    like = next(trunk.parameters())
    empty = [_Room(C, *kept_size(trunk, i, h, w), like) for i in range(len(trunk.strides))]
    levels = [each if is_kept_small(trunk, i) else level_of(trunk, i, each) for i, each in enumerate(empty)]
    itemsize = like.element_size()
    if not isinstance(model, SegmentationModel):
        maps, logits = levels, 0
    else:
        with torch.inference_mode():
            maps = [low_rows(model, levels, partial(pooled_evenly, band=64))]
        # strips at the image's own size: the logits, their sides' mixtures, the exponentials
        logits = 4 * 4 * 4 * rows.width * model.num_classes
    fixed = max(step_bytes(each, 1, itemsize) for each in maps)
    more = max(step_bytes(each, 9, itemsize) for each in maps)
    return replace(needs, kept_grids=kept, head_row=(more - fixed) // 8 + logits, head_fixed=fixed)


def kept_size(trunk: FoldedPyramid, level: int, h: int, w: int) -> tuple[int, int]:
    """Return rows and columns of what is kept for a level."""
    factor = max(1, trunk.strides[level] // trunk.patch_size)
    return h // factor, w // factor


class _Room(RowMap):
    """A map of a size and with nothing in it, of which a head's needs are asked."""

    def __init__(self, channels: int, height: int, width: int, like: Tensor) -> None:
        super().__init__(channels, height, width)
        self._like = like

    def make(self, begin: int, end: int) -> Tensor:
        return self._like.new_zeros(1, self.channels, end - begin, self.width)
