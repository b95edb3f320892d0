"""Segmenters as mmsegmentation, and so the released files, store them, both ways.

This package gives the parts of a segmenter mmsegmentation's names (``backbone.*``, ``neck.*``, ``decode_head.*``,
``auxiliary_head.*``), so weights need no renaming. What differs is around them: a dictionary with "state_dict", and
with "meta", in which the classes' names and colours are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from xcit.errors import CheckpointError, ConfigError
from xcit.models.dialects import State, tensors_only, unwrap
from xcit.models.pyramid import default_taps
from xcit.models.zoo import ARCHITECTURES

SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
"""What tells one XCiT from another."""
_STEM = re.compile(r"backbone\.patch_embed\.proj\.(\d+)\.0\.weight")
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def is_mmseg(content: Any) -> bool:
    """Tell whether what a file holds are weights under mmsegmentation's names of a segmenter, wrapped or bare."""
    if not isinstance(content, Mapping):
        return False
    state = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    return any(re.match(r"(module\.)?decode_head\.conv_seg\.", str(key)) for key in state)


def from_mmseg(content: Any, name: str) -> tuple[State, dict[str, Any]]:
    """Return a segmenter's weights, and what the file says about its classes.

    Args:
        content: what was read: mmsegmentation's dictionary, or weights alone.
        name: the file's name, for messages.

    Returns:
        The weights, and a ``pretrained_cfg`` with "class_names" and "palette" as far as the file has them for all
        classes, else {}.

    Raises:
        CheckpointError: it holds no weights.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not a dictionary of weights.")
    state = tensors_only(unwrap(content, name, False), name)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    last = state.get("decode_head.conv_seg.weight")
    return state, _classes(content.get("meta"), len(last) if last is not None and last.ndim else 0)


def to_mmseg(state: Mapping[str, Tensor], cfg: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what mmsegmentation stores of a segmenter, to be written with ``torch.save``.

    Args:
        state: ``state_dict()`` of a ``UperNet`` or a ``SemanticFPN``.
        cfg: its ``pretrained_cfg``, whose names and colours of the classes are taken along.

    Raises:
        ConfigError: the weights of something else.
    """
    if not is_mmseg(state):
        raise ConfigError(
            f"These are no segmenter's weights: the names begin with {', '.join(map(repr, [*state][:3]))}."
        )
    cfg = cfg or {}
    meta: dict[str, Any] = {}
    if cfg.get("class_names"):
        meta["CLASSES"] = tuple(cfg["class_names"])
    if cfg.get("palette") is not None:
        meta["PALETTE"] = [[int(value) for value in colour] for colour in cfg["palette"]]
    return {"meta": meta, "state_dict": dict(state)}


def shown(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Read a segmenter's arguments off its weights' names and shapes; None if they are of something else.

    The scales of pyramid pooling leave no trace; the released ones are assumed.

    Args:
        state: under mmsegmentation's names.

    Returns:
        The arguments, with "head" for the kind and the XCiT's under "backbone".
    """

    def shape(key: str) -> tuple[int, ...]:
        return tuple(state[key].shape)

    convolutions = [key for key in state if _STEM.fullmatch(key)]
    blocks = [int(found[1]) for key in state if (found := _BLOCK.match(key))]
    pooling = any(key.startswith("decode_head.psp_modules.") for key in state)
    if pooling == any(key.startswith("decode_head.scale_heads.") for key in state):
        return None
    try:
        depth = max(blocks) + 1
        layout = {
            "patch_size": 2 ** len(convolutions),
            "in_chans": shape("backbone.patch_embed.proj.0.0.weight")[1],
            "embed_dim": shape("backbone.blocks.0.norm1.weight")[0],
            "depth": depth,
            "num_heads": shape("backbone.blocks.0.attn.temperature")[0],
            "num_classes": 0,
        }
        known = [a for a in ARCHITECTURES.values() if all(getattr(a, n) == layout[n] for n in SIZES)]
        num_classes, channels = shape("decode_head.conv_seg.weight")[:2]
        config = {
            "head": "upernet" if pooling else "sem_fpn",
            "backbone": (known[0].config if known else {}) | layout,
            "taps": list(default_taps(depth)),
            "num_classes": num_classes,
            "channels": channels,
        }
        if not pooling:
            return config | {"fpn_channels": shape("neck.lateral_convs.0.conv.weight")[0]}
        last = "auxiliary_head.conv_seg.weight"
        return config | {"auxiliary_channels": shape(last)[1] if last in state else 0}
    except (KeyError, IndexError, ValueError, ConfigError):
        return None


def _classes(meta: Any, num_classes: int) -> dict[str, Any]:
    """Return names and colours out of "meta" of either generation of mmsegmentation, where there are K of them."""
    if not isinstance(meta, Mapping) or not num_classes:
        return {}
    nested = meta.get("dataset_meta")
    found = {
        str(key).lower(): value for part in (nested, meta) if isinstance(part, Mapping) for key, value in part.items()
    }
    cfg: dict[str, Any] = {}
    names, palette = found.get("classes"), found.get("palette")
    if _is_list(names, num_classes) and all(isinstance(name, str) for name in names):
        cfg["class_names"] = list(names)
    if _is_list(palette, num_classes) and all(_is_colour(colour) for colour in palette):
        cfg["palette"] = [list(colour) for colour in palette]
    return cfg


def _is_list(value: Any, length: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length


def _is_colour(value: Any) -> bool:
    return _is_list(value, 3) and all(isinstance(part, int) and 0 <= part <= 255 for part in value)
