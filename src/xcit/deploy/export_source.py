"""What is exported, by name: a classifier, a backbone, a segmenter or a detector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from xcit.errors import ConfigError, UnknownNameError
from xcit.inference.runtimes import is_artefact
from xcit.models.detectors import create_detector
from xcit.models.factory import create_model
from xcit.models.segmenters import create_segmenter
from xcit.models.storage import read_file
from xcit.models.weights import read_description
from xcit.models.zoo import find

_SIGNS = {"segmentation": ("decode_head.",), "detection": ("roi_heads.", "roi_head.")}
"""How names of weights begin that only such models have."""


def load_model(name: str) -> nn.Module:
    """Return a trained model in eval mode, whatever it was trained for.

    Args:
        name: a released model's (an architecture means its distilled weights at 224 px; downloaded once), the path of
            a file that xcit wrote, of a segmenter or a detector in mmsegmentation's or mmdetection's format too, or
            hf-hub:owner/name.

    Raises:
        UnknownNameError: no such name.
        ConfigError: a file that is exported already.
        CheckpointError: weights that cannot be had or do not fit.
    """
    if is_artefact(name):
        raise ConfigError(f"{name} is exported already; name the model that it was made of.")
    try:
        _, released = find(name)
    except UnknownNameError:
        # a file or a hub's repository, or no name at all, which create_model says best
        path = Path(name).expanduser()
        task = _task_of(path) if path.is_file() else None
        if task == "segmentation":
            return create_segmenter(path).eval()
        if task == "detection":
            return create_detector(path).eval()
        return create_model(name, pretrained=True).eval()
    task = released.task if released else None
    if task == "segmentation":
        return create_segmenter(name, pretrained=True).eval()
    if task == "detection":
        return create_detector(name, pretrained=True).eval()
    return create_model(name, pretrained=True).eval()


def _task_of(path: Path) -> str | None:
    """Return what a file's model was trained for, by its description or by its weights' names."""
    stored = read_file(path)
    config, _ = read_description(stored.metadata, str(path))
    if config is not None:
        task = config.get("task")
        return None if task is None else str(task)
    if not isinstance(stored.content, Mapping):
        return None
    inner = stored.content.get("state_dict")
    keys = [str(key).removeprefix("module.") for key in (inner if isinstance(inner, Mapping) else stored.content)]
    found = (task for task, signs in _SIGNS.items() if any(key.startswith(signs) for key in keys))
    return next(found, None)
