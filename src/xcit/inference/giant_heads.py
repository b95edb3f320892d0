"""A pyramid's levels and a segmenter's head, made a few rows at a time of tokens that lie ready.

Each head is built here as maps of rows (``row_maps``) out of the modules of the head itself, and computes what its
``forward`` does; tests hold the two together.

Legend: K classes; C channels of the pyramid's levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.inference.segment_windows import LowLogits
from xcit.models.folded_models import FoldedPyramid
from xcit.models.row_maps import (
    Convolved,
    Doubled,
    Mapped,
    Pooled,
    RowMap,
    Whole,
    added,
    joined,
    resized,
)
from xcit.models.segmentation import ConvNorm, SegmentationModel
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.upernet import UperHead, UperNet

MARGIN = 6
"""Rows of the coarsest level beyond its own that a process's share of a head's output is made of, at most."""


def is_kept_small(pyramid: FoldedPyramid, level: int) -> bool:
    """Return whether a level is kept as such, since it is no larger than the tokens that it is made of."""
    return pyramid.strides[level] >= pyramid.patch_size


def level_of(pyramid: FoldedPyramid, level: int, tokens: RowMap) -> RowMap:
    """Return a level of the pyramid, of the tokens after its block."""
    operation = (pyramid.fpn1, pyramid.fpn2, pyramid.fpn3, pyramid.fpn4)[level]
    x = tokens
    for layer in operation if isinstance(operation, nn.Sequential) else [operation]:
        if isinstance(layer, nn.ConvTranspose2d):
            x = Doubled(x, layer)
        elif isinstance(layer, nn.MaxPool2d):
            assert isinstance(layer.kernel_size, int)
            x = Pooled(x, layer.kernel_size)
        elif not isinstance(layer, nn.Identity):
            x = Mapped((x,), layer, x.channels)
    return x


Pool = Callable[[RowMap, Sequence[int]], list[Tensor]]
"""Averages a map into n x n cells, for each of some n's: ``pooled_evenly``."""


def low_rows(model: SegmentationModel, levels: Sequence[RowMap], pool: Pool) -> RowMap:
    """Return a segmenter's logits at stride 4.

    Args:
        model: a ``UperNet`` or a ``SemanticFPN``, in eval mode.
        levels: its pyramid's, the finest first.
        pool: reads all of the coarsest level first, where the head looks at the whole.
    """
    if isinstance(model, UperNet):
        return _upernet(model, levels, pool)
    assert isinstance(model, SemanticFPN)
    return _semantic_fpn(model, levels)


class StreamedLogits(LowLogits):
    """The logits of an image that goes through a segmenter a few rows at a time.

    Args:
        low: what ``low_rows`` returns.
        size: h, w.
        extent: h, w with the padding.
        device: where they are made.
    """

    def __init__(self, low: RowMap, size: tuple[int, int], extent: tuple[int, int], device: torch.device) -> None:
        self._reader, self.size, self.extent, self.device = low.reader(), size, extent, device
        self.shape = (low.channels, low.height, low.width)

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows of logits."""
        rows = self._reader.rows(begin, end)[0]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _upernet(model: UperNet, levels: Sequence[RowMap], pool: Pool) -> RowMap:
    head = model.decode_head
    assert isinstance(head, UperHead)
    coarsest = levels[-1]
    pools = [(module[0].output_size, module[1]) for module in head.psp_modules]  # type: ignore[index]
    cells = pool(coarsest, [size for size, _ in pools])
    size = (coarsest.height, coarsest.width)
    pooled = [resized(Whole(convolve(each)), size) for each, (_, convolve) in zip(cells, pools, strict=True)]
    above = _conv_norm(joined([coarsest, *pooled]), head.bottleneck)
    maps = [above]
    for i in range(len(head.lateral_convs) - 1, -1, -1):
        lateral = _conv_norm(levels[i], head.lateral_convs[i])
        above = added(lateral, resized(above, (lateral.height, lateral.width)))
        maps.insert(0, _conv_norm(above, head.fpn_convs[i]))
    finest = (maps[0].height, maps[0].width)
    together = joined([maps[0], *(resized(coarser, finest) for coarser in maps[1:])])
    return Convolved(_conv_norm(together, head.fpn_bottleneck), head.conv_seg)


def _semantic_fpn(model: SemanticFPN, levels: Sequence[RowMap]) -> RowMap:
    neck, head = model.neck, model.decode_head
    maps: list[RowMap] = []
    above: RowMap | None = None
    for i in range(len(levels) - 1, -1, -1):
        lateral: RowMap = Convolved(levels[i], neck.lateral_convs[i].conv)  # type: ignore[arg-type]
        if above is not None:
            lateral = added(lateral, resized(above, (lateral.height, lateral.width), "nearest"))
        above = lateral
        maps.insert(0, Convolved(lateral, neck.fpn_convs[i].conv))  # type: ignore[arg-type]
    total: RowMap | None = None
    for x, steps in zip(maps, head.scale_heads, strict=True):  # type: ignore[arg-type]
        for step in steps:
            x = _conv_norm(x, step) if isinstance(step, ConvNorm) else resized(x, (2 * x.height, 2 * x.width))
        total = x if total is None else added(total, resized(x, (total.height, total.width)))
    assert total is not None
    return Convolved(total, head.conv_seg)


def _conv_norm(x: RowMap, module: nn.Module) -> RowMap:
    assert isinstance(module, ConvNorm)
    return Convolved(x, module.conv, then=lambda y: F.relu(module.bn(y)))
