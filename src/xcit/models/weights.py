"""Weights into and out of a model: strict, in any dialect, with an error that says what is wrong.

``save_checkpoint`` writes one safetensors file that describes itself; ``load_checkpoint`` reads that and every released
dialect (``xcit.models.dialects``) into a model that exists. ``xcit.models.factory.create_model`` builds the model too.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from xcit.errors import CheckpointError, ConfigError
from xcit.models.dialects import Layout, Network, State, layout_of, to_official
from xcit.models.download import download, is_url, verify_sha256
from xcit.models.storage import read_file, write_safetensors
from xcit.models.xcit import XCiT
from xcit.models.zoo import CHECKPOINTS, IMAGENET_MEAN, IMAGENET_STD, Checkpoint

FORMAT_VERSION = 1
"""Of the metadata that ``save_checkpoint`` writes; raised when an older xcit could not read a newer file."""

DESCRIPTION = "xcit"
"""Where a pickle of ours holds its ``description``; safetensors have metadata."""

_VERSION_KEY, _CONFIG_KEY, _CFG_KEY = "xcit.format_version", "xcit.config", "xcit.pretrained_cfg"
_FIRST_CONV = "patch_embed.proj.0.0.weight"
_SILENT_OPTIONS = ("tokens_norm", "global_pool")
"""Options that change what a model computes but not the names or shapes of its weights."""

_log = logging.getLogger("xcit")


@runtime_checkable
class HasCfg(Protocol):
    """Something that can say how it prepares images, such as ``xcit.data.preprocess.Preprocessing``."""

    def to_cfg(self) -> dict[str, Any]:
        """Return ``pretrained_cfg``'s keys about images: input_size, mean, std, interpolation, crop_pct."""


@dataclass(frozen=True)
class WeightFile:
    """Weights that were read, under the released names, with all that the file says about them."""

    name: str
    """As the caller gave it, for messages."""
    state: State
    dialect: str
    layout: Layout | None
    config: dict[str, Any] | None = None
    """The model's arguments, where the file holds them."""
    cfg: dict[str, Any] | None = None
    """Its ``pretrained_cfg``, likewise."""
    projection: State = field(default_factory=dict)
    """DINO's projection head, where the file holds one beside the backbone."""


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: HasCfg | Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to one safetensors file from which ``create_model(path)`` rebuilds it alone.

    The file holds every parameter and buffer in its own dtype and, in its metadata, the architecture, the names of the
    classes and the preparation of images. It appears whole or not at all.

    Args:
        model: an ``XCiT``; compiled or distributed wrappers around it are looked through.
        path: ends in ``.safetensors``; an existing file is replaced.
        class_names: one name a class, in the order of the logits. None keeps those of ``model.pretrained_cfg``.
        preprocessing: how images were prepared in training, or a dictionary with ``pretrained_cfg``'s keys. None keeps
            what ``model.pretrained_cfg`` says.

    Returns:
        The path.

    Raises:
        ConfigError: not an XCiT, another suffix, or class names that are not as many as the classes.
        CheckpointError: weights that are not finite, a full disk, no permission; the former file stays as it was.
    """
    model = bare(model)
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path.name} does not end in .safetensors, the format that xcit writes; name it so.")
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ConfigError("The model is on the meta device: it has shapes but no weights to save.")
    refuse_not_finite(state, "The model", "it is not saved, and a file under that name stays as it was")

    cfg = dict(model.pretrained_cfg)
    if preprocessing is not None:
        cfg.update(preprocessing if isinstance(preprocessing, Mapping) else preprocessing.to_cfg())
    if class_names is not None:
        if len(class_names) != model.num_classes:
            raise ConfigError(f"There are {len(class_names)} class_names; the model has {model.num_classes} classes.")
        cfg.update(class_names=[str(name) for name in class_names], label_set=None)
    elif len(cfg.get("class_names") or ()) not in (0, model.num_classes):
        cfg.update(class_names=None, label_set=None)  # of a former classifier
    if cfg:
        known = layout_of(state)
        architecture = known.architecture.id if known and known.architecture else None
        cfg = {"label_set": None, "class_names": None, "checkpoint": None, "architecture": architecture} | cfg
    write_safetensors(path, state, {"format": "pt"} | description(model.config, cfg))
    return path


def description(config: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, str]:
    """Return what a file says of its model, for ``read_weights`` to find: a safetensors file in its metadata.

    Args:
        config: the model's arguments.
        cfg: its ``pretrained_cfg``.
    """
    return {_VERSION_KEY: str(FORMAT_VERSION), _CONFIG_KEY: json.dumps(config), _CFG_KEY: json.dumps(cfg)}


def load_checkpoint(
    model: nn.Module,
    path_or_url: str | Path,
    *,
    keep_head: bool = False,
    dino_network: Network | None = None,
    ema: bool = False,
    sha256: str | None = None,
) -> None:
    """Load weights into a model, all of them or none.

    Reads what ``save_checkpoint`` wrote and the dialects of the released code, DINO, timm and mmpretrain; prefixes and
    wrappers around the weights are looked through. Values are converted to the model's dtype and device.
    ``model.pretrained_cfg`` then describes them: from the file's metadata, from the zoo where the file bears the name
    of a released one, else XCiT's common preparation with no class names.

    Args:
        model: an ``XCiT``; compiled or distributed wrappers around it are looked through.
        path_or_url: a local file, or an http(s) address, which is downloaded once.
        keep_head: leave the model's classifier as it is, and the file's aside, whatever their sizes.
        dino_network: of a DINO training checkpoint, "teacher" (what None means) or "student".
        ema: of a training checkpoint, take the moving average of the weights instead of the weights.
        sha256: refuse a file with another checksum (hexadecimal, or its first 8 digits or more).

    Raises:
        CheckpointError: the file cannot be read or is not safe to read, or its weights do not fit; the message names
            the first keys that do not, and the architecture that the file looks like. The model is left as it was.
    """
    model = bare(model)
    file = read_weights(path_or_url, dino_network=dino_network, ema=ema, sha256=sha256)
    fit(model, file, keep_head=keep_head)


def read_weights(
    path_or_url: str | Path,
    *,
    dino_network: Network | None = None,
    ema: bool = False,
    sha256: str | None = None,
) -> WeightFile:
    """Read a file's weights, whatever its format and dialect; the arguments are those of ``load_checkpoint``."""
    name = str(path_or_url)
    path = download(name, sha256=sha256) if is_url(name) else Path(path_or_url).expanduser()
    stored = read_file(path)
    if sha256 is not None and not is_url(name):
        verify_sha256(path, sha256)
    weights = to_official(stored.content, name=name, dino_network=dino_network, ema=ema)
    if weights.has_average:
        _log.info("%s also holds a moving average of its weights; ema=True would take that.", name)
    own = stored.content.get(DESCRIPTION) if isinstance(stored.content, Mapping) else None
    config, cfg = read_description(own if isinstance(own, Mapping) else stored.metadata, name)
    return WeightFile(name, weights.state, weights.dialect, layout_of(weights.state), config, cfg, weights.projection)


def fit(model: XCiT, file: WeightFile, *, keep_head: bool = False, overridden: Collection[str] = ()) -> None:
    """Copy weights into a model if every name and shape agrees; otherwise leave it alone and say what does not.

    Args:
        model: what to fill.
        file: what ``read_weights`` returned.
        keep_head: see ``load_checkpoint``.
        overridden: options of the model that the caller chose knowingly against those in the file.
    """
    ours, theirs = model.config["variant"], (file.config or {}).get("variant", "none")
    if ours != theirs and "variant" not in overridden and (file.config or file.layout):
        named = {name: "a plain XCiT" if name == "none" else f"the variant {name}" for name in (ours, theirs)}
        raise CheckpointError(
            f"{file.name} is {named[theirs]}, the model is {named[ours]}: its weights would not fit, or compute "
            f"something else. Build the model with variant={theirs!r}."
        )
    expected, given = model.state_dict(), dict(file.state)
    if keep_head:
        expected, given = ({k: t for k, t in d.items() if not k.startswith("head.")} for d in (expected, given))
    if expected.keys() != given.keys() or any(expected[key].shape != given[key].shape for key in expected):
        raise CheckpointError(_misfit(file, given, expected))
    for option in _SILENT_OPTIONS:
        ours, theirs = model.config[option], (file.config or model.config).get(option)
        if ours != theirs and option not in overridden:
            raise CheckpointError(
                f"{file.name} was saved with {option}={theirs!r}, the model has {option}={ours!r}: its weights would "
                f"fit but compute something else. Build the model with {option}={theirs!r}."
            )
    for key, tensor in given.items():
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise CheckpointError(f"{file.name}: {key} is stored as {tensor.dtype}, not as floating-point weights.")
    refuse_not_finite(given, file.name, "training has diverged or the file is damaged; use an earlier one")

    stored = {tensor.dtype for tensor in given.values() if tensor.is_floating_point()}
    own = {tensor.dtype for tensor in expected.values() if tensor.is_floating_point()}
    if stored != own:
        names = (" and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) for dtypes in (stored, own))
        _log.info("%s stores %s; converted to the model's %s.", file.name, *names)
    with torch.no_grad():
        for key, tensor in given.items():
            expected[key].copy_(tensor)
    model.pretrained_cfg = _cfg_of(file, model, keep_head)
    _log.debug("%s: %d tensors, dialect %s.", file.name, len(given), file.dialect)


def released_cfg(released: Checkpoint, layout: Layout | None) -> dict[str, Any]:
    """Return a released file's ``pretrained_cfg``; weights with another number of classes have not its names."""
    cfg = released.pretrained_cfg
    classes = {"imagenet-1k": 1000, None: 0}
    if layout and layout.num_classes != classes.get(cfg["label_set"]):
        cfg["label_set"] = None
    return cfg


def _cfg_of(file: WeightFile, model: XCiT, keep_head: bool) -> dict[str, Any]:
    architecture = file.layout.architecture if file.layout else None
    released = CHECKPOINTS.get(Path(file.name).stem)
    if file.cfg is not None:
        cfg = dict(file.cfg)
    elif released and architecture and released.architecture == architecture.id:
        _log.info("%s is taken for the released file of that name.", file.name)
        cfg = released_cfg(released, file.layout)
    else:
        _log.info("%s does not say how to prepare images; XCiT's common way at 224 px is assumed.", file.name)
        cfg = {
            "input_size": [3, 224, 224],
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "label_set": None,
            "class_names": None,
            "checkpoint": None,
            "architecture": architecture.id if architecture else None,
        }
    if keep_head:
        cfg.update(label_set=None, class_names=None)
    return cfg


def read_description(metadata: Mapping[str, Any], name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return what ``description`` wrote: a model's arguments and its ``pretrained_cfg``; None where nothing is.

    Raises:
        CheckpointError: damaged, or of a newer version than this one reads.
    """
    if _VERSION_KEY not in metadata:
        return None, None
    try:
        version = int(metadata[_VERSION_KEY])
        config, cfg = json.loads(metadata[_CONFIG_KEY]), json.loads(metadata[_CFG_KEY])
    except (KeyError, TypeError, ValueError) as err:
        raise CheckpointError(f"{name} has damaged xcit metadata ({err}); save or download it again.") from err
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has format version {version}; this xcit reads up to {FORMAT_VERSION}. Update xcit to read it."
        )
    return config, cfg


def bare(model: nn.Module, *, or_folded: bool = False) -> XCiT:
    """Return the model inside the wrappers of ``torch.compile`` and data-parallel training.

    Args:
        model: an ``XCiT``, wrapped or not.
        or_folded: accept what ``xcit.deploy.fold`` made of one too, which has its attributes and its forward pass, but
            neither its weights nor its other methods.

    Raises:
        ConfigError: something else.
    """
    while not (isinstance(model, XCiT) or (or_folded and getattr(model, "is_folded_xcit", False))):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            cure = " Use the model that it was folded from." if getattr(model, "is_folded_xcit", False) else ""
            raise ConfigError(f"Expected an XCiT model, got {type(model).__name__}.{cure}")
        model = inner
    return model  # type: ignore[return-value]


def refuse_not_finite(state: Mapping[str, Tensor], name: str, advice: str) -> None:
    """Raise CheckpointError if a value is NaN or infinite, naming the first tensor."""
    bad = [k for k, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{name} has NaN or infinite values in {len(bad)} tensors (first: {bad[0]}); {advice}.")


def _misfit(file: WeightFile, given: State, expected: State) -> str:
    """Say why weights do not fit, the likeliest cause first, and what to do."""
    name, theirs, ours = file.name, file.layout, layout_of(expected)
    if theirs is None or ours is None:
        first = ", ".join(repr(key) for key in list(given)[:3])
        return f"{name} holds no XCiT: its keys begin with {first}."
    facts = differences(given, expected)
    if (theirs.architecture, str(theirs)) != (ours.architecture, str(ours)):
        cure = (
            f" create_model({theirs.architecture.id!r}, pretrained={name!r}) builds the model that it fits."
            if theirs.architecture
            else ""
        )
        return f"{name} is another architecture: it looks like {theirs}, the model is {ours}. {facts}{cure}"
    wrong = {key for key in given.keys() | expected.keys() if _shape(given, key) != _shape(expected, key)}
    if all(key.startswith("head.") for key in wrong):
        return f"{name} {_head_misfit(theirs, ours)}"
    if wrong == {_FIRST_CONV}:
        return (
            f"{name} is for images of {theirs.in_chans} channels, the model for {ours.in_chans}. "
            f"create_model(..., pretrained={name!r}, in_chans={ours.in_chans}) adapts the first convolution."
        )
    missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    problem = "does not fit the model"
    if not unexpected and missing == wrong:
        problem = "lacks weights that the model needs"
    elif not missing and unexpected == wrong:
        problem = "has weights that the model does not know"
    return f"{name} {problem}, though both look like {theirs}. {facts}"


def _head_misfit(theirs: Layout, ours: Layout) -> str:
    if not theirs.num_classes:
        return (
            f"is a backbone without a classifier, the model has one for {ours.num_classes} classes. Build the model "
            "with num_classes=0, or pass keep_head=True to leave its own (untrained) classifier in place."
        )
    if not ours.num_classes:
        return (
            f"has a classifier for {theirs.num_classes} classes, the model has none. "
            f"Pass keep_head=True to leave the file's aside, or build the model with num_classes={theirs.num_classes}."
        )
    return (
        f"has a classifier for {theirs.num_classes} classes, the model one for {ours.num_classes}. Pass num_classes to "
        "create_model together with pretrained, or keep_head=True here, to leave the file's aside."
    )


def differences(given: State, expected: State) -> str:
    """How many keys fit, and the first of each kind that do not."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    other = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    facts = [f"{len(expected) - len(missing) - len(other)} of {len(expected)} keys fit"]
    if missing:
        facts.append(f"{len(missing)} missing (first: {missing[0]})")
    if unexpected:
        facts.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    if other:
        shapes = f"{_shape(given, other[0])} in the file, {_shape(expected, other[0])} in the model"
        facts.append(f"{len(other)} of another shape (first: {other[0]}, {shapes})")
    return ", ".join(facts) + "."


def _shape(state: State, key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
