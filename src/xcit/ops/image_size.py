"""The size that an image is brought to."""

from __future__ import annotations


def scaled_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the height and width of an image whose shorter side becomes ``min_size``, the longer at most ``max_size``.

    The proportions are kept, sides rounded half up to at least one pixel.

    Source: mmcv's ``rescale_size``.
    """
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
