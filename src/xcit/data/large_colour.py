"""From the samples that a file stores to the bands that a model looks at, window by window.

The conventions are those of ``images``: transparency is composited on white, palettes and CMYK become RGB, where the
least value is white the values are turned round. Nothing is scaled: a window keeps the file's own type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from xcit.errors import DataError

_PIXELS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Colour:
    """What a file's samples mean.

    Attributes:
        num_stored: samples a pixel in the file.
        kind: what they are: "plain" bands, an index into a "palette", "cmyk" or "ycbcr" of 8 bits.
        palette: (n, 3) uint8, RGB of each index.
        alpha: which of the bands is the transparency (0-based, after a palette or CMYK became RGB); None for none.
        premultiplied: the colours have been multiplied by the transparency already.
        inverted: the least value is white.
        white: the value of white (and of what is opaque).
    """

    num_stored: int
    kind: Literal["plain", "palette", "cmyk", "ycbcr"] = "plain"
    palette: np.ndarray | None = None
    alpha: int | None = None
    premultiplied: bool = False
    inverted: bool = False
    white: float = 1.0

    @property
    def num_bands(self) -> int:
        """Bands after a palette or CMYK became RGB, the transparency among them."""
        return {"plain": 0, "palette": 2, "cmyk": -1, "ycbcr": 0}[self.kind] + self.num_stored

    @property
    def dtype(self) -> np.dtype | None:
        """The type that the bands have, where it is not that of the samples."""
        return np.dtype(np.uint8) if self.kind == "palette" else None

    def bands(self, samples: np.ndarray, name: str) -> np.ndarray:
        """Return all bands of a window.

        Args:
            samples: (H, W, ``num_stored``).
            name: of the file, for messages.

        Returns:
            (H, W, ``num_bands``).

        Raises:
            DataError: an index that the palette does not have.
        """
        if self.kind == "palette":
            assert self.palette is not None
            index = samples[..., 0]
            if index.size and index.max() >= len(self.palette):
                raise DataError(
                    f"{name}: has the value {index.max()}, but its palette ends at {len(self.palette) - 1}."
                )
            return _joined(self.palette[index], samples[..., 1:])
        if self.kind in ("cmyk", "ycbcr"):
            first = 4 if self.kind == "cmyk" else 3
            mode = "CMYK" if self.kind == "cmyk" else "YCbCr"
            flat = np.ascontiguousarray(samples[..., :first])
            image = Image.frombuffer(mode, (flat.shape[1], flat.shape[0]), flat, "raw", mode, 0, 1)
            return _joined(np.asarray(image.convert("RGB")), samples[..., first:])
        return self.turned(samples)

    def turned(self, samples: np.ndarray) -> np.ndarray:
        """Return plain samples with white as their largest value."""
        if not self.inverted:
            return samples
        return ~samples if samples.dtype == bool else samples.dtype.type(self.white) - samples

    def on_white(self, bands: np.ndarray) -> np.ndarray:
        """Return the bands without their transparency, composited on white.

        Args:
            bands: (H, W, ``num_bands``).

        Returns:
            (H, W, ``num_bands`` - 1) of the same type; integers are rounded.
        """
        assert self.alpha is not None
        height, width, count = bands.shape
        out = np.empty((height, width, count - 1), dtype=bands.dtype)
        step = max(1, _PIXELS_AT_ONCE // width)  # the products need wider numbers, for few rows at once
        for top in range(0, height, step):
            part = bands[top : top + step]
            alpha = part[..., self.alpha : self.alpha + 1]
            out[top : top + step] = self._composited(np.delete(part, self.alpha, axis=-1), alpha)
        return out

    def _composited(self, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        if colours.dtype.kind == "f":
            white = colours.dtype.type(self.white)
            return colours + (white - alpha) if self.premultiplied else colours * alpha / white + (white - alpha)
        full = int(self.white)
        wide = alpha.astype(np.uint32 if full < 65535 else np.uint64)
        if self.premultiplied:
            return np.minimum(colours + (full - wide), full)
        return (colours * wide + full * (full - wide) + full // 2) // full


def _joined(colours: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return np.concatenate([colours, rest.astype(colours.dtype, copy=False)], axis=-1) if rest.shape[-1] else colours
