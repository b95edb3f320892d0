"""DINO's projection head, and a backbone with it: what student and teacher are.

Legend: V views, B images, C embed_dim, K outputs.

Source: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021; facebookresearch/dino,
vision_transformer.py (DINOHead) and utils.py (MultiCropWrapper), whose names the weights bear.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.errors import ConfigError, ShapeError
from xcit.models.xcit import XCiT

_DROPS = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows have a direction and a length of their own: W = g · v / ||v||.

    Args:
        in_dim: width of the input.
        out_dim: rows of W.

    Source: Salimans and Kingma, "Weight normalization", 2016.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Return x W^T."""
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class DINOHead(nn.Module):
    """A feed-forward network to a narrow vector of length 1, then a weight-normed map to many outputs.

    With rows of length 1 each output is a cosine, between -1 and 1.

    Args:
        in_dim: width of the backbone's features.
        out_dim: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the vector of length 1.
        num_layers: of the feed-forward network, 1 or more; GELU between them, no batch norm.
        norm_last_layer: the rows of the last map keep length 1; otherwise their lengths are learnt.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim}
        wrong = [f"{name} is {size}" for name, size in (sizes | {"num_layers": num_layers}).items() if size < 1]
        if wrong:
            raise ConfigError(f"{'; '.join(wrong)}; DINO's head needs 1 or more.")
        self.in_dim, self.out_dim, self.norm_last_layer = in_dim, out_dim, norm_last_layer
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.mlp: nn.Module = nn.Sequential(*layers[:-1]) if num_layers > 1 else layers[0]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)  # its directions as PyTorch begins a linear layer
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Return the K logits of each feature vector."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class DINOModel(nn.Module):
    """A backbone and a projection head: the views of some images to their logits.

    Args:
        backbone: without classifier (``num_classes=0``).
        head: as wide as its features.

    Raises:
        ConfigError: the two do not fit.
    """

    def __init__(self, backbone: XCiT, head: DINOHead) -> None:
        super().__init__()
        if backbone.num_classes:
            raise ConfigError(
                f"The backbone has a classifier for {backbone.num_classes} classes; build it with num_classes=0."
            )
        if head.in_dim != backbone.num_features:
            raise ConfigError(f"The head takes {head.in_dim} features, the backbone has {backbone.num_features}.")
        self.backbone = backbone
        self.head = head

    def forward(
        self, views: Sequence[Float[Tensor, "batch chans ?height ?width"]]
    ) -> Float[Tensor, "views batch outputs"]:
        """Return the logits (V, B, K) of the views, in their order.

        Neighbouring views of one size go through the backbone as one batch, so that its batch norm sees them together;
        the head sees all at once.

        Args:
            views: V tensors (B, C, H, W); their sizes may differ, but those of one size stand side by side.

        Raises:
            ShapeError: no view, or another number of images in some.
        """
        if len({len(view) for view in views}) != 1:
            raise ShapeError(f"Expected views of the same images, got {[tuple(view.shape) for view in views]}.")
        features = [
            self.backbone(torch.cat(list(same))) for _, same in groupby(views, key=lambda view: tuple(view.shape[-2:]))
        ]
        return self.head(torch.cat(features)).unflatten(0, (len(views), -1))


def teacher_of(student: DINOModel) -> DINOModel:
    """Return a teacher for a student: equal weights, nothing dropped in training, no gradients."""
    backbone = XCiT(**student.backbone.config | dict.fromkeys(_DROPS, 0.0))
    backbone.pretrained_cfg = copy.deepcopy(student.backbone.pretrained_cfg)
    teacher = DINOModel(backbone, copy.deepcopy(student.head))
    weight = student.backbone.norm.weight
    teacher.to(weight.device, weight.dtype)
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False).train()
