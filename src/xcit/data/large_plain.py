"""Large images in the everyday formats (PNG, JPEG, WebP, ...): decoded whole at the first window, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from xcit.data.images import EXTENSIONS_OF_FORMAT
from xcit.data.large_base import LargeImage, Stored, value_scale
from xcit.data.large_colour import Colour
from xcit.errors import DataError

_ORIENTATION = 0x0112  # the EXIF tag
_PIXELS_AT_ONCE = 1 << 24
"""A crop beyond Pillow's limit against decompression bombs is refused by Pillow."""
_DTYPES = {"1": "?", "L": "u1", "I;16": "u2", "I;16B": "u2", "I;16L": "u2", "I;16N": "u2", "I": "i4", "F": "f4"}
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # a pixel in Pillow's memory, else 4

_WORKING = {"AVIF": 8, "QOI": 4, "SGI": 3, "WEBP": 12}
"""Bytes a pixel that decoding takes besides the decoded image, measured; JPEG 2000 takes 5 for each band, a progressive
JPEG 2, and the other formats next to none."""


class PlainImage(LargeImage):
    """A picture that Pillow decodes whole.

    Pillow's limit of pixels does not hold here: ``bytes_in_memory`` says what decoding will take before the first
    window is read, and nothing is decoded before.
    """

    format = "plain"

    def __init__(self, path: Path, image: Any, file: BinaryIO, *, bands: Sequence[int] | None) -> None:
        self._image, self._file = image, file
        self._broken: Exception | None = None
        try:
            mode = image.mode
            grey = mode in _DTYPES and not image.has_transparency_data
            if mode in ("I", "I;16", "I;16B", "I;16L", "I;16N") and image.has_transparency_data:
                grey = True  # one value of 16-bit grey is see-through; _window paints it white
            dtype = np.dtype(_DTYPES[mode] if grey else "u1")
            scale = 65535.0 if mode == "I" else value_scale(dtype)  # as for a PNG of 16 bits
            self._mode = None if grey else "RGBA" if image.has_transparency_data else "RGB"
            if mode in ("LA", "La"):
                self._mode = "LA"
            channels = 1 if self._mode is None else len(self._mode)
            stored = Stored(
                size=(image.height, image.width),
                dtype=dtype,
                colour=Colour(channels, alpha=channels - 1 if channels in (2, 4) else None, white=scale),
                block=(image.height, image.width),
                bytes_in_memory=(_BYTES.get(mode, 4) + _working(image)) * image.width * image.height,
                is_windowed=False,
                levels=((image.height, image.width),),
                orientation=_orientation(image, file),
                scale=scale,
            )
            super().__init__(path, stored, bands=bands)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file and of the decoded image."""
        self._image.close()
        self._file.close()

    def _window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        self._load()
        out = np.empty((height, width, len(samples)), dtype=self.dtype)
        step = max(1, _PIXELS_AT_ONCE // width)
        for row in range(0, height, step):
            rows = min(step, height - row)
            out[row : row + rows] = self._piece((left, top + row, left + width, top + row + rows))[..., list(samples)]
        return out

    def _load(self) -> None:
        """Decode the image, once; what failed fails again, as Pillow would give half an image the second time."""
        if self._broken is not None:
            raise self._broken
        try:
            self._image.load()
        except Exception as error:
            self._broken = error
            raise

    def _piece(self, box: tuple[int, int, int, int]) -> np.ndarray:
        piece = self._image.crop(box)
        if self._mode is not None and piece.mode != self._mode:
            piece = piece.convert(self._mode)
        values = np.asarray(piece)
        transparent = self._image.info.get("transparency")
        if self._mode is None and isinstance(transparent, int):
            values = np.where(values == transparent, values.dtype.type(self.scale), values)
        return values if values.ndim == 3 else values[..., None]


def _working(image: Any) -> int:
    bands = len(image.getbands())
    if image.format == "JPEG2000":
        return 5 * bands
    return 2 * bands if image.info.get("progressive") else _WORKING.get(image.format, 0)


def _orientation(image: Any, file: BinaryIO) -> int:
    """Return EXIF's number. Of a PNG Pillow would decode the pixels first, as the chunk may come after them."""
    exif = image.getexif() if image.format != "PNG" else Image.Image.getexif(image)
    if image.format == "PNG" and _ORIENTATION not in exif:
        at = file.tell()
        file.seek(8)  # behind the signature
        while len(head := file.read(8)) == 8:
            length, name = int.from_bytes(head[:4], "big"), head[4:]
            if name == b"eXIf":
                exif = Image.Exif()
                exif.load(file.read(length))
                break
            file.seek(length + 4, 1)  # the checksum too
        file.seek(at)
    number = exif.get(_ORIENTATION, 1)
    return number if isinstance(number, int) else 1


def identified(path: Path) -> tuple[Any, BinaryIO] | None:
    """Return Pillow's image of a file, not decoded yet, and the open file; None if it is of none of its formats.

    Not ``Image.open``: that refuses what is large, and its limit is one for the whole process.

    Raises:
        DataError: the file begins as one of the formats, and is damaged.
    """
    Image.init()
    file = path.open("rb")
    begin = file.read(16)
    for name in EXTENSIONS_OF_FORMAT:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(begin)
        if not accepted or isinstance(accepted, str):  # a text says that this Pillow was built without the format
            continue
        file.seek(0)
        try:
            return factory(file, str(path)), file
        except Exception as error:  # whatever the damage provokes; SyntaxError means another format
            if accept is not None and not isinstance(error, SyntaxError):
                file.close()
                reason = str(error).rstrip(".") or type(error).__name__
                raise DataError(f"{path}: is damaged or incomplete ({reason}).") from None
    file.close()
    return None
