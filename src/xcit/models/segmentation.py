"""What semantic segmenters on an XCiT have in common: the way of an image, and the classifier of its pixels.

A segmenter turns the pyramid's four maps into one map of class scores at stride 4 (``decode_head``), which is brought
to the size of the image. While it learns, a second and smaller head may look at the map of stride 16 alone.

Modules are named as in the released files, which are mmsegmentation's, so that those load without renaming.

Legend: B batch, K classes, C embed_dim of the backbone, H x W the image.

Source: section 4.4 of the paper; the released segmentation configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.errors import ConfigError, ShapeError
from xcit.models.pyramid import XCiTPyramid

SMALLEST_SIDE = 32
"""Of the images that a segmenter is set up for, in pixels: one cell of the pyramid's coarsest level."""
_AUXILIARY_LEVEL = 2


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, C, h, w) at another size, bilinear, corners not aligned: as everywhere in the released heads."""
    return F.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=False)


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the size, batch norm, and a rectifier: ``max(0, bn(conv(x)))``.

    Args:
        in_channels: of the map.
        out_channels: of the result.
        kernel_size: an odd number of pixels.

    Raises:
        ShapeError: in training, a map of a single pixel of a single image, which has no statistics.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_channels, h, w) of (B, in_channels, h, w)."""
        x = self.conv(x)
        # Synchronised batch norm, which is no BatchNorm2d, has the other devices' images too.
        if self.bn.training and isinstance(self.bn, nn.BatchNorm2d) and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise ShapeError(
                "Training on one image a batch leaves batch norm a single value a channel, which has no variance; take "
                "two images or more a batch."
            )
        return F.relu(self.bn(x), inplace=True)


class PixelHead(nn.Module):
    """A head that ends in a classifier of every pixel; subclasses make the features that it sees.

    Args:
        channels: of the features.
        num_classes: K.
        dropout: chance that a channel of the features is left out in training.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = pixel_classifier(channels, num_classes)

    def classify(self, x: Tensor) -> Tensor:
        """Return logits (B, K, h, w) of features (B, channels, h, w)."""
        return self.conv_seg(self.dropout(x))


class AuxiliaryHead(PixelHead):
    """One 3 x 3 convolution and a classifier on the map of stride 16: mmsegmentation's FCNHead as the models had it."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.Sequential(ConvNorm(in_channels, channels, 3))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, H / 16, W / 16) of the pyramid's maps."""
        return self.classify(self.convs(levels[_AUXILIARY_LEVEL]))


def pixel_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Return a new classifier of pixels: weights normal with standard deviation 0.01, bias 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class SegmentationModel(nn.Module):
    """Names every pixel of an image. ``UperNet`` and ``SemanticFPN`` are the two there are.

    Images come normalised by ``mean`` and ``std``, of any height and width. Sizes that are no multiples of the patch
    (better, of 32) are taken too; the map of scores, which covers whole patches, is then pressed into the image's size,
    as in the released models.

    Attributes:
        backbone: the pyramid.
        decode_head: from the pyramid's maps to class scores at stride 4.
        auxiliary_head: scores from the map of stride 16, for training; None without.
        num_classes: K.
        config: the arguments, with "head" for the kind, and the XCiT's under "backbone": ``segmenters.build`` takes it.
        pretrained_cfg: what the classes are called ("class_names", "label_set"), their colours ("palette"), "mean" and
            "std", and where the weights come from ("checkpoint", "architecture"), as far as known.
        mean: per channel, of images with values 0 to 1.
        std: likewise.
        image_size: the shorter side, in pixels, to which images are scaled in use,
        max_size: and the longer at most.
    """

    head: ClassVar[str]
    """What the kind is called: "upernet" or "sem_fpn", as in the names of the released files."""

    decode_head: PixelHead
    auxiliary_head: AuxiliaryHead | None

    def __init__(self, backbone: XCiTPyramid, own: dict[str, Any]) -> None:
        """Take the pyramid and the arguments, which are checked.

        Raises:
            ConfigError: an argument out of its range.
        """
        super().__init__()
        _check(own, backbone.config["in_chans"])
        self.backbone = backbone
        self.num_classes: int = own["num_classes"]
        self.mean, self.std = (tuple(float(value) for value in own[name]) for name in ("mean", "std"))
        self.image_size: int = own["image_size"]
        self.max_size: int = own["max_size"]
        listed = {name: list(value) for name, value in own.items() if isinstance(value, (list, tuple))}
        shape = {"head": self.head, "backbone": backbone.config, "taps": list(backbone.taps)}
        self.config: dict[str, Any] = own | listed | shape
        self.pretrained_cfg: dict[str, Any] = {
            "label_set": None,
            "class_names": None,
            "palette": None,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def decode(self, levels: list[Tensor]) -> Float[Tensor, "batch classes rows columns"]:
        """Return class scores at the finest level's size, of the pyramid's four maps."""
        return self.decode_head(levels)

    def forward_low(self, x: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes rows columns"]:
        """Return logits (B, K, rows, columns) as the head gives them, stride 4.

        Raises:
            ShapeError: an image of another number of channels, or too small for the pyramid.
        """
        return self.decode(self.backbone(x))

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes height width"]:
        """Return logits (B, K, H, W): those of ``forward_low`` at the size of the images.

        Args:
            x: images normalised by ``mean`` and ``std``.

        Raises:
            ShapeError: as ``forward_low``.
        """
        return resize(self.forward_low(x), x.shape[-2:])

    def forward_auxiliary(self, x: Float[Tensor, "batch chans height width"]) -> tuple[Tensor, Tensor | None]:
        """Return what training compares with the masks, in one pass of the backbone.

        Returns:
            The logits of ``forward_low``, and the auxiliary head's (B, K, H / 16, W / 16); None without that head.

        Raises:
            ShapeError: as ``forward_low``; or in training, a single image where batch norm needs several.
        """
        levels = self.backbone(x)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(levels)
        return self.decode(levels), auxiliary

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training, in the backbone's blocks."""
        self.backbone.set_grad_checkpointing(enable)


def _check(own: dict[str, Any], in_chans: int) -> None:
    least = {
        "num_classes": 2,
        "channels": 1,
        "fpn_channels": 1,
        "auxiliary_channels": 0,
        "image_size": SMALLEST_SIDE,
        "max_size": SMALLEST_SIDE,
    }
    problems = [
        f"{name} is {own[name]!r}; it must be a whole number, {floor} or more"
        for name, floor in least.items()
        if name in own and not (_is_whole(own[name]) and own[name] >= floor)
    ]
    if not (isinstance(own["dropout"], (int, float)) and 0 <= own["dropout"] < 1):
        problems.append(f"dropout is {own['dropout']!r}; it must be a number, 0 or more and less than 1")
    scales = own.get("pool_scales", (1,))
    if not isinstance(scales, (list, tuple)):
        problems.append(f"pool_scales is {scales!r}; it must be a list of whole numbers of 1 or more")
    elif not scales or not all(_is_whole(scale) and scale >= 1 for scale in scales):
        problems.append(f"pool_scales is {list(scales)}; it must be whole numbers of 1 or more")
    for name in ("mean", "std"):
        values = own[name]
        numbers = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
        if not numbers or len(values) != in_chans:
            problems.append(f"{name} is {values!r}; the images have {in_chans} channels, give a number for each")
        elif name == "std" and not all(value > 0 for value in values):
            problems.append(f"std is {values!r}; its numbers must be more than 0")
    if not problems and own["max_size"] < own["image_size"]:
        problems.append(f"max_size is {own['max_size']}, less than image_size, {own['image_size']}")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
