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
ALONE = 0.9
"""Share of the images in the sample whose nearest stranger it must keep apart from them."""

SURROUNDINGS = 20
"""Neighbours that show how densely strangers lie around an image; up to half of them may be copies of it."""
FEWEST_SURROUNDINGS = 4
"""With fewer neighbours, copies are not told from strangers."""
CHANCE = 0.01
"""A neighbour that is nearer than the nearest of strangers would be in this share of cases is likely a copy."""
TENTH = 0.1
"""Of the surroundings' radius: one that is nearer is likely a copy, whatever a few neighbours say of their density."""

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
    """Share of the images in the sample that it joins with another of all images, files of the same bytes aside."""
    likely_copies: float
    """Share of the images in the sample that it joins with one so near that it is likely a copy."""
    reached: float
    """Cosine that ``FOUND`` of the copies reach; the value is higher if that would join too many strangers."""
    num_images: int
    """Images in the sample."""


def choose_threshold(
    paths: Sequence[Path],
    features: np.ndarray,
    extractor: FeatureExtractor,
    *,
    exact: Sequence[Sequence[int]] = (),
    side: np.ndarray | None = None,
) -> Threshold:
    """Choose a threshold for near copies, by making some, and by looking how near strangers are.

    Cosines mean different things with each model: of one, strangers have 0.2, of another 0.98. So up to ``SAMPLE``
    images, evenly spaced, are re-compressed (JPEG, quality 30), halved in size, and cropped to the middle 90 % of their
    area. The threshold is the cosine that ``FOUND`` of these copies reach with their original, but so high that
    ``ALONE`` of the images in the sample are not joined with their nearest stranger.

    Strangers are looked for among all images, since the more there are, the nearer the nearest of them is. Images that
    are there twice must not pass for strangers, or else a folder full of copies would raise its own threshold: files of
    the same bytes are taken once, and neighbours that stand out as copies do are passed over (see ``_neighbours``).

    Args:
        paths: the images; those that cannot be read are not sampled.
        features: (n, dim), theirs, of any length.
        extractor: what made the features.
        exact: groups of positions with the same content, as of ``content_groups``.
        side: (n,) bool; only images on different sides are compared. None compares all.

    Raises:
        DataError: there is one image only, or none of the sample can be read.
    """
    content = np.arange(len(paths))
    for group in exact:
        content[list(group)] = min(group)
    sides = np.zeros(len(paths), bool) if side is None else np.asarray(side, bool)
    # each content once on each side
    once = np.unique(np.stack((content, sides.astype(int))), axis=1, return_index=True)[1]
    once.sort()
    pictures: list[Image.Image] = []
    sample: list[int] = []
    for number in np.unique(np.linspace(0, len(once) - 1, SAMPLE).round().astype(int)):
        try:
            pictures.append(open_image(paths[once[number]]))
        except DataError:
            continue
        sample.append(int(once[number]))
    if len(paths) < 2 or not pictures:
        what = "one image" if len(paths) == 1 else f"{len(paths):,} images, none of which can be read"
        raise DataError(f"A threshold cannot be chosen from {what}; give one instead of auto.")
    originals = unit_rows(extractor(pictures)).astype(np.float64)
    cosines = [
        (originals * unit_rows(extractor([change(picture) for picture in pictures]))).sum(axis=1)
        for change in (_recompressed, _halved, _cropped)
    ]
    copies = np.concatenate(cosines)
    nearest, stranger = _neighbours(unit_rows(features), np.array(sample), once, content, sides, side is not None)
    reached = float(np.quantile(copies, 1 - FOUND, method="lower"))
    apart = float(np.quantile(stranger, ALONE, method="lower")) + 2 * ROUNDING
    value = min(max(reached, apart), NEVER)
    found, joined = (float((each >= value - ROUNDING).mean()) for each in (copies, nearest))
    likely = float(((nearest >= value - ROUNDING) & (stranger < nearest)).mean())
    return Threshold(value, found, joined, likely, reached, len(pictures))


def _neighbours(
    vectors: np.ndarray, sample: np.ndarray, others: np.ndarray, content: np.ndarray, sides: np.ndarray, sided: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines of images with their nearest neighbour, and with the nearest that is likely no copy.

    Around a point in d dimensions, the k nearest of strangers lie so that ``(r_1 / r_k) ** d`` is below x with a
    chance of ``1 - (1 - x) ** (k - 1)``. A neighbour that is nearer than ``CHANCE`` allows, or than ``TENTH``, is taken
    for a copy. The dimension is that of the features at hand: half of the k lie within ``r_k / 2 ** (1 / d)``.

    Args:
        vectors: (n, dim) float32, of length 1.
        sample: positions of the images.
        others: positions of what they are compared with.
        content: (n,), equal for files of the same bytes, which are not compared.
        sides: (n,) bool.
        sided: compare only images on different sides.

    Returns:
        Both (sample,) float64; -1 for an image that there is nothing to compare with.
    """
    k = max(FEWEST_SURROUNDINGS, min(SURROUNDINGS, (len(others) - 1) // 2))
    top = np.full((len(sample), k), -1.0)
    mine = vectors[sample].astype(np.float64)
    for start in range(0, len(others), 8 * CHUNK):
        part = others[start : start + 8 * CHUNK]
        cosines = mine @ vectors[part].T.astype(np.float64)
        cosines[content[sample][:, None] == content[part]] = -1
        if sided:
            cosines[sides[sample][:, None] == sides[part]] = -1
        top = -np.sort(-np.concatenate((top, cosines), axis=1), axis=1)[:, :k]
    nearest = top[:, 0]
    full = top[:, -1] > -1
    if not full.any():
        return nearest, nearest
    radii = np.sqrt(np.maximum(1 - top, ROUNDING))  # rounding makes equal features differ by less
    growth = float(np.median(np.log(radii[full, -1] / radii[full, k // 2 - 1])))  # ln 2 / d
    limit = max(TENTH, (1 - (1 - CHANCE) ** (1 / (k - 1))) ** (growth / np.log(2)))
    is_stranger = (radii >= limit * radii[:, -1:]) | ~full[:, None]
    return nearest, top[np.arange(len(sample)), is_stranger.argmax(axis=1)]


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
    """Return the position of the image of a cluster that is best kept.

    It is the largest file, since copies that were scaled down, cropped or compressed again are mostly smaller than the
    original; of equal ones, such as exact copies, the one with the shortest name ("cat.jpg", not "cat (1).jpg"), and
    of these the first.
    """

    def worth(position: int) -> tuple[int, int, int]:
        return _size(paths[position]), -len(paths[position].name), -position

    return max((member.position for member in cluster), key=worth)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
