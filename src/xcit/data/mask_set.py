"""Images with a semantic mask each: pairs of files that have the same name but for the ending."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from xcit.data.images import find_images, open_image
from xcit.data.mask_files import IGNORE, MaskCoding, mask_error, read_mask
from xcit.data.parts import Texts, canonical
from xcit.errors import DataError

__all__ = ["IGNORE", "MaskSet", "Pairs", "find_pairs"]

_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True, eq=False)
class MaskSet:
    """Images with masks, decoded one by one when asked for. Light to copy, as worker processes do.

    Attributes:
        root: the folder that names are relative to.
        names: of the images, with "/" between their parts.
        mask_names: of their masks.
        class_names: K names; class i has the i-th.
        palette: (K, 3) uint8, red, green and blue of each class.
        coding: what the values of the masks mean.
        label_set: "ade20k" for its classes; None for others.
        notes: what a user should hear about the files, a sentence each.
    """

    root: str
    names: Sequence[str]
    mask_names: Sequence[str]
    class_names: tuple[str, ...]
    palette: np.ndarray
    coding: MaskCoding
    label_set: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return where an image's file lies."""
        return Path(self.root, self.names[index])

    def mask_path(self, index: int) -> Path:
        """Return where its mask lies."""
        return Path(self.root, self.mask_names[index])

    def subset(self, positions: Sequence[int] | np.ndarray) -> MaskSet:
        """Return the images at these positions, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            names=Texts(self.names[i] for i in chosen),
            mask_names=Texts(self.mask_names[i] for i in chosen),
        )

    def open(self, index: int) -> Image.Image:
        """Return an image, RGB and upright.

        Raises:
            DataError: it cannot be read; the message names the file.
        """
        return open_image(self.path(index))

    def open_mask(self, index: int) -> np.ndarray:
        """Return the class of each pixel, (H, W) int32: 0 to K - 1, or ``IGNORE``.

        Raises:
            DataError: the mask cannot be read, has an unknown value or colour, or is of another size than its image;
                the message names the file.
        """
        return self._fitted(read_mask(self.mask_path(index), self.coding), index, _upright_size(self.path(index)))

    def open_pair(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image and its mask, as ``open`` and ``open_mask`` do.

        Raises:
            DataError: either cannot be read, or they do not belong together; the message names the file.
        """
        image = self.open(index)
        return image, self._fitted(read_mask(self.mask_path(index), self.coding), index, image.size)

    def _fitted(self, mask: np.ndarray, index: int, size: tuple[int, int]) -> np.ndarray:
        """Return the mask of an image of this width and height.

        Camera images may be stored lying and be turned by their EXIF entry. A mask that was drawn on one as it is
        stored, as its size tells, is turned likewise.
        """
        if mask.shape == size[::-1]:
            return mask
        if mask.shape == size:
            turned = _turned(mask, _head(self.path(index))[1])
            if turned is not None:
                return turned
        raise mask_error(
            "mask-size",
            f"{self.mask_path(index)}: is {mask.shape[1]} x {mask.shape[0]} px, but its image {self.names[index]} is "
            f"{size[0]} x {size[1]} px; they belong to different versions.",
        )


def _head(path: Path) -> tuple[tuple[int, int], int]:
    """Return an image's width and height and its EXIF orientation, without decoding it."""
    with Image.open(path) as image:
        return image.size, image.getexif().get(_ORIENTATION, 1)


def _upright_size(path: Path) -> tuple[int, int]:
    try:
        size, orientation = _head(path)
    except Exception:  # whatever a damaged file provokes: the sentence on it is open_image's
        return open_image(path).size
    # Pillow gives the size of a lying image as stored, but of a TIFF as it will be.
    return open_image(path).size if orientation in (5, 6, 7, 8) else size


def _turned(mask: np.ndarray, orientation: int) -> np.ndarray | None:
    """Turn a mask of an image as stored upright, of the orientations that swap width and height; None for others."""
    if orientation == 5:
        return np.ascontiguousarray(mask.T)
    if orientation == 6:
        return np.ascontiguousarray(np.rot90(mask, -1))
    if orientation == 7:
        return np.ascontiguousarray(np.rot90(mask, 2).T)
    if orientation == 8:
        return np.ascontiguousarray(np.rot90(mask, 1))
    return None


# --- pairs ------------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """The files of two folders that belong together, by their paths relative to a third."""

    images: list[str]
    """In natural order."""
    masks: list[str]
    """One an image."""
    images_alone: list[str]
    masks_alone: list[str]
    ambiguous: list[str]
    """Sentences: several files of one folder whose names differ in their ending only. They are in none of the pairs."""


def find_pairs(images: Path, masks: Path, root: Path) -> Pairs:
    """Pair the images of a folder with the masks of another, by their paths without the ending.

    Args:
        images: the folder with the images, at any depth.
        masks: the folder with the masks.
        root: the folder above both that paths are given relative to.

    Raises:
        DataError: one of them cannot be read or holds no image at all.
    """
    ours = _by_stem(images, root)
    theirs = _by_stem(masks, root)
    ambiguous = [
        f"{folder}: {', '.join(paths)} differ in their ending alone; keep one, since pairs are found by the rest."
        for folder, found in ((images, ours), (masks, theirs))
        for paths in found.values()
        if len(paths) > 1
    ]
    both = [stem for stem in ours if stem in theirs and len(ours[stem]) == len(theirs[stem]) == 1]
    return Pairs(
        [ours[stem][0] for stem in both],
        [theirs[stem][0] for stem in both],
        [path for stem, paths in ours.items() if stem not in theirs for path in paths],
        [path for stem, paths in theirs.items() if stem not in ours for path in paths],
        ambiguous,
    )


def _by_stem(folder: Path, root: Path) -> dict[str, list[str]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder.")
    found = defaultdict(list)
    for path in find_images([folder]):
        stem = canonical(os.path.splitext(path.relative_to(folder).as_posix())[0])  # noqa: PTH122 (keeps the folders)
        found[stem].append(path.relative_to(root).as_posix())
    return dict(found)
