"""Which image is drawn when, and with which random numbers: a pure function of seed, epoch and position.

Nothing here depends on how many processes share the work or on what was drawn before. That is what makes a resumed run
exact at any step, and runs on one and on several devices see the same images, distorted in the same way.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from xcit.errors import ConfigError


class Draw(NamedTuple):
    """One image to be prepared."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    """Its position in the set."""
    seed: int
    """What all of its random distortion follows from."""


def derive_seed(*parts: int) -> int:
    """Return a number below 2^63 that any change of the parts changes beyond recognition."""
    digest = blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, *, devices: bool = True) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Args:
        seed: from ``derive_seed``.
        devices: torch's generators on accelerators too, not only the CPU's.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU as the seed says within the block, and as before after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(seed, devices=False)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class EpochSampler(Sampler[Draw]):
    """Draw the training images of an epoch in a random order, one process's share of them.

    An epoch has as many steps as whole batches fit into the set; the images left over change from epoch to epoch. Or it
    has a given number of steps: then one pass over all images follows the other, across the epochs' borders. The
    processes take turns, so that together they draw in each step what one alone would.

    Args:
        num_images: size of the set.
        batch_size: images a step, of all processes together.
        seed: of the run.
        repeats: repeated augmentation: each image is drawn so often in a row, distorted differently, while the epoch
            keeps its length.
        steps: an epoch has so many; 0 for as many as whole batches fit into the set. Not together with ``repeats``.
        rank: which process this is.
        world_size: how many there are; divides ``batch_size``.

    Attributes:
        epoch: which epoch is drawn next, from 0.
        skip: how many of this process's draws are left out at its beginning.

    Raises:
        ConfigError: the set is smaller than a batch.

    Source: Hoffer et al., "Augment your batch", 2020, and the sampler of the released code, whose epochs are rounded
        to 256 images instead of to a batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        repeats: int = 1,
        steps: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert not steps or repeats == 1
        if num_images < batch_size and not steps:
            raise ConfigError(
                f"There are {num_images} images to train on, fewer than the {batch_size} of one step; take a "
                f"--batch-size of {num_images} or less."
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.steps = steps
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip = 0

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        return self.steps or self.num_images // self.batch_size

    def __len__(self) -> int:
        """Return this process's draws in a whole epoch."""
        return self.num_steps * self.batch_size // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a new one is drawn from its beginning."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __iter__(self) -> Iterator[Draw]:
        total = self.num_steps * self.batch_size
        before = self.epoch * total if self.steps else 0  # draws since the pass with number 0 began
        number, order = -1, np.empty(0, np.int64)
        for position in range(self.rank + self.skip * self.world_size, total, self.world_size):
            passes, place = divmod(before + position // self.repeats, self.num_images)
            if passes != number:
                number = passes
                order = np.random.default_rng([self.seed, passes if self.steps else self.epoch]).permutation(
                    self.num_images
                )
            yield Draw(int(order[place]), derive_seed(self.seed, self.epoch, position))


class ShareSampler(Sampler[int]):
    """Every image once, in order, dealt out to the processes; the last may get one less.

    Args:
        num_images: size of the set.
        rank: which process this is.
        world_size: how many there are.
    """

    def __init__(self, num_images: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.positions = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions)
