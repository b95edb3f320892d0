"""Models of timm under the same recipes: what XCiT is compared with, and convolutional teachers trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import timm
from safetensors.torch import load, save
from torch import nn

from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.files import write_atomic

PREFIX = "timm:"
KEY = "timm_model"
"""Of a file's metadata: what else its weights need."""


class Peer(NamedTuple):
    """A model of timm with what it was trained on."""

    model: nn.Module
    """In evaluation mode."""
    class_names: tuple[str, ...]
    """One a class."""
    preprocessing: Preprocessing
    """How its images are prepared."""


def create_peer(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model of timm.

    Args:
        name: as timm calls it, such as resnet18; with or without ``timm:``.
        num_classes: outputs.
        in_chans: channels of the images.
        pretrained: with timm's weights, which are downloaded once.
        options: other arguments of the model; a text of numbers with commas between stands for a tuple.

    Raises:
        UnknownNameError: timm has no such model.
        ConfigError: arguments that the model does not take.
    """
    name = name.removeprefix(PREFIX)
    if name.partition(".")[0] not in timm.list_models():
        raise UnknownNameError("model of timm", name, timm.list_models())
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **_arguments(options or {})
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as err:
        raise ConfigError(f"timm cannot build {name} with these options: {' '.join(str(err).split())}.") from err


def save_peer(
    model: nn.Module,
    path: Path,
    *,
    name: str,
    options: Mapping[str, Any],
    class_names: Sequence[str],
    preprocessing: Preprocessing,
) -> None:
    """Write a model's weights with what ``load_peer`` needs to build it again.

    Raises:
        ExportError: the file cannot be written.
    """
    content = {
        "name": name.removeprefix(PREFIX),
        "options": dict(options),
        "class_names": list(class_names),
        "cfg": preprocessing.to_cfg(),
    }
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomic(path, save(state, {KEY: json.dumps(content), "format": "pt"}))


def is_peer(path: Path) -> bool:
    """Return whether ``save_peer`` wrote this file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def load_peer(path: Path) -> Peer:
    """Read a model that ``save_peer`` wrote.

    Raises:
        CheckpointError: it is no such file, or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[KEY])
        state = load(path.read_bytes())
        preprocessing = Preprocessing.from_cfg(content["cfg"])
        model = create_peer(
            content["name"],
            num_classes=len(content["class_names"]),
            in_chans=preprocessing.in_chans,
            options=content["options"],
        )
        model.load_state_dict(state)
    except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as err:
        raise CheckpointError(f"{path} cannot be read as a model of timm: {' '.join(str(err).split())}.") from err
    return Peer(model.eval(), tuple(content["class_names"]), preprocessing)


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) if isinstance(value, str) else value for key, value in options.items()}


def _tuple(text: str) -> str | tuple[int, ...]:
    parts = text.split(",")
    return tuple(int(part) for part in parts) if len(parts) > 1 and all(p.strip().isdigit() for p in parts) else text
