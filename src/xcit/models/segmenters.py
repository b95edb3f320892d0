"""Segmenters by name, and as files: one verb for architectures, released weights and own files."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from xcit.errors import CheckpointError, ConfigError, UnknownNameError, XCiTError
from xcit.models.dense_backbone import dense_backbone
from xcit.models.dialects import State
from xcit.models.download import download, is_url, verify_sha256
from xcit.models.mmdet_files import is_mmdet
from xcit.models.mmseg_files import SIZES, from_mmseg, shown
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmentation import SegmentationModel, pixel_classifier
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.storage import read_file, write_safetensors
from xcit.models.upernet import UperNet
from xcit.models.weights import description, differences, read_description, refuse_not_finite
from xcit.models.xcit import XCiT
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS, Architecture, find

TASK = "segmentation"
"""What the description of a segmenter's file calls it."""
HEADS: dict[str, type[UperNet] | type[SemanticFPN]] = {"upernet": UperNet, "sem_fpn": SemanticFPN}
"""The kinds of segmenters, under the names with which the released files' names begin."""
_BACKBONE_OPTIONS = tuple(n for n in inspect.signature(XCiT).parameters if n != "num_classes")

_log = logging.getLogger("xcit")


class SegmenterFile(NamedTuple):
    """A segmenter's weights under this package's names, with what the file says and shows about them."""

    name: str
    """As the caller gave it, for messages."""
    state: State
    config: dict[str, Any]
    """``SegmentationModel.config``: stated by our own files, else read off the shapes."""
    cfg: dict[str, Any]
    """``pretrained_cfg``."""


def create_segmenter(
    name: str | Path,
    pretrained: bool | str | Path = False,
    num_classes: int | None = None,
    *,
    head: str | None = None,
    backbone: bool | str | Path = False,
    **options: Any,
) -> SegmentationModel:
    """Build a UperNet or a Semantic FPN on an XCiT: with released weights, weights from a file, or to be trained.

    Args:
        name: what to build:

            * an architecture (``xcit_small_12_p16``);
            * a released segmenter (``upernet_xcit_small_12_p16``, ``sem_fpn_xcit_small_12_p16``);
            * a ``.safetensors`` file that ``save_segmenter`` wrote, which holds everything.

        pretrained: True for the released segmenter, the architecture's own. Or the path or address of a file with a
            segmenter's weights, ours or mmsegmentation's. Own files bring theirs: leave it out there.
        num_classes: None means as many as the weights have, or 150. Another number than the weights' gets new, random
            last layers.
        head: "upernet" or "sem_fpn". None means what the name or the weights say, or "upernet".
        backbone: initial weights of the backbone alone: True for the architecture's released classifier, a released
            checkpoint's name, or a file, of a classifier, of DINO, or of a detector or a segmenter, whose heads are
            left aside. Not together with ``pretrained``.
        **options: other arguments of ``UperNet`` or ``SemanticFPN`` (``channels``, ``dropout``, ...), ``taps``, and
            arguments of ``XCiT`` (``drop_path_rate``, ...).

    Returns:
        The segmenter, in training mode as PyTorch builds modules. ``pretrained_cfg`` names its classes.

    Raises:
        UnknownNameError: no such name, or no such head.
        ConfigError: unknown options, values out of range, weights asked for twice, or a head that the name is not of.
        CheckpointError: weights that cannot be had or do not fit.
    """
    if head is not None and head not in HEADS:
        raise UnknownNameError("head", str(head), HEADS, f"There are {' and '.join(HEADS)}.")
    name = os.fspath(name)
    if Path(name).suffix or "/" in name or os.sep in name or is_url(name):
        if pretrained is not False or backbone is not False:
            raise ConfigError(f"{name} brings its own weights; leave pretrained and backbone out.")
        return _with_weights(read_segmenter(name), num_classes, head, options)
    architecture, released = find(name)
    if released is not None:
        head = _head_of(name, released.task, architecture, head)
    if pretrained is not False:
        if backbone is not False:
            raise ConfigError("pretrained brings a whole segmenter's weights, the backbone's too; leave backbone out.")
        file = _released(architecture, head or UperNet.head) if pretrained is True else read_segmenter(pretrained)
        _check_architecture(file, architecture, options)
        return _with_weights(file, num_classes, head, options)
    kind = HEADS[head or UperNet.head]
    own, overrides = _sorted_options(options, kind)
    pyramid = dense_backbone(architecture, backbone, overrides, taps=own.pop("taps", None), whole="segmenter")
    own = {key: pyramid.pretrained_cfg[key] for key in ("mean", "std") if pyramid.pretrained_cfg.get(key)} | own
    return kind(pyramid, 150 if num_classes is None else num_classes, **own)


def save_segmenter(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    palette: Iterable[Sequence[int]] | None = None,
) -> Path:
    """Write a segmenter to one safetensors file from which ``create_segmenter(path)`` rebuilds it alone.

    Args:
        model: a ``UperNet`` or a ``SemanticFPN``.
        path: ends in ``.safetensors``; an existing file is replaced, whole or not at all.
        class_names: one a class; None keeps those of ``model.pretrained_cfg``.
        palette: a colour (red, green, blue, each 0 to 255) a class, a list or an array (K, 3); None likewise.

    Returns:
        The path.

    Raises:
        ConfigError: not a segmenter, another suffix, or names or colours that are not as many as the classes.
        CheckpointError: weights that are not finite, a full disk, no permission; a former file stays as it was.
    """
    if not isinstance(model, SegmentationModel):
        raise ConfigError(
            f"Expected a UperNet or a SemanticFPN, got {type(model).__name__}; save_checkpoint writes classifiers, "
            f"save_detector detectors."
        )
    if not isinstance(model.backbone, XCiTPyramid):
        raise ConfigError("The model is folded, which its file could not say; save the one that it was folded from.")
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path.name} does not end in .safetensors, the format that xcit writes; name it so.")
    state, K = model.state_dict(), model.num_classes
    if any(tensor.is_meta for tensor in state.values()):
        raise ConfigError("The model is on the meta device: it has shapes but no weights to save.")
    cfg = dict(model.pretrained_cfg)
    if class_names is not None:
        cfg |= {"class_names": list(class_names), "label_set": None}
    if palette is not None:
        cfg["palette"] = list(palette)
    if cfg.get("class_names") is not None:
        cfg["class_names"] = [str(name) for name in cfg["class_names"]]
    if cfg.get("palette") is not None:
        cfg["palette"] = [_colour(colour) for colour in cfg["palette"]]
    for key in ("class_names", "palette"):
        if cfg.get(key) is not None and len(cfg[key]) != K:
            raise ConfigError(f"There are {len(cfg[key])} entries in {key}; the model has {K} classes.")
    refuse_not_finite(state, "The model", "it is not saved, and a file under that name stays as it was")
    write_safetensors(path, state, {"format": "pt"} | description({"task": TASK} | model.config, cfg))
    return path


def read_segmenter(path_or_url: str | Path, *, sha256: str | None = None) -> SegmenterFile:
    """Read a segmenter's file, ours or mmsegmentation's.

    A file that does not describe itself but bears the name of a released one, and looks like it, is taken for that.

    Args:
        path_or_url: a local file, or an http(s) address, which is downloaded once.
        sha256: refuse a file with another checksum (hexadecimal, or its first 8 digits or more).

    Raises:
        CheckpointError: the file cannot be read or is not safe to read, or holds no segmenter on an XCiT.
    """
    name = str(path_or_url)
    path = download(name, sha256=sha256) if is_url(name) else Path(path_or_url).expanduser()
    stored = read_file(path)
    if sha256 is not None and not is_url(name):
        verify_sha256(path, sha256)
    state, said = from_mmseg(stored.content, name)
    config, cfg = read_description(stored.metadata, name)
    described = isinstance(config, dict) and config.get("task") == TASK  # then the weights need not look like XCiT's
    found = config if described else shown(state)
    if found is None:
        if is_mmdet(state) or (isinstance(config, dict) and config.get("task") == "detection"):
            raise CheckpointError(f"{name} holds a detector; xcit.create_detector({name!r}) builds it.")
        first = ", ".join(repr(key) for key in list(state)[:3])
        raise CheckpointError(f"{name} holds no UperNet or Semantic FPN on an XCiT: its keys begin with {first}.")
    refuse_not_finite(state, name, "training has diverged or the file is damaged; use an earlier one")
    if not described:
        return SegmenterFile(name, state, found, said | _released_cfg(name, found))
    cfg = cfg or {}
    _check_description(found, cfg, name)
    return SegmenterFile(name, state, {k: v for k, v in found.items() if k != "task"}, cfg)


def reset_classes(model: SegmentationModel, num_classes: int) -> None:
    """Give a segmenter new, random last layers for other classes; all else stays.

    Raises:
        ConfigError: fewer than two classes.
    """
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; it must be 2 or more.")
    for part in (model.decode_head, model.auxiliary_head):
        if part is not None:
            old = part.conv_seg
            part.conv_seg = pixel_classifier(old.in_channels, num_classes).to(old.weight.device, old.weight.dtype)
    model.num_classes = model.config["num_classes"] = num_classes
    model.pretrained_cfg = model.pretrained_cfg | {"class_names": None, "label_set": None, "palette": None}


def build(config: Mapping[str, Any]) -> SegmentationModel:
    """Build a segmenter with random weights from what ``SegmentationModel.config`` says.

    Raises:
        ConfigError: an argument out of its range.
    """
    options = {key: value for key, value in config.items() if key not in ("head", "backbone", "taps")}
    return HEADS[config["head"]](XCiTPyramid(XCiT(**config["backbone"]), config["taps"]), **options)


# --- inside -----------------------------------------------------------------------------------------------------------


def _own_options(kind: type[SegmentationModel]) -> list[str]:
    return [*(n for n in inspect.signature(kind).parameters if n not in ("backbone", "num_classes")), "taps"]


def _sorted_options(options: dict[str, Any], kind: type[SegmentationModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide options into the segmenter's and the backbone's; those of neither are errors."""
    known = _own_options(kind)
    strange = sorted(options.keys() - {*known, *_BACKBONE_OPTIONS})
    if strange:
        sentences = []
        for option in strange:
            near = get_close_matches(option, [*known, *_BACKBONE_OPTIONS], n=1)
            sentences.append(
                f"{kind.__name__} has no option {option!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        raise ConfigError(" ".join(sentences) + f" Its own are {', '.join(known)}; the others are those of XCiT.")
    own = {name: value for name, value in options.items() if name in known}
    return own, {name: value for name, value in options.items() if name not in known}


def _head_of(name: str, task: str, architecture: Architecture, head: str | None) -> str:
    """Return the head that a released file has."""
    if task == "detection":
        raise ConfigError(f"{name} is a detector; create_detector({name!r}, ...) builds it.")
    if task != TASK:
        raise ConfigError(
            f"{name} is no segmenter; create_segmenter({architecture.id!r}, backbone={name!r}) builds one on it."
        )
    named = name.removesuffix(f"_{architecture.id}")
    if head not in (None, named):
        raise ConfigError(
            f"{name} has the head {named!r}, not {head!r}; ask for head={named!r} (in training: model.head), or name "
            f"{head}_{architecture.id}."
        )
    return named


def _check_description(config: dict[str, Any], cfg: Any, name: str) -> None:
    """Refuse what a file says of its model where that could not be built, or not by this version."""
    kind, backbone = HEADS.get(str(config.get("head"))), config.get("backbone")
    whole = isinstance(backbone, dict) and isinstance(cfg, dict) and {"num_classes", "taps"} <= config.keys()
    named = whole and all(
        isinstance(cfg.get(key) or [], list) and len(cfg.get(key) or []) in (0, config["num_classes"])
        for key in ("class_names", "palette")
    )
    if kind is None or not isinstance(backbone, dict) or not named:
        raise CheckpointError(f"{name} has a damaged description of its model; save or download it again.")
    unknown = config.keys() - {*_own_options(kind), "num_classes", "head", "backbone", "task"}
    unknown |= backbone.keys() - {*_BACKBONE_OPTIONS, "num_classes"}
    if unknown:
        raise CheckpointError(
            f"{name} was saved with options that this xcit does not have: {', '.join(map(repr, sorted(unknown)))}."
        )


def _released(architecture: Architecture, head: str) -> SegmenterFile:
    stem = f"{head}_{architecture.id}"
    if stem not in CHECKPOINTS:
        known = dict.fromkeys(c.architecture for c in CHECKPOINTS.values() if c.task == TASK)
        raise ConfigError(
            f"No segmenter on {architecture.id} was released; there are those on {', '.join(known)}. To "
            f"begin with its classifier's weights take backbone=True, in training --pretrained released."
        )
    return read_segmenter(CHECKPOINTS[stem].url)._replace(name=stem)


def _released_cfg(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a released file, if the name is one's and the weights look like it; else {}."""
    released = CHECKPOINTS.get(Path(name).stem)
    if released is None or released.task != TASK:
        return {}
    architecture = ARCHITECTURES[released.architecture]
    looks = f"{config['head']}_{architecture.id}" == released.stem and config["num_classes"] == 150
    if not looks or any(getattr(architecture, key) != config["backbone"][key] for key in SIZES):
        return {}
    _log.info("%s is taken for the released file of that name.", name)
    names = {"label_set": released.label_set, "class_names": None, "palette": None}  # a label set has its own
    return names | {"checkpoint": released.stem, "architecture": architecture.id}


def _check_architecture(file: SegmenterFile, architecture: Architecture, overrides: Mapping[str, Any]) -> None:
    """Refuse weights of another backbone than the architecture with the caller's own sizes: patch 8 under a 16."""
    theirs = {name: file.config["backbone"].get(name) for name in SIZES}
    changed = {name: overrides[name] for name in SIZES if name in overrides}
    if all(changed.get(name, getattr(architecture, name)) == value for name, value in theirs.items()):
        return
    known = [a.id for a in ARCHITECTURES.values() if all(getattr(a, name) == v for name, v in theirs.items())]
    looks = known[0] if known else ", ".join(f"{name} {value}" for name, value in theirs.items())
    asked = " and ".join(f"{name} {value}" for name, value in changed.items())
    sizes = " and the sizes" if asked or not known else ""
    raise CheckpointError(
        f"{file.name} is a segmenter on {looks}, not on {architecture.id}{asked and f' with {asked}'}; name the "
        f"architecture{sizes} that its weights are of."
    )


def _with_weights(
    file: SegmenterFile, num_classes: int | None, head: str | None, options: dict[str, Any]
) -> SegmentationModel:
    """Build the segmenter that the weights fit exactly; then only change the classes, where others are asked for."""
    theirs = file.config["head"]
    if head not in (None, theirs):
        raise CheckpointError(
            f"{file.name} has the head {theirs!r}, not {head!r}; ask for head={theirs!r} (in training: model.head), or "
            f"leave head out."
        )
    own, overrides = _sorted_options(options, HEADS[theirs])
    config = file.config | own
    config["backbone"] = file.config["backbone"] | overrides
    try:
        with torch.device("meta"):  # no time for random values that the weights replace
            model = build(config)
    except (XCiTError, TypeError, ValueError) as err:
        if options:  # then it is rather the caller's mistake
            raise
        raise CheckpointError(f"{file.name} has a damaged description of its model: {err}") from err
    expected = model.state_dict()
    if expected.keys() != file.state.keys() or any(t.shape != file.state[k].shape for k, t in expected.items()):
        raise CheckpointError(
            f"{file.name} does not fit a {type(model).__name__} on an XCiT. {differences(file.state, expected)}"
        )
    model.to_empty(device=torch.get_default_device())
    expected = model.state_dict()
    with torch.no_grad():
        for key, tensor in file.state.items():
            expected[key].copy_(tensor)
    prepared = {"mean": list(model.mean), "std": list(model.std)}
    model.pretrained_cfg = model.pretrained_cfg | file.cfg | prepared
    if num_classes is not None and num_classes != model.num_classes:
        _log.info(
            "%s: new last layers for %d classes instead of its own %d.", file.name, num_classes, model.num_classes
        )
        reset_classes(model, num_classes)
    return model


def _colour(value: Iterable[Any]) -> list[int]:
    try:
        parts = [int(part) for part in value]
    except (TypeError, ValueError):
        parts = []
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise ConfigError(f"palette has the colour {value}; a colour is red, green and blue, each 0 to 255.")
    return parts
