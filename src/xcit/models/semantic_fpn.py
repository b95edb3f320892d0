"""Semantic FPN on an XCiT: a feature pyramid network, each of whose maps is brought to stride 4, and their sum.

Legend: B batch, K classes, C channels of the pyramid's maps, F of the network's, D of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmentation import ConvNorm, PixelHead, SegmentationModel, resize
from xcit.models.zoo import IMAGENET_MEAN, IMAGENET_STD


class _Convolution(nn.Module):
    """A convolution under the name that mmsegmentation's modules give it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPNNeck(nn.Module):
    """A feature pyramid network without norms: the maps at one width, each with what the coarser ones saw added.

    Args:
        in_channels: of every map, the finest first.
        channels: F, of every map that comes out.

    Source: the neck FPN of mmsegmentation 0.11; maps are enlarged by repeating pixels.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Convolution(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(_Convolution(channels, channels, 3) for _ in in_channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return maps of the same sizes, each (B, F, rows, columns)."""
        maps: list[Tensor] = []
        above: Tensor | None = None
        for i in range(len(levels) - 1, -1, -1):
            lateral = self.lateral_convs[i](levels[i])
            if above is not None:
                lateral = lateral + F.interpolate(above, size=lateral.shape[-2:], mode="nearest")
            above = lateral
            maps.insert(0, self.fpn_convs[i](lateral))
        return maps


class FPNHead(PixelHead):
    """Convolutions that double a map's size, one for each factor of two that it is short of the finest, and the sum.

    Args:
        in_channels: of every map.
        strides: of the maps, powers of two, the finest first.
        channels: D.
        num_classes: K.
        dropout: before the classifier.

    Source: FPNHead of mmsegmentation 0.11, as the released configurations set it.
    """

    def __init__(
        self, in_channels: int, strides: Sequence[int], channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            doublings = (stride // strides[0]).bit_length() - 1
            steps: list[nn.Module] = []
            for i in range(max(1, doublings)):
                steps.append(ConvNorm(channels if i else in_channels, channels, 3))
                if doublings:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*steps))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, rows, columns) of the finest map's size."""
        total = self.scale_heads[0](levels[0])
        for i in range(1, len(levels)):
            total = total + resize(self.scale_heads[i](levels[i]), total.shape[-2:])
        return self.classify(total)


class SemanticFPN(SegmentationModel):
    """An XCiT with a feature pyramid network and the head of Semantic FPN. It has no auxiliary head.

    Args:
        backbone: the pyramid.
        num_classes: K.
        fpn_channels: F of the feature pyramid network; None for the backbone's embed_dim.
        channels: D of the head.
        dropout: before the classifier.
        image_size: the shorter side, in pixels, to which images are scaled in use,
        max_size: and the longer at most.
        mean: of each channel of the images, whose values are 0 to 1.
        std: likewise.

    Attributes:
        neck: the feature pyramid network.

    Raises:
        ConfigError: an argument out of its range.

    Source: Kirillov et al., Panoptic Feature Pyramid Networks, CVPR 2019; the released configurations
    ``sem_fpn_xcit_*``.
    """

    head: ClassVar[str] = "sem_fpn"

    def __init__(
        self,
        backbone: XCiTPyramid,
        num_classes: int = 150,
        *,
        fpn_channels: int | None = None,
        channels: int = 128,
        dropout: float = 0.1,
        image_size: int = 512,
        max_size: int = 2048,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        fpn_channels = backbone.embed_dim if fpn_channels is None else fpn_channels
        own: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__", "backbone")}
        super().__init__(backbone, own)
        self.neck = FPNNeck(backbone.out_channels, fpn_channels)
        self.decode_head = FPNHead(fpn_channels, backbone.strides, channels, num_classes, dropout)
        self.auxiliary_head = None

    def decode(self, levels: list[Tensor]) -> Tensor:
        """Return class scores at the finest level's size, of the pyramid's four maps."""
        return self.decode_head(self.neck(levels))
