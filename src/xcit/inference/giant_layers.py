"""A folded XCiT's layers over tokens of which only a band of rows is at hand at a time.

XCA is one linear map, the same for all tokens, made of their moments; LPI sees two rows on each side; everything else
is a token by itself. So one pass over the tokens runs a layer, and gathers the moments that the next one needs. Class
attention is a softmax that is gathered likewise, over as many passes as there are layers of it.

Legend: (h, w) the token grid, N = h * w, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.inference.giant_tokens import TokenGrid
from xcit.models.folded_inplace import HALO, carry_bias, local_output, mlp_
from xcit.models.folded_layers import FoldedBlock, FoldedClassBlock
from xcit.ops.class_tokens import Softmax, merge_softmax, softmax_of
from xcit.ops.xca_moments import Moments, channel_map, merge_moments, moments_of

NORM_TOKENS = 8192
"""Whose moments are gathered at once: their products are float32 within, and float64 between."""


class Halo(NamedTuple):
    """Rows of tokens beyond a process's own, before the layer: at most two on each side, none at the image's border."""

    above: Tensor
    below: Tensor


class MomentSum:
    """Moments of normed tokens, gathered band by band in float64."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._norm = norm
        self.moments: Moments | None = None

    def add(self, rows: Tensor) -> None:
        """Add tokens (n, w, C)."""
        for tokens in rows.view(1, -1, rows.shape[-1]).split(NORM_TOKENS, dim=1):
            found = moments_of(self._norm(tokens), overwrite=True)
            self.moments = found if self.moments is None else merge_moments(self.moments, found)


def bands(height: int, band: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each band and the one behind its last."""
    for top in range(0, height, band):
        yield top, min(top + band, height)


def run_layer(
    block: FoldedBlock,
    moments: Moments,
    source: TokenGrid,
    target: TokenGrid,
    *,
    band: int,
    device: torch.device,
    halo: Halo | None = None,
    each: Callable[[int, Tensor], None] = lambda top, rows: None,
) -> None:
    """Run one layer.

    Args:
        block: the layer.
        moments: of all the image's normed tokens, as the layer's first norm gives them.
        source: the tokens.
        target: where they go afterwards; it may be the source.
        band: rows at once.
        device: where the layer runs.
        halo: what lies above and below the source's rows, if that is not all of the image.
        each: is given each band of the result, its first row and (n, w, C) on the device.
    """
    weight, bias = channel_map(moments, block.attn.weights(), small_terms=torch.float64)
    wide = source.dtype in (torch.float32, torch.float64)
    ones = weight.new_ones(weight.shape[-1]) if wide else None
    if wide:
        weight = carry_bias(weight, bias)
    height, w, C = source.shape

    def attended(rows: Tensor) -> Tensor:
        x = rows.to(device).reshape(-1, C)
        normed = F.layer_norm(x, (C,), None, ones, block.norm1.eps)
        x = torch.addmm(x, normed, weight[0].t())
        return (x if wide else x.add_(bias)).view(-1, w, C)

    with torch.inference_mode():
        none = torch.empty(0, w, C, dtype=source.dtype, device=device)
        seen = none if halo is None else attended(halo.above)  # from two rows above the band on, as far as attended
        first, read = -len(seen), 0  # the row that it begins with, and that behind the last one read
        for top, bottom in bands(height, band):
            reach = min(bottom + HALO, height)
            parts = [seen]
            if read < reach:
                parts.append(attended(source.read(read, reach)))
            if reach == height and read < height and halo is not None:
                parts.append(attended(halo.below))
            read = reach
            seen = torch.cat(parts) if len(parts) > 1 else seen
            del parts
            behind = seen[max(0, bottom - HALO - first) :].clone() if bottom < height else none
            rows = seen[top - first : bottom - first]
            if block.local_mp is not None:
                below = seen[: bottom + HALO - first]
                rows = rows.add_(local_output(block.local_mp, below.unsqueeze(0))[0, top - first : bottom - first])
            mlp_(block.mlp, block.norm2, rows.view(-1, C))
            each(top, rows)
            target.write(top, rows.cpu())
            first, seen = max(first, bottom - HALO), behind


class ClassAttending(NamedTuple):
    """What one class-attention layer did."""

    cls: Tensor
    """(1, 1, C): the class token afterwards."""
    direction: Tensor
    """(H, C): what scores are products with."""
    patches: Softmax
    """Over all patch tokens."""
    own: Tensor
    """(H,): of a head's attention, the share that the class token keeps for itself, 0 to 1."""


def patch_tokens(blocks: list[FoldedClassBlock], x: Tensor) -> Tensor:
    """Return what class-attention layers make of patch tokens (..., C), each by itself."""
    for block in blocks:
        x = block.patch_tokens(x)
    return x


def attend(
    earlier: list[FoldedClassBlock],
    block: FoldedClassBlock,
    cls: Tensor,
    source: TokenGrid,
    *,
    band: int,
    device: torch.device,
    merge: Callable[[Softmax], Softmax] = lambda found: found,
) -> ClassAttending:
    """Run one class-attention layer for the class token.

    Args:
        earlier: the layers before it, through which the source's tokens have yet to go.
        block: the layer.
        cls: (1, 1, C), as the layer before left it.
        source: the tokens after the last XCA layer.
        band: rows at once.
        device: where the layer runs.
        merge: adds what other processes found.
    """
    C = source.shape[2]
    with torch.inference_mode():
        own = block.norm1(cls)
        direction = block.attn.direction(own)[0]  # (H, C)
        found: Softmax | None = None
        for top, bottom in bands(source.shape[0], band):
            x = patch_tokens(earlier, source.read(top, bottom).to(device).view(1, -1, C))
            more = softmax_of(direction, block.norm1(x)[0])
            found = more if found is None else merge_softmax(found, more)
        assert found is not None
        patches, itself = merge(found), softmax_of(direction, own[0])
        both = merge_softmax(itself, patches)
        mean = both.mean().to(cls.dtype)
        share = (itself.top - both.top).exp() * itself.total / both.total
        return ClassAttending(block.class_token_of_mean(cls, mean.unsqueeze(0)), direction, patches, share)
