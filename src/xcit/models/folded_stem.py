"""A folded XCiT's stem tile after tile: its first maps, much larger than the tokens, never exist as a whole.

Legend: B batch, p patch size, (Hp, Wp) patch grid, C embed_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.models.layers import ConvPatchEmbed
from xcit.models.row_maps import Convolved, RowMap
from xcit.models.variants import LinearPatchEmbed

LARGE = 512 * 512
"""Pixels of an image from which on the stem's maps count in memory."""
TILE_BYTES = 9 << 19
"""Of the first map of a tile: what ``embed_in_tiles`` holds is one and a half of it."""
SHARED = 0.875
"""Tokens' sides of the first map that two neighbouring tiles both make: 1, 2 and 4 of 8 rows, for patches of 16."""


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


def embed_in_tiles(
    stem: nn.Module, x: Tensor, position: Callable[[int, int], tuple[Tensor, Tensor]] | None
) -> Tensor | None:
    """Return the tokens (B, Hp * Wp, C) of images; None where they are too small for it, or the stem is another.

    Unlike ``stem_rows`` it makes what two tiles share twice: of tiles as large as these that costs less than keeping
    it.

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
    tall, wide = tile_of(height, width, TILE_BYTES // token_bytes)
    if (tall, wide) == (height, width):
        return None
    parts = None if position is None else position(height, width)
    tokens = x.new_empty(x.shape[0], height, width, convs[-1].out_channels)
    corners = [(top, left) for top in range(0, height, tall) for left in range(0, width, wide)]
    for image, (top, left) in itertools.product(range(x.shape[0]), corners):  # a tile is of one image
        rows, columns = (top, min(height, top + tall)), (left, min(width, left + wide))
        made = _tile(stem, x[image : image + 1], rows, columns)[0].permute(1, 2, 0)
        into = tokens[image, slice(*rows), slice(*columns)]
        if parts is None:
            into.copy_(made)
        else:
            down, across = parts
            torch.add(made, down[slice(*rows)].unsqueeze(1) + across[slice(*columns)], out=into)
    return tokens.flatten(1, 2)


def tile_of(height: int, width: int, num_tokens: int) -> tuple[int, int]:
    """Return the height and width of tiles, of at most so many tokens with what they share, that share the least.

    Args:
        height: of the grid that they cover.
        width: of it.
        num_tokens: in a tile; one token is a tile wherever more do not fit.
    """
    best, least = (1, 1), float("inf")
    for across in range(1, width + 1):
        wide = -(-width // across)
        tall = min(height, int(num_tokens / (wide + SHARED * (across > 1)) - SHARED))
        if tall < height and tall < 1:
            continue
        down = -(-height // tall)
        tall = -(-height // down)
        made = (height + SHARED * (down - 1)) * (width + SHARED * (across - 1))
        if made < least:
            best, least = (tall, wide), made
    return best


def _tile(stem: ConvPatchEmbed, x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Return a part of the stem's output, (B, C, rows, columns), of 3 x 3 convolutions of stride 2 and padding 1."""
    num_convs = sum(isinstance(layer, nn.Conv2d) for layer in stem.proj)
    down, across = (_spans(*axis, num_convs) for axis in ((x.shape[2], *rows), (x.shape[3], *columns)))
    y = x[:, :, slice(*down[0].seen), slice(*across[0].seen)].contiguous(memory_format=torch.channels_last)
    spans = iter(zip(down, across, strict=True))
    for layer in stem.proj:
        if not isinstance(layer, nn.Conv2d):
            y = layer(y)
            continue
        vertical, horizontal = next(spans)
        padding = (vertical.before, horizontal.before)
        if vertical.after or horizontal.after:  # seldom: a side of the map is odd
            y = F.pad(y, (horizontal.before, horizontal.after, vertical.before, vertical.after))
            padding = (0, 0)
        # zeros before make zeros after: of an even number of rows or columns, the stride passes over them
        y = F.conv2d(y, layer.weight, layer.bias, layer.stride, padding)
    return y


class _Span(NamedTuple):
    """What one convolution sees of its input along an axis."""

    seen: tuple[int, int]
    """Begin and end."""
    before: int
    """Zeros before it: at the border."""
    after: int
    """Zeros after it."""


def _spans(size: int, begin: int, end: int, num_convs: int) -> list[_Span]:
    """Return, for each convolution, what it sees for the outputs from begin to end of the last one."""
    sizes = [size]
    for _ in range(num_convs - 1):
        sizes.append(-(-sizes[-1] // 2))
    spans = []
    for of_input in reversed(sizes):
        first, last = 2 * begin - 1, 2 * end
        spans.append(_Span((max(0, first), min(of_input, last)), int(first < 0), int(last > of_input)))
        begin, end = spans[-1].seen
    return spans[::-1]
