"""A linear probe's head and its backbone as one classifier, which everything that takes a classifier takes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcit.errors import CheckpointError, ConfigError
from xcit.models.download import download, is_url
from xcit.models.storage import read_file
from xcit.models.weights import bare
from xcit.models.xcit import XCiT

IMAGENET_CLASSES = 1000

_PREFIXES = re.compile(r"^(module\.)?(linear\.|head\.)?")


def with_linear_head(
    model: nn.Module,
    weight: Tensor,
    bias: Tensor,
    *,
    pool: str = "token",
    class_names: Sequence[str] | None = None,
) -> XCiT:
    """Return a copy of a model with a head put in the place of its own.

    Args:
        model: an ``XCiT``; its own head is left aside.
        weight: (classes, embed_dim).
        bias: (classes,).
        pool: what the head was trained on: "token" or "avg".
        class_names: one a class.

    Raises:
        ConfigError: a pooling that a checkpoint cannot express, or names that are not as many as the classes.
        CheckpointError: the head is for features of another width.
    """
    if pool not in ("token", "avg"):
        raise ConfigError(
            f"A classifier pools by token or avg; a head that was trained on pool={pool!r} cannot be part of one."
        )
    if class_names is not None and len(class_names) != len(bias):
        raise ConfigError(f"There are {len(class_names)} class_names; the head has {len(bias)} classes.")
    classifier = copy.deepcopy(bare(model))
    _check_shapes("The head", weight, bias, classifier)
    classifier.reset_classifier(len(bias), global_pool="token" if pool == "token" else "avg")
    with torch.no_grad():
        head: Any = classifier.head
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    cfg = {**classifier.pretrained_cfg, "checkpoint": None}  # it is no longer that file
    if class_names is not None:
        cfg["class_names"] = [str(name) for name in class_names]
    classifier.pretrained_cfg = cfg if classifier.pretrained_cfg or class_names is not None else {}
    return classifier


def load_linear_head(model: nn.Module, path_or_url: str | Path) -> XCiT:
    """Return a copy of a DINO backbone with the head of a linear probe's file, such as a ``*_linearweights.pth``.

    A head for 1000 classes is taken for ImageNet's, as the released ones are.

    Args:
        model: the backbone that the head was trained on.
        path_or_url: holds ``{"state_dict": {"module.linear.weight", "module.linear.bias"}}``; with or without the
            wrapper and the prefixes.

    Raises:
        CheckpointError: the file cannot be read, holds anything else, or a head of another width.
    """
    name = str(path_or_url)
    content = read_file(download(name) if is_url(name) else Path(path_or_url).expanduser()).content
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not the head of a linear probe.")
    head = {_PREFIXES.sub("", str(key)): value for key, value in content.items()}
    if head.keys() != {"weight", "bias"} or not all(isinstance(value, Tensor) for value in head.values()):
        first = ", ".join(repr(key) for key in list(content)[:3])
        raise CheckpointError(
            f"{name} is not the head of a linear probe, which is a weight and a bias; its keys begin with {first}."
        )
    _check_shapes(name, head["weight"], head["bias"], bare(model))
    if not all(bool(value.isfinite().all()) for value in head.values()):
        raise CheckpointError(f"{name} has NaN or infinite values; training has diverged or the file is damaged.")
    classifier = with_linear_head(model, head["weight"], head["bias"])
    if classifier.num_classes == IMAGENET_CLASSES:
        classifier.pretrained_cfg = {**classifier.pretrained_cfg, "label_set": "imagenet-1k"}
    return classifier


def _check_shapes(name: str, weight: Tensor, bias: Tensor, model: XCiT) -> None:
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{name} has a weight of {tuple(weight.shape)} and a bias of {tuple(bias.shape)}; a head has (classes, "
            f"features) and (classes,)."
        )
    if weight.shape[1] != model.embed_dim:
        raise CheckpointError(
            f"{name} is for features of {weight.shape[1]} numbers, the model has {model.embed_dim}; it belongs to "
            f"another backbone, or to several layers of one."
        )
