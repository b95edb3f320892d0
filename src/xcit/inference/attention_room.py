"""Whether an image that is looked at whole fits into memory, and at what size it would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from xcit.errors import DataError
from xcit.inference.room import Lack, Room
from xcit.inference.whole_image import Size, WholeImage
from xcit.models.xcit import XCiT

DRAWING = {"overlay": 70, "mask": 12, "heads": 12, "pca": 12}
"""Bytes a pixel that drawing takes, the shown image included: 66.6, 7.7, 10.6 and 10 were measured."""
COPIES_OF_FEATURES = 5
"""Of the patch features, in float64, that live at once while their directions are found."""


@dataclass
class ViewerRoom:
    """Compares what looking at an image takes with the memory there is.

    Args:
        model: who looks.
        kinds: of pictures and numbers that are made.
    """

    model: XCiT
    kinds: Sequence[str]

    def __post_init__(self) -> None:
        self._rooms = [(Room(self.model), function) for function in self._functions()]

    def check(self, whole: WholeImage, height: int, width: int, num_images: int = 1) -> None:
        """Refuse images that would not fit.

        Args:
            whole: how they are prepared.
            height: of each, in pixels.
            width: of each.
            num_images: at once.

        Raises:
            DataError: with how much they would take, how much there is, and the largest size that would fit.
        """
        lack = self._lack(whole, height, width, num_images)
        if lack is None:
            return
        seen = whole.seen_size(height, width)
        takes = f"would take {lack}, to be looked at with {seen[0]} x {seen[1]} px"
        scale = math.sqrt(lack.available / lack.needed)
        patch = whole.patch_size
        # Linear in the pixels but for rounding to patches and the limit on what is drawn: a few steps at most.
        sides = [max(patch, math.floor(side * scale) // patch * patch) for side in seen]
        while self._lack(smaller := replace(whole, size=_size(whole.size, sides)), height, width, 1):
            if max(smaller.seen_size(height, width)) <= patch or min(sides) <= patch:
                raise DataError(f"{takes}; not even the smallest size fits. Use a smaller model or another device.")
            sides = [max(patch, math.floor(side * 0.98) // patch * patch) for side in sides]
        fits = smaller.size
        shown = fits if isinstance(fits, int) else "x".join(map(str, sides))
        raise DataError(f"{takes}; the largest size that fits is about --size {shown}.")

    def _lack(self, whole: WholeImage, height: int, width: int, num_images: int) -> Lack | None:
        seen, shown = whole.seen_size(height, width), whole.shown_size(height, width)
        drawing = max((DRAWING.get(kind, 0) for kind in self.kinds), default=0) * shown[0] * shown[1]
        features = 0
        if "pca" in self.kinds:
            num_patches = num_images * seen[0] * seen[1] // whole.patch_size**2
            features = 8 * num_patches * self.model.embed_dim
        on_host = max(drawing + features, COPIES_OF_FEATURES * features)
        chans = whole.preprocessing.in_chans
        lacks = (room.lack(function, num_images, chans, seen, on_host=on_host) for room, function in self._rooms)
        return next((lack for lack in lacks if lack is not None), None)

    def _functions(self) -> list[Callable[[Tensor], object]]:
        found: list[Callable[[Tensor], object]] = []
        if {"overlay", "mask", "heads", "raw"} & set(self.kinds):
            found.append(self.model.class_attention)
        if "pca" in self.kinds:
            found.append(self.model.forward_features)
        if "xca" in self.kinds:
            found.append(self.model.channel_attention)
        return found


def _size(former: Size, sides: Sequence[int]) -> Size:
    """Return a size by which an image is seen with these sides: in the way in which the former one was given."""
    return (sides[0], sides[1]) if isinstance(former, tuple) else min(sides)
