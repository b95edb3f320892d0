"""What a training run needs to be told, as typed and checked settings, and their YAML form on disk."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from xcit.errors import ConfigError
from xcit.recipes.run_folder import write_atomic


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, both ends included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.low:g} or more" if math.isinf(self.high) else f"from {self.low:g} to {self.high:.10g}"


Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The size of the XCiT that is trained; channels and classes follow from the data."""

    patch_size: Annotated[int, Range(8, 16)] = 8
    """Pixels a side of what one token covers: 8 or 16."""
    embed_dim: Annotated[int, Range(8)] = 128
    """Width of a token."""
    depth: Annotated[int, Range(1)] = 4
    """Number of XCA blocks."""
    num_heads: Annotated[int, Range(1)] = 4
    """Heads of the attention; divides embed_dim."""
    cls_attn_layers: Annotated[int, Range(1)] = 2
    """Number of class-attention blocks."""
    eta: Annotated[float, Range(0)] = 1.0
    """Initial value of LayerScale."""
    drop_path_rate: Annotated[float, Range(0, 0.9)] = 0.0
    """Stochastic depth of every XCA block."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at which size."""

    image_size: Annotated[int, Range(8, 512)] = 32
    """Pixels a side to which the 8 x 8 digits are enlarged."""
    batch_size: Annotated[int, Range(2, 1024)] = 64
    """Images a step."""
    val_fraction: Annotated[float, Range(0.05, 0.5)] = 0.2
    """Share of the digits that are not held out on which choices are made."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How each image is distorted anew in every epoch."""

    degrees: Annotated[float, Range(0, 180)] = 12.0
    """Rotation by up to so many degrees either way."""
    translate: Annotated[float, Range(0, 0.5)] = 0.1
    """Shift by up to this share of the side."""
    scale: Annotated[float, Range(0, 0.9)] = 0.15
    """Zoom by up to this share, in or out."""
    shear: Annotated[float, Range(0, 60)] = 8.0
    """Shear by up to so many degrees, in both directions."""
    erase: Share = 0.0
    """Probability that a rectangle is painted over."""
    mixup: Annotated[float, Range(0, 10)] = 0.2
    """Alpha of the Beta distribution that pairs of images are mixed by; 0 does not mix."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Range(1e-8, 1e3)] = 2e-3
    """Peak learning rate."""
    min_lr: Annotated[float, Range(0, 1e3)] = 2e-5
    """Where the cosine ends."""
    warmup_fraction: Annotated[float, Range(0, 0.9)] = 0.075
    """Share of all steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    """Of matrices and kernels."""
    label_smoothing: Annotated[float, Range(0, 0.9)] = 0.1
    """Share of the target that is spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete training run. Together with the version of the package it decides what comes out."""

    recipe: str
    """Name of the recipe that these settings began as."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of the initial weights, the order of the images and all augmentation; which images are held out never changes."""
    epochs: Annotated[int, Range(1)] = 40
    """Passes over the training images."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def check_config(config: TrainConfig) -> TrainConfig:
    """Return the config if every setting is in its range.

    Raises:
        ConfigError: naming all that are not.
    """
    _refuse(list(_range_problems(config, "")), "The settings")
    return config


def read_config(path: Path) -> TrainConfig:
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


def write_config(config: TrainConfig, path: Path) -> None:
    """Write a config as a YAML file.

    Raises:
        ExportError: the file cannot be written.
    """
    write_atomic(path, f"# All settings of this run.\n{to_yaml(config)}".encode())


def to_yaml(config: TrainConfig) -> str:
    """Return a config as YAML, every setting included."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def config_from_dict(content: Any, *, source: str = "The settings") -> TrainConfig:
    """Build a config from nested dictionaries; settings that are left out take their defaults.

    Args:
        content: what ``dataclasses.asdict`` gives and YAML holds.
        source: how to call it in messages.

    Raises:
        ConfigError: naming at once all unknown keys, wrong types and values out of range.
    """
    problems: list[str] = []
    config = _build(TrainConfig, content, "", problems)
    if config is not None:
        problems += _range_problems(config, "")
    _refuse(problems, source)
    assert isinstance(config, TrainConfig)
    return config


def _build(kind: type, content: Any, prefix: str, problems: list[str]) -> Any:
    """Return an instance of a dataclass; None, and the reason among the problems, where it cannot be."""
    if not isinstance(content, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'the whole'} is {content!r}; it must be settings by name")
        return None
    hints = get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            problems.append(f"{prefix}{key} is unknown" + (f" (did you mean {prefix}{near[0]}?)" if near else ""))
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, f"{prefix}{key}.", problems)
        else:
            values[key] = _typed(hints[key], value, f"{prefix}{key}", problems)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    problems += [f"{prefix}{name} is missing" for name in sorted(required - set(content))]
    if required - set(content):
        return None
    # Where a part could not be read its default stands in, so that the ranges of all others are still looked at.
    return kind(**{key: value for key, value in values.items() if value is not None})


def _typed(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, str):  # PyYAML takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        return value
    word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    problems.append(f"{name} is {value!r}; it must be {word}")
    return None


def _range_problems(config: Any, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _range_problems(value, f"{prefix}{name}.")
        elif get_origin(hint) is Annotated:
            allowed = next(extra for extra in get_args(hint) if isinstance(extra, Range))
            if not allowed.low <= value <= allowed.high:
                yield f"{prefix}{name} is {value}; it must be {allowed}"


def _refuse(problems: list[str], source: str) -> None:
    if problems:
        raise ConfigError(f"{source} cannot be used: {'; '.join(problems)}.")
