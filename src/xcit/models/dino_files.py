"""DINO's training checkpoints: a student, a teacher and their projection heads, read and written.

The released full checkpoints hold ``{"student": ..., "teacher": ..., "epoch": ..., "args": Namespace, ...}``, in which
both networks' weights are named ``module.backbone.*`` and ``module.head.*``. The files of backbones alone have no head.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from xcit.errors import CheckpointError, ExportError
from xcit.files import replacing
from xcit.models.dialects import Network
from xcit.models.dino_head import DINOHead, DINOModel
from xcit.models.factory import check_overrides, with_weights
from xcit.models.weights import DESCRIPTION, WeightFile, description, read_weights, refuse_not_finite
from xcit.models.xcit import XCiT

_PREFIX = "module."
"""What data-parallel training put before every name."""


@overload
def load_dino(
    path_or_url: str | Path,
    network: Network | None = ...,
    head: Literal[True] = ...,
    *,
    sha256: str | None = ...,
    **overrides: Any,
) -> DINOModel: ...


@overload
def load_dino(
    path_or_url: str | Path,
    network: Network | None = ...,
    *,
    head: Literal[False],
    sha256: str | None = ...,
    **overrides: Any,
) -> XCiT: ...


def load_dino(
    path_or_url: str | Path,
    network: Network | None = None,
    head: bool = True,
    *,
    sha256: str | None = None,
    **overrides: Any,
) -> DINOModel | XCiT:
    """Build a network of a DINO checkpoint, released or of ``save_dino``, and fill it: every weight, or an error.

    Args:
        path_or_url: a local file, or an http(s) address, which is downloaded once.
        network: "teacher" (what None means, where there are both) or "student". Leave it out for a file that holds one
            network.
        head: keep the projection head, whose sizes are read off the weights, and return both as a ``DINOModel``; or
            leave it aside and return the backbone alone.
        sha256: refuse a file with another checksum (hexadecimal, or its first 8 digits or more).
        **overrides: other arguments of ``XCiT``, such as ``drop_path_rate`` to go on training. A backbone that has no
            released architecture's sizes and does not describe itself needs ``tokens_norm``, which its weights do not
            show.

    Returns:
        The model, in training mode as PyTorch builds modules. The head's ``norm_last_layer`` is what the weights are:
        every row's length 1, or not. ``pretrained_cfg`` of the backbone says how images are prepared.

    Raises:
        CheckpointError: the file cannot be read, holds no such network, no head, no XCiT, or weights that do not fit.
        ConfigError: unknown overrides.
    """
    check_overrides(overrides)
    file = read_weights(path_or_url, dino_network=network, sha256=sha256)
    if head and not file.projection:
        raise CheckpointError(
            f"{file.name} holds a backbone alone, without a projection head; pass head=False to load the backbone."
        )
    backbone = with_weights(_config(file, overrides), file, None, None, overrides)
    return DINOModel(backbone, _filled_head(file)) if head else backbone


def _config(file: WeightFile, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the backbone's arguments, as far as the file tells or implies them."""
    if file.config is not None:
        return file.config
    layout = file.layout
    if layout is None:
        first = ", ".join(repr(key) for key in list(file.state)[:3])
        raise CheckpointError(f"{file.name} holds no XCiT: its keys begin with {first}.")
    if layout.architecture:
        return layout.architecture.config
    if "tokens_norm" not in overrides:
        raise CheckpointError(
            f"{file.name} is {layout}. Its weights do not show whether class attention norms all tokens: pass "
            f"tokens_norm=True or tokens_norm=False, and whatever else is not XCiT's default."
        )
    return {name: getattr(layout, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}


def _filled_head(file: WeightFile) -> DINOHead:
    """Build the head that the weights are of."""
    weights = file.projection
    layers = sorted(int(found[1]) for key in weights if (found := re.fullmatch(r"mlp\.(\d+)\.weight", key)))
    last = weights.get("last_layer.weight_v")
    first = weights.get(f"mlp.{layers[0]}.weight" if layers else "mlp.weight")
    if last is None or last.ndim != 2 or first is None or first.ndim != 2:
        raise CheckpointError(f"{file.name} has a projection head of other parts than DINO's: {_names(weights)}.")
    lengths = weights.get("last_layer.weight_g")
    head = DINOHead(
        first.shape[1],
        last.shape[0],
        hidden_dim=first.shape[0],
        bottleneck_dim=last.shape[1],
        num_layers=max(1, len(layers)),
        norm_last_layer=lengths is not None and bool((lengths == 1).all()),
    )
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found_shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found_shapes:
        wrong = sorted(name for name in expected | found_shapes if expected.get(name, ()) != found_shapes.get(name, ()))
        raise CheckpointError(
            f"{file.name} has a projection head that is not DINO's of {max(1, len(layers))} layers without batch norm: "
            f"{wrong[0]} is {found_shapes.get(wrong[0], 'missing')} in the file, expected "
            f"{expected.get(wrong[0], 'nothing of that name')}. Pass head=False to load the backbone."
        )
    refuse_not_finite(weights, file.name, "training has diverged or the file is damaged; use an earlier one")
    head.load_state_dict(weights)
    return head


def _names(weights: dict[str, Tensor]) -> str:
    return ", ".join(sorted(weights)[:4])


def save_dino(
    path: str | Path, student: DINOModel, teacher: DINOModel, epoch: int, *, center: Tensor | None = None
) -> Path:
    """Write both networks as DINO's own training code does, for it and whatever else reads its files.

    The file appears whole or not at all. It holds no optimiser: whoever goes on from it in that code begins with fresh
    moments. An entry of its own, which that code does not look at, describes the backbone, so that ``load_dino`` and
    ``create_model`` can build it whatever its size; stochastic depth is not part of that.

    Args:
        path: a name that ends in ``.pth`` by custom; an existing file is replaced.
        student: what is trained.
        teacher: its average.
        epoch: epochs that are done.
        center: (K,) the centre of the teacher's outputs; None leaves it out, and that code begins with zeros.

    Returns:
        The path.

    Raises:
        CheckpointError: weights that are not finite, a full disk, no permission; the former file stays as it was.
    """
    path = Path(path).expanduser()
    networks = {"student": student, "teacher": teacher}
    states = {
        name: {k: t.detach().cpu() for k, t in network.state_dict().items()} for name, network in networks.items()
    }
    for name, state in states.items():
        refuse_not_finite(state, f"The {name}", "it is not saved, and a file under that name stays as it was")
    backbone, cfg = teacher.backbone, teacher.backbone.pretrained_cfg
    content: dict[str, Any] = {
        name: {f"{_PREFIX}{key}": tensor for key, tensor in state.items()} for name, state in states.items()
    }
    content["epoch"] = epoch
    content["args"] = argparse.Namespace(
        arch=cfg.get("architecture") or "xcit",
        patch_size=backbone.config["patch_size"],
        out_dim=student.head.out_dim,
        norm_last_layer=student.head.norm_last_layer,
        use_bn_in_head=False,
    )
    if center is not None:
        content["dino_loss"] = {"center": center.detach().cpu().reshape(1, -1)}
    content[DESCRIPTION] = description(backbone.config, cfg)
    try:
        with replacing(path) as partial, partial.open("xb") as file:
            torch.save(content, file)
    except ExportError as err:
        raise CheckpointError(str(err)) from err
    return path
