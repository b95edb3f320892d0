"""A loaded model changed to other classes or other channels, keeping all else that it has learned."""

from typing import Any

import torch
from torch import Tensor, nn

from xcit.models.xcit import XCiT


def change_classes(model: XCiT, num_classes: int) -> None:
    """Give a model a new classifier, randomly initialised; ``pretrained_cfg`` forgets the former classes."""
    model.reset_classifier(num_classes)
    model.pretrained_cfg.update(class_names=None, label_set=None)


def change_in_chans(model: XCiT, in_chans: int) -> None:
    """Adapt a model's first convolution to images of another number of channels.

    To one channel its weights are summed: a grey image then gives what it gave when repeated over all channels. To
    any other number they are repeated in turn (R, G, B, R, ...) and scaled by old / new, which keeps the size of the
    sum. ``pretrained_cfg`` follows: mean and std are averaged, or repeated likewise.

    Args:
        model: changed in place.
        in_chans: channels of the images to come.
    """
    stem: Any = model.patch_embed.proj
    old: Any = next(module for module in stem.modules() if isinstance(module, nn.Conv2d))
    new: Any = nn.Conv2d(
        in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
    )
    new = new.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(adapted_weight(old.weight, in_chans))
    if old.bias is not None:
        new.bias = old.bias
    if stem is old:  # the variant linear_patch
        model.patch_embed.proj = new
    else:
        stem[0][0] = new
    model.patch_embed.in_chans = model.config["in_chans"] = in_chans
    _adapt_cfg(model.pretrained_cfg, in_chans)


def adapted_weight(weight: Tensor, in_chans: int) -> Tensor:
    """Return the weight (out, in_chans, kh, kw) by the rule of ``change_in_chans``."""
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    old = weight.shape[1]
    return weight[:, [i % old for i in range(in_chans)]] * (old / in_chans)


def _adapt_cfg(cfg: dict[str, Any], in_chans: int) -> None:
    for key in ("mean", "std"):
        if values := cfg.get(key):
            if in_chans == 1:
                cfg[key] = [sum(values) / len(values)]
            else:
                cfg[key] = [values[i % len(values)] for i in range(in_chans)]
    if "input_size" in cfg:
        cfg["input_size"] = [in_chans, *cfg["input_size"][1:]]
