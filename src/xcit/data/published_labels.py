"""ReaL, the reassessed labels of ImageNet's validation images, in the file that their authors publish.

It is a JSON list of 50,000 lists, which hold the numbers of all classes that people saw in ILSVRC2012_val_00000001,
ILSVRC2012_val_00000002, and so on. Some lists are empty.

Source: Beyer et al., "Are we done with ImageNet?", 2020.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from xcit.errors import DataError

NUM_CLASSES = 1000
NUM_VALIDATION_IMAGES = 50_000

RealLabels = tuple[tuple[int, ...], ...]
"""For each image of ImageNet's validation part, in the order of their numbers, the classes that are right."""

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")


def read_real_labels(path: str | os.PathLike[str]) -> RealLabels:
    """Read the published file of ReaL labels, ``real.json``.

    Raises:
        DataError: the file cannot be read, or is not 50,000 lists of numbers from 0 to 999.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: the ReaL labels cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):  # not JSON, or not even text
        raise DataError(f"{path}: is not JSON; ReaL labels are the published real.json.") from None
    expected = f"ReaL labels are the published real.json, a list of {NUM_VALIDATION_IMAGES:,} lists of class numbers"
    if not isinstance(content, list) or len(content) != NUM_VALIDATION_IMAGES:
        found = f"a list of {len(content):,}" if isinstance(content, list) else f"a JSON {type(content).__name__}"
        raise DataError(f"{path}: holds {found}; {expected}.")
    for position, labels in enumerate(content, 1):
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < NUM_CLASSES for label in labels):
            raise DataError(f"{path}: image {position} has {str(labels)[:60]}; {expected} from 0 to {NUM_CLASSES - 1}.")
    return tuple(tuple(labels) for labels in content)


def match_real_labels(labels: RealLabels, names: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the classes that are right for each image, found by the number in its name.

    Args:
        labels: all of ReaL's.
        names: the images', as in ``ImageSet.names``; folders before the file's name do not matter.

    Returns:
        One tuple an image; an empty one where ReaL has no label.

    Raises:
        DataError: an image that is not called like one of ImageNet's validation part.
    """
    matched = []
    for name in names:
        found = _VALIDATION_NAME.search(re.split(r"[/\\]", name)[-1])
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(labels):
            raise DataError(
                f"{name}: ReaL has labels for ImageNet's validation images alone, and finds them by names such as "
                f"ILSVRC2012_val_00000001.JPEG; leave --real out for other data, or give the files back those names."
            )
        matched.append(labels[number - 1])
    return matched
