"""What a recipe is: a function that returns all settings, and what one should know before following it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from xcit.recipes.settings import RunConfig

BACKWARD = 3
"""Cost of a forward and a backward pass together, in forward passes."""
EXPONENTS = {"E": 18, "P": 15, "T": 12, "G": 9}


@dataclass(frozen=True)
class Recipe:
    """A training run that can be started by name."""

    name: str
    """What ``xcit train`` takes."""
    make: Callable[[], RunConfig]
    """Returns all settings, but for where the images are."""
    summary: str
    """What it does, in a line."""
    source: str
    """Where its settings were published."""
    target: str
    """The figure that following it should give, and on what; empty where there is none."""
    cost: str
    """Epochs x images x multiply-adds, three times for the backward pass; empty where that hangs on the user's data."""
    status: Literal["reproduced", "partial", "not run"]
    """Whether this package reached the target; "partial" for a part of it, which the notes name."""
    notes: str = ""
    """Where the published recipe is unknown and what stands in, and where this one differs."""


def training_cost(epochs: int, images: int, gmacs: float) -> str:
    """Return what a training run computes, as text.

    Args:
        epochs: passes.
        images: in a pass; repeated augmentation does not change their number.
        gmacs: 1e9 multiply-adds of the forward pass of one image.
    """
    total = BACKWARD * epochs * images * gmacs * 1e9
    unit, exponent = next((u, e) for u, e in EXPONENTS.items() if total >= 10.0**e or u == "G")
    seen = f"{images / 1e6:.2f} M" if images >= 1e6 else f"{images:,}"
    product = f"{epochs} epochs x {seen} images x {gmacs:.3g} G x {BACKWARD}"
    return f"{product} = {total / 10.0**exponent:.3g} {unit} multiply-adds"
