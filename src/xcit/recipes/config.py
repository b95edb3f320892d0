"""What a training run needs to be told, as typed and checked settings, and their YAML form on disk."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

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
class ModelConfig:
    """Which model, and the weights it begins with. Its classes follow from the data."""

    name: str = "xcit_small_12_p16"
    """An XCiT architecture (``xcit models``), or a peer from timm as timm:NAME."""
    pretrained: str = "none"
    """Initial weights: none (random), released (the architecture's own), a released checkpoint's name, or a file."""
    drop_path_rate: Annotated[float, Range(0, 0.9)] = 0.0
    """Stochastic depth of every XCA block."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    surgery: str = "none"
    """Copy the patch embedding from this checkpoint (name or file) and freeze it: steadies very large models."""
    variant: str = "none"
    """Ablation: what of the architecture is replaced (``xcit.models.variants``)."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Other arguments of the model's class, such as depth."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at which size."""

    root: str = ""
    """Folder, CSV file, pattern of tar shards, or the local copy of a named data set; empty for the embedded digits."""
    format: Literal[
        "auto", "folder", "csv", "shards", "cifar10", "cifar100", "flowers102", "stanford_cars", "inat18", "inat19",
        "digits",
    ] = "auto"  # fmt: skip
    """What lies there; auto finds out a folder, a CSV or shards."""
    download: bool = False
    """Fetch a named data set if it is not there."""
    val_fraction: Annotated[float, Range(0.01, 0.5)] = 0.1
    """Share of the training images to choose by, where the data has no validation part of its own; stratified."""
    split_seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Which images those are."""
    image_size: Annotated[int, Range(8, 4096)] = 224
    """Pixels a side of what the model sees."""
    in_chans: Literal[1, 3] = 3
    """Channels: 3, or 1 for grey images."""
    crop_pct: Annotated[float, Range(0.1, 1)] = 1.0
    """Share of the resized image that evaluation crops; 1 is the paper's protocol."""
    normalize: Literal["weights", "data"] = "weights"
    """Mean and standard deviation: of the initial weights (random ones: ImageNet's), or measured on the images."""
    max_bad_fraction: Share = 0.1
    """Stop if more than this share of the images cannot be decoded; fewer are skipped and listed."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weigh rare classes up in the loss."""
    num_workers: Annotated[int, Range(-1, 256)] = -1
    """Processes a device that prepare images; -1 takes as many as the machine has cores to spare, 0 none."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How each training image is distorted anew in every epoch."""

    crop: Literal["resized", "pad", "none"] = "resized"
    """A random part, resized; a shift within a border of 4 pixels (small images); or the whole, as in evaluation."""
    min_area: Annotated[float, Range(0.01, 1)] = 0.08
    """Smallest share of the image that a random part has."""
    hflip: Share = 0.5
    """Probability of mirroring left and right."""
    vflip: Share = 0.0
    """Probability of mirroring top and bottom."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; empty for none."""
    color_jitter: Annotated[float, Range(0, 1)] = 0.4
    """Brightness, contrast and saturation by up to this factor; RandAugment takes its place where both are given."""
    degrees: Annotated[float, Range(0, 180)] = 0.0
    """Rotation by up to so many degrees either way."""
    translate: Annotated[float, Range(0, 0.5)] = 0.0
    """Shift by up to this share of the side."""
    scale: Annotated[float, Range(0, 0.9)] = 0.0
    """Zoom by up to this share, in or out."""
    shear: Annotated[float, Range(0, 60)] = 0.0
    """Shear by up to so many degrees, in both directions."""
    erase: Share = 0.25
    """Probability that a rectangle is painted over with noise."""
    mixup: Annotated[float, Range(0, 10)] = 0.8
    """Alpha of the Beta distribution that pairs of images are mixed by; 0 does not mix."""
    cutmix: Annotated[float, Range(0, 10)] = 1.0
    """Likewise, for pasting a rectangle of the other image; 0 does not paste."""
    mix_prob: Share = 1.0
    """Share of the batches that are mixed or pasted."""
    cutmix_share: Share = 0.5
    """Of these, how many are pasted where both are on."""
    repeats: Annotated[int, Range(1, 16)] = 3
    """Repeated augmentation: how often an image is drawn in an epoch; an epoch keeps its length, so that it sees
    only so many of all images."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and loss."""

    opt: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov's momentum 0.9."""
    batch_size: Annotated[int, Range(1, 1 << 20)] = 1024
    """Images a step, over all devices and accumulated gradients together."""
    accumulate: Annotated[int, Range(1, 1024)] = 1
    """Parts in which a device computes its share of the batch, to save memory."""
    lr: Annotated[float, Range(0, 1e3)] = 5e-4
    """Peak learning rate, at lr_batch images a step."""
    lr_batch: Annotated[int, Range(0, 1 << 20)] = 512
    """The peak of this run is lr · batch_size / lr_batch; 0: lr itself."""
    min_lr: Annotated[float, Range(0, 1e3)] = 1e-5
    """Where the cosine ends."""
    warmup_epochs: Annotated[float, Range(0, 1000)] = 5.0
    """Length of the linear rise, by the step."""
    warmup_lr: Annotated[float, Range(0, 1e3)] = 1e-6
    """Where it begins."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    """Of matrices, kernels and, as in the released code, temperatures (``xcit.tasks.optim``)."""
    label_smoothing: Annotated[float, Range(0, 0.9)] = 0.1
    """Share of the target that is spread over all classes."""
    clip_grad: Annotated[float, Range(0, 1e6)] = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: Annotated[float, Range(0, 0.9999999)] = 0.0
    """Decay a step of the averaged weights, which are evaluated beside the raw ones; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a teacher."""

    kind: Literal["none", "hard", "soft"] = "none"
    """The teacher's most probable class (the paper's), or its whole distribution."""
    teacher: str = "timm:regnety_160.deit_in1k"
    """timm:NAME, timm:NAME=FILE, a released XCiT checkpoint's name, or a file that xcit wrote."""
    alpha: Share = 0.5
    """Weight of the teacher's part of the loss."""
    tau: Annotated[float, Range(0.01, 100)] = 1.0
    """Temperature of the soft distribution."""


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
class TrainConfig:
    """A complete training run. Together with the version of the package it decides what comes out."""

    recipe: str
    """Name of the recipe that these settings began as."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of the initial weights, the order of the images and all augmentation."""
    epochs: Annotated[int, Range(1)] = 400
    """Passes over the training images."""
    patience: Annotated[int, Range(0)] = 0
    """Stop after so many epochs without a better validation figure; 0 never."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    log: LogConfig = field(default_factory=LogConfig)

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
        optim, augment, compute, data = self.optim, self.augment, self.compute, self.data
        parts = self.world_size * optim.accumulate
        if optim.batch_size % parts:
            below, above = optim.batch_size // parts * parts, -(-optim.batch_size // parts) * parts
            yield (
                f"optim.batch_size is {optim.batch_size}, which {self.world_size} devices x {optim.accumulate} parts "
                f"do not divide; take {f'{below} or ' if below else ''}{above}"
            )
        if (augment.mixup or augment.cutmix) and augment.mix_prob and self.micro_batch_size % 2:
            yield (
                f"mixup pairs the images of a batch, and {self.micro_batch_size} on a device are odd; take an even "
                f"number, or augment.mixup=0 augment.cutmix=0"
            )
        if data.class_weights != "none" and (augment.mixup or augment.cutmix) and augment.mix_prob:
            yield "data.class_weights needs hard targets, but mixup and cutmix make soft ones; switch one of them off"
        if optim.min_lr > self.lr:
            yield f"optim.min_lr is {optim.min_lr:g}, above the peak learning rate of {self.lr:g}"
        if optim.warmup_epochs and optim.warmup_lr > self.lr:
            yield f"optim.warmup_lr is {optim.warmup_lr:g}, above the peak learning rate of {self.lr:g}"
        if optim.warmup_epochs >= self.epochs and optim.warmup_epochs:
            yield (
                f"optim.warmup_epochs is {optim.warmup_epochs:g} of {self.epochs} epochs in all; raise --epochs, or "
                f"lower optim.warmup_epochs"
            )
        if self.distill.kind != "none" and self.distill.alpha == 0:
            yield "distill.alpha is 0, so that the teacher is not listened to; raise it, or set distill.kind to none"
        if self.distill.kind != "soft" and self.distill.tau != 1:
            yield f"distill.tau is {self.distill.tau:g}, which only distill.kind=soft uses; leave it at 1"
        if compute.strategy == "fsdp" and optim.ema_decay:
            yield "compute.strategy=fsdp shards the weights, so that optim.ema_decay cannot average them; set it to 0"
        if compute.strategy == "fsdp" and optim.clip_grad:
            yield "compute.strategy=fsdp shards the gradient, whose norm optim.clip_grad would need; set it to 0"
        if compute.strategy == "fsdp" and self.world_size == 1:
            yield "compute.strategy=fsdp needs several devices; raise compute.devices"
        if compute.precision == "16" and compute.device == "cpu":
            yield "compute.precision=16 is for GPUs; take bf16 or 32 on the CPU"
        if self.model.pretrained != "none" and self.model.variant != "none":
            yield "model.variant changes the architecture, which model.pretrained has no weights for; drop one"
        if self.model.name.startswith("timm:") and (self.model.surgery != "none" or self.model.variant != "none"):
            yield "model.surgery and model.variant are for XCiT; drop them for a model of timm"
        if data.format == "digits" and data.root:
            yield "data.format=digits is the embedded set; drop data.root, or write it out by xcit data digits"
        if data.format != "digits" and not data.root:
            yield "data.root is empty; name the images with --data"
        if data.download and data.format in ("auto", "folder", "csv", "shards", "digits"):
            yield f"data.download is for named data sets; data.format is {data.format}"


def check_config(config: TrainConfig) -> TrainConfig:
    """Return the config if every setting is in its range and none contradicts another.

    Raises:
        ConfigError: naming all that are not, and all that do.
    """
    _refuse([*_range_problems(config, ""), *config.contradictions()], "The settings")
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
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if type(value) is int and type(allowed[0]) is str:  # YAML takes precision: 16 for a number
            value = str(value)
        if value in allowed and type(value) is type(allowed[0]):
            return value
        problems.append(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
        return None
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


def override(config: TrainConfig, changes: Mapping[str, Any], *, source: str = "The settings") -> TrainConfig:
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
    names = dict(_setting_names(TrainConfig, ""))
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
    changed = _build(TrainConfig, content, "", problems)
    if problems and changed is not None:
        problems += _range_problems(changed, "")  # all at once
    _refuse(problems, source)
    assert isinstance(changed, TrainConfig)
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
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _setting_names(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", hint
