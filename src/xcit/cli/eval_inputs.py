"""Who is judged by `xcit eval`, and by which images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.data.sources import match_classes, open_eval_set
from xcit.errors import CheckpointError, ConfigError, DataError
from xcit.inference.devices import choose_device
from xcit.inference.predictor import Predictor
from xcit.models.weights import bare


class Judged(NamedTuple):
    """A model with what its weights say of images and classes."""

    model: nn.Module
    device: torch.device
    preprocessing: Preprocessing
    class_names: Sequence[str]
    named: bool
    """Whether these are names, not just numbers because the weights have none."""
    patch_size: int


def load_judged(model: str, device: str, image_size: int | None, sizes: str | None) -> Judged:
    """Read an XCiT, or a model of timm that `xcit train` wrote.

    Args:
        model: as on the command line.
        device: likewise.
        image_size: instead of what the weights expect.
        sizes: whether, and as what text, several sizes were asked for.

    Raises:
        XCiTError: no such model, no classifier, or a size that it does not take.
    """
    try:
        predictor = Predictor(model, device=device, image_size=image_size)
    except CheckpointError:
        peer = _load_peer(model, device)
        if peer is None:
            raise
        if image_size is not None or sizes is not None:
            raise ConfigError(
                f"{model} is a model of timm, which is judged at its own size; leave --image-size and --sizes out."
            ) from None
        return peer
    xcit = bare(predictor.model)
    cfg = xcit.pretrained_cfg
    named = bool(cfg.get("class_names") or cfg.get("label_set"))
    return Judged(
        xcit, predictor.device, predictor.preprocessing, predictor.class_names, named, xcit.config["patch_size"]
    )


def _load_peer(model: str, device: str) -> Judged | None:
    """Return the model if the file is one of timm's."""
    path = Path(model).expanduser()
    if not path.is_file():
        return None
    from xcit.recipes.peers import is_peer, load_peer  # takes seconds: timm

    if not is_peer(path):
        return None
    peer = load_peer(path)
    return Judged(peer.model, choose_device(device), peer.preprocessing, peer.class_names, True, 1)


def open_images(data: str, layout: str, split: str | None, judged: Judged) -> ImageSet:
    """Return the images with the model's classes in the order of its logits.

    Args:
        data: as on the command line.
        layout: likewise.
        split: likewise.
        judged: the model.

    Raises:
        XCiTError: no data, or classes that the model does not have.
    """
    if not data and layout != "digits":
        raise ConfigError("--data is missing; name a folder of images, a CSV file or a pattern of tar shards.")
    names, in_chans = judged.class_names, judged.preprocessing.in_chans
    if judged.named:
        return open_eval_set(data, layout, split=split, in_chans=in_chans, class_names=names)
    # Weights that name no classes: the data's own names must be their numbers, or else agree in number and order.
    images = open_eval_set(data, layout, split=split, in_chans=in_chans)
    if set(images.class_names) <= set(names):
        return match_classes(images, names)
    if len(images.class_names) != len(names):
        raise DataError(
            f"{data} has {len(images.class_names)} classes, and the model has {len(names)}, which it does not name; "
            f"save it with class_names."
        )
    print("xcit: The model does not name its classes; those of the data are taken, in order.", file=sys.stderr)
    return images
