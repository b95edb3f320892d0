"""A folded XCiT's stem a few rows at a time: its first maps, much larger than the tokens, never exist as a whole.

Legend: B batch, p patch size, (Hp, Wp) patch grid, C embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.models.layers import ConvPatchEmbed
from xcit.models.row_maps import Convolved, RowMap
from xcit.models.variants import LinearPatchEmbed

LARGE = 512 * 512
"""Pixels of an image from which on the stem's maps count in memory."""
BAND_BYTES = 10 << 20
"""Of the first map, made at once by ``embed_in_bands``: less would cost time (rows that bands share)."""
LEAST_ROWS = 4
"""Of tokens, in a band of many or wide images, whose rows are larger: fewer would share too many."""


def stem_rows(stem: nn.Module, image: RowMap) -> RowMap:
    """Return a stem's tokens as a map (B, C, Hp, Wp) of rows.

    Args:
        stem: a ``ConvPatchEmbed`` with its batch norms folded, or a ``LinearPatchEmbed``.
        image: (B, in_chans, H, W), a patch or more each way.
    """
    if isinstance(stem, LinearPatchEmbed):
        p = stem.patch_size
        return Convolved(image, stem.proj, padded=(-image.height % p, -image.width % p))
    assert isinstance(stem, ConvPatchEmbed)
    x, layers = image, list(stem.proj)
    for i, conv in enumerate(layers):
        if isinstance(conv, nn.Conv2d):
            x = Convolved(x, conv, then=layers[i + 1] if i + 1 < len(layers) else None)
    return x


def embed_in_bands(
    stem: nn.Module, x: Tensor, position: Callable[[int, int], tuple[Tensor, Tensor]] | None
) -> Tensor | None:
    """Return the tokens (B, Hp * Wp, C) of images; None where they are too small for it, or the stem is another.

    Unlike ``stem_rows`` it makes the rows that two bands share twice: of bands as high as these that costs less than
    keeping them.

    Args:
        stem: a ``ConvPatchEmbed`` with its batch norms folded.
        x: (B, in_chans, H, W), which the stem takes.
        position: gives, for a grid (Hp, Wp), what is added to the tokens of each row (Hp, C) and column (Wp, C).
    """
    if not isinstance(stem, ConvPatchEmbed) or x.shape[2] * x.shape[3] < LARGE:
        return None
    height, width = (-(-side // stem.patch_size) for side in x.shape[2:])
    convs = [layer for layer in stem.proj if isinstance(layer, nn.Conv2d)]
    token_bytes = (stem.patch_size // 2) ** 2 * convs[0].out_channels * x.element_size()  # of the first map
    row_bytes = token_bytes * x.shape[0] * width
    band = max(LEAST_ROWS, BAND_BYTES // row_bytes - 1)  # those shared with the neighbours are nearly a row of tokens
    if band >= height:
        return None
    parts = None if position is None else position(height, width)
    tokens = x.new_empty(x.shape[0], height, width, convs[-1].out_channels)
    for top in range(0, height, band):
        bottom = min(height, top + band)
        made = _band(stem, x, top, bottom).permute(0, 2, 3, 1)
        if parts is None:
            tokens[:, top:bottom] = made
        else:
            down, across = parts
            torch.add(made, down[top:bottom].unsqueeze(1) + across, out=tokens[:, top:bottom])
    return tokens.flatten(1, 2)


def _band(stem: ConvPatchEmbed, x: Tensor, begin: int, end: int) -> Tensor:
    """Return rows of the stem's output, (B, C, end - begin, Wp), of 3 x 3 convolutions of stride 2 and padding 1."""
    heights = [x.shape[2]]
    convs = [layer for layer in stem.proj if isinstance(layer, nn.Conv2d)]
    for _ in convs:
        heights.append(-(-heights[-1] // 2))
    spans = [(begin, end)]  # of each convolution's output rows, the last one first; then of the image's
    for height in heights[-2::-1]:
        begin, end = 2 * spans[-1][0] - 1, 2 * spans[-1][1]
        spans.append((max(0, begin), min(height, end)))
    first, last = spans.pop()
    y = x[:, :, first:last].contiguous(memory_format=torch.channels_last)
    at = 0
    for layer in stem.proj:
        if not isinstance(layer, nn.Conv2d):
            y = layer(y)
            continue
        wanted = spans.pop()
        above, below = int(wanted[0] == 0), int(2 * wanted[1] > heights[at])
        if below:  # seldom: the map's height is odd
            y = F.pad(y, (0, 0, above, below))
            above = 0
        # zeros above make zeros below: of an even number of rows, the stride passes over them
        y = F.conv2d(y, layer.weight, layer.bias, layer.stride, (above, 1))
        at += 1
    return y
