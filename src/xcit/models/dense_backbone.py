"""The backbone of a detector or a segmenter to be trained, with the weights that it begins with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xcit.errors import CheckpointError, ConfigError
from xcit.models.dialects import State, tensors_only, unwrap
from xcit.models.download import download, is_url
from xcit.models.factory import create_model
from xcit.models.mmdet_files import from_mmdet, is_mmdet
from xcit.models.pyramid import XCiTPyramid
from xcit.models.storage import read_file
from xcit.models.weights import differences, read_description, refuse_not_finite
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS, Architecture, find

_DETECTOR = "backbone.body."
_SEGMENTER = "decode_head.conv_seg."
"""How names begin that nothing else has."""


def dense_backbone(
    architecture: Architecture,
    source: bool | str | Path,
    overrides: dict[str, Any],
    *,
    taps: Sequence[int] | None = None,
    whole: str = "model",
) -> XCiTPyramid:
    """Return a pyramid: random, or with the weights of a classifier, of DINO, or of another detector or segmenter.

    Args:
        architecture: the backbone's.
        source: False for random weights, True for the architecture's released classifier, a released checkpoint's name,
            or the path or address of a file. A detector or a segmenter gives its whole pyramid, not its heads.
        overrides: other arguments of ``XCiT``.
        taps: as for ``XCiTPyramid``.
        whole: what is to be built on it, for messages.

    Raises:
        ConfigError: a released checkpoint of another architecture.
        CheckpointError: weights that cannot be had or do not fit.
    """
    if isinstance(source, bool):
        return XCiTPyramid(create_model(architecture.id, source, num_classes=0, **overrides), taps)
    name = os.fspath(source)
    if name in CHECKPOINTS or name in ARCHITECTURES:
        origin, released = find(name)
        if origin.id != architecture.id:
            raise ConfigError(f"backbone is {name}, of {origin.id}; the {whole} is to be on {architecture.id}.")
        if released is None or released.task not in ("detection", "segmentation"):
            return XCiTPyramid(create_model(name, True, num_classes=0, **overrides), taps)
        path = download(released.url)
    else:
        path = download(name) if is_url(name) else Path(name).expanduser()
    stored = read_file(path)
    state = _pyramid_of(stored.content, name)
    if state is None:
        return XCiTPyramid(create_model(architecture.id, name, num_classes=0, **overrides), taps)
    refuse_not_finite(state, name, "training has diverged or the file is damaged; use an earlier one")
    pyramid = XCiTPyramid(create_model(architecture.id, num_classes=0, **overrides), taps)
    expected = pyramid.state_dict()
    if expected.keys() != state.keys() or any(t.shape != state[key].shape for key, t in expected.items()):
        raise CheckpointError(
            f"The backbone of {name} is not the one that the {whole} is to have. {differences(state, expected)}"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            expected[key].copy_(tensor)
    config = read_description(stored.metadata, name)[0] or {}
    pyramid.pretrained_cfg |= {key: list(config[key]) for key in ("mean", "std") if config.get(key)}
    return pyramid


def _pyramid_of(content: Any, name: str) -> State | None:
    """Return the weights of the pyramid that a detector's or a segmenter's file holds; None if it is of neither."""
    if not isinstance(content, Mapping):
        return None
    inner = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    names = [str(key).removeprefix("module.") for key in inner]
    if not any(key.startswith((_SEGMENTER, _DETECTOR, "roi_head.bbox_head.")) for key in names):
        return None
    state = {key.removeprefix("module."): t for key, t in tensors_only(unwrap(content, name, False), name).items()}
    if is_mmdet(state):
        state = from_mmdet(state)
    prefix = _DETECTOR if any(key.startswith(_DETECTOR) for key in state) else "backbone."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
