"""What a detector or a segmenter begins with: a whole model's weights, or its backbone's."""

from __future__ import annotations

import os
from collections.abc import Callable

from xcit.errors import CheckpointError, ConfigError
from xcit.models.zoo import CHECKPOINTS, Architecture, Task, find


def architecture_of(name: str) -> Architecture:
    """Return the architecture that a setting names.

    Raises:
        ConfigError: it names weights.
        UnknownNameError: nothing is called so.
    """
    architecture, released = find(name)
    if released is not None:
        raise ConfigError(
            f"model.name is {name}, which means weights; name the architecture {architecture.id}, and the weights to "
            f"begin with by --pretrained {name}."
        )
    return architecture


def whole_model(
    source: str, architecture: str, *, word: str, task: Task, read: Callable[[str], object]
) -> bool | str | None:
    """Return what of a whole model to begin with: True for the released one, a name or a file; None if it is none.

    Args:
        source: the setting ``model.pretrained``.
        architecture: the backbone's id.
        word: what the released model is called there.
        task: of such models.
        read: reads such a model's file; raises CheckpointError if it is something else.

    Raises:
        ConfigError: a released model of another architecture.
    """
    if source == word:
        return True
    if source in CHECKPOINTS:
        checkpoint = CHECKPOINTS[source]
        if checkpoint.task == task and checkpoint.architecture != architecture:
            raise ConfigError(f"{source} is of {checkpoint.architecture}, not of {architecture}.")
        return source if checkpoint.task == task else None
    if source in ("none", "released") or not os.path.exists(source):  # noqa: PTH110
        return None
    try:
        read(source)
    except CheckpointError:
        return None  # of a backbone, or damaged, which whoever reads it next will say
    return source


def backbone_source(source: str) -> bool | str:
    """Return what of a classifier or DINO to begin with, as ``create_model`` takes it."""
    choices: dict[str, bool | str] = {"none": False, "released": True}
    return choices.get(source, source)
