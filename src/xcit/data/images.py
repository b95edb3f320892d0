"""Image files as a model wants them: found, opened, upright, 8 bits a channel, grey or RGB.

What a file may hold and what becomes of it:

=================================  ====================================================================================
transparency (RGBA, LA, palette)   composited on white
CMYK, YCbCr, LAB, palette, 1 bit   converted as Pillow does; an embedded ICC profile is not applied
16-bit grey, ``I``                 0..65535 becomes 0..255, rounded
float grey                         0..1, 0..255 or 0..65535, whichever its largest value fits first, becomes 0..255
several frames or pages            the first
EXIF orientation                   applied
=================================  ====================================================================================

Everything else (values outside those ranges, damaged files) is refused with one sentence.
"""

from __future__ import annotations

import difflib
import functools
import glob
import itertools
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xcit.errors import ConfigError, DataError

EXTENSIONS_OF_FORMAT = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "ICO": (".ico",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k"),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Pillow's raster formats that are read, by content, never by name. EPS and WMF are left out on purpose: opening one
would run another program on it."""

EXTENSIONS = tuple(sorted(ext for exts in EXTENSIONS_OF_FORMAT.values() for ext in exts))
"""Endings by which a folder's images are found; a file that is named explicitly may have any."""

_ORIENTATION = 0x0112  # the EXIF tag
_MODES = {1: "L", 3: "RGB"}
_importing = threading.Lock()


# --- finding ----------------------------------------------------------------------------------------------------------


def find_images(sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files that files, folders and glob patterns stand for.

    A folder stands for the files below it, at any depth, that have one of ``EXTENSIONS`` (in any case), in natural
    order (``img2`` before ``img10``); hidden files and folders are passed over, links are followed. A pattern
    (``*``, ``?``, ``[...]``, ``**`` for any depth) stands for what it matches, as though each match had been named.
    A file that is named is taken whatever its ending is, and even when it does not exist: ``open_image`` then says so
    for that file alone.

    Args:
        sources: paths and patterns; a leading ``~`` is the home folder.

    Returns:
        Paths in the order of the sources, each file once, spelt as the source was.

    Raises:
        DataError: no sources, a folder without images, a folder that cannot be read, a pattern without a match.
    """
    found: dict[str, Path] = {}
    names = [os.path.expanduser(os.fspath(source)) for source in sources]  # noqa: PTH111 (keeps "./" and "*")
    if not names:
        raise DataError("No images were given; name files, folders or patterns such as 'photos/*.jpg'.")
    for name in names:
        for path in _expand(name):
            found.setdefault(os.path.abspath(path), path)  # noqa: PTH100 (links stay apart)
    return list(found.values())


def _expand(source: str) -> list[Path]:
    if not source:
        raise DataError("An image's name is empty; name a file, a folder or a pattern such as 'photos/*.jpg'.")
    path = Path(source)
    if glob.has_magic(source) and not os.path.lexists(source):
        matches = [Path(match) for match in glob.glob(source, recursive=True)]  # noqa: PTH207 (takes absolute ones)
        if not matches:
            raise DataError(f"The pattern {source!r} matches nothing{_where(source)}.")
        files = [m for m in matches if not m.is_dir()]
        # With ** the pattern itself descends; a folder that it matches on the way is not searched a second time.
        folders = [m for m in matches if m.is_dir()] if "**" not in source else []
        images = [*files, *(image for folder in folders for image in _images_below(folder))]
        if not images:
            raise DataError(f"The pattern {source!r} matches folders only, and no image is below them.")
        return sorted(images, key=_natural)
    if path.is_dir():
        images = sorted(_images_below(path), key=_natural)
        if not images:
            raise DataError(
                f"The folder {source!r} holds no image (hidden files aside): none of its files ends in "
                f"{', '.join(EXTENSIONS)}."
            )
        return images
    return [path]


def _images_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"The folder {error.filename!r} cannot be read: {error.strerror}.") from error

    images, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [
            Path(parent, name) for name in files if not name.startswith(".") and name.lower().endswith(EXTENSIONS)
        ]
    return images


def _natural(path: Path) -> list[tuple[tuple[int, int, str], ...]]:
    """Order by the path's parts, digits by their value; names that differ only in case or zeros stay in one order."""
    parts = [
        tuple((0, int(run), "") if run.isdecimal() else (1, 0, run) for run in re.findall(r"\d+|\D+", part.lower()))
        for part in path.parts
    ]
    return [*parts, ((1, 0, str(path)),)]


def _where(pattern: str) -> str:
    """Say how much of a pattern exists, for the message that it matches nothing."""
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    if not fixed.is_dir():
        return f": there is no folder {str(fixed)!r}"
    endings = sorted({p.suffix for p in fixed.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS})
    return f"; {str(fixed)!r} holds files that end in {', '.join(endings)}" if endings else ""


# --- opening ----------------------------------------------------------------------------------------------------------


def open_image(path: str | os.PathLike[str], in_chans: int = 3) -> Image.Image:
    """Return a file's image, decoded, upright and in mode "RGB" or "L".

    Args:
        path: a file of one of the formats of ``EXTENSIONS_OF_FORMAT``, recognised by its content.
        in_chans: 3 for RGB, 1 for grey.

    Returns:
        A Pillow image that no longer needs the file.

    Raises:
        DataError: the file is missing, empty, damaged, too large, not an image, or holds values that have no one
            reading; the message names the file.
        ConfigError: another number of channels.
    """
    check_channels(in_chans)
    path = Path(path)
    try:
        with path.open("rb") as file:
            image = decode(file, path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file{_nearest(path)}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not an image.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    try:
        return convert_image(image, in_chans)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def decode(file: Any, path: Path) -> Image.Image:
    """Return the picture in an open binary file, with all its pixels.

    Args:
        file: at its beginning.
        path: what it is called in messages.

    Raises:
        DataError: it is empty, of an unknown format, damaged, or too large.
    """
    begin = file.read(24)
    if not begin:
        raise DataError(f"{path}: is empty (0 bytes).")
    file.seek(0)
    try:
        with Image.open(file, formats=_known_formats()) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise DataError(f"{path}: is not an image in a format that can be read; it begins with {begin!r}.") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"{path}: claims more than {limit:,} pixels, which a small damaged or hostile file can do as well; if you "
            f"trust it, scale it down first, or raise PIL.Image.MAX_IMAGE_PIXELS in Python."
        ) from None
    except MemoryError:
        raise DataError(f"{path}: is too large to be decoded in the memory there is; scale it down first.") from None
    except Exception as error:  # decoders raise whatever the damage provokes: OSError, SyntaxError, struct.error, ...
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(f"{path}: is damaged or incomplete ({reason}).") from None


@functools.cache
def _known_formats() -> list[str]:
    """Return the formats that this Pillow has, after it has imported them all: not a thing for two threads at once."""
    with _importing:
        Image.init()
    return [name for name in EXTENSIONS_OF_FORMAT if name in Image.OPEN]


def _nearest(path: Path) -> str:
    """End the message about a missing file: with a neighbour of nearly the same name, where there is one."""
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f", nor a folder {str(path.parent)!r}."
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else "."


# --- converting -------------------------------------------------------------------------------------------------------


def check_channels(in_chans: int) -> None:
    """Refuse a number of channels that a photograph does not have.

    Raises:
        ConfigError: neither 1 nor 3.
    """
    if in_chans not in _MODES:
        raise ConfigError(
            f"The model takes {in_chans} channels; image files are read as RGB (3) or grey (1) only. Build the "
            f"tensor of such a model yourself and call the model with it."
        )


def convert_image(image: Image.Image, in_chans: int = 3) -> Image.Image:
    """Return an opened image upright and in mode "RGB" (``in_chans`` 3) or "L" (1); the module's text says how.

    One that is so already is returned itself.

    Raises:
        DataError: its mode or its values have no one reading as 8-bit colour.
        ConfigError: another number of channels.
    """
    check_channels(in_chans)
    if not image.width or not image.height:
        raise DataError(f"has no pixels ({image.width} x {image.height}).")
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    if upright and image.mode == _MODES[in_chans] and not image.has_transparency_data:
        image.load()
        return image  # as most are: the two steps below would each copy it
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    try:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert(_MODES[in_chans])
    except ValueError:
        raise DataError(f"its colours ({image.mode}) cannot be read as RGB; convert it to RGB first.") from None


def array_to_image(array: np.ndarray) -> Image.Image:
    """Return an array's pixels as a Pillow image.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with values 0..255 (uint8), 0..65535 (uint16), or 0..1
            (floating point).

    Raises:
        DataError: another shape or type, or floating-point values outside 0..1.
    """
    array = np.asarray(array)
    expected = "expected (H, W) or (H, W, 1, 3 or 4) of uint8, of uint16, or of floats from 0 to 1"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise DataError(f"The array's shape is {array.shape}; {expected}.")
    if array.dtype == np.uint16:
        array = _rounded(array.astype(np.float64) * (255 / 65535))
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError(f"The array's floats go from {array.min():g} to {array.max():g}; {expected}.")
        array = _rounded(array.astype(np.float64) * 255)
    elif array.dtype != np.uint8:
        raise DataError(f"The array is of {array.dtype}; {expected}.")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits: Pillow's own conversion would clip all but the darkest."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    # one comparison that NaN fails as well
    white = next((limit for limit in ranges if low >= 0 and high <= limit), None)
    if white is None:
        kind = "floating-point" if image.mode == "F" else "integer"
        raise DataError(
            f"its {kind} values go from {low:g} to {high:g}, and the file does not say which of them are black and "
            f"white; scale it to 8 or 16 bits first."
        )
    grey = _rounded(values * (255 / white))
    transparent = image.info.get("transparency")  # of a 16-bit grey PNG: the one value that is see-through
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.uint8)
