"""What a detector or a segmenter begins with: a whole model's weights, or its backbone's."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from xcit.errors import CheckpointError, ConfigError
from xcit.models.xcit import XCiT
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


def backbone_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings ``model.options``, which must be arguments of the backbone's class.

    Raises:
        ConfigError: naming those that are not.
    """
    known = set(inspect.signature(XCiT).parameters) - {"num_classes"}
    strange = sorted(options.keys() - known)
    if strange:
        near = difflib.get_close_matches(strange[0], sorted(known), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"model.options.{strange[0]} is no argument of the backbone's class, XCiT{hint}.")
    return dict(options)


def backbone_source(source: str) -> bool | str:
    """Return what to begin the backbone with, as ``dense_backbone`` takes it."""
    choices: dict[str, bool | str] = {"none": False, "released": True}
    return choices.get(source, source)
