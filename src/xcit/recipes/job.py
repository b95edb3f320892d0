"""What a training run is about, as the run itself sees it: a task, its batches, and what to do when it is over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from xcit.data.image_set import NamedImages
from xcit.data.loading import TrainingImages, TrainLoader, default_workers
from xcit.data.sampling import EpochSampler
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import RunConfig
from xcit.tasks.task import Task

if TYPE_CHECKING:
    from xcit.recipes.checkpointing import RunKeeper

Fact = tuple[str, str]
"""A name and a text."""


class Share(NamedTuple):
    """Which of the run's processes this one is."""

    rank: int = 0
    """From 0."""
    world_size: int = 1
    """How many there are."""


class Job(ABC):
    """One run's data, model and task, built from its settings. Each task has a class of its own.

    Attributes:
        task: model, loss, optimiser.
        train_loader: batches to learn from.
        val_loader: batches to choose by; None where nothing is chosen.
        images: by part of the data ("train", "val", "test"); a part that does not exist is left out.
        accumulate: batches whose gradients make a step.
        clip_grad: largest norm of the whole gradient; 0 does not clip.
    """

    task: Task
    train_loader: TrainLoader
    val_loader: DataLoader[Any] | None = None
    images: Mapping[str, NamedImages]
    accumulate: int = 1
    clip_grad: float = 0.0

    @abstractmethod
    def save(self, model: nn.Module, path: Path) -> None:
        """Write a model's weights in the form they are used in.

        Raises:
            ExportError, CheckpointError: the file cannot be written, or the weights are not numbers any more.
        """

    @abstractmethod
    def introduction(self) -> Iterator[Fact]:
        """Yield what to say before the first step."""

    @abstractmethod
    def plan(self) -> list[Fact]:
        """Return what the run would do, for whoever wants to know before it does anything."""

    @abstractmethod
    def conclude(self, run: RunFolder, keeper: RunKeeper, device: torch.device) -> Any:
        """Evaluate the weights that were kept, write report and figures, and return the figures.

        ``run.metrics`` is written last: it says that the run is complete.
        """


def num_workers(config: RunConfig) -> int:
    """Return how many processes prepare images for each process of the run."""
    wanted: int = config.data.num_workers
    return default_workers(config.compute.devices) if wanted < 0 else wanted


def train_loader(
    config: RunConfig, dataset: TrainingImages, share: Share, *, pin_memory: bool, steps: int = 0
) -> TrainLoader:
    """Return one process's batches of a run.

    Args:
        config: says how large a batch is, and how many images may be broken.
        dataset: the images, which draws are made of.
        share: which process this is.
        pin_memory: lay batches where CUDA can fetch them.
        steps: of an epoch; 0 for one pass over the images.

    Raises:
        ConfigError: fewer images than a batch.
    """
    sampler = EpochSampler(
        len(dataset),
        config.optim.batch_size,
        seed=config.seed,
        steps=steps,
        rank=share.rank,
        world_size=share.world_size,
    )
    return TrainLoader(
        dataset,
        sampler,
        config.micro_batch_size,
        num_workers=num_workers(config),
        max_bad_fraction=config.data.max_bad_fraction,
        pin_memory=pin_memory,
    )
