"""Weighted k-nearest-neighbour classification of frozen features: what a backbone is worth without any training.

A query's class is the one with the most votes among the k images of the bank that are most similar to it by cosine. A
neighbour's vote weighs exp(similarity / T). Queries and bank are taken in pieces, and of the bank only the k best are
kept, so that memory does not grow with the bank.
Legend: Q queries, M images of the bank, D features.

Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", 2018; [dino] eval_knn.py,
whose k are 10, 20, 100 and 200 and whose T is 0.07.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.evaluate.accuracy import Accuracy, accuracy_of, ranks
from xcit.evaluate.embedding import embed_set

KS = (10, 20, 100, 200)
"""The numbers of neighbours that are published; 20 is the usual one."""

TEMPERATURE = 0.07

QUERIES_AT_ONCE = 1024
BANK_AT_ONCE = 8192
"""Similarities of a piece against a piece: 8 million, 34 MB, of which a few copies live at once."""

_INDEX_BITS = 32
_LARGEST_INDEX = (1 << _INDEX_BITS) - 1


@dataclass(frozen=True)
class KNNResult:
    """What the neighbours say.

    Attributes:
        accuracies: of each k, in the order in which they were asked for.
        num_bank: images that could be neighbours.
        temperature: T.
    """

    accuracies: dict[int, Accuracy]
    num_bank: int
    temperature: float

    def of(self, k: int) -> tuple[int, Accuracy]:
        """Return what k neighbours say; where the bank is smaller, all of it, and how many these are."""
        k = min(k, self.num_bank)
        return k, self.accuracies[k]


def knn_accuracy(
    queries: np.ndarray,
    query_labels: np.ndarray,
    bank: np.ndarray,
    bank_labels: np.ndarray,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> KNNResult:
    """Classify each query by its neighbours in the bank.

    Of classes with equal votes the one of the lower number wins, and a class without a vote is never among the first
    five. (Sorting votes as they come, as the published code does, decides both by chance.)

    Args:
        queries: (Q, D) features of any length and floating-point type.
        query_labels: (Q,) classes, from 0.
        bank: (M, D); may be a memory-mapped file, which is read piece by piece.
        bank_labels: (M,).
        num_classes: of which classes there are.
        ks: numbers of neighbours, at most M (less one, if one is left out).
        temperature: T, more than 0. The smaller, the more the nearest count.
        leave_one_out: the bank holds the queries, in the same order; no query is its own neighbour.
        device: where similarities are computed.
        on_progress: called with the number of queries done.

    Raises:
        ConfigError: a k or a temperature out of its range.
        DataError: arrays that do not belong together, labels out of range, or features that are not finite.
    """
    _check(queries, query_labels, bank, bank_labels, num_classes, leave_one_out)
    _check_numbers(ks, temperature, len(bank) - leave_one_out)
    labels = torch.from_numpy(np.asarray(bank_labels, dtype=np.int64))
    truth = torch.from_numpy(np.asarray(query_labels, dtype=np.int64))
    places: dict[int, list[Tensor]] = {k: [] for k in ks}
    done = 0
    for similarities, indices in neighbours(queries, bank, max(ks), leave_one_out=leave_one_out, device=device):
        right = truth[done : done + len(indices)]
        # The nearest one's weight is 1: a factor common to all votes changes nothing, and nothing overflows.
        weights = ((similarities.double() - similarities[:, :1].double()) / temperature).exp()
        for k in ks:
            votes = torch.zeros(len(indices), num_classes, dtype=torch.float64)
            votes.scatter_add_(1, labels[indices[:, :k]], weights[:, :k])
            places[k].append(ranks(votes, right, floor=0.0))
        done += len(indices)
        if on_progress is not None:
            on_progress(done)
    accuracies = {k: accuracy_of(torch.cat(each), num_classes) for k, each in places.items()}
    return KNNResult(accuracies, len(bank), temperature)


def neighbours(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    *,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
    queries_at_once: int = QUERIES_AT_ONCE,
    bank_at_once: int = BANK_AT_ONCE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the k nearest of the bank of some queries at a time, in the queries' order.

    Args:
        queries: (Q, D).
        bank: (M, D).
        k: at most M.
        leave_one_out: see ``knn_accuracy``.
        device: where similarities are computed.
        queries_at_once: queries in a piece.
        bank_at_once: images of the bank in a piece.

    Yields:
        Cosine similarities, (q, k) float32, the largest first, and positions in the bank, (q, k) int64, both on the
        CPU. Of equal similarities the lower position comes first. (The similarity of the same two vectors may differ in
        its last bits where they lie in pieces of another size.)

    Raises:
        DataError: features that are not finite.
    """
    for begin in range(0, len(queries), queries_at_once):
        some = _normalised(queries, begin, queries_at_once, "queries", device)
        best = torch.empty(len(some), 0, dtype=torch.int64, device=some.device)
        for start in range(0, len(bank), bank_at_once):
            piece = _normalised(bank, start, bank_at_once, "bank", device)
            similarities = some @ piece.T
            if leave_one_out:
                own = torch.arange(begin, begin + len(some), device=some.device) - start
                rows = ((own >= 0) & (own < len(piece))).nonzero()[:, 0]
                similarities[rows, own[rows]] = -torch.inf
            keys = _keys(similarities, start)
            keys = keys.topk(min(k, keys.shape[1]), dim=1).values  # of this piece alone first: the others are many
            best = torch.cat((best, keys), dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        yield _decoded(best.cpu())


def knn_probe(
    model: nn.Module,
    bank: ImageSet,
    queries: ImageSet,
    preprocessing: Preprocessing | None = None,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    pool: str = "token",
    max_bank: int | None = None,
    max_queries: int | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    max_bad_fraction: float = 0.1,
) -> KNNResult:
    """Classify images by a model's features, as during training: the model is left in its mode and on its device.

    Broken images are left out. A k larger than the bank becomes the bank's size.

    Args:
        model: an ``XCiT``.
        bank: images whose classes are known to the neighbours.
        queries: images to classify.
        preprocessing: how both are prepared; None for the model's own.
        ks: numbers of neighbours.
        temperature: T.
        pool: one of ``xcit.inference.features.POOLS``.
        max_bank: take so many of the bank at most, spread evenly over it.
        max_queries: likewise of the queries.
        batch_size: images through the model at once; None for as many as have the pixels of 32 images of 224.
        num_workers: processes that decode.
        max_bad_fraction: share of the images of each set that may fail to decode, 0 to 1.

    Raises:
        XCiTError: as ``embed_set`` and ``knn_accuracy``.
    """
    arrays: list[np.ndarray] = []
    for images, most in ((queries, max_queries), (bank, max_bank)):
        chosen = images if most is None or most >= len(images) else images.subset(_spread(len(images), most))
        embedded = embed_set(
            model,
            chosen,
            preprocessing,
            pool=pool,
            batch_size=batch_size,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
        )
        arrays += embedded.usable()
    fitting = list(dict.fromkeys(min(k, len(arrays[2])) for k in ks))
    return knn_accuracy(
        arrays[0],
        arrays[1],
        arrays[2],
        arrays[3],
        num_classes=len(bank.class_names),
        ks=fitting,
        temperature=temperature,
    )


def _spread(total: int, count: int) -> np.ndarray:
    return np.arange(count) * total // count


def _normalised(features: np.ndarray, start: int, count: int, name: str, device: torch.device | str) -> Tensor:
    """Return rows of the array as float32 of length 1, copied; of length 0 where all is 0."""
    rows = torch.from_numpy(np.array(features[start : start + count], dtype=np.float32)).to(device)
    if not bool(rows.isfinite().all()):
        row = start + int((~rows.isfinite()).any(dim=1).nonzero()[0, 0])
        raise DataError(f"The features of image {row} of the {name} are not finite.")
    return F.normalize(rows, dim=1)


def _keys(similarities: Tensor, start: int) -> Tensor:
    """Return integers that sort by similarity and, where that is equal, by position, the lower one larger.

    The upper 32 bits are those of the float, made to sort as an integer; the lower ones count down. No two of a row are
    equal, so that which ones are the largest is no matter of chance.
    """
    bits = (similarities + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    positions = torch.arange(start, start + similarities.shape[1], device=similarities.device)
    return bits.to(torch.int64).bitwise_left_shift_(_INDEX_BITS).bitwise_or_(_LARGEST_INDEX - positions)


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits = (keys >> _INDEX_BITS).to(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.view(torch.float32), _LARGEST_INDEX - (keys & _LARGEST_INDEX)


def _check_numbers(ks: Sequence[int], temperature: float, most: int) -> None:
    problems = []
    if not ks or min(ks) < 1:
        problems.append(f"k is {', '.join(map(str, ks)) or 'missing'}; it must be 1 or more")
    elif max(ks) > most:
        problems.append(f"k is {max(ks)}, more than the {most} images that can be neighbours")
    if not 0 < temperature < float("inf"):
        problems.append(f"temperature is {temperature}; it must be more than 0")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _check(
    queries: np.ndarray,
    query_labels: np.ndarray,
    bank: np.ndarray,
    bank_labels: np.ndarray,
    num_classes: int,
    leave_one_out: bool,
) -> None:
    problems = []
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1:] != bank.shape[1:]:
        problems.append(
            f"queries are {queries.shape} and the bank is {bank.shape}; both must be (images, features), with as many "
            f"features"
        )
    for name, features, labels in (("queries", queries, query_labels), ("bank", bank, bank_labels)):
        if len(features) != len(labels):
            problems.append(f"the {name} have {len(features)} rows and {len(labels)} labels")
        elif not len(labels):
            problems.append(f"the {name} are empty")
        elif labels.min() < 0 or labels.max() >= num_classes:
            problems.append(
                f"the {name}' labels go from {labels.min()} to {labels.max()}; there are {num_classes} classes"
            )
    if leave_one_out and queries.shape != bank.shape:
        problems.append(
            f"leave_one_out is for a bank of the queries themselves; they are {queries.shape} and {bank.shape}"
        )
    if problems:
        raise DataError("Of k-NN: " + "; ".join(problems) + ".")
