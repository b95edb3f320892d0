"""Attention as pictures: masks, all heads on one sheet, channel attention, feature colours.

Drawn with Pillow alone, so that looking at a model needs nothing beyond the base installation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from xcit.errors import ConfigError
from xcit.inference.attention_maps import heat_colours, overlay

TILE = 240
"""Pixels of the longer side of a picture on a sheet."""
GAP, LINE, TEXT = 10, 22, 15
"""Between pictures; height of a line of text; size of its letters, in pixels."""
INK, QUIET = (31, 36, 48), (107, 114, 128)


class Tile(NamedTuple):
    """A picture on a sheet and what stands above it."""

    title: str
    picture: Image.Image


def mask_picture(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return a mask (Hp, Wp) as a picture in mode "L", 255 inside and 0 outside, each patch a rectangle.

    Args:
        mask: bool.
        size: height and width in pixels.
    """
    return Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.NEAREST)


def masked(image: Image.Image, mask: np.ndarray, dim: float = 0.2) -> Image.Image:
    """Return an image whose patches outside of a mask (Hp, Wp) are darkened, to ``dim`` times their brightness."""
    inside = np.asarray(mask_picture(mask, (image.height, image.width)), dtype=np.float32)[..., None] / 255
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return Image.fromarray(np.rint(pixels * (dim + (1 - dim) * inside)).astype(np.uint8))


def colours_picture(colours: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return colours (Hp, Wp, 3) from 0 to 1 as an RGB picture of this height and width, each patch a rectangle."""
    small = Image.fromarray(np.rint(255 * colours).astype(np.uint8))
    return small.resize(size[::-1], Image.Resampling.NEAREST)


def heads_sheet(image: Image.Image, patches: np.ndarray, opacity: float = 0.75, title: str = "") -> Image.Image:
    """Return one figure: the image, the heads' mean, and every head, laid over the image.

    Args:
        image: the whole image.
        patches: (heads, Hp, Wp) shares of attention that sum to one, or multiples; each map has its own scale, of
            which the title gives the largest value in multiples of even attention.
        opacity: of the brightest colour.
        title: stands above all.
    """
    picture = _small(image)
    tiles = [Tile("image", picture)]
    for name, each in [("mean", patches.mean(axis=0)), *((f"head {i}", head) for i, head in enumerate(patches))]:
        peak = each.max() / each.mean()
        tiles.append(Tile(f"{name}, up to {peak:.1f}x", overlay(picture, torch.from_numpy(each), opacity)))
    return sheet(tiles, _columns(len(tiles), picture), title)


def channels_sheet(matrices: Sequence[np.ndarray], title: str = "") -> Image.Image:
    """Return one figure of XCA's matrices: a row a block, a column a head.

    Args:
        matrices: of each block (heads, d, d); rows sum to one. Brightness is an entry's share of the largest one in
            its matrix, which the title above gives in multiples of an even row's 1 / d.
        title: stands above all.
    """
    heads, d = matrices[0].shape[:2]
    scale = max(1, min(8, 96 // d))
    tiles = []
    for block, of_block in enumerate(matrices):
        for head, matrix in enumerate(of_block):
            colours = heat_colours(matrix / max(matrix.max(), np.finfo(np.float64).tiny))
            small = Image.fromarray(np.rint(colours).astype(np.uint8))
            name = f"{block}.{head}  {matrix.max() * d:.1f}x"
            tiles.append(Tile(name, small.resize((d * scale, d * scale), Image.Resampling.NEAREST)))
    return sheet(tiles, heads, title)


def sheet(tiles: Sequence[Tile], columns: int, title: str = "") -> Image.Image:
    """Put pictures of any size on a white sheet, row by row, each under its title.

    Args:
        tiles: at least one.
        columns: pictures in a row.
        title: stands above all.

    Raises:
        ConfigError: there are none.
    """
    if not tiles:
        raise ConfigError("A sheet needs at least one picture.")
    font = ImageFont.load_default(TEXT)
    columns = min(columns, len(tiles))
    width = max(max(tile.picture.width, _text_width(tile.title, font)) for tile in tiles)
    height = max(tile.picture.height for tile in tiles)
    rows = -(-len(tiles) // columns)
    above = LINE + GAP if title else 0
    whole = Image.new(
        "RGB",
        (
            max(columns * (width + GAP) + GAP, _text_width(title, font) + 2 * GAP),
            above + rows * (height + LINE + GAP) + GAP,
        ),
        "white",
    )
    draw = ImageDraw.Draw(whole)
    draw.text((GAP, GAP), title, fill=INK, font=font)
    for i, tile in enumerate(tiles):
        x = GAP + (i % columns) * (width + GAP)
        y = above + GAP + (i // columns) * (height + LINE + GAP)
        draw.text((x, y), tile.title, fill=QUIET, font=font)
        whole.paste(tile.picture, (x, y + LINE))
    return whole


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two pictures beside each other, as high as the first."""
    if right.height != left.height:
        right = right.resize((max(1, round(right.width * left.height / right.height)), left.height))
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def _small(image: Image.Image) -> Image.Image:
    """Return an image at a tile's size."""
    scale = TILE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _columns(num_tiles: int, picture: Image.Image) -> int:
    """Return how many pictures stand in a row so that the sheet is about as wide as a page, and its rows even."""
    most = max(2, min(6, 1300 // (picture.width + GAP)))
    rows = -(-num_tiles // most)
    return -(-num_tiles // rows)


def _text_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(np.ceil(font.getlength(text)))
