"""Image retrieval by published protocols: mAP on Revisited Oxford and Paris, copy detection on Copydays.

Images are brought to vectors of length 1 and ranked by cosine. They are not prepared as for classification:

* Revisited: the longer side is brought down to ``image_size`` (never up), nothing is cut off; one image at a time,
  since each has a size of its own. Queries are cropped to their box first, as the protocol demands; DINO's published
  script does not, which ``crop_queries=False`` repeats.
* Copydays: squeezed into a square of ``image_size``, whatever the proportions.

Source: Radenović et al., CVPR 2018 (revisitop's evaluate.py); [dino] eval_image_retrieval.py, eval_copy_detection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xcit.data.images import open_image
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.evaluate.retrieval_sets import CopySet, RevisitedSet
from xcit.inference.feature_file import unit_rows
from xcit.inference.features import FeatureExtractor
from xcit.inference.stream import DECODERS

LEVELS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Of each level of difficulty: the labels that count as found, and those that are taken out of the ranking."""
RANKS = (1, 5, 10)
DEPTH = 20
"""Results of a copy's search that are looked at; one that is found later counts as not found."""
WHITENING_FLOOR = 1e-5
"""Least eigenvalue that whitening divides by, as a share of the largest."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class LevelScores:
    """One level of difficulty.

    Attributes:
        mean_average_precision: over the queries that have a positive, 0 to 1.
        precision_at: mean precision among the first 1, 5 and 10, of a query whose last positive stands before that,
            among the results up to there.
        num_queries: those with a positive.
    """

    mean_average_precision: float
    precision_at: dict[int, float]
    num_queries: int


@dataclass(frozen=True)
class CopyScores:
    """One kind of attack.

    Attributes:
        mean_average_precision: of the attacked images' searches, 0 to 1.
        num_queries: attacked images.
    """

    mean_average_precision: float
    num_queries: int


# --- figures ----------------------------------------------------------------------------------------------------------


def average_precision(ranks: Sequence[int] | np.ndarray, num_positives: int) -> float:
    """Return the area under the curve of precision over recall, by trapezoids.

    AP = Σ_j (j / r_j + (j + 1) / (r_j + 1)) / (2 P), the first of the two being 1 where r_j = 0.

    Args:
        ranks: r_j, ascending, of the positives that were found, counted from 0.
        num_positives: P, all that there are, 1 or more.
    """
    r = np.asarray(ranks, dtype=np.float64)
    j = np.arange(len(r))
    before = np.where(r > 0, j / np.maximum(r, 1), 1.0)
    return float((before + (j + 1) / (r + 1)).sum() / (2 * num_positives))


def revisited_scores(similarities: np.ndarray, data: RevisitedSet) -> dict[str, LevelScores]:
    """Judge a ranking of the database by Revisited Oxford's and Paris' protocol.

    Args:
        similarities: (queries, images); of equal ones the first stands first.
        data: who is right.

    Returns:
        The three levels; one that no query has a positive of is NaN.
    """
    orders = np.argsort(-similarities, axis=1, kind="stable")
    scores = {}
    for level, (positive, ignored) in LEVELS.items():
        precisions, at = [], []
        for order, query in zip(orders, data.queries, strict=True):
            wanted = np.concatenate([query.labels[label] for label in positive])
            if not len(wanted):
                continue
            junk = np.setdiff1d(np.concatenate([query.labels[label] for label in ignored]), wanted)
            order = order[~np.isin(order, junk)]
            ranks = np.flatnonzero(np.isin(order, wanted))
            precisions.append(average_precision(ranks, len(wanted)))
            last = ranks[-1] + 1
            at.append([(ranks < min(k, last)).sum() / min(k, last) for k in RANKS])
        means = np.mean(at, axis=0) if at else np.full(len(RANKS), np.nan)
        scores[level] = LevelScores(
            float(np.mean(precisions)) if precisions else float("nan"),
            {k: float(mean) for k, mean in zip(RANKS, means, strict=True)},
            len(precisions),
        )
    return scores


def copy_scores(similarities: np.ndarray, positives: Sequence[Sequence[int]]) -> CopyScores:
    """Judge searches for originals, each by its first ``DEPTH`` results.

    Args:
        similarities: (queries, images).
        positives: positions of each query's originals.
    """
    orders = np.argsort(-similarities, axis=1, kind="stable")[:, :DEPTH]
    values = [
        average_precision(np.flatnonzero(np.isin(order, wanted)), len(wanted))
        for order, wanted in zip(orders, positives, strict=True)
    ]
    return CopyScores(float(np.mean(values)), len(values))


# --- running ----------------------------------------------------------------------------------------------------------


def evaluate_revisited(
    extractors: Sequence[FeatureExtractor],
    data: RevisitedSet,
    *,
    image_size: int = 224,
    crop_queries: bool = True,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, LevelScores]:
    """Judge a model on Revisited Oxford or Paris.

    Args:
        extractors: their features are concatenated; one is usual.
        data: as ``open_revisited`` gives it.
        image_size: longest side in pixels.
        crop_queries: see above.
        on_progress: called after each image.

    Raises:
        DataError: an image that cannot be read: the figures need all.
        ConfigError: an image size below one patch.
    """

    def prepare(path: Path, box: Box | None) -> Tensor:
        picture = open_image(path, extractors[0].preprocessing.in_chans)
        if box is not None:
            picture = picture.crop(tuple(round(value) for value in box))  # type: ignore[arg-type]
        picture.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
        return _tensor(picture, extractors[0].preprocessing)

    _check_size(extractors, image_size)
    images = _features(extractors, data.images, prepare, None, on_progress)
    boxes = [query.box for query in data.queries] if crop_queries else None
    queries = _features(extractors, [query.path for query in data.queries], prepare, boxes, on_progress)
    return revisited_scores(unit_rows(queries) @ unit_rows(images).T, data)


def evaluate_copies(
    extractors: Sequence[FeatureExtractor],
    data: CopySet,
    *,
    image_size: int = 320,
    distractors: Sequence[Path] = (),
    whitening: Sequence[Path] = (),
    on_progress: Callable[[], None] | None = None,
) -> dict[str, CopyScores]:
    """Judge a model on Copydays.

    Args:
        extractors: their features are concatenated; DINO takes the class token and GeM.
        data: as ``open_copydays`` gives it.
        image_size: side in pixels of the square that images are squeezed into.
        distractors: further images in the database, which are no originals; DINO takes 10,000 of YFCC100M.
        whitening: images whose features give a whitening; DINO takes 20,000 of YFCC100M.
        on_progress: called after each image.

    Returns:
        Scores of each kind of attack that the data has.

    Raises:
        DataError: an image that cannot be read: the figures need all.
        ConfigError: an image size below one patch.
    """

    def prepare(path: Path, box: Box | None) -> Tensor:
        picture = open_image(path, extractors[0].preprocessing.in_chans)
        return _tensor(picture.resize((image_size, image_size), Image.Resampling.BICUBIC), extractors[0].preprocessing)

    def features(paths: Sequence[Path]) -> np.ndarray:
        return _features(extractors, paths, prepare, None, on_progress)

    _check_size(extractors, image_size)
    finish = whitening_of(features(whitening)) if whitening else np.asarray
    database = unit_rows(finish(features([*data.originals, *distractors])))
    scores = {}
    for block, queries in data.blocks.items():
        found = unit_rows(finish(features([path for path, _ in queries]))) @ database.T
        scores[block] = copy_scores(found, [positives for _, positives in queries])
    return scores


def whitening_of(features: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return what subtracts the mean of some features and scales their principal directions by 1 / √eigenvalue.

    The eigenvalues are those of the second moments about 0, not about the mean, as in DINO's published script.

    Args:
        features: (n, dim).
    """
    mean = features.mean(axis=0, dtype=np.float64)
    moments = features.astype(np.float64).T @ features / len(features)
    values, vectors = np.linalg.eigh(moments)
    values = np.maximum(values, values.max() * WHITENING_FLOOR)[::-1]
    project = vectors[:, ::-1] / np.sqrt(values)
    return lambda rows: ((rows - mean) @ project).astype(np.float32)


def _check_size(extractors: Sequence[FeatureExtractor], image_size: int) -> None:
    extractor = extractors[0]
    patch_size = extractor.model.config["patch_size"]  # type: ignore[index]
    least = patch_size / min(extractor.scales)
    if image_size < least:
        raise ConfigError(
            f"image_size is {image_size}; with patches of {patch_size} px and the smallest scale "
            f"{min(extractor.scales):g} it must be at least {int(np.ceil(least))}."
        )


def _tensor(picture: Image.Image, preprocessing: Preprocessing) -> Tensor:
    values = np.array(picture, dtype=np.float32).reshape(picture.height, picture.width, -1) / 255
    values = (values - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _features(
    extractors: Sequence[FeatureExtractor],
    paths: Sequence[Path],
    prepare: Callable[[Path, Box | None], Tensor],
    boxes: Sequence[Box] | None,
    on_progress: Callable[[], None] | None,
) -> np.ndarray:
    """Return (n, dim) float32; images of one size that follow each other go through the model together."""
    rows: list[np.ndarray] = []
    batch_size = extractors[0].batch_size
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(0, len(paths), batch_size):
            chunk = range(start, min(start + batch_size, len(paths)))
            tensors = list(pool.map(lambda i: prepare(paths[i], boxes[i] if boxes else None), chunk))
            while tensors:
                count = next((i for i, t in enumerate(tensors) if t.shape != tensors[0].shape), len(tensors))
                batch = torch.stack(tensors[:count])
                rows.append(torch.cat([extractor.tensors(batch) for extractor in extractors], dim=1).cpu().numpy())
                tensors = tensors[count:]
            if on_progress is not None:
                for _ in chunk:
                    on_progress()
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise DataError("The model's features are NaN or infinite; its weights are not, or something overflows.")
    return features
