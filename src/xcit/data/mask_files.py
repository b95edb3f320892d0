"""Semantic masks as files: what their values or colours mean, and a file read as the class of each pixel.

``classes.txt`` has a class a line, by its name alone, or with its colour as ``name r g b`` or ``name #rrggbb``. Empty
lines do not count. A line called ``ignore`` or ``void`` is no class: what it stands for is ignored.

=================================  ====================================================================================
mask                               read as
=================================  ====================================================================================
grey, 1 to 8 bits                  value n is line n of the list, from 0; 255 is ignored
grey, 16 bits                      likewise; 65535 is ignored
palette                            likewise where the list has no colours; else by the palette's colours, which must be
                                   listed, but for that of value 255, which is ignored if it is not
RGB, or RGBA without transparency  by colours, which must be listed; where the list has none, as grey if all pixels are
grey, and all colours are greys    by colours: 0 and 255 are two classes if the list says "0 0 0" and "255 255 255"
=================================  ====================================================================================

The file must be a PNG or a TIFF: what is compressed with losses (JPEG) has other values at every edge. Several pages,
floating-point numbers and an alpha channel with transparency are refused too, since they have no one reading; that of a
palette does not matter.
"""

from __future__ import annotations

import colorsys
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from xcit.data.images import decode
from xcit.data.parts import canonical, listing, plural, read_text
from xcit.errors import DataError

IGNORE = -1
"""Stands in a mask where a pixel is of no class: nothing is learnt there, nothing judged."""
IGNORE_WORDS = ("ignore", "void")
"""Names of lines that are no class."""
LOSSLESS = ("PNG", "TIFF")
"""Formats that masks may have."""
LOSSY = ("JPEG", "JPEG2000", "WEBP", "AVIF")
"""Formats that are refused since they change values, or may have done so."""

_UNKNOWN = -2
_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # of a PNG, positions in the file
_BITS_PER_SAMPLE = 258  # of a TIFF, the tag


class MaskError(DataError):
    """A mask that cannot be used; ``kind`` says why, as ``mask_check.TITLES`` has it."""

    kind = "mask-unreadable"


def mask_error(kind: str, text: str) -> MaskError:
    """Return the error of a kind."""
    # Its class takes a text alone: so it survives the way out of a loader's process.
    error = MaskError(text)
    error.kind = kind
    return error


@dataclass(frozen=True, eq=False)
class MaskCoding:
    """What the values or colours of a set's masks mean.

    Attributes:
        described: the list and its values, as messages call them: "classes.txt has the values 0 to 10".
        classes: (n,) int32, the class of each value from 0; ``IGNORE`` for one that is ignored.
        colours: (n, 3) uint8, of each value; None where values alone count.
    """

    described: str
    classes: np.ndarray
    colours: np.ndarray | None = None

    @property
    def grey(self) -> bool:
        """Whether there are colours, and all are greys."""
        return self.colours is not None and bool((self.colours == self.colours[:, :1]).all())


class ClassList(NamedTuple):
    """A list of classes, and what it says about masks."""

    names: tuple[str, ...]
    palette: np.ndarray
    """(K, 3) uint8: the colours that are listed, or some that differ."""
    coding: MaskCoding


# --- the list of classes ----------------------------------------------------------------------------------------------


def read_classes(path: str | Path) -> ClassList:
    """Read ``classes.txt``.

    Raises:
        DataError: no such file, no UTF-8, fewer than two classes, a name or a colour twice, colours in some lines only,
            or a colour that is none; the message names the line.
    """
    path = Path(path)
    lines = [(number, line.split()) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    entries = [(number, *_entry(words, f"{path}, line {number}")) for number, words in lines]
    coloured = [number for number, _, colour in entries if colour is not None]
    if coloured and len(coloured) < len(entries):
        bare = next(number for number, _, colour in entries if colour is None)
        raise DataError(
            f"{path}: line {coloured[0]} has a colour, line {bare} has none; give all of them colours, or none."
        )
    seen: dict[str | tuple[int, ...], int] = {}
    for number, name, colour in entries:
        for what, key in (("name", name), ("colour", colour)):
            if key is not None and key in seen:
                shown = repr(key) if isinstance(key, str) else "{} {} {}".format(*key)
                raise DataError(f"{path}: lines {seen[key]} and {number} have the same {what}, {shown}; make them two.")
            if key is not None:
                seen[key] = number
    is_class = [name.lower() not in IGNORE_WORDS for _, name, _ in entries]
    num_classes = sum(is_class)
    if num_classes < 2:
        raise DataError(
            f"{path}: names {plural(num_classes, 'class')}; at least two are needed, a line each (what surrounds the "
            f"things is one too, such as background)."
        )
    classes = np.where(is_class, np.cumsum(is_class) - 1, IGNORE).astype(np.int32)
    colours = np.array([colour for _, _, colour in entries], dtype=np.uint8) if coloured else None
    return ClassList(
        tuple(name for (_, name, _), kept in zip(entries, is_class, strict=True) if kept),
        distinct_colours(num_classes) if colours is None else colours[np.array(is_class)],
        MaskCoding(f"{path} has {'colours for ' if coloured else ''}the values 0 to {len(entries) - 1}", classes,
                   colours),
    )  # fmt: skip


def _entry(words: list[str], where: str) -> tuple[str, tuple[int, ...] | None]:
    """Return the name and the colour of a line."""
    colour: tuple[int, ...] | None = None
    if re.fullmatch("#[0-9a-fA-F]{6}", words[-1]):
        colour = tuple(bytes.fromhex(words[-1][1:]))
        words = words[:-1]
    elif len(words) > 3 and all(re.fullmatch(r"\d+", word, re.ASCII) for word in words[-3:]):
        colour = tuple(map(int, words[-3:]))
        words = words[:-3]
        if max(colour) > 255:
            raise DataError(f"{where}: the colour {' '.join(map(str, colour))} has a part above 255.")
    elif words[-1].startswith("#"):
        raise DataError(f"{where}: {words[-1]!r} is no colour; one is # and six digits 0 to f, such as #1e90ff.")
    if not words:
        raise DataError(f"{where}: has a colour without a name; write the name first.")
    return canonical(" ".join(words)), colour


def distinct_colours(num: int) -> np.ndarray:
    """Return (num, 3) uint8, colours that differ most between neighbours; the first is black, as for a background."""
    colours = [(0.0, 0.0, 0.0)]
    for i in range(num - 1):
        # the golden section never comes near to where it was; saturation and brightness tell later rounds apart
        hue = (i * 0.6180339887) % 1
        colours.append(colorsys.hsv_to_rgb(hue, (0.85, 0.5, 0.7)[i % 3], (0.95, 0.9, 0.65, 0.8)[i // 3 % 4]))
    return np.rint(255 * np.array(colours[:num])).astype(np.uint8)


# --- one mask ---------------------------------------------------------------------------------------------------------


class _Raw(NamedTuple):
    """A mask as its file has it: values, or colours."""

    values: np.ndarray | None
    """(H, W) uint8, or uint16."""
    colours: np.ndarray | None = None
    """(H, W, 3) uint8."""
    palette: np.ndarray | None = None
    """(n, 3) uint8, of the values."""
    white: int = 255
    """The largest value that the file could have: 1, 3, 15, 255 or 65535."""


def read_mask(path: str | Path, coding: MaskCoding) -> np.ndarray:
    """Return the class of each pixel of a file, (H, W) int32: 0 to K - 1, or ``IGNORE``.

    Raises:
        MaskError: a DataError: the file is missing, damaged, of a kind that has no one reading, or has a value or a
            colour that the list does not have; the message names the file.
    """
    path = Path(path)
    raw = _open(path)
    if raw.colours is not None:
        if coding.colours is not None:
            return _by_colour(raw.colours, coding, path)
        first, *rest = np.moveaxis(raw.colours, 2, 0)
        if not all(np.array_equal(first, channel) for channel in rest):
            raise mask_error(
                "mask-kind",
                f"{path}: is coloured, but the list of classes has no colours; write each class as 'name r g b'.",
            )
        raw = _Raw(first)
    assert raw.values is not None
    if coding.colours is None:
        return _by_value(raw, coding, path)
    if raw.palette is not None:
        return _by_table(raw.values, _colour_classes(raw.palette, coding), raw.palette, coding, path)
    if coding.grey and raw.white <= 255:
        greys = np.repeat(np.arange(raw.white + 1)[:, None] * (255 // raw.white), 3, axis=1).astype(np.uint8)
        return _by_table(raw.values, _colour_classes(greys, coding), greys, coding, path)
    return _by_value(raw, coding, path)


def _open(path: Path) -> _Raw:
    try:
        with path.open("rb") as file:
            head = file.read(_COLOUR_TYPE + 1)
            file.seek(0)
            image = decode(file, path)
    except FileNotFoundError:
        raise mask_error("mask-unreadable", f"{path}: there is no such mask.") from None
    except OSError as error:
        raise mask_error("mask-unreadable", f"{path}: the mask cannot be read: {error.strerror or error}.") from None
    except DataError as error:
        raise mask_error("mask-unreadable", f"The mask {error}") from None
    form = image.format or ""
    pages, bits = getattr(image, "n_frames", 1) if form == "PNG" else 1, 8
    if form == "PNG":
        bits = head[_BIT_DEPTH]
    elif form == "TIFF":
        with Image.open(path) as lazy:
            pages = getattr(lazy, "n_frames", 1)
            bits = max(getattr(lazy, "tag_v2", {}).get(_BITS_PER_SAMPLE, (1,)))
            if lazy.info.get("compression") in ("jpeg", "webp"):
                form = "JPEG"  # in a TIFF's clothes
    if form in LOSSY:
        raise mask_error(
            "mask-lossy",
            f"{path}: is a {form}, whose compression changes values, at edges above all; save the masks as PNG where "
            f"they were made.",
        )
    if form not in LOSSLESS:
        raise mask_error("mask-kind", f"{path}: is a {form}; masks must be PNG or TIFF, so save it as PNG.")
    if pages > 1:
        raise mask_error("mask-kind", f"{path}: has {pages} pages; a mask has one.")
    if not image.width or not image.height:
        raise mask_error("mask-kind", f"{path}: has no pixels.")
    return _raw(ImageOps.exif_transpose(image), form, bits, path)


def _raw(image: Image.Image, form: str, bits: int, path: Path) -> _Raw:
    """Take an opened mask's values or colours."""
    mode = image.mode
    if mode in ("LA", "RGBA"):
        alpha = np.asarray(image.getchannel("A"))
        if (alpha != 255).any():
            raise mask_error(
                "mask-kind",
                f"{path}: has {plural(int((alpha != 255).sum()), 'transparent pixel')}; a mask must be opaque, so "
                f"paint them in the colour of a class or of 'ignore'.",
            )
        image = image.convert(mode[:-1])
        mode = image.mode
    if mode == "1":
        return _Raw(np.asarray(image).astype(np.uint8), white=1)
    if mode == "P":
        palette = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
        return _Raw(np.asarray(image), palette=palette)
    if mode == "L" and (bits == 8 or (form == "PNG" and bits in (2, 4))):
        white = 2**bits - 1
        return _Raw(np.asarray(image) // np.uint8(255 // white), white=white)  # Pillow has spread them over 0 to 255
    if bits == 16 and (mode.startswith("I;16") or (mode == "I" and form == "PNG")):
        return _Raw(np.asarray(image).astype(np.uint16), white=65535)
    if mode == "RGB" and bits == 8:
        return _Raw(None, colours=np.asarray(image))
    kind = "floating-point values" if mode == "F" else f"{bits} bits in the mode {mode}"
    raise mask_error(
        "mask-kind", f"{path}: has {kind}; a mask is grey (8 or 16 bits), has a palette, or has 8-bit colours."
    )


def _by_value(raw: _Raw, coding: MaskCoding, path: Path) -> np.ndarray:
    """Value n is the n-th class."""
    assert raw.values is not None
    table = np.full(65536 if raw.white > 255 else 256, _UNKNOWN, dtype=np.int32)
    num = min(len(coding.classes), len(table))
    table[:num] = coding.classes[:num]
    table[-1] = IGNORE  # whatever the list says: a 256th class needs 16 bits
    return _by_table(raw.values, table, None, coding, path)


def _by_table(
    values: np.ndarray, table: np.ndarray, colours: np.ndarray | None, coding: MaskCoding, path: Path
) -> np.ndarray:
    """Look each value up, in a table that need not reach to the largest.

    Args:
        values: (H, W).
        table: (n,) int32, the class of each value.
        colours: (n, 3), what it is looked up by, for the message; None for values.
        coding: likewise.
        path: likewise.
    """
    if len(table) < 256:
        table = np.concatenate([table, np.full(256 - len(table), _UNKNOWN, dtype=np.int32)])
    if colours is not None and table[255] == _UNKNOWN:
        table[255] = IGNORE
    classes = table[values]
    bad = classes == _UNKNOWN
    if bad.any():
        unknown = np.unique(values[bad])
        if colours is None:
            raise mask_error(
                "mask-values",
                f"{path}: has {_values('value', [str(v) for v in unknown])} in {plural(int(bad.sum()), 'pixel')}, but "
                f"{coding.described} (and {len(table) - 1}, which is ignored).",
            )
        raise _unlisted([tuple(colours[v]) if v < len(colours) else () for v in unknown], int(bad.sum()), coding, path)
    return classes


def _by_colour(pixels: np.ndarray, coding: MaskCoding, path: Path) -> np.ndarray:
    classes = _colour_classes(pixels, coding)
    bad = classes == _UNKNOWN
    if bad.any():
        unknown = np.unique(pixels[bad], axis=0)
        raise _unlisted([tuple(colour) for colour in unknown], int(bad.sum()), coding, path)
    return classes


def _colour_classes(colours: np.ndarray, coding: MaskCoding) -> np.ndarray:
    """Return the class of each colour, (...,) int32 for (..., 3) uint8."""
    assert coding.colours is not None
    listed = _numbered(coding.colours)
    order = np.argsort(listed)
    wanted = _numbered(colours)
    at = order[np.searchsorted(listed, wanted, sorter=order).clip(max=len(listed) - 1)]
    return np.where(listed[at] == wanted, coding.classes[at], np.int32(_UNKNOWN))


def _numbered(colours: np.ndarray) -> np.ndarray:
    wide = colours.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _unlisted(colours: list[tuple[int, ...]], num_pixels: int, coding: MaskCoding, path: Path) -> MaskError:
    shown = [" ".join(map(str, colour)) or "outside its palette" for colour in colours]
    return mask_error(
        "mask-values",
        f"{path}: has {_values('colour', shown)} in {plural(num_pixels, 'pixel')}, but {coding.described}, without "
        f"{'it' if len(colours) == 1 else 'them'}; list it there as a class or as 'ignore'.",
    )


def _values(what: str, shown: list[str]) -> str:
    if len(shown) == 1:
        return f"the {what} {shown[0]}"
    return f"the {what}s {listing(shown)}".replace("'", "")
