"""Models by name: one verb for architectures, released weights, files and hub repositories."""

import inspect
import logging
import os
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models.adapt import change_classes, change_in_chans
from xcit.models.download import is_url
from xcit.models.timm_models import from_timm as from_timm
from xcit.models.weights import WeightFile, fit, read_weights, released_cfg
from xcit.models.xcit import XCiT
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS, Architecture, Checkpoint, default_checkpoint, find

_HUB = "hf-hub:"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_OPTIONS = tuple(name for name in inspect.signature(XCiT).parameters if name not in ("num_classes", "in_chans"))
_BUILDS = ("classification", "self-supervised")

_log = logging.getLogger("xcit")


def create_model(
    name: str | Path,
    pretrained: bool | str | Path = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    **overrides: Any,
) -> XCiT:
    """Build a model, with released weights, with weights from a file, or random.

    Args:
        name: what to build:

            * an architecture (``xcit_small_12_p16``);
            * a released checkpoint's stem (``xcit_small_12_p16_384_dist``, ``dino_xcit_small_12_p16_pretrain``), or
              timm's name of it (``xcit_small_12_p16_384.fb_dist_in1k``);
            * a ``.safetensors`` file that ``save_checkpoint`` wrote, which holds architecture and weights;
            * ``hf-hub:owner/name``, likewise.

        pretrained: True for released weights: a stem's own file, for an architecture its distilled one at 224 px. Or
            the path or address of a file with weights for this architecture, in any dialect. False for random weights.
            Files and hub repositories bring their own: leave it out there.
        num_classes: outputs of the classifier; 0 for features. None means as many as the weights have (a DINO
            backbone: 0), or 1000 for random ones. Any other number than the weights' gets a new, random classifier.
        in_chans: channels of the images. None means what the weights have, or 3. To another number than the weights'
            the first convolution is adapted (``xcit.models.adapt``).
        **overrides: other arguments of ``XCiT``, such as ``drop_path_rate`` or ``attn_form``.

    Returns:
        The model, in training mode as PyTorch builds modules, on torch's default device and dtype.
        ``model.pretrained_cfg`` says what its weights expect; it is {} for random ones.

    Raises:
        UnknownNameError: no such name; the message has the nearest ones.
        ConfigError: unknown overrides, values that ``XCiT`` refuses, a released detector or segmenter, which
            ``create_detector`` and ``create_segmenter`` build.
        CheckpointError: the weights cannot be had or do not fit; a folder, or a file that is no checkpoint by its name.
    """
    check_overrides(overrides)
    name = os.fspath(name)
    if name.startswith(_HUB) or _is_file(name):
        if not isinstance(pretrained, bool):
            raise ConfigError(f"{name} brings its own weights; leave pretrained={os.fspath(pretrained)!r} out.")
        file = _self_described(name)
        return with_weights(file.config or {}, file, num_classes, in_chans, overrides)

    architecture, released = _known(name)
    if released and released.task not in _BUILDS:
        if released.task == "detection":
            raise ConfigError(f"{name} is a detector; create_detector({name!r}, ...) builds it.")
        raise ConfigError(f"{name} is a segmentation model; create_segmenter({name!r}, ...) builds it.")
    if pretrained is False:
        classes = 1000 if released is None or released.label_set else 0
        config = {
            "num_classes": classes if num_classes is None else num_classes,
            "in_chans": 3 if in_chans is None else in_chans,
        }
        return XCiT(**architecture.config | config | overrides)
    file = _weights(architecture, released, pretrained)
    return with_weights(architecture.config, file, num_classes, in_chans, overrides)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` builds: architectures first, then released checkpoints.

    The released detectors and segmenters, which it does not build, are in ``xcit.models.zoo.CHECKPOINTS``.

    Args:
        pattern: with the shell's wildcards, e.g. ``"*_p8*dist"``.
    """
    stems = [stem for stem, checkpoint in CHECKPOINTS.items() if checkpoint.task in _BUILDS]
    return [name for name in (*ARCHITECTURES, *stems) if fnmatchcase(name, pattern)]


def check_overrides(overrides: dict[str, Any]) -> None:
    """Raise ConfigError for options that ``XCiT`` does not have, naming the nearest."""
    sentences = []
    for name in overrides.keys() - set(_OPTIONS):
        near = get_close_matches(name, _OPTIONS, n=1)
        sentences.append(f"XCiT has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    if sentences:
        raise ConfigError(" ".join(sorted(sentences)) + f" Its options are {', '.join(_OPTIONS)}.")


def _known(name: str) -> tuple[Architecture, Checkpoint | None]:
    """Look a name up in the zoo; say what a file or folder of that name is not, where there is one."""
    try:
        return find(name)
    except UnknownNameError:
        there = Path(name)
        if there.is_dir():
            raise CheckpointError(
                f"{name} is a folder, and neither the name of a model nor a checkpoint; name a file, such as "
                f"{there / 'model.safetensors'}."
            ) from None
        if there.exists():
            raise CheckpointError(
                f"{name} is a file, but not named as a checkpoint ({', '.join(_SUFFIXES)}), and no model is called so; "
                f"if it is one, write .{os.sep}{name}."
            ) from None
        raise


def _is_file(name: str) -> bool:
    return is_url(name) or Path(name).suffix in _SUFFIXES or "/" in name or os.sep in name


def _self_described(name: str) -> WeightFile:
    if name.startswith(_HUB):
        from xcit.models.hub import fetch

        return fetch(name)
    file = read_weights(name)
    if file.config is None:
        known = file.layout.architecture if file.layout else None
        raise CheckpointError(
            f"{name} holds weights but does not say of which model, as a file of save_checkpoint would."
            + (f" It looks like {file.layout}." if file.layout else "")
            + f" Name the architecture: create_model({known.id if known else 'xcit_...'!r}, pretrained={name!r})."
        )
    return file


def _weights(architecture: Architecture, released: Checkpoint | None, pretrained: bool | str | Path) -> WeightFile:
    """Read the file that ``pretrained`` means for a name of the zoo, with what the zoo says of it."""
    if not isinstance(pretrained, bool):
        file = read_weights(pretrained)
        if file.cfg is not None or released is None:
            return file
        return replace(file, cfg=released_cfg(released, file.layout))
    if released is None:
        released = default_checkpoint(architecture)
        _log.info("%s with pretrained=True: the weights are those of %s.", architecture.id, released.stem)
    return replace(read_weights(released.url), name=released.stem, cfg=released.pretrained_cfg)


def with_weights(
    config: dict[str, Any], file: WeightFile, num_classes: int | None, in_chans: int | None, overrides: dict[str, Any]
) -> XCiT:
    """Build the model that the weights fit exactly; change only then what the caller asked to have otherwise."""
    said = file.config or {}  # the weights of a variant have no layout to tell by
    own = (
        (file.layout.num_classes, file.layout.in_chans)
        if file.layout
        else (said.get("num_classes", 0), said.get("in_chans", 3))
    )
    config = config | {"num_classes": own[0], "in_chans": own[1]} | overrides
    unknown = config.keys() - {*_OPTIONS, "num_classes", "in_chans"}
    if unknown:
        raise CheckpointError(
            f"{file.name} was saved with options that this xcit does not have: {', '.join(map(repr, sorted(unknown)))}."
        )
    with torch.device("meta"):  # no time for random values that the weights replace
        model = XCiT(**config)
    model.to_empty(device=torch.get_default_device())
    fit(model, file, overridden=overrides)
    if num_classes is not None and num_classes != own[0]:
        _log.info("%s: a new classifier for %d classes instead of its own for %d.", file.name, num_classes, own[0])
        change_classes(model, num_classes)
    if in_chans is not None and in_chans != own[1]:
        _log.info("%s: its first convolution adapted from %d channels to %d.", file.name, own[1], in_chans)
        change_in_chans(model, in_chans)
    return model
