"""Data loaders that can be stopped and gone on with at any batch, and that know how long they are waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from xcit.data.image_set import NamedImages
from xcit.data.sampling import EpochSampler, ShareSampler
from xcit.errors import DataError

PREFETCH = 4
"""Batches that each worker process prepares ahead."""


class TrainingImages(Protocol):
    """Images for a ``TrainLoader``: a draw becomes an item, items a batch with ``indices`` and ``decoded``."""

    @property
    def images(self) -> NamedImages:
        """What they are made of."""

    @property
    def check(self) -> str:
        """The command that says what is wrong with them."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Any) -> Any: ...


class TrainLoader(DataLoader[Any]):
    """Batches of an epoch's draws. Its state is a position; what lies ahead in worker processes needs no saving.

    Args:
        dataset: the images, each distorted once or in several views.
        sampler: their order.
        batch_size: images that this process computes at once; divides the sampler's length.
        num_workers: processes that decode and distort; 0 does it in this one, with the same outcome.
        max_bad_fraction: share of the images that may fail to decode.
        pin_memory: lay batches where CUDA can fetch them.

    Attributes:
        wait_seconds: time spent waiting for batches since it was last set to 0.
        bad: positions of images that could not be decoded so far.
    """

    dataset: TrainingImages  # type: ignore[assignment]  # torch asks for its own class, and takes any
    sampler: EpochSampler

    def __init__(
        self,
        dataset: TrainingImages,
        sampler: EpochSampler,
        batch_size: int,
        *,
        num_workers: int = 0,
        max_bad_fraction: float = 0.1,
        pin_memory: bool = False,
    ) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.wait_seconds = 0.0
        self.bad: set[int] = set()
        self._batches = 0
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH if num_workers else None,
            generator=torch.Generator(),  # its draws leave the global generator alone
            collate_fn=_collate_of(dataset),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches that are left of the epoch.

        Raises:
            DataError: more images are broken than may be.
        """
        self._batches = self.sampler.skip // (self.batch_size or 1)
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            if not bool(batch.decoded.all()):
                self._note_bad(batch)
            self._batches += 1
            yield batch

    def _note_bad(self, batch: Any) -> None:
        self.bad.update(batch.indices[~batch.decoded].tolist())
        images = self.dataset.images
        if len(self.bad) > self.max_bad_fraction * len(images):
            name = images.names[min(self.bad)]
            raise DataError(
                f"{len(self.bad)} of {len(images)} training images cannot be used so far, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g} allows (one is {name}). Look at them with "
                f"{self.dataset.check}, or allow more."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch is, and what was found broken."""
        epoch, batches = self.sampler.epoch, self._batches
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches, "bad": sorted(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at that batch."""
        self.sampler.epoch = state["epoch"]
        self.sampler.skip = state["batches"] * (self.batch_size or 1)
        self._batches = state["batches"]
        self.bad = set(state["bad"])


def _collate_of(dataset: object) -> Callable[[Any], Any] | None:
    """Return what makes a batch of a dataset's items; None for torch's own way, which stacks images of one size."""
    return getattr(dataset, "collate", None)


def eval_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """Return a loader that gives every image once, in order; with several processes, each its share.

    Args:
        dataset: the images.
        batch_size: images at once.
        num_workers: processes that decode; 0 does it in this one.
        pin_memory: lay batches where CUDA can fetch them.
        rank: which process this is.
        world_size: how many there are.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=ShareSampler(len(dataset), rank=rank, world_size=world_size),  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
        collate_fn=_collate_of(dataset),
    )


def default_workers(processes: int = 1) -> int:
    """Return how many worker processes each training process on this machine should have.

    All cores but one a training process, and not more than 16: with a single spare core or none, a worker would only
    take time from the model.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spare = (cores - processes) // processes
    return min(16, spare) if spare > 1 else 0
