"""timm's XCiT, taken over: the same weights in this package's model."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from xcit.errors import ConfigError, UnknownNameError
from xcit.models.dialects import layout_of, to_official
from xcit.models.layers import NORM_EPS
from xcit.models.weights import WeightFile, fit
from xcit.models.xcit import POOLS, XCiT
from xcit.models.zoo import find

_BATCH_NORM = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
_IMAGE_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


def from_timm(timm_model: nn.Module) -> XCiT:
    """Return this package's model with a timm XCiT's weights, options, dtype, device and mode; its outputs are equal.

    Args:
        timm_model: a ``timm.models.xcit.Xcit``, such as ``timm.create_model("xcit_nano_12_p16_224")``. It is not
            changed and shares nothing with the result.

    Returns:
        The model. ``pretrained_cfg`` is what timm says of images and classes.

    Raises:
        ConfigError: not a timm XCiT, or one with an option that this package's model does not have, such as another
            activation or norm, no pooling, or pruned blocks.
    """
    # Whoever holds such a model has imported timm already; nobody else should wait the seconds that this takes.
    module = sys.modules.get("timm.models.xcit")
    if module is None or not isinstance(timm_model, module.Xcit):
        raise ConfigError(f"from_timm takes a timm Xcit model, not {type(timm_model).__name__}.")
    problems = _problems(timm_model)
    if problems:
        raise ConfigError(f"This timm model cannot be taken over: {'; '.join(problems)}.")

    state = to_official(timm_model.state_dict(), name="The timm model").state
    layout = layout_of(state)
    architecture = layout.architecture if layout else None
    config = _config(timm_model)
    config["eta"] = architecture.eta if architecture else 1.0  # an initial value only; timm does not keep it
    model = XCiT(**config).to(timm_model.cls_token.device, timm_model.cls_token.dtype)
    told = getattr(timm_model, "pretrained_cfg", None)  # which only timm.create_model gives
    cfg = cfg_from_timm(told, timm_model.num_classes) if told else {}
    fit(model, WeightFile("The timm model", state, "timm", layout, cfg=cfg))
    model.set_grad_checkpointing(timm_model.grad_checkpointing)
    return model.train(timm_model.training)


def cfg_from_timm(cfg: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Return what timm says of images and classes as this package's ``pretrained_cfg``.

    Args:
        cfg: timm's ``pretrained_cfg``, of a model or of the ``config.json`` in a hub repository.
        num_classes: of the model; a classifier that is not ImageNet's has no ImageNet names.
    """
    name = ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    try:
        architecture, released = find(name)
    except UnknownNameError:
        architecture, released = None, None
    ours = {key: list(v) if isinstance(v := cfg[key], tuple | list) else v for key in _IMAGE_KEYS if key in cfg}
    names = cfg.get("label_names") or None
    return {
        **ours,
        "label_set": released.label_set if released and names is None and num_classes == 1000 else None,
        "class_names": list(names) if names and len(names) == num_classes else None,
        "checkpoint": None,
        "architecture": architecture.id if architecture else None,
    }


def _config(timm_model: Any) -> dict[str, Any]:
    block, cls_block = timm_model.blocks[0], timm_model.cls_attn_blocks[0]
    return {
        "patch_size": timm_model.patch_embed.patch_size,
        "in_chans": timm_model.in_chans,
        "num_classes": timm_model.num_classes,
        "embed_dim": timm_model.embed_dim,
        "depth": len(timm_model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / timm_model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "cls_attn_layers": len(timm_model.cls_attn_blocks),
        "use_pos": timm_model.pos_embed is not None,
        "tokens_norm": cls_block.tokens_norm,
        "global_pool": timm_model.global_pool,
        "drop_rate": timm_model.head_drop.p,
        "pos_drop_rate": timm_model.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": getattr(block.drop_path1, "drop_prob", 0.0),
    }


def _problems(timm_model: Any) -> list[str]:
    """What of a timm model has no counterpart here; its weights' names and shapes are checked later."""
    if timm_model.cls_attn_blocks is None or not len(timm_model.cls_attn_blocks) or not len(timm_model.blocks):
        return ["it was pruned to a feature extractor"]
    problems = []
    if timm_model.global_pool not in POOLS:
        problems.append(f"global_pool is {timm_model.global_pool!r}, not 'token' or 'avg'")
    if timm_model.pos_embed is not None and timm_model.pos_embed.temperature != 10000:
        problems.append(f"its positional encoding has temperature {timm_model.pos_embed.temperature}, not 10000")
    for name, values in {
        "num_heads": {b.attn.num_heads for b in (*timm_model.blocks, *timm_model.cls_attn_blocks)},
        "tokens_norm": {b.tokens_norm for b in timm_model.cls_attn_blocks},
        "drop_path_rate": {getattr(b.drop_path1, "drop_prob", 0.0) for b in timm_model.blocks},
    }.items():
        if len(values) > 1:
            problems.append(f"{name} differs from block to block")
    foreign = {str(m): name for name, m in reversed(list(timm_model.named_modules())) if not _has_counterpart(m)}
    problems += [f"{name} is {m}" for m, name in foreign.items()]
    return problems


def _has_counterpart(module: Any) -> bool:
    """Whether a module without children does what the one at its place in this package's model does."""
    if any(True for _ in module.children()):
        return True
    kind = type(module)  # a subclass may compute something else
    if kind is nn.GELU:
        return module.approximate == "none"
    if kind is nn.LayerNorm:
        return module.eps == NORM_EPS
    if kind is nn.BatchNorm2d:
        return all(getattr(module, name) == value for name, value in _BATCH_NORM.items())
    if kind.__name__ == "DropPath":
        return module.scale_by_keep
    return kind in (nn.Conv2d, nn.Linear, nn.Dropout, nn.Identity)
