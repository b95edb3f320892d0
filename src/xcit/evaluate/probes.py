"""Which images a probe learns from, chooses by and is judged on, and the probes that need nothing but features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from xcit.data.image_set import DataSplits, ImageSet
from xcit.data.parts import split_off
from xcit.data.sampling import derive_seed, seeded
from xcit.evaluate.accuracy import Accuracy
from xcit.evaluate.embedding import SetFeatures
from xcit.evaluate.knn import knn_accuracy
from xcit.evaluate.logistic import logistic_probe
from xcit.evaluate.run import Skipped
from xcit.models.xcit import XCiT

CHOOSING_SHARE = 0.1
"""Of the training images, where the data has no part left to choose by."""


class ProbeSets(NamedTuple):
    """The roles of a data set's images."""

    bank: ImageSet
    """The training part: the neighbours of k-NN, and what all else is learnt from."""
    choose: ImageSet | None
    """What settings are chosen by; None where a share of the bank has to do."""
    judge: ImageSet
    """What is reported: the test part, or where there is none the validation part."""
    judged_part: str
    """Which of these: "test" or "val"."""


class ProbeFeatures(NamedTuple):
    """The same as features."""

    bank: SetFeatures
    learn: SetFeatures
    """The bank, less the share that has to choose."""
    choose: SetFeatures
    """Empty where nothing is chosen."""
    judge: SetFeatures

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The images that could not be decoded."""
        return (*self.bank.skipped, *self.choose.skipped, *self.judge.skipped)


class ProbeRow(NamedTuple):
    """A row of the table."""

    features: str
    """Whose features they are."""
    probe: str
    setting: str
    accuracy: Accuracy


def probe_sets(splits: DataSplits) -> ProbeSets:
    """Say which part of a data set plays which role: nothing is ever chosen by what is reported."""
    if splits.test is None:
        return ProbeSets(splits.train, None, splits.val, "val")
    return ProbeSets(splits.train, splits.val, splits.test, "test")


def embed_parts(embed: Callable[[ImageSet], SetFeatures], sets: ProbeSets, *, choosing: bool = True) -> ProbeFeatures:
    """Embed each image once.

    Args:
        embed: a set to its features.
        sets: from ``probe_sets``.
        choosing: whether anything is chosen; without, all of the bank is learnt from, and what could choose is left
            alone.

    Raises:
        DataError: the bank is too small to split off what should choose.
    """
    if not choosing:
        bank = embed(sets.bank)
        return ProbeFeatures(bank, bank, bank.subset(np.arange(0)), embed(sets.judge))
    if sets.choose is None:
        learn_at, choose_at = _divided(sets.bank)
    bank, judge = embed(sets.bank), embed(sets.judge)
    if sets.choose is None:
        return ProbeFeatures(bank, bank.subset(learn_at), bank.subset(choose_at), judge)
    return ProbeFeatures(bank, bank, embed(sets.choose), judge)


def learning_set(sets: ProbeSets) -> ImageSet:
    """Return the images of which ``ProbeFeatures.learn`` are the features."""
    return sets.bank if sets.choose is not None else sets.bank.subset(_divided(sets.bank)[0])


def _divided(bank: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    learn, choose, _ = split_off(bank, CHOOSING_SHARE, seed=0)
    return learn, choose


def knn_rows(
    name: str, features: ProbeFeatures, num_classes: int, ks: Sequence[int], temperature: float
) -> list[ProbeRow]:
    """Return a row for each k; the arguments are those of ``knn_accuracy``."""
    judged, bank = features.judge.usable(), features.bank.usable()
    result = knn_accuracy(*judged, *bank, num_classes=num_classes, ks=ks, temperature=temperature)
    return [ProbeRow(name, "k-NN", f"k = {k}", accuracy) for k, accuracy in result.accuracies.items()]


def logistic_rows(
    name: str, features: ProbeFeatures, num_classes: int, on_progress: Callable[[int], None] | None = None
) -> list[ProbeRow]:
    """Return the row of logistic regression; see ``logistic_probe``."""
    result = logistic_probe(
        features.learn.usable(),
        features.choose.usable(),
        features.judge.usable(),
        num_classes=num_classes,
        on_progress=on_progress,
    )
    note = "" if result.converged else ", stopped early"
    return [ProbeRow(name, "logistic", f"C = {result.strength:g}{note}", result.accuracy)]


def untrained(model: XCiT, seed: int = 0) -> XCiT:
    """Return a model of the same architecture with random weights and without head, and the same preprocessing."""
    with seeded(derive_seed(seed)):
        fresh = XCiT(**{**model.config, "num_classes": 0})
    fresh.pretrained_cfg = dict(model.pretrained_cfg)
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    return fresh.to(device, dtype).eval()
