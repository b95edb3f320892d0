"""Detectors by name, and as files: one verb for architectures, released weights and own files."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcit.errors import CheckpointError, ConfigError
from xcit.models.dense_backbone import dense_backbone
from xcit.models.dialects import State, tensors_only, unwrap
from xcit.models.download import download, is_url, verify_sha256
from xcit.models.factory import check_overrides
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.mmdet_files import from_mmdet, is_mmdet
from xcit.models.pyramid import XCiTPyramid, default_taps
from xcit.models.storage import read_file, write_safetensors
from xcit.models.weights import description, differences, read_description, refuse_not_finite
from xcit.models.xcit import XCiT
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS, Architecture, find

TASK = "detection"
"""What the description of a detector's file calls it."""
_OPTIONS = tuple(n for n in inspect.signature(MaskRCNN).parameters if n not in ("body", "num_classes"))
_STEM = re.compile(r"backbone\.body\.patch_embed\.proj\.(\d+)\.0\.weight")

_log = logging.getLogger("xcit")


class DetectorFile(NamedTuple):
    """A detector's weights under this package's names, with what the file says and shows about them."""

    name: str
    """As the caller gave it, for messages."""
    state: State
    config: dict[str, Any]
    """The arguments of ``MaskRCNN``, the XCiT's under "backbone": stated by our own files, else read off the shapes."""
    cfg: dict[str, Any]
    """``pretrained_cfg``."""


def create_detector(
    name: str | Path,
    pretrained: bool | str | Path = False,
    num_classes: int | None = None,
    *,
    backbone: bool | str | Path = False,
    **options: Any,
) -> MaskRCNN:
    """Build a Mask R-CNN on an XCiT: with released weights, with weights from a file, or to be trained.

    Args:
        name: what to build:

            * an architecture (``xcit_small_12_p16``);
            * a released detector (``maskrcnn_xcit_small_12_p16``);
            * a ``.safetensors`` file that ``save_detector`` wrote, which holds everything.

        pretrained: True for the released detector, the architecture's own. Or the path or address of a file with a
            detector's weights, ours or mmdetection's. Own files bring theirs: leave it out there.
        num_classes: foreground classes. None means as many as the weights have, or 80. Another number than the
            weights' gets new, random last layers.
        backbone: initial weights of the backbone alone: True for the architecture's released classifier, a released
            checkpoint's name, or a file, of a classifier, of DINO, or of a detector or a segmenter, whose heads are
            left aside. Not together with ``pretrained``.
        **options: other arguments of ``MaskRCNN`` (``min_size``, ``score_thresh``, ...) and of ``XCiT``
            (``drop_path_rate``, ...).

    Returns:
        The detector, in training mode as PyTorch builds modules. ``pretrained_cfg`` names its classes.

    Raises:
        UnknownNameError: no such name.
        ConfigError: unknown options, values out of range, or weights asked for twice.
        CheckpointError: weights that cannot be had or do not fit.
    """
    own, overrides = _sorted_options(options)
    name = os.fspath(name)
    if Path(name).suffix or "/" in name or os.sep in name or is_url(name):
        if pretrained is not False or backbone is not False:
            raise ConfigError(f"{name} brings its own weights; leave pretrained and backbone out.")
        return _with_weights(read_detector(name), num_classes, own, overrides)
    architecture, released = find(name)
    if released is not None and released.task != TASK:
        raise ConfigError(
            f"{name} is no detector; create_detector({architecture.id!r}, backbone={name!r}) builds one on it."
        )
    if pretrained is not False:
        if backbone is not False:
            raise ConfigError("pretrained brings a whole detector's weights, the backbone's too; leave backbone out.")
        file = _released(architecture) if pretrained is True else read_detector(pretrained)
        _check_architecture(file, architecture, overrides)
        return _with_weights(file, num_classes, own, overrides)
    pyramid = dense_backbone(architecture, backbone, overrides, taps=own.pop("taps", None), whole="detector")
    own = {key: pyramid.pretrained_cfg[key] for key in ("mean", "std") if pyramid.pretrained_cfg.get(key)} | own
    return MaskRCNN(pyramid, 80 if num_classes is None else num_classes, **own)


def save_detector(model: nn.Module, path: str | Path, *, class_names: Sequence[str] | None = None) -> Path:
    """Write a detector to one safetensors file from which ``create_detector(path)`` rebuilds it alone.

    Args:
        model: a ``MaskRCNN``.
        path: ends in ``.safetensors``; an existing file is replaced, whole or not at all.
        class_names: one a foreground class; None keeps those of ``model.pretrained_cfg``.

    Returns:
        The path.

    Raises:
        ConfigError: not a detector, another suffix, or names that are not as many as the classes.
        CheckpointError: weights that are not finite, a full disk, no permission; a former file stays as it was.
    """
    if not isinstance(model, MaskRCNN):
        raise ConfigError(f"Expected a MaskRCNN, got {type(model).__name__}; save_checkpoint writes classifiers.")
    if not isinstance(model.backbone.body, XCiTPyramid):
        raise ConfigError("The model is folded, which its file could not say; save the one that it was folded from.")
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path.name} does not end in .safetensors, the format that xcit writes; name it so.")
    cfg = dict(model.pretrained_cfg)
    if class_names is not None:
        if len(class_names) != model.num_classes:
            raise ConfigError(f"There are {len(class_names)} class_names; the model has {model.num_classes} classes.")
        cfg.update(class_names=[str(name) for name in class_names], label_set=None)
    state = model.state_dict()
    refuse_not_finite(state, "The model", "it is not saved, and a file under that name stays as it was")
    write_safetensors(path, state, {"format": "pt"} | description({"task": TASK} | model.config, cfg))
    return path


def read_detector(path_or_url: str | Path, *, sha256: str | None = None) -> DetectorFile:
    """Read a detector's file, ours or mmdetection's.

    Args:
        path_or_url: a local file, or an http(s) address, which is downloaded once.
        sha256: refuse a file with another checksum (hexadecimal, or its first 8 digits or more).

    Raises:
        CheckpointError: the file cannot be read or is not safe to read, or holds no Mask R-CNN on an XCiT.
    """
    name = str(path_or_url)
    path = download(name, sha256=sha256) if is_url(name) else Path(path_or_url).expanduser()
    stored = read_file(path)
    if sha256 is not None and not is_url(name):
        verify_sha256(path, sha256)
    if not isinstance(stored.content, Mapping):
        raise CheckpointError(f"{name} holds a {type(stored.content).__name__}, not a dictionary of weights.")
    state = tensors_only(unwrap(stored.content, name, False), name)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    config, cfg = read_description(stored.metadata, name)
    if is_mmdet(state):
        state = from_mmdet(state)
    found = _shown(state) if config is None else config if config.get("task") == TASK else None
    if found is None:
        if config is not None and config.get("task") == "segmentation":
            raise CheckpointError(f"{name} holds a segmenter; xcit.create_segmenter({name!r}) builds it.")
        first = ", ".join(repr(key) for key in list(state)[:3])
        raise CheckpointError(f"{name} holds no Mask R-CNN on an XCiT: its keys begin with {first}.")
    if config is not None and not {"backbone", "taps", "num_classes"} <= config.keys():
        raise CheckpointError(f"{name} has a damaged description of its model; save or download it again.")
    refuse_not_finite(state, name, "training has diverged or the file is damaged; use an earlier one")
    return DetectorFile(name, state, {key: value for key, value in found.items() if key != "task"}, cfg or {})


def reset_classes(model: MaskRCNN, num_classes: int) -> None:
    """Give a detector new, random last layers for other classes; all else stays.

    Raises:
        ConfigError: fewer than one class.
    """
    fresh = _build(model.config | {"num_classes": num_classes})
    for part in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.logits"):
        owner, _, layer = part.partition(".")
        if getattr(model.roi_heads, owner) is None:
            continue
        new = getattr(getattr(fresh.roi_heads, owner), layer)
        old = getattr(getattr(model.roi_heads, owner), layer)
        setattr(getattr(model.roi_heads, owner), layer, new.to(old.weight.device, old.weight.dtype))
    model.num_classes = model.config["num_classes"] = num_classes
    model.pretrained_cfg = model.pretrained_cfg | {"class_names": None, "label_set": None}


# --- inside -----------------------------------------------------------------------------------------------------------


def _sorted_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide options into the detector's and the backbone's; those of neither are errors."""
    own = {k: v for k, v in options.items() if k in _OPTIONS or k == "taps"}
    overrides = {k: v for k, v in options.items() if k not in own}
    strange = overrides.keys() - inspect.signature(XCiT).parameters.keys()
    near = {k: get_close_matches(k, _OPTIONS, n=1) for k in sorted(strange)}
    wrong = [f"MaskRCNN has no option {k!r}; did you mean {m[0]!r}?" for k, m in near.items() if m]
    if wrong:
        raise ConfigError(" ".join(wrong))
    check_overrides({k: v for k, v in overrides.items() if k != "in_chans"})  # an argument of its own elsewhere
    return own, overrides


def _released(architecture: Architecture) -> DetectorFile:
    stem = f"maskrcnn_{architecture.id}"
    if stem not in CHECKPOINTS:
        known = ", ".join(c.architecture for c in CHECKPOINTS.values() if c.task == TASK)
        raise ConfigError(
            f"No detector on {architecture.id} was released; there are those on {known}. To begin with its "
            f"classifier's weights take backbone=True, in training --pretrained released."
        )
    released = CHECKPOINTS[stem]
    file = read_detector(released.url)
    cfg = {"label_set": released.label_set, "class_names": None, "checkpoint": stem, "architecture": architecture.id}
    return file._replace(name=stem, cfg=cfg)


def _check_architecture(file: DetectorFile, architecture: Architecture, overrides: Mapping[str, Any]) -> None:
    """Refuse weights of another backbone than the architecture with the caller's own sizes: patch 8 under a 16."""
    theirs = {name: file.config["backbone"][name] for name in _SIZES}
    changed = {name: overrides[name] for name in _SIZES if name in overrides}
    if all(changed.get(name, getattr(architecture, name)) == value for name, value in theirs.items()):
        return
    known = [a.id for a in ARCHITECTURES.values() if all(getattr(a, name) == v for name, v in theirs.items())]
    looks = known[0] if known else ", ".join(f"{name} {value}" for name, value in theirs.items())
    asked = " and ".join(f"{name} {value}" for name, value in changed.items())
    sizes = " and the sizes" if asked or not known else ""
    raise CheckpointError(
        f"{file.name} is a detector on {looks}, not on {architecture.id}{asked and f' with {asked}'}; name the "
        f"architecture{sizes} that its weights are of."
    )


def _with_weights(
    file: DetectorFile, num_classes: int | None, own: dict[str, Any], overrides: dict[str, Any]
) -> MaskRCNN:
    config = file.config | own
    config["backbone"] = file.config["backbone"] | overrides
    model = _build(config)
    expected = model.state_dict()
    if expected.keys() != file.state.keys() or any(t.shape != file.state[k].shape for k, t in expected.items()):
        raise CheckpointError(f"{file.name} does not fit a Mask R-CNN on an XCiT. {differences(file.state, expected)}")
    with torch.no_grad():
        for key, tensor in file.state.items():
            expected[key].copy_(tensor)
    model.pretrained_cfg = dict(file.cfg)
    if num_classes is not None and num_classes != model.num_classes:
        _log.info(
            "%s: new last layers for %d classes instead of its own %d.", file.name, num_classes, model.num_classes
        )
        reset_classes(model, num_classes)
    return model


def _build(config: Mapping[str, Any]) -> MaskRCNN:
    options = {key: value for key, value in config.items() if key not in ("backbone", "taps")}
    return MaskRCNN(XCiTPyramid(XCiT(**config["backbone"]), config["taps"]), **options)


def _shown(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Read a detector's arguments off its weights' names and shapes; None if they are of something else."""

    def shape(key: str) -> tuple[int, ...]:
        return tuple(state[key].shape)

    convolutions = [found for key in state if (found := _STEM.fullmatch(key))]
    blocks = [int(f[1]) for key in state if (f := re.match(r"backbone\.body\.blocks\.(\d+)\.", key))]
    try:
        depth = max(blocks) + 1
        layout = {
            "patch_size": 2 ** len(convolutions),
            "in_chans": shape("backbone.body.patch_embed.proj.0.0.weight")[1],
            "embed_dim": shape("backbone.body.blocks.0.norm1.weight")[0],
            "depth": depth,
            "num_heads": shape("backbone.body.blocks.0.attn.temperature")[0],
            "num_classes": 0,
        }
        known = [a for a in ARCHITECTURES.values() if all(getattr(a, k) == layout[k] for k in _SIZES)]
        masks = "roi_heads.mask_predictor.logits.weight" in state
        convs = {f[1] for key in state if (f := re.match(r"roi_heads\.mask_head\.(\d+)\.", key))}
        return {
            "backbone": (known[0].config if known else {}) | layout,
            "taps": list(default_taps(depth)),
            "num_classes": shape("roi_heads.box_predictor.cls_score.weight")[0] - 1,
            "out_channels": shape("rpn.head.cls_logits.weight")[1],
            "box_width": shape("roi_heads.box_predictor.fc6.weight")[0],
            "with_masks": masks,
            **({"mask_channels": shape("roi_heads.mask_predictor.logits.weight")[1]} if masks else {}),
            "mask_convs": len(convs),
        }
    except (KeyError, IndexError, ValueError):
        return None


_SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
