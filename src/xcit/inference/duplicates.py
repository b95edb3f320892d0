"""Images that are there twice: the same bytes, or nearly the same picture.

Exact copies are found by a checksum of their content. Near copies are pairs whose features have a cosine of at least a
threshold. Images that are joined by such pairs, directly or through others, form a cluster.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from xcit.data.images import convert_image, open_image
from xcit.errors import ConfigError, DataError
from xcit.inference.feature_file import unit_rows
from xcit.inference.features import FeatureExtractor

CHUNK = 1024
"""Images that are compared with all others at once."""
SAMPLE = 64
"""Images of which copies are made to choose a threshold."""
FOUND = 0.95
"""Share of these copies that the threshold lets find."""
ALONE = 0.8
"""Share of the images in the sample that it must not join with another: real copies are seldom more than a fifth."""


ROUNDING = 1e-6
"""Cosines of float32 features are as large as a threshold if no more than this is lacking."""

NEVER = 1 + 2 * ROUNDING
"""A threshold that no pair reaches."""


class Member(NamedTuple):
    """An image of a cluster."""

    position: int
    """Among the images that were compared."""
    exact: bool
    """Some other image of the cluster has the same bytes."""
    similarity: float
    """Cosine with the image of the cluster that is most similar."""


class Threshold(NamedTuple):
    """A threshold that was chosen by copies of the user's own images."""

    value: float
    copies_found: float
    """Share of the copies that it finds, 0 to 1."""
    images_joined: float
    """Share of the images in the sample that it joins with another one of it."""
    num_images: int
    """Images in the sample."""


def choose_threshold(paths: Sequence[Path], extractor: FeatureExtractor) -> Threshold:
    """Choose a threshold for near copies, by making some and comparing them with their originals.

    Cosines mean different things with each model: of one, strangers have 0.2, of another 0.98. So up to ``SAMPLE``
    images, evenly spaced, are re-compressed (JPEG, quality 30), halved in size, and cropped to the middle 90 % of their
    area. The threshold is the cosine that ``FOUND`` of these copies reach with their original, but so high that
    ``ALONE`` of the images in the sample are joined with no other one.

    Args:
        paths: the images; broken ones are passed over.
        extractor: makes the features.

    Raises:
        DataError: fewer than two images can be read.
    """
    pictures: list[Image.Image] = []
    for number in np.unique(np.linspace(0, len(paths) - 1, SAMPLE).round().astype(int)):
        try:
            pictures.append(open_image(paths[number]))
        except DataError:
            continue
    if len(pictures) < 2:
        raise DataError(f"A threshold cannot be chosen from {len(pictures)} readable images; give one.")
    originals = unit_rows(extractor(pictures)).astype(np.float64)
    cosines = [
        (originals * unit_rows(extractor([change(picture) for picture in pictures]))).sum(axis=1)
        for change in (_recompressed, _halved, _cropped)
    ]
    copies = np.concatenate(cosines)
    others = originals @ originals.T
    np.fill_diagonal(others, -1)
    nearest = others.max(axis=1)
    reached = float(np.quantile(copies, 1 - FOUND, method="lower"))
    apart = float(np.quantile(nearest, ALONE, method="lower")) + 2 * ROUNDING
    value = min(max(reached, apart), NEVER)
    found, joined = (float((each >= value - ROUNDING).mean()) for each in (copies, nearest))
    return Threshold(value, found, joined, len(pictures))


def _recompressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    convert_image(picture).save(file, format="JPEG", quality=30)
    with Image.open(file) as copy:
        return copy.convert("RGB")


def _halved(picture: Image.Image) -> Image.Image:
    return picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), Image.Resampling.BICUBIC)


def _cropped(picture: Image.Image) -> Image.Image:
    x, y = (round(side * (1 - 0.9**0.5) / 2) for side in picture.size)
    return picture.crop((x, y, picture.width - x, picture.height - y))


def content_groups(paths: Sequence[Path]) -> list[list[int]]:
    """Return the positions of files with the same content, each group of two or more in order.

    Only files of the same size are read. What cannot be read is in no group.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        try:
            by_size[path.stat().st_size].append(i)
        except OSError:
            continue
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for size, positions in by_size.items():
        if size == 0 or len(positions) < 2:
            continue
        for i in positions:
            try:
                with paths[i].open("rb") as file:
                    by_content[hashlib.file_digest(file, "sha256").digest()].append(i)
            except OSError:
                continue
    return sorted(group for group in by_content.values() if len(group) > 1)


def find_clusters(
    features: np.ndarray,
    threshold: float,
    *,
    exact: Sequence[Sequence[int]] = (),
    side: np.ndarray | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Member]]:
    """Return the clusters of images that are joined by pairs of copies.

    Args:
        features: (n, dim), of any length.
        threshold: least cosine of a pair, in (-1, 1]; or ``NEVER``, which ``choose_threshold`` gives where strangers
            have a cosine of 1: then only images of the same bytes are joined.
        exact: groups of positions with the same content, which are joined whatever their features.
        side: (n,) bool; only pairs of images on different sides count. None lets all count.
        on_progress: called with the number of images that were compared.

    Returns:
        Clusters of two or more, the largest first, then by their first member; members in order.

    Raises:
        ConfigError: a threshold out of its range.

    Cost: n² dim / 2 multiply-adds, in chunks of ``CHUNK`` rows.
    """
    if not -1 < threshold <= NEVER:
        raise ConfigError(f"The threshold is {threshold}; it must be more than -1 and at most 1.")
    n = len(features)
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    nearest = np.full(n, -1.0)
    same = np.zeros(n, bool)

    def join(i: int, j: int, cosine: float) -> None:
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
        nearest[i], nearest[j] = max(nearest[i], cosine), max(nearest[j], cosine)

    for group in exact:
        for i in group:
            for j in group if side is not None else group[:1]:
                if i != j and (side is None or side[i] != side[j]):
                    join(i, j, 1.0)
                    same[[i, j]] = True
    vectors = torch.from_numpy(unit_rows(features))
    for start in range(0, n, CHUNK):
        cosines = (vectors[start : start + CHUNK] @ vectors[start:].T).clamp_(max=1.0)
        # float32 gives equal vectors cosines a little below 1
        rows, columns = torch.nonzero(cosines >= threshold - ROUNDING, as_tuple=True)
        for i, j in zip((rows + start).tolist(), (columns + start).tolist(), strict=True):
            if i < j and (side is None or side[i] != side[j]):
                join(i, j, float(cosines[i - start, j - start]))
        if on_progress is not None:
            on_progress(min(n, start + CHUNK))
    clusters: dict[int, list[int]] = defaultdict(list)
    for i in range(n):
        clusters[root(i)].append(i)
    found = [members for members in clusters.values() if len(members) > 1]
    return [
        [Member(i, bool(same[i]), float(nearest[i])) for i in members]
        for members in sorted(found, key=lambda members: (-len(members), members[0]))
    ]


def kept_member(cluster: Sequence[Member], paths: Sequence[Path]) -> int:
    """Return the position of the image of a cluster that is best kept: the largest file, of equals the first.

    Copies that were scaled down, cropped or compressed again are mostly smaller than the original.
    """
    sizes = {member.position: _size(paths[member.position]) for member in cluster}
    return max(sizes, key=lambda position: (sizes[position], -position))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
