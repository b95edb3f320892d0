"""A folded XCiT layer over its own input, band after band of tokens: what eager mode runs on a CPU.

The tokens are overwritten, and what a layer makes on the way exists for one band of patch rows at a time: the
feed-forward network's hidden layer, four times as wide as the tokens, never as a whole. That saves most of a layer's
memory, and with it the time in which the system hands out fresh pages.

XCA is the map of ``xcit.ops.xca_moments``. LPI sees two rows beyond the band, those above as they were before the band
before it was overwritten.

Biases after a norm cost no pass. A normed token's channels sum to zero, so that W and W + u 1^T are the same map of it;
of a token to which the norm adds one they differ by C u. With u = (b - W 1) / C (``carry_bias``) the latter is
W n + b. Below float32 the bias is added: there the sum is no zero, and one costs digits of the token.

Legend: B batch, N tokens = Hp * Wp, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.ops.class_tokens import merge_softmax, softmax_of
from xcit.ops.xca import XCAWeights, take_form, xca_tokens
from xcit.ops.xca_moments import Moments, channel_map, merge_moments, moments_of

if TYPE_CHECKING:
    from xcit.models.folded_layers import FoldedBlock, FoldedClassBlock, FoldedLPI
    from xcit.models.folded_xca import FoldedXCA

BAND_TOKENS = 4096
"""Of images that are taken together."""
PART_TOKENS = 2048
"""Normed at once by XCA and by class attention. XCA norms the tokens of an image of more twice, once for each pass."""
LPI_TOKENS = 2048
"""Of a band of LPI with the rows around it: so many that those cost little. At least half of ``BAND_TOKENS``."""
MLP_TOKENS = 1024
"""Taken at once by the feed-forward network: enough for matrix products at their full speed."""
HALO = 2
"""Rows beyond its own that LPI's two 3 x 3 convolutions see."""


def carry_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """Return W + u 1^T: the map of normed tokens that W (..., K, C) is, and W n + b, b (..., K), of those plus one."""
    return weight + ((bias - weight.sum(-1)) / weight.shape[-1]).unsqueeze(-1)


def can_run_in_place(x: Tensor) -> bool:
    """Return whether a layer may run over these tokens: eager mode on a CPU, and no gradient to be kept for."""
    return can_run_in_bands(x) and x.is_contiguous()


def can_run_in_bands(x: Tensor) -> bool:
    """Return whether parts of these values may be computed one after another: as above, in any layout."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
    )


def run_in_place(block: FoldedBlock, x: Tensor, height: int, width: int) -> None:
    """Transform the tokens (B, N, C) of (height, width) patch grids.

    Images are taken together as long as they fit into a band, and one after another where one does not.
    """
    for images in x.split(max(1, BAND_TOKENS // x.shape[1])):
        _attend(block.attn, block.norm1, images)
        _local_and_mlp(block, images, height, width)


def attend_in_place(block: FoldedClassBlock, cls: Tensor, x: Tensor, *, overwrite: bool) -> Tensor:
    """Return the class token (B, 1, C) after a layer of class attention over tokens (B, N, C).

    Args:
        block: the layer.
        cls: the class token before it.
        x: the patch tokens.
        overwrite: put the patch tokens after the layer in their place.
    """
    step = max(1, BAND_TOKENS // x.shape[1])  # images at once, as above
    return torch.cat(
        [_attend_class(block, *both, overwrite) for both in zip(cls.split(step), x.split(step), strict=True)]
    )


def overwrite_patches(block: FoldedClassBlock, x: Tensor) -> None:
    """Put patch tokens (B, N, C) after a layer of class attention in their place."""
    for tokens in x.view(-1, x.shape[2]).split(PART_TOKENS):
        block.overwrite(tokens, block.norm1(tokens))


def _attend_class(block: FoldedClassBlock, cls: Tensor, x: Tensor, overwrite: bool) -> Tensor:
    if x.shape[1] <= PART_TOKENS:
        normed = block.norm1(x)
        after = block.class_token_of_normed(cls, normed)
        if overwrite:
            block.overwrite(x, normed)
        return after
    own = block.norm1(cls)
    direction = block.attn.direction(own)
    found = softmax_of(direction, own)
    for band in x.split(PART_TOKENS, dim=1):
        normed = block.norm1(band)
        found = merge_softmax(found, softmax_of(direction, normed))
        if overwrite:
            block.overwrite(band, normed)
    return block.class_token_of_mean(cls, found.mean().to(x.dtype))


class OverwritingGELU(nn.GELU):
    """GELU of what nobody else reads: in its input's place where no gradient is kept, and nothing records a graph."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``gelu(x)``."""
        return gelu_(self, x) if can_run_in_place(x.permute(0, 2, 3, 1)) else super().forward(x)


def gelu_(act: nn.Module, x: Tensor) -> Tensor:
    """Return an activation's output, in its input's place where it is a GELU."""
    if isinstance(act, nn.GELU):
        return torch.ops.aten.gelu_.default(x, approximate=act.approximate)
    return act(x)


def _attend(attn: FoldedXCA, norm: nn.LayerNorm, x: Tensor) -> None:
    """Add XCA's output."""
    weights: XCAWeights = attn.weights()
    if take_form(x, weights, attn.form) == "tokens":
        x.add_(xca_tokens(norm(x), weights))
        return
    added = _added(x)
    if x.shape[1] <= PART_TOKENS:
        normed = _normed(norm, x, added)
        moments = moments_of(normed, torch.promote_types(x.dtype, torch.float32))
        _add_mapped(x, normed, *_map_of_normed(attn, weights, moments, added))
        return
    parts = x.split(PART_TOKENS, dim=1)
    moments = moments_of(_normed(norm, parts[0], added), overwrite=True)
    for part in parts[1:]:
        moments = merge_moments(moments, moments_of(_normed(norm, part, added), overwrite=True))
    weight, bias = _map_of_normed(attn, weights, moments, added)
    for part in parts:
        _add_mapped(part, _normed(norm, part, added), weight, bias)


def _map_of_normed(
    attn: FoldedXCA, weights: XCAWeights, moments: Moments, added: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight (B, C, C) and bias (B, C) of XCA as a map of normed tokens, to which their norm adds ``added``.

    Where it adds ones, the weight does the bias' work.
    """
    if added is None:
        return channel_map(moments, weights, small_terms=attn.small_terms)
    moments = moments._replace(mean=moments.mean - 1)
    return carry_bias(*channel_map(moments, weights, small_terms=attn.small_terms)), None


def _add_mapped(x: Tensor, normed: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # not baddbmm_, which torch's counter of operations does not know
    torch.baddbmm(x, normed, weight.transpose(1, 2), out=x)
    if bias is not None:
        x.add_(bias.unsqueeze(1))


def _added(x: Tensor) -> Tensor | None:
    """Return the ones (C,) that norms add to tokens like these, if any."""
    return x.new_ones(x.shape[-1]) if x.dtype in (torch.float32, torch.float64) else None


def _normed(norm: nn.LayerNorm, x: Tensor, added: Tensor | None) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, None, added, norm.eps)


def _local_and_mlp(block: FoldedBlock, x: Tensor, height: int, width: int) -> None:
    """Add LPI's output, then the feed-forward network's."""
    grid = x.unflatten(1, (height, width))
    rows = height
    if x.shape[1] > LPI_TOKENS:  # of one image
        most = max(2 * HALO, LPI_TOKENS // width - 2 * HALO)
        rows = -(-height // -(-height // most))  # bands as even as can be
    above = grid[:, :0]  # the rows before the band, as they were
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = grid[:, top:bottom]
        if block.local_mp is not None:
            below = grid[:, top : bottom + HALO]
            first = above.shape[1]
            kept = torch.cat((above, band[:, -HALO:]), dim=1)[:, -HALO:].clone() if bottom < height else None
            added = local_output(block.local_mp, torch.cat((above, below), dim=1) if first else below)
            band.add_(added[:, first : first + bottom - top])
            del added  # as large as the band: not beside the hidden layer
            above = above if kept is None else kept
        mlp_(block.mlp, block.norm2, band.view(-1, x.shape[2]))


def local_output(lpi: FoldedLPI, seen: Tensor) -> Tensor:
    """Return LPI's output (B, rows, width, C) for rows around which there is nothing but zeros.

    ``seen`` is let go before the convolutions: it takes no memory beside them unless somebody else holds it.
    """
    seen = F.layer_norm(seen, seen.shape[-1:], None, lpi.conv1.shift, lpi.norm.eps)
    seen = gelu_(lpi.act, lpi.conv1.of_shifted(seen.permute(0, 3, 1, 2)))
    seen = lpi.conv2.of_shifted(seen.add_(lpi.conv2.shift.view(-1, 1, 1)))
    return seen.permute(0, 2, 3, 1)


def mlp_(mlp: nn.Sequential, norm: nn.LayerNorm, x: Tensor) -> None:
    """Add the feed-forward network's output to tokens (T, C), in their place."""
    added = _added(x)
    first, act, second = mlp
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    assert first.bias is not None
    # One hidden layer for all parts: a fresh one each time would cost as much time as its activation.
    room = x.new_empty(min(len(x), MLP_TOKENS), first.out_features)
    for tokens in x.split(MLP_TOKENS):
        normed, hidden = _normed(norm, tokens, added), room[: len(tokens)]
        if added is None:
            torch.addmm(first.bias, normed, first.weight.t(), out=hidden)
        else:
            torch.mm(normed, first.weight.t(), out=hidden)
        torch.addmm(tokens, gelu_(act, hidden), second.weight.t(), out=tokens).add_(second.bias)
