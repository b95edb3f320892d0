"""Settings from a file, whatever task they are of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml  # type: ignore[import-untyped]

from xcit.errors import ConfigError
from xcit.recipes.config import TrainConfig
from xcit.recipes.detection_config import DetectionConfig
from xcit.recipes.dino_config import DinoConfig
from xcit.recipes.segmentation_config import SegmentationConfig
from xcit.recipes.settings import RunConfig, build_config

CONFIGS: Mapping[str, type[RunConfig]] = MappingProxyType(
    {
        "classification": TrainConfig,
        "dino": DinoConfig,
        "detection": DetectionConfig,
        "segmentation": SegmentationConfig,
    }
)
"""What holds the settings of each task."""


def read_config(path: Path) -> RunConfig:
    """Read a complete config from YAML.

    Raises:
        ConfigError: no such file, not YAML, or naming at once all unknown keys, wrong types and values out of range.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path} cannot be read: {err.strerror}.") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(err).split())}.") from err
    return config_from_dict(content, source=str(path))


def config_from_dict(content: Any, *, source: str = "The settings") -> RunConfig:
    """Build a config from nested dictionaries; settings that are left out take their defaults.

    Args:
        content: what ``dataclasses.asdict`` gives and YAML holds. Its ``task`` says which settings there are; without
            one it is classification.
        source: how to call it in messages.

    Raises:
        ConfigError: no such task, or naming at once all unknown keys, wrong types and values out of range.
    """
    task = content.get("task", "classification") if isinstance(content, Mapping) else "classification"
    if task not in CONFIGS:
        near = difflib.get_close_matches(str(task), CONFIGS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{source} cannot be used: task is {task!r}{hint}; it must be one of {', '.join(CONFIGS)}.")
    return build_config(CONFIGS[task], content, source=source)
