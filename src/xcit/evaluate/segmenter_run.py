"""A segmenter's way through a whole set: images in, figures out, what cannot be used listed instead of fatal."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from xcit.data.mask_set import IGNORE, MaskSet
from xcit.data.parts import canonical, listing, plural
from xcit.errors import ConfigError, DataError
from xcit.evaluate.run import Skipped
from xcit.evaluate.segmentation import SegmentationFigures, confusion, segmentation_figures
from xcit.inference.segmenter import Segmenter
from xcit.inference.stream import Source, ahead

AHEAD = 2
"""Images that are read, with their masks, beyond those that the segmenter has taken."""

_log = logging.getLogger("xcit")


@dataclass(frozen=True, eq=False)
class SegmentationEvaluation:
    """What a set says about a segmenter.

    Attributes:
        figures: of all pixels of the images that could be used, in the order of ``class_names``.
        bad: the images that could not, each with a sentence on itself or its mask, in the set's order.
        class_names: the segmenter's; the data's where the segmenter names none.
        num_images: that were judged.
    """

    figures: SegmentationFigures
    bad: tuple[Skipped, ...]
    class_names: tuple[str, ...]
    num_images: int


def evaluate_segmenter(
    segmenter: Segmenter,
    images: MaskSet,
    *,
    max_bad_fraction: float = 1.0,
    on_image: Callable[[], None] | None = None,
) -> SegmentationEvaluation:
    """Judge a segmenter by all images of a set, each at its own size.

    Images go through the segmenter as it was made: whole or by windows, of one or several scales, mirrored too or not.
    A few images at a time are held, however many there are. The data's classes are found among the segmenter's by name,
    so that their order may be another and some may be missing; if the segmenter names none, they must be as many, and
    are taken in order.

    Args:
        segmenter: who is judged.
        images: by which.
        max_bad_fraction: share of the images that may be of no use, 0 to 1: broken, or with a mask that is.
        on_image: called after each image, of use or not.

    Raises:
        ConfigError: an empty set, a share out of its range, or what does not fit in memory; the message then says what
            does.
        DataError: classes that the segmenter lacks, more images of no use than may be, none of use, or none with a
            pixel that counts.

    Example:
        >>> evaluation = evaluate_segmenter(Segmenter("model.safetensors", flip=True), open_mask_parts("mine").val)
        >>> evaluation.figures.miou
    """
    if not len(images):
        raise ConfigError("There are no images to judge the segmenter by.")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; it must be from 0 to 1.")
    class_names, position = _classes(segmenter, images)
    bad: dict[int, str] = {}
    waiting: deque[tuple[int, np.ndarray]] = deque()  # the masks of images that the segmenter has taken

    def leave_out(index: int, reason: str) -> None:
        bad[index] = reason
        if max_bad_fraction * len(images) < len(bad) < len(images):  # all of them have a sentence of their own
            raise DataError(
                f"{len(bad):,} of {plural(len(images), 'image')} cannot be used so far, more than the share of "
                f"{max_bad_fraction:g} that max_bad_fraction (--max-bad-fraction) allows. The first: "
                f"{bad[min(bad)]} Mend or remove them, or allow more."
            )
        if on_image is not None:
            on_image()

    def readable() -> Iterator[Image.Image]:
        numbered: Iterator[tuple[int, Source]] = ((i, images.path(i)) for i in range(len(images)))
        read: Any = partial(_read, images)
        pairs: Iterator[Any] = ahead(read, numbered, AHEAD)
        for index, pair in enumerate(pairs):
            if isinstance(pair, str):
                leave_out(index, pair)
                continue
            image, mask = pair
            waiting.append((index, mask))
            yield image
            del pair, image, mask  # not held while the next is waited for

    matrix = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    num_images = 0
    for seen in segmenter.stream(readable()):
        index, mask = waiting.popleft()
        if seen.error is not None:
            # It knows the image by its place among those that it was given.
            leave_out(index, f"{images.path(index)}: {seen.error.partition(': ')[2]}")
            continue
        matrix += confusion(seen.labels, position[mask], len(class_names))
        num_images += 1
        if on_image is not None:
            on_image()
    if not num_images:
        raise DataError(f"None of {plural(len(images), 'image')} can be used. The first: {bad[0]}")
    if not matrix.any():
        raise DataError(
            f"{images.root}: every pixel of {plural(num_images, 'mask')} is ignored; {images.coding.described}."
        )
    return SegmentationEvaluation(
        segmentation_figures(matrix),
        tuple(Skipped(images.names[index], bad[index]) for index in sorted(bad)),
        class_names,
        num_images,
    )


def _read(images: MaskSet, item: tuple[int, Source]) -> tuple[Image.Image, np.ndarray] | str:
    """Return an image and its mask, or why there is no such pair; called from several threads."""
    index, path = item
    try:
        return images.open_pair(index)
    except DataError as error:
        return str(error)
    except MemoryError:
        return f"{path}: is too large for the memory there is; scale it and its mask down first."


def _classes(segmenter: Segmenter, images: MaskSet) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the classes that are judged, and the class of each value of a mask, its last for ``IGNORE``.

    Raises:
        DataError: the segmenter lacks some, or has two of one name.
    """
    # mmsegmentation's name of a class of ADE20k ends in a space.
    ours = [canonical(name).strip() for name in segmenter.class_names]
    theirs = [canonical(name).strip() for name in images.class_names]
    cfg = segmenter.model.pretrained_cfg
    one_set = images.label_set is not None and images.label_set == cfg.get("label_set")
    in_order = theirs == ours or (one_set and len(theirs) == len(ours))
    missing = [name for name in theirs if name not in ours]
    if missing and not in_order and not (cfg.get("class_names") or cfg.get("label_set")):
        if len(ours) != len(theirs):
            raise DataError(
                f"{images.root} has {plural(len(theirs), 'class')}, and the segmenter has {len(ours)}, which it does "
                f"not name; save it with class_names."
            )
        _log.info("The segmenter does not name its classes; those of the data are taken, in order.")
        return tuple(images.class_names), _with_ignore(range(len(theirs)))
    if in_order:
        return tuple(segmenter.class_names), _with_ignore(range(len(ours)))
    if missing:
        raise DataError(
            f"The segmenter knows {len(theirs) - len(missing):,} of the data's {plural(len(theirs), 'class')}; it "
            f"lacks {listing(missing)}. Its own {len(ours):,} are {listing(ours)}."
        )
    twice = [name for name in theirs if ours.count(name) > 1]
    if twice:
        raise DataError(
            f"The segmenter has two classes called {listing(twice)}, so that it cannot be said which is meant; save it "
            f"with other class_names."
        )
    return tuple(segmenter.class_names), _with_ignore(ours.index(name) for name in theirs)


def _with_ignore(classes: range | Iterator[int]) -> np.ndarray:
    """Return a table of classes that gives ``IGNORE``, -1 and hence its last entry, for itself."""
    assert IGNORE == -1
    return np.array([*classes, IGNORE], dtype=np.int32)
