"""UperNet on an XCiT: the coarsest map sees the whole image by pooling, and the finer ones take it up from above.

Legend: B batch, K classes, C channels of the pyramid's maps, D channels of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmentation import AuxiliaryHead, ConvNorm, PixelHead, SegmentationModel, resize
from xcit.models.zoo import IMAGENET_MEAN, IMAGENET_STD

POOL_SCALES = (1, 2, 3, 6)


class UperHead(PixelHead):
    """Pyramid pooling on the coarsest map, a feature pyramid network down to the finest, and both joined.

    Args:
        in_channels: of every map, the finest first.
        channels: D, of all that the head computes.
        num_classes: K.
        pool_scales: the coarsest map is averaged into so many rows and columns, once each.
        dropout: before the classifier.

    Source: UPerHead of mmsegmentation 0.11, as the released configurations set it.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, pool_scales: Sequence[int], dropout: float
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNorm(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvNorm(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNorm(len(in_channels) * channels, channels, 3)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, rows, columns) of the finest map's size."""
        coarsest = levels[-1]
        pooled = [resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.psp_modules]
        top = self.bottleneck(torch.cat([coarsest, *pooled], 1))
        maps, above = [top], top
        for i in range(len(self.lateral_convs) - 1, -1, -1):
            lateral = self.lateral_convs[i](levels[i])
            above = lateral + resize(above, lateral.shape[-2:])
            maps.insert(0, self.fpn_convs[i](above))
        size = maps[0].shape[-2:]
        joined = torch.cat([maps[0], *(resize(coarser, size) for coarser in maps[1:])], 1)  # (B, 4 D, rows, columns)
        return self.classify(self.fpn_bottleneck(joined))


class UperNet(SegmentationModel):
    """An XCiT with UperNet's head, and while it learns an auxiliary head on the map of stride 16.

    Args:
        backbone: the pyramid.
        num_classes: K.
        channels: D of the head.
        pool_scales: of its pyramid pooling.
        auxiliary_channels: of the auxiliary head; 0 for none.
        dropout: before both classifiers.
        image_size: the shorter side, in pixels, to which images are scaled in use,
        max_size: and the longer at most.
        mean: of each channel of the images, whose values are 0 to 1.
        std: likewise.

    Raises:
        ConfigError: an argument out of its range.

    Source: Xiao et al., Unified Perceptual Parsing, ECCV 2018; the released configurations ``upernet_xcit_*``.
    """

    head: ClassVar[str] = "upernet"

    def __init__(
        self,
        backbone: XCiTPyramid,
        num_classes: int = 150,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = POOL_SCALES,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
        image_size: int = 512,
        max_size: int = 2048,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        own: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__", "backbone")}
        super().__init__(backbone, own)
        widths = backbone.out_channels
        self.decode_head = UperHead(widths, channels, num_classes, pool_scales, dropout)
        self.auxiliary_head = (
            AuxiliaryHead(widths[2], auxiliary_channels, num_classes, dropout) if auxiliary_channels else None
        )
