"""The names under which others store XCiT's weights, and what a set of weights says about its architecture.

``to_official`` turns any dialect into the released names, which are this package's own:

* official: released classifiers, ``{"model": ...}``;
* DINO: a backbone alone; or a training checkpoint with a student and a teacher, each ``module.backbone.*`` with a
  projection head that is no classifier;
* timm: ``pos_embed`` for ``pos_embeder``, and class attention's ``qkv`` in three parts;
* mmpretrain: the modules of its own building blocks, ``backbone.xca_layers.0.ffn.layers.0.0`` and so on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xcit.errors import CheckpointError
from xcit.models.zoo import ARCHITECTURES, Architecture

State = dict[str, Tensor]
Network = Literal["teacher", "student"]

_NETWORKS = ("teacher", "student")
_RAW = ("model", "state_dict")
_AVERAGED = ("model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_BACKBONE = "backbone."
_DINO_HEAD = re.compile(r"head\.(mlp\.|last_layer\.)")
_DETECTORS = ("roi_head.", "roi_heads.", "rpn_head.", "rpn.")
_SEGMENTERS = ("decode_head.", "auxiliary_head.")

_MMPRETRAIN = (
    (r"^xca_layers\.", "blocks."),
    (r"^ca_layers\.", "cls_attn_blocks."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.local_mp\.conv1\.bn\.", ".local_mp.bn."),
    (r"\.local_mp\.(conv[12])\.conv\.", r".local_mp.\1."),
    (r"^pos_embed\.token_projection\.conv\.", "pos_embeder.token_projection."),
    (r"^head\.fc\.", "head."),
)


class Translated(NamedTuple):
    """Weights under the released names, and where they were found."""

    state: State
    dialect: str
    has_average: bool
    """The file also holds an exponential moving average that was not taken."""
    projection: State
    """DINO's projection head, under its own names without a prefix; {} where there is none."""


def to_official(content: Any, *, name: str, dino_network: Network | None = None, ema: bool = False) -> Translated:
    """Find the weights in what a file holds and give them the released names.

    Args:
        content: what was read.
        name: the file's name, for messages.
        dino_network: of a DINO training checkpoint, whose weights; None means the teacher.
        ema: of a training checkpoint, take the exponential moving average instead of the weights themselves.

    Raises:
        CheckpointError: no weights in it, or not those asked for, or those of a detector or segmenter.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not a dictionary of weights.")
    dialect = ""
    if any(isinstance(content.get(network), Mapping) for network in _NETWORKS):
        network = dino_network or "teacher"
        if network not in content:
            raise CheckpointError(f"{name} is a DINO training checkpoint without a {network}.")
        state, dialect = content[network], f"DINO {network}"
    elif dino_network is not None:
        raise CheckpointError(
            f"{name} is no DINO training checkpoint, so it has no {dino_network}; leave dino_network out."
        )
    else:
        state = unwrap(content, name, ema)
    has_average = not ema and any(key in content for key in _AVERAGED)

    state, projection = _strip_prefixes(tensors_only(state, name))
    if any(key.startswith(_DETECTORS) for key in state):
        raise CheckpointError(f"{name} holds a detector, not a classifier; xcit.create_detector opens it.")
    if any(key.startswith(_SEGMENTERS) for key in state):
        raise CheckpointError(f"{name} holds a segmentation model, not a classifier; xcit.create_segmenter opens it.")
    if any(key.startswith("xca_layers.") for key in state):
        state, dialect = {_renamed(key, _MMPRETRAIN): tensor for key, tensor in state.items()}, "mmpretrain"
    elif any(key.startswith("pos_embed.") for key in state) or "cls_attn_blocks.0.attn.q.weight" in state:
        state, dialect = {re.sub(r"^pos_embed\.", "pos_embeder.", key): t for key, t in state.items()}, "timm"
    return Translated(_join_class_attention(state), dialect or "official", has_average, projection)


def unwrap(content: Mapping[str, Any], name: str, ema: bool) -> Mapping[str, Any]:
    """Return the weights within what a training run saved around them.

    Raises:
        CheckpointError: several sets of weights, or not the one asked for.
    """
    averaged = [key for key in _AVERAGED if isinstance(content.get(key), Mapping)]
    raw = [key for key in _RAW if isinstance(content.get(key), Mapping)]
    if ema:
        if not averaged:
            raise CheckpointError(f"{name} holds no moving average of the weights; leave ema out.")
        return content[averaged[0]]
    if len(raw) > 1:
        raise CheckpointError(f"{name} holds weights twice, under 'model' and 'state_dict'; save one of them alone.")
    if not raw and averaged:
        raise CheckpointError(f"{name} holds only a moving average of the weights; pass ema=True to take it.")
    return content[raw[0]] if raw else content


def tensors_only(state: Mapping[str, Any], name: str) -> State:
    """Return weights by name.

    Raises:
        CheckpointError: there are none, or something else among them.
    """
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if not state or len(other) == len(state):
        keys = ", ".join(repr(key) for key in list(state)[:5]) or "nothing"
        raise CheckpointError(f"{name} holds no weights: a dictionary with {keys} is not a checkpoint of a model.")
    if other:
        kind = type(state[other[0]]).__name__
        raise CheckpointError(f"{name} holds a {kind} under {other[0]!r} among its weights; only tensors belong there.")
    return {str(key): tensor for key, tensor in state.items()}


def _strip_prefixes(state: State) -> tuple[State, State]:
    """Return the backbone's weights (a classifier's too), and DINO's projection head if there is one beside it."""
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    if not any(key.startswith(_BACKBONE) for key in state):
        return state, {}
    # beside a backbone, "head.mlp" and "head.last_layer" are DINO's projection, "head.fc" mmpretrain's classifier
    projection = {k.removeprefix("head."): tensor for k, tensor in state.items() if _DINO_HEAD.match(k)}
    return {k.removeprefix(_BACKBONE): tensor for k, tensor in state.items() if not _DINO_HEAD.match(k)}, projection


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    stem = re.match(r"patch_embed\.proj\.(\d+)\.(conv|bn)\.(.+)", key)
    if stem:  # theirs counts convolutions, ours also the activations between them
        key = f"patch_embed.proj.{2 * int(stem[1])}.{'0' if stem[2] == 'conv' else '1'}.{stem[3]}"
    return key


def _join_class_attention(state: State) -> State:
    """Stack class attention's ``q``, ``k``, ``v`` into ``qkv``; a set that is not complete stays, to be reported."""
    joined = dict(state)
    for key in state:
        found = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)q\.(weight|bias)", key)
        if found:
            parts = [f"{found[1]}{letter}.{found[2]}" for letter in "qkv"]
            if all(part in state for part in parts):
                joined[f"{found[1]}qkv.{found[2]}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


@dataclass(frozen=True)
class Layout:
    """The architecture that a set of weights belongs to, as far as names and shapes tell."""

    patch_size: int
    in_chans: int
    num_classes: int
    embed_dim: int
    depth: int
    num_heads: int

    @property
    def architecture(self) -> Architecture | None:
        """The released architecture with these sizes, if there is one."""
        for known in ARCHITECTURES.values():
            if all(getattr(known, n) == getattr(self, n) for n in ("patch_size", "embed_dim", "depth", "num_heads")):
                return known
        return None

    def __str__(self) -> str:
        sizes = f"embed_dim {self.embed_dim}, depth {self.depth}, {self.num_heads} heads, patch size {self.patch_size}"
        return f"{self.architecture.id} ({sizes})" if self.architecture else f"an XCiT of a custom size ({sizes})"


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """Read the layout off weights under the released names; None if they are not an XCiT's."""
    blocks = [int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))]
    convolutions = [k for k in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", k)]
    cls_token, temperature = state.get("cls_token"), state.get("blocks.0.attn.temperature")
    first = state.get("patch_embed.proj.0.0.weight")
    if cls_token is None or temperature is None or first is None or not blocks:
        return None
    if cls_token.ndim != 3 or temperature.ndim != 3 or first.ndim != 4:
        return None
    return Layout(
        patch_size=2 ** len(convolutions),
        in_chans=first.shape[1],
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
        embed_dim=cls_token.shape[-1],
        depth=max(blocks) + 1,
        num_heads=temperature.shape[0],
    )
