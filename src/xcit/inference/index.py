"""Nearest neighbours among the features of many images, by cosine, through faiss.

Vectors are brought to length 1, so that their inner product is the cosine of the angle between them. Three kinds:

* ``exact`` compares with every image.
* ``hnsw`` walks a graph of neighbours (32 links a node). Fast, and as large as the features and half as much again.
  Equal features, such as those of exact copies, are one node: linked to each other they would cut the graph in pieces.
* ``ivf`` divides the features into ``num_lists`` cells by k-means and looks into the nearest ones.

How far the two approximate kinds look is raised when they are built until ``TARGET_RECALL`` of the true neighbours of a
sample are found; what was reached is kept with the index and shown.

Cosines that lie within ``TIE`` of the highest of them count as equal, and equally near images come in the order in
which they were indexed, however many are asked for: of exact copies, the first is always found first. (An approximate
index looks further for more results, and may then find nearer ones.)

An index is one file: the word ``XCITINDX``, the length of a JSON header (8 bytes, little endian), the header, what
faiss wrote, and the SHA-256 of all that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xcit.errors import BackendError, ConfigError, DataError, UnknownNameError
from xcit.files import replacing
from xcit.inference.feature_file import FeatureTable, Origin, unit_rows

KINDS = ("exact", "hnsw", "ivf")
MAGIC = b"XCITINDX"
FORMAT = 1
DIGEST_BYTES = 32

TARGET_RECALL = 0.99
RECALL_AT = 10
SAMPLE = 200
"""Indexed images whose true neighbours an approximate index is measured by."""

LINKS = 32
"""Of a node of the graph."""
BUILDING_BREADTH = 200
"""Candidates that are looked at while a node is put into the graph."""
POINTS_A_LIST = 39
"""Least number of images a cell that k-means is trained with; faiss's own limit."""
FEWEST_LISTS = 16
TIE = 1e-6
"""Cosines that differ by no more, which rounding may, are equally near."""
SPARE = 8
"""Results beyond those asked for, to see which are equally near; where all are, more are fetched."""


class Recall(NamedTuple):
    """How an approximate index agrees with the exact one."""

    value: float
    """Share of the ``RECALL_AT`` true neighbours that it finds, the image itself aside."""
    num_queries: int
    """Indexed images that were looked up."""


class Hits(NamedTuple):
    """Results of a search, nearest first, equally near ones by position; fewer than asked for if there are fewer."""

    similarities: np.ndarray
    """(queries, k) float32, cosines; equal where they differ by no more than ``TIE``."""
    positions: np.ndarray
    """(queries, k) int64, into ``ImageIndex.paths``; -1 where an approximate index found no more."""


class Copies(NamedTuple):
    """Images with equal features, group by group; a group may be a single image."""

    members: np.ndarray
    """(images,) int64, positions of images, those of a group beside each other."""
    starts: np.ndarray
    """(groups + 1,) int64, where each group begins among the members."""

    def expand(self, hits: Hits, k: int) -> Hits:
        """Return the k nearest images where ``hits`` holds the k nearest groups."""
        similarities = np.full((len(hits.positions), k), -1.0, np.float32)
        positions = np.full((len(hits.positions), k), -1, np.int64)
        for row, groups in enumerate(hits.positions):
            filled = 0
            for group, similarity in zip(groups[groups >= 0], hits.similarities[row], strict=False):
                images = self.members[self.starts[group] : self.starts[group + 1]][: k - filled]
                positions[row, filled : filled + len(images)] = images
                similarities[row, filled : filled + len(images)] = similarity
                filled += len(images)
        return Hits(similarities, positions)


@dataclass(frozen=True)
class ImageIndex:
    """Features that are ready to be searched.

    Attributes:
        kind: one of ``KINDS``.
        paths: of the images, as they were spelt.
        origin: what made the features; a query must come from the same.
        breadth: what an approximate index looks at: candidates ("hnsw") or cells ("ivf").
        num_lists: cells of "ivf", else 0.
        recall: agreement with the exact index; None for the exact one.
        searcher: faiss's own.
        copies: whose features are equal, where the searcher holds each of them once.
    """

    kind: str
    paths: Sequence[str]
    origin: Origin
    breadth: int
    num_lists: int
    recall: Recall | None
    searcher: Any
    copies: Copies | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.searcher.d)

    def search(self, features: np.ndarray, top_k: int = 10) -> Hits:
        """Return the indexed images that are most similar to each query.

        Args:
            features: (queries, dim), of any length.
            top_k: 1 or more; at most all images come back.

        Raises:
            ConfigError: ``top_k`` below 1, or vectors of another length.
        """
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; it must be 1 or more.")
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ConfigError(f"The queries' shape is {features.shape}; the index takes (queries, {self.dim}).")
        k = min(top_k, len(self))
        return self._in_order(unit_rows(features), k, k + SPARE)

    def _in_order(self, queries: np.ndarray, k: int, num_fetched: int) -> Hits:
        """Return the k nearest, equally near ones by position, of at least so many that are fetched."""
        num_fetched = min(num_fetched, len(self))
        found = _search(self.searcher, self.kind, queries, min(num_fetched, int(self.searcher.ntotal)), self.breadth)
        if self.copies is not None:
            found = self.copies.expand(found, num_fetched)
        hits, is_cut = _sorted(found, k)
        if num_fetched < len(self):
            for row in np.flatnonzero(is_cut):  # one by one, since they may be as many as the images
                again = self._in_order(queries[row : row + 1], k, 4 * num_fetched)
                hits.similarities[row], hits.positions[row] = again.similarities[0], again.positions[0]
        return hits

    def check_origin(self, other: Origin, name: str) -> None:
        """Refuse queries that another extractor made.

        Args:
            other: of the queries.
            name: what the index is called in the message.

        Raises:
            ConfigError: their fingerprints differ; the message names both.
        """
        if other.fingerprint != self.origin.fingerprint:
            raise ConfigError(
                f"{self.origin.unlike(other, name)} Their features cannot be compared: take the model that it was made "
                f"with, or make another index."
            )


def build_index(table: FeatureTable, kind: str = "exact") -> ImageIndex:
    """Make features searchable.

    Args:
        table: one image or more.
        kind: one of ``KINDS``.

    Raises:
        UnknownNameError: another kind.
        ConfigError: no images, or too few for "ivf".
        BackendError: faiss is not installed.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of index", kind, KINDS, f"There are {', '.join(KINDS)}.")
    if not len(table):
        raise ConfigError("There are no features to index.")
    if kind == "ivf":
        num_lists_of(len(table))
    faiss = _faiss()
    vectors = unit_rows(table.features)
    n, dim = vectors.shape
    copies = None
    if kind == "hnsw":
        vectors, copies = _once_each(vectors)
    exact = faiss.IndexFlatIP(dim)
    exact.add(vectors)
    if kind == "exact":
        return ImageIndex(kind, table.paths, table.origin, n, 0, None, exact)
    if kind == "hnsw":
        num_lists, limit = 0, len(vectors)
        searcher = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        searcher.hnsw.efConstruction = BUILDING_BREADTH
    else:
        num_lists = limit = num_lists_of(n)
        searcher = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        searcher.cp.spherical = True
        searcher.cp.min_points_per_centroid = 1  # that there are enough is made sure of; faiss would print about it
        searcher.train(vectors)
    searcher.add(vectors)
    breadth, recall = _widen(searcher, kind, exact, vectors, limit)
    return ImageIndex(kind, table.paths, table.origin, breadth, num_lists, recall, searcher, copies)


def _once_each(vectors: np.ndarray) -> tuple[np.ndarray, Copies | None]:
    """Return each vector once, in the order in which they come, and who shares it; None where all differ."""
    groups: dict[bytes, list[int]] = {}
    for position, vector in enumerate(vectors):
        groups.setdefault(hashlib.blake2b(vector.tobytes(), digest_size=16).digest(), []).append(position)
    if len(groups) == len(vectors):
        return vectors, None
    first = [members[0] for members in groups.values()]
    starts = np.cumsum([0, *map(len, groups.values())], dtype=np.int64)
    return vectors[first], Copies(np.concatenate([np.array(m, np.int64) for m in groups.values()]), starts)


def num_lists_of(num_images: int) -> int:
    """Return the number of cells of an "ivf" index: 4 √n, as far as each gets ``POINTS_A_LIST`` images to train with.

    Raises:
        ConfigError: too few images.
    """
    fewest = FEWEST_LISTS * POINTS_A_LIST
    if num_images < fewest:
        raise ConfigError(
            f"An ivf index needs at least {fewest} images to train its {FEWEST_LISTS} cells; there are {num_images}. "
            f"Take exact, which needs no training and is fast at this size."
        )
    return max(FEWEST_LISTS, min(round(4 * math.sqrt(num_images)), num_images // POINTS_A_LIST))


def _widen(searcher: Any, kind: str, exact: Any, vectors: np.ndarray, limit: int) -> tuple[int, Recall]:
    """Return how far to look for ``TARGET_RECALL``, and what was reached."""
    chosen = np.unique(np.linspace(0, len(vectors) - 1, SAMPLE).round().astype(np.int64))
    k = min(RECALL_AT + 1, len(vectors))
    truth = _search(exact, "exact", vectors[chosen], k, 0)
    breadth = min(limit, 64 if kind == "hnsw" else 4)
    while True:
        found = _search(searcher, kind, vectors[chosen], k, breadth)
        recall = Recall(_agreement(found, truth, chosen), len(chosen))
        if recall.value >= TARGET_RECALL or breadth >= limit:
            return breadth, recall
        breadth = min(limit, 2 * breadth)


def _agreement(found: Hits, truth: Hits, queries: np.ndarray) -> float:
    """Return the share of true neighbours that were found, the queries themselves aside."""
    right = total = 0
    for q, query in enumerate(queries):
        others = truth.similarities[q][truth.positions[q] != query][:RECALL_AT]
        if not len(others):
            continue
        mine = found.similarities[q][(found.positions[q] != query) & (found.positions[q] >= 0)]
        right += min(int((mine >= others[-1] - TIE).sum()), len(others))  # one as near as the last is as good
        total += len(others)
    return right / total if total else 1.0


def _search(searcher: Any, kind: str, queries: np.ndarray, k: int, breadth: int) -> Hits:
    if kind == "hnsw":
        searcher.hnsw.efSearch = max(breadth, k)
    elif kind == "ivf":
        searcher.nprobe = breadth
    similarities, positions = searcher.search(queries, k)
    similarities = np.clip(similarities, -1.0, 1.0)  # where nothing was found, faiss gives the lowest float there is
    return Hits(similarities, positions)


def _sorted(found: Hits, k: int) -> tuple[Hits, np.ndarray]:
    """Return the first k with equally near ones by position, and where such might be missing beyond the last column."""
    similarities = found.similarities.copy()
    for column in range(1, similarities.shape[1]):
        before, here = similarities[:, column - 1], similarities[:, column]
        similarities[:, column] = np.where(here >= before - TIE, before, here)
    nothing = found.positions < 0
    places = np.where(nothing, np.iinfo(np.int64).max, found.positions)
    order = np.lexsort((places, -similarities), axis=1)[:, :k]
    is_cut = (similarities[:, -1] == similarities[:, k - 1]) & ~nothing[:, -1]
    hits = Hits(np.take_along_axis(similarities, order, 1), np.take_along_axis(found.positions, order, 1))
    return hits, is_cut


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_index(path: str | os.PathLike[str], index: ImageIndex) -> None:
    """Write an index whole or not at all.

    Raises:
        ExportError: no space, no permission, or the like.
    """
    path = Path(path)
    faiss = _faiss()
    about = {
        "format": FORMAT,
        "kind": index.kind,
        "breadth": index.breadth,
        "num_lists": index.num_lists,
        "recall": None if index.recall is None else list(index.recall),
        "copies": None if index.copies is None else [part.tolist() for part in index.copies],
        "origin": index.origin.to_json(),
        "paths": list(index.paths),
    }
    header = json.dumps(about).encode()
    content = faiss.serialize_index(index.searcher)
    digest = hashlib.sha256()
    with replacing(path, num_bytes=len(content) + len(header)) as partial, partial.open("xb") as file:
        for part in (MAGIC, len(header).to_bytes(8, "little"), header, content.data):
            file.write(part)
            digest.update(part)
        file.write(digest.digest())


def is_index(path: str | os.PathLike[str]) -> bool:
    """Tell by its first bytes whether a file is an index, damaged or not; one that cannot be read is none."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_index(path: str | os.PathLike[str]) -> ImageIndex:
    """Read what ``save_index`` wrote, after its checksum was found right.

    The checksum tells damage, not malice: as with any program that faiss is part of, open indexes of people you trust.

    Raises:
        DataError: nothing there, not an index, or a truncated or damaged one; the message names it.
        BackendError: faiss is not installed.
    """
    path = Path(path)
    faiss = _faiss()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such index; xcit index makes one.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; an index is one file, which xcit index makes.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if not data.startswith(MAGIC):
        what = f"is not an index of xcit; it begins with {data[:8]!r}" if data else "is empty (0 bytes)"
        raise DataError(f"{path}: {what}. xcit index makes one.")
    view = memoryview(data)
    start = len(MAGIC) + 8
    if len(data) < start + DIGEST_BYTES or hashlib.sha256(view[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        raise DataError(f"{path}: is truncated or damaged (its checksum does not fit); make it again with xcit index.")
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    about = json.loads(data[start : start + length])
    if about["format"] != FORMAT:
        raise DataError(f"{path}: is of format {about['format']}; this xcit reads {FORMAT}. Make it again.")
    searcher = faiss.deserialize_index(np.frombuffer(view[start + length : -DIGEST_BYTES], dtype=np.uint8))
    return ImageIndex(
        about["kind"],
        about["paths"],
        Origin.from_json(about["origin"]),
        about["breadth"],
        about["num_lists"],
        None if about["recall"] is None else Recall(*about["recall"]),
        searcher,
        None if about["copies"] is None else Copies(*(np.array(part, np.int64) for part in about["copies"])),
    )


def _faiss() -> Any:
    """Return faiss, set to as many threads as torch has: both count on the same cores.

    Raises:
        BackendError: it is not installed.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its bindings, on first import
            import faiss
    except ModuleNotFoundError:
        raise BackendError('An index needs faiss, which is not installed: pip install "xcit[retrieval]"') from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
