"""Recipes on the embedded handwritten digits."""

from __future__ import annotations

from xcit.recipes.config import TrainConfig

EPOCH_SECONDS = 1.6
"""Of the quickstart, on two CPU cores."""


def digits_quickstart() -> TrainConfig:
    """Return the settings of ``xcit quickstart``: a small XCiT on the digits, about two minutes on two CPU cores.

    Size, epochs and augmentation were chosen on the validation part, over three seeds.
    """
    return TrainConfig(recipe="digits_quickstart")


def expected_minutes(epochs: int) -> str:
    """Say how long so many epochs of the quickstart take on two CPU cores."""
    minutes = epochs * EPOCH_SECONDS / 60
    if minutes < 1:
        return "less than a minute"
    return "about a minute" if round(minutes) == 1 else f"about {minutes:.0f} minutes"
