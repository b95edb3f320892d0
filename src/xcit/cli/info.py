"""`xcit info`: one model, its weights, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from xcit.cli.output import mib
from xcit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from xcit.models.xcit import XCiT
    from xcit.models.zoo import Checkpoint

Fact = tuple[str, str]


def info(
    name: Annotated[str, Positional, arg(metavar="MODEL")],
    *,
    size: Annotated[
        int | None, arg(metavar="PX", help_behavior_hint="(default: what the model expects, or 224)")
    ] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    timing: bool = True,
) -> None:
    """Describe a model: parameters, multiply-adds, memory, and the time of one forward pass here.

    MODEL is a name of `xcit models` (nothing is downloaded; the time is that of random weights), a checkpoint that xcit
    wrote, or hf-hub:owner/name.

    Multiply-adds are those of convolutions and matrix products (half of what torch's flop counter counts), for each of
    the two exact forms of XCA. Memory is that of one float32 image, counted by following every tensor of a forward pass
    that computes no values: for inference the most that lives at once, for training what is kept for the backward
    pass. Weights, gradients, the optimiser's state and a library's scratch space come on top.

    Args:
        name: What to describe; see above.
        size: Side of the square image in pixels.
        device: Where to time it.
        timing: Time a forward pass of one image.
    """
    if size is not None and size < 1:
        raise ConfigError(f"--size is {size}; it must be 1 or more, and at least one patch of the model.")
    from xcit.cli.output import print_facts
    from xcit.inference.devices import choose_device

    where = choose_device(device) if timing else None
    model, checkpoint = _model(name)
    cfg = checkpoint.pretrained_cfg if checkpoint else model.pretrained_cfg
    if size is None:
        _, height, width = cfg.get("input_size") or (3, 224, 224)
    else:
        height = width = size
    if min(height, width) < model.config["patch_size"]:
        raise ConfigError(f"--size is {size}; it must be at least one patch of {model.config['patch_size']} px.")

    facts = _architecture(model, cfg)
    if checkpoint:
        facts += _released(checkpoint)
    facts += _costs(model, height, width)
    if where:
        facts += _time(model, height, width, where)
    print_facts(name, facts)


def _model(name: str) -> tuple[XCiT, Checkpoint | None]:
    """Return the model, with random weights for a name of the zoo, and the zoo's row if the name has one."""
    from xcit.errors import UnknownNameError
    from xcit.models.factory import create_model
    from xcit.models.zoo import find

    try:
        _, checkpoint = find(name)
    except UnknownNameError:
        return create_model(name, pretrained=True), None  # a file, or the error once more
    return create_model(name), checkpoint


def _architecture(model: XCiT, cfg: dict[str, Any]) -> list[Fact]:
    c = model.config
    sizes = f"{c['depth']} blocks, width {c['embed_dim']}, {c['num_heads']} heads, patches of {c['patch_size']} px"
    weights = {p.dtype for p in model.parameters()}
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights))
    classes = str(model.num_classes) if model.num_classes else "none: it returns features"
    names = cfg.get("class_names") or []
    if names:
        classes += f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    elif cfg.get("label_set"):
        classes += f" ({cfg['label_set']})"
    return [
        ("architecture", f"{cfg['architecture']}: {sizes}" if cfg.get("architecture") else sizes),
        ("channels", str(c["in_chans"])),
        ("classes", classes),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,} ({mib(num_bytes)} of {dtypes})"),
    ]


def _released(checkpoint: Checkpoint) -> list[Fact]:
    how = {"self-supervised": "DINO, without labels"}.get(checkpoint.task, "ImageNet-1k")
    return [
        ("weights", checkpoint.url),
        ("trained", how + (", distilled from RegNetY-16GF" if checkpoint.distilled else "")),
        *(
            ("published" if i == 0 else "", f"{m.name} {m.value:.1f} % ({m.source})")
            for i, m in enumerate(checkpoint.metrics)
        ),
    ]


def _costs(model: XCiT, height: int, width: int) -> list[Fact]:
    from xcit.inference.costs import count_costs

    patch = model.config["patch_size"]
    rows, columns = -(-height // patch), -(-width // patch)
    forms: tuple[Literal["tokens", "covariance"], ...] = (
        ("tokens",) if model.config["variant"] == "no_qk_norm" else ("tokens", "covariance")
    )
    costs = {form: count_costs(model.config, (height, width), form) for form in forms}
    return [
        ("image", f"{height} x {width} px, {rows} x {columns} = {rows * columns:,} tokens"),
        ("multiply-adds", _by_form({form: f"{c.multiply_adds / 1e9:.2f} G" for form, c in costs.items()})),
        ("memory, inference", _by_form({form: mib(c.inference_bytes) for form, c in costs.items()})),
        ("memory, training", _by_form({form: mib(c.training_bytes) for form, c in costs.items()})),
    ]


def _by_form(texts: Mapping[str, str]) -> str:
    words = {"tokens": "token form", "covariance": "covariance form"}
    return ", ".join(f"{text:>12} {words[form]}" for form, text in texts.items())


def _time(model: XCiT, height: int, width: int, device: torch.device) -> list[Fact]:
    import torch

    from xcit.inference.costs import time_forward
    from xcit.inference.devices import describe_device, is_out_of_memory
    from xcit.ops.xca import observe_forms

    try:
        model = model.eval().to(device)
        image = torch.randn(1, model.config["in_chans"], height, width, device=device, dtype=model.norm.weight.dtype)
        with observe_forms() as forms:
            seconds = time_forward(model, image)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [("one forward", f"out of memory on {describe_device(device)}")]
    dtype = str(image.dtype).removeprefix("torch.")
    chosen = " and ".join(sorted(set(forms)))
    return [("one forward", f"{1000 * seconds:.1f} ms on {describe_device(device)}, {dtype}, chosen form: {chosen}")]
