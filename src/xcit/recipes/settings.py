"""Settings of any training run: typed, checked all at once, and their YAML form on disk.

Each task has a class of its own (``RunConfig`` with more parts); ``xcit.recipes.config_file`` knows them all.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from xcit.errors import ConfigError
from xcit.files import write_atomic


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, both ends included."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.low:g} or more" if math.isinf(self.high) else f"from {self.low:g} to {self.high:.10g}"


Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and how the run computes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: Annotated[int, Range(1, 1024)] = 1
    """Processes on this node, one a device."""
    num_nodes: Annotated[int, Range(1, 4096)] = 1
    """Nodes, each started by torchrun or SLURM."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Replicate the model on each device, or shard it (CUDA); auto replicates where there are several."""
    precision: Literal["32", "bf16", "16"] = "32"
    """float32, or mixed with bfloat16 or float16."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = True
    """Lay images out with channels last."""
    checkpoint_minutes: Annotated[float, Range(0, 1e6)] = 15.0
    """Save the whole state so often within an epoch as well; 0 only at its end."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Who else hears of the figures, besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard's event files into the run folder."""
    wandb: str = ""
    """Project of Weights & Biases."""
    mlflow: str = ""
    """Tracking address of MLflow, such as http://127.0.0.1:5000."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run is told. Together with the version of the package all settings decide what comes out."""

    recipe: str
    """Name of the recipe that these settings began as."""
    task: str
    """What is learned."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of the initial weights, the order of the images and all augmentation."""
    epochs: Annotated[int, Range(1)] = 400
    """Passes over the training images, or stretches of optim.steps_per_epoch where there is such a setting."""
    patience: Annotated[int, Range(0)] = 0
    """Stop after so many epochs without a better validation figure; 0 never."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    log: LogConfig = field(default_factory=LogConfig)

    lengths: ClassVar[tuple[str, ...]] = ()
    """Settings that are numbers of epochs, and shrink with a run that is made shorter."""
    if TYPE_CHECKING:
        data: Any  # which images, and how the optimiser goes: each task has settings of its own for them
        optim: Any

    @property
    def lr(self) -> float:
        """Peak learning rate of the run: lr · batch_size / lr_batch."""
        optim = self.optim
        return optim.lr * optim.batch_size / optim.lr_batch if optim.lr_batch else optim.lr

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.compute.devices * self.compute.num_nodes

    @property
    def micro_batch_size(self) -> int:
        """Images that a device computes at once."""
        return self.optim.batch_size // (self.world_size * self.optim.accumulate)

    def contradictions(self) -> Iterator[str]:
        """Yield each pair of settings that cannot both be honoured, with the way out."""
        optim, parts = self.optim, self.world_size * self.optim.accumulate
        if optim.batch_size % parts:
            below, above = optim.batch_size // parts * parts, -(-optim.batch_size // parts) * parts
            yield (
                f"optim.batch_size is {optim.batch_size}, which {self.world_size} devices x {optim.accumulate} parts "
                f"do not divide; take {f'{below} or ' if below else ''}{above}"
            )
        if optim.min_lr > self.lr:
            yield f"optim.min_lr is {optim.min_lr:g}, above the peak learning rate of {self.lr:g}"
        if optim.warmup_epochs and optim.warmup_lr > self.lr:
            yield f"optim.warmup_lr is {optim.warmup_lr:g}, above the peak learning rate of {self.lr:g}"
        if self.compute.strategy == "fsdp" and self.world_size == 1:
            yield "compute.strategy=fsdp needs several devices; raise compute.devices"
        if self.compute.precision == "16" and self.compute.device == "cpu":
            yield "compute.precision=16 is for GPUs; take bf16 or 32 on the CPU"


C = TypeVar("C", bound=RunConfig)


def check_config(config: C) -> C:
    """Return the config if every setting is in its range and none contradicts another.

    Raises:
        ConfigError: naming all that are not, and all that do.
    """
    _refuse([*_range_problems(config, ""), *config.contradictions()], "The settings")
    return config


def write_config(config: RunConfig, path: Path) -> None:
    """Write a config as a YAML file.

    Raises:
        ExportError: the file cannot be written.
    """
    write_atomic(path, f"# All settings of this run.\n{to_yaml(config)}".encode())


def to_yaml(config: RunConfig) -> str:
    """Return a config as YAML, every setting included."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def build_config(kind: type[C], content: Any, *, source: str = "The settings") -> C:
    """Build a config from nested dictionaries; settings that are left out take their defaults.

    Args:
        kind: of the task.
        content: what ``dataclasses.asdict`` gives and YAML holds.
        source: how to call it in messages.

    Raises:
        ConfigError: naming at once all unknown keys, wrong types and values out of range.
    """
    problems: list[str] = []
    config = _build(kind, content, "", problems)
    if config is not None:
        problems += _range_problems(config, "")
    _refuse(problems, source)
    assert isinstance(config, kind)
    return config


def _build(kind: type, content: Any, prefix: str, problems: list[str]) -> Any:
    """Return an instance of a dataclass; None, and the reason among the problems, where it cannot be."""
    if not isinstance(content, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'the whole'} is {content!r}; it must be settings by name")
        return None
    hints = _hints(kind)
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


def _hints(kind: type, *, extras: bool = False) -> dict[str, Any]:
    """Return the types of a dataclass's fields, without its class variables."""
    hints = get_type_hints(kind, include_extras=extras)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _typed(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, str):  # PyYAML takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if type(value) is int and type(allowed[0]) is str:  # YAML takes precision: 16 for a number
            value = str(value)
        if value in allowed and type(value) is type(allowed[0]):
            return value
        problems.append(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
        return None
    if get_origin(kind) is dict and get_args(kind)[1] is float:
        return _numbers(value, name, problems)
    if get_origin(kind) is dict:
        if isinstance(value, Mapping) and all(type(v) in (bool, int, float, str) for v in value.values()):
            return dict(value)
        problems.append(f"{name} is {value!r}; it must be numbers, words or true/false by name")
        return None
    if type(value) is kind:
        return value
    word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    problems.append(f"{name} is {value!r}; it must be {word}")
    return None


def _numbers(value: Any, name: str, problems: list[str]) -> dict[str, float] | None:
    if not isinstance(value, Mapping):
        problems.append(f"{name} is {value!r}; it must be numbers by name")
        return None
    numbers = {str(key): _typed(float, number, f"{name}.{key}", problems) for key, number in value.items()}
    return None if None in numbers.values() else numbers


def _range_problems(config: Any, prefix: str) -> Iterator[str]:
    for name, hint in _hints(type(config), extras=True).items():
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


def override(config: C, changes: Mapping[str, Any], *, source: str = "The settings") -> C:
    """Return a config with some settings replaced.

    Args:
        config: the settings to begin with.
        changes: values by dotted name, such as ``{"optim.lr": 1e-3}``; a text is read as YAML reads it where the
            setting is not text itself.
        source: how to call them in messages.

    Raises:
        ConfigError: naming at once all unknown names and wrong types. Ranges and contradictions are for
            ``check_config``, when all settings are known.
    """
    content = dataclasses.asdict(config)
    problems: list[str] = []
    names = dict(_setting_names(type(config), ""))
    for name, value in changes.items():
        *parts, last = name.split(".")
        open_ended = get_origin(names.get(".".join(parts))) is dict  # model.options.depth
        if name not in names and not open_ended:
            same = [known for known in names if known.endswith(f".{last}")]
            near = same or difflib.get_close_matches(name, names, n=1)
            problems.append(f"{name} is unknown" + (f" (did you mean {near[0]}?)" if near else ""))
            continue
        place = content
        for part in parts:
            place = place[part]
        textual = not open_ended and _is_text(names[name])
        place[last] = _from_text(value) if isinstance(value, str) and not textual else value
    changed = _build(type(config), content, "", problems)
    if problems and changed is not None:
        problems += _range_problems(changed, "")  # all at once
    _refuse(problems, source)
    assert isinstance(changed, type(config))
    return changed


def _from_text(text: str) -> Any:
    """Return what YAML reads; the text itself, which will not fit, where it reads nothing."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _setting_names(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in _hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _setting_names(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", hint
