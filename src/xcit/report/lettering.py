"""Letters in pictures: a font with as many of them as can be had, and texts that fit."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

GLYPHS = 13
"""Size at which letters are compared with what a font draws for those that it lacks."""


def shortened(text: str, width: int, size: int) -> str:
    """Return a text that is at most so many pixels wide, with dots for its middle: a name's end says most."""
    letters = font(size)
    if letters.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # how many characters may stay
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if letters.getlength(_without_middle(text, middle)) <= width else (low, middle - 1)
    return _without_middle(text, low)


def _without_middle(text: str, length: int) -> str:
    end = length * 2 // 3
    return f"{text[: length - end]}...{text[len(text) - end :]}"


def drawable(text: str) -> str:
    """Return a text with a question mark for each character that the font lacks or that is no letter at all."""
    return "".join(letter if letter.isprintable() and _has_glyph(letter) else "?" for letter in text)


@functools.lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    if letter.isascii():
        return True
    return _outline(letter) != _outline("\U0010ffff")  # which no font has: what it draws stands for all it lacks


def _outline(letter: str) -> tuple[tuple[int, int], bytes]:
    try:
        mask = font(GLYPHS).getmask(letter)
    except (UnicodeError, OSError):
        return (0, 0), b""
    return mask.size, bytes(mask)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return matplotlib's font, which has accents, Greek and Cyrillic, or else Pillow's own, which has ASCII."""
    found = find_spec("matplotlib")  # which is not imported: that takes longer than the sheet
    if found is not None and found.origin is not None:
        try:
            return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
        except OSError:
            pass
    return ImageFont.load_default(size)
