"""The linear probe: a classifier of frozen features, trained by SGD, and what a backbone is published with.

Each epoch shows every training image once more, as another random part of it, so that its features are computed anew.
Several learning rates can be tried at the cost of one: each has a head of its own on the same features, and the
validation images choose.

Source: [dino] eval_linear.py: SGD with momentum 0.9 and no weight decay, learning rate 1e-3 for a batch of 256, in
proportion for others (published: 1024), cosine to 0 over 100 epochs, weights from N(0, 0.01), biases 0, random parts of
at least 8 % of the image, mirrored half of the time. The published figure is the best epoch's on the images that it is
reported for; here it is the last epoch's.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.data.datasets import TrainImages
from xcit.data.image_set import ImageSet
from xcit.data.loading import TrainLoader, default_workers
from xcit.data.random_crop import RandomCrop
from xcit.data.sampling import EpochSampler, derive_seed
from xcit.errors import ConfigError
from xcit.evaluate.accuracy import Accuracy, accuracy_of, ranks
from xcit.evaluate.embedding import SetFeatures
from xcit.files import replacing
from xcit.inference.features import FeatureExtractor

LR_BATCH = 256
"""The batch that a learning rate is meant for."""

INIT_STD = 0.01

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class LinearSettings:
    """How the heads are trained. The defaults are the published ones.

    Args:
        epochs: passes over the training images.
        lrs: peak learning rates for a batch of 256; of several, the validation images choose one.
        batch_size: images a step; of a smaller set, all of them.
        momentum: of SGD.
        weight_decay: likewise.
        augment: show another random part of each image in each epoch. Without, features are computed once, of the
            images as they are judged: about as many times faster as there are epochs.
        min_area: smallest share of the image that a random part has.
        hflip: probability that it is mirrored.
        seed: of the initial weights, the order of the images and their parts.

    Raises:
        ConfigError: a value out of its range; all are named at once.
    """

    epochs: int = 100
    lrs: tuple[float, ...] = (1e-3,)
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    augment: bool = True
    min_area: float = 0.08
    hflip: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lrs", tuple(float(lr) for lr in self.lrs))
        problems = [
            f"{name} is {getattr(self, name)}; it must be 1 or more"
            for name in ("epochs", "batch_size")
            if getattr(self, name) < 1
        ]
        if not self.lrs or not all(0 < lr < float("inf") for lr in self.lrs):
            problems.append(f"learning rates are {self.lrs}; there must be one or more, each more than 0")
        if not 0 <= self.momentum < 1:
            problems.append(f"momentum is {self.momentum}; it must be at least 0 and less than 1")
        if self.weight_decay < 0:
            problems.append(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        if not 0 < self.min_area <= 1:
            problems.append(f"min_area is {self.min_area}; it must be more than 0 and at most 1")
        if not 0 <= self.hflip <= 1:
            problems.append(f"hflip is {self.hflip}; it must be from 0 to 1")
        if problems:
            raise ConfigError("; ".join(problems) + ".")


class EpochFigures(NamedTuple):
    """What an epoch gave, of the head that does best on the validation images so far trained."""

    epoch: int
    """From 1."""
    loss: float
    """Mean cross-entropy of its training images, in nats."""
    val_top1: float


@dataclass(frozen=True)
class LinearResult:
    """A trained head.

    Attributes:
        weight: (classes, dim) float32, on the CPU.
        bias: (classes,) float32.
        lr: the learning rate that was chosen, for a batch of 256.
        val: of the validation images, by that head.
        val_by_lr: top-1 accuracy of the validation images for each learning rate.
        history: of each epoch of this process; a run that was gone on with has the later ones only.
        settings: as they were used: the batch is no larger than the set.
        broken: names of training images in whose place others were shown.
    """

    weight: Tensor
    bias: Tensor
    lr: float
    val: Accuracy
    val_by_lr: dict[float, float]
    history: tuple[EpochFigures, ...]
    settings: LinearSettings
    broken: tuple[str, ...] = ()

    def judge(self, embedded: SetFeatures) -> Accuracy:
        """Return how many images of a set the head classifies right."""
        return _judge(self.weight, self.bias, embedded)


def train_linear(
    extract: FeatureExtractor,
    train: ImageSet,
    val: SetFeatures,
    settings: LinearSettings | None = None,
    *,
    cached: SetFeatures | None = None,
    num_workers: int | None = None,
    state_file: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochFigures], None] | None = None,
) -> LinearResult:
    """Train a linear classifier on the features of a frozen model.

    Args:
        extract: the model, its preprocessing and pooling.
        train: images to learn from, with one class each. Of a set that is no multiple of the batch, other images are
            left out in each epoch.
        val: the features of those that the learning rate is chosen by.
        settings: None for the published ones.
        cached: without augmentation, the features of ``train``.
        num_workers: processes that decode; 0 does it in this one; None chooses by the number of cores.
        state_file: what is written after each epoch, so that the same call goes on there, to the same result; it is
            removed in the end.
        on_progress: called after each step with the epoch (from 0) and the number of its images done.
        on_epoch: called after each epoch.

    Raises:
        ConfigError: several classes an image, no cached features where they are needed, a state file of another
            run, or losses that are not finite.
        DataError: more than a tenth of the images are broken.
    """
    settings = settings or LinearSettings()
    if train.multi_label:
        raise ConfigError("The linear probe is for images with one class each; these may have several.")
    if not settings.augment and cached is None:
        raise ConfigError("Without augmentation the linear probe needs the features of the training images (cached).")
    num_images = len(train) if cached is None or settings.augment else int(cached.decoded.sum())
    settings = LinearSettings(**{**asdict(settings), "batch_size": min(settings.batch_size, num_images)})
    heads = _Heads(extract.dim, len(train.class_names), settings)
    if settings.augment:
        batches: _Batches = _Augmented(extract, train, settings, num_workers)
    else:
        assert cached is not None
        batches = _Cached(cached, settings)
    identity = {
        "settings": repr(settings),
        "model": extract.fingerprint,
        "classes": list(train.class_names),
        "images": _digest(train),
    }
    start = heads.load(state_file, identity) if state_file is not None and state_file.exists() else 0

    history = []
    for epoch in range(start, settings.epochs):
        heads.set_epoch(epoch)
        done, losses = 0, 0.0
        for features, labels in batches.epoch(epoch):
            losses += heads.step(features, labels) * len(labels)
            done += len(labels)
            if on_progress is not None:
                on_progress(epoch, done)
        best, val_by_lr = heads.judged(val)
        history.append(EpochFigures(epoch + 1, losses / done, val_by_lr[settings.lrs[best]]))
        if state_file is not None:
            heads.save(state_file, identity, epoch + 1)
        if on_epoch is not None:
            on_epoch(history[-1])
    best, val_by_lr = heads.judged(val)
    weight, bias = heads.weights(best)
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise ConfigError(f"The linear probe diverged with the learning rates {settings.lrs}; take smaller ones.")
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return LinearResult(
        weight,
        bias,
        settings.lrs[best],
        _judge(weight, bias, val),
        val_by_lr,
        tuple(history),
        settings,
        tuple(train.names[position] for position in sorted(batches.bad)),
    )


class _Heads:
    """A head for each learning rate, all trained on the same batches."""

    def __init__(self, dim: int, num_classes: int, settings: LinearSettings) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(derive_seed(settings.seed))
        initial = torch.randn(num_classes, dim, generator=generator) * INIT_STD  # the same for all of them
        self.weight = [nn.Parameter(initial.clone()) for _ in settings.lrs]
        self.bias = [nn.Parameter(torch.zeros(num_classes)) for _ in settings.lrs]
        self.optimiser = torch.optim.SGD(
            [{"params": pair} for pair in zip(self.weight, self.bias, strict=True)],
            lr=1.0,  # set_epoch has the one of each
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )

    def set_epoch(self, epoch: int) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * epoch / self.settings.epochs))
        for group, lr in zip(self.optimiser.param_groups, self.settings.lrs, strict=True):
            group["lr"] = lr * self.settings.batch_size / LR_BATCH * cosine

    def step(self, features: Tensor, labels: Tensor) -> float:
        """Train on a batch; return the least loss of the heads, before the step."""
        with torch.enable_grad():
            losses = torch.stack(
                [
                    F.cross_entropy(F.linear(features, weight, bias), labels)
                    for weight, bias in zip(self.weight, self.bias, strict=True)
                ]
            )
            self.optimiser.zero_grad()
            losses.sum().backward()  # of each head by its own loss: they share nothing that is trained
        self.optimiser.step()
        values = [value for value in losses.tolist() if math.isfinite(value)]
        if not values:
            raise ConfigError(
                f"The linear probe's loss is not finite with any of the learning rates {self.settings.lrs}; take "
                f"smaller ones."
            )
        return min(values)

    def judged(self, val: SetFeatures) -> tuple[int, dict[float, float]]:
        """Return which head is right most often, of several the one of the smallest rate, and each one's accuracy."""
        pairs = [self.weights(i) for i in range(len(self.weight))]
        by_lr = {lr: _judge(*pair, val).top1 for lr, pair in zip(self.settings.lrs, pairs, strict=True)}
        best = min(range(len(pairs)), key=lambda i: (-by_lr[self.settings.lrs[i]], self.settings.lrs[i]))
        return best, by_lr

    def weights(self, index: int) -> tuple[Tensor, Tensor]:
        return self.weight[index].detach().clone(), self.bias[index].detach().clone()

    def save(self, path: Path, identity: dict[str, Any], epochs: int) -> None:
        state = {
            "identity": identity,
            "epochs": epochs,
            "weight": [weight.detach() for weight in self.weight],
            "bias": [bias.detach() for bias in self.bias],
            "optimiser": self.optimiser.state_dict(),
        }
        with replacing(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path, identity: dict[str, Any]) -> int:
        """Take up what ``save`` wrote; return the number of epochs done.

        Raises:
            ConfigError: it is of another run, or damaged.
        """
        try:
            state = torch.load(path, weights_only=True)
            same = state["identity"] == identity
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
            raise ConfigError(f"{path} is not the state of a linear probe, or is damaged; remove it.") from None
        if not same:
            raise ConfigError(
                f"{path} is the state of a linear probe with another model, other images or other settings; remove it, "
                f"or repeat the command that it is of."
            )
        with torch.no_grad():
            for own, saved in zip((*self.weight, *self.bias), (*state["weight"], *state["bias"]), strict=True):
                own.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        return int(state["epochs"])


class _Batches(ABC):
    """Features and labels of an epoch, on the CPU: a head is small."""

    bad: Collection[int] = ()
    """Positions of images that could not be decoded so far."""

    @abstractmethod
    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class _Augmented(_Batches):
    def __init__(
        self, extract: FeatureExtractor, train: ImageSet, settings: LinearSettings, num_workers: int | None
    ) -> None:
        transform = RandomCrop(extract.preprocessing, min_area=settings.min_area, hflip=settings.hflip)
        self.extract = extract
        self.sampler = EpochSampler(len(train), settings.batch_size, seed=settings.seed)
        self.loader = TrainLoader(
            TrainImages(train, transform),
            self.sampler,
            settings.batch_size,
            num_workers=default_workers() if num_workers is None else num_workers,
            pin_memory=extract.device.type == "cuda",
        )
        self.bad = self.loader.bad

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch)
        for batch in self.loader:
            pieces = batch.images.split(self.extract.batch_size)
            yield torch.cat([self.extract.tensors(piece).cpu() for piece in pieces]), batch.labels


class _Cached(_Batches):
    def __init__(self, cached: SetFeatures, settings: LinearSettings) -> None:
        features, labels = cached.usable()
        self.features, self.labels = torch.from_numpy(features), torch.from_numpy(labels)
        self.sampler = EpochSampler(len(labels), settings.batch_size, seed=settings.seed)
        self.batch_size = settings.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch)
        order = torch.tensor([draw.index for draw in self.sampler])
        for chosen in order.split(self.batch_size):
            yield self.features[chosen], self.labels[chosen]


def _judge(weight: Tensor, bias: Tensor, embedded: SetFeatures) -> Accuracy:
    features, labels = (torch.from_numpy(np.ascontiguousarray(array)) for array in embedded.usable())
    places = []
    for piece, right in zip(features.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        scores = F.linear(piece, weight, bias)
        places.append(ranks(torch.nan_to_num(scores), right))  # not finite where a rate was too large
    return accuracy_of(torch.cat(places), len(bias))


def _digest(images: ImageSet) -> str:
    digest = hashlib.sha256(images.labels.tobytes())
    for name in images.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
