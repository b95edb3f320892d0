"""Mask R-CNN on an XCiT: torchvision's detector with the pyramid and the geometry of the released models.

An image is scaled (``DetectionTransform``), becomes a pyramid (``XCiTPyramid``), which a feature pyramid network
levels to one width; proposals are drawn from it (``ProposalNetwork``), and each is named, bounded and outlined
(``InstanceHeads``).

Source: section 4.3 of the paper; the released detection configurations. K foreground classes are labels 1 to K, 0 is
background, as in torchvision; the released files have the background last (``xcit.models.mmdet_files``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from xcit.errors import ConfigError, ShapeError
from xcit.models.proposals import ProposalNetwork
from xcit.models.pyramid import XCiTPyramid
from xcit.models.roi import InstanceHeads
from xcit.models.zoo import IMAGENET_MEAN, IMAGENET_STD
from xcit.ops.image_size import scaled_size
from xcit.ops.instance_masks import paste_masks

SIZE_DIVISIBLE = 32
Target = dict[str, Tensor]


class DetectionTransform(nn.Module):
    """Images of any sizes to one batch, and detections back to the images' own pixels.

    Args:
        min_size: the shorter side after scaling, in pixels.
        max_size: the longer side is at most this.
        mean: per channel, of values 0 to 1.
        std: likewise.

    Source: the released configurations: 1333 x 800, the proportions kept, padded to multiples of 32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, min_size: int, max_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(
        self, images: Sequence[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        """Return the images normalised, scaled in evaluation only, and padded with zeros at the right and the bottom.

        In training images and targets come as augmentation scaled them, and keep their size.
        """
        prepared = []
        for image in images:
            if image.ndim != 3 or image.shape[0] != len(self.mean) or not image.is_floating_point():
                raise ShapeError(
                    f"An image for the detector is ({len(self.mean)}, H, W) with values 0 to 1; got "
                    f"{tuple(image.shape)}, {image.dtype}."
                )
            normal = (image - self.mean.to(image)) / self.std.to(image)
            prepared.append(normal if self.training else self._scaled(normal))
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in prepared]
        H, W = (-(-max(side) // SIZE_DIVISIBLE) * SIZE_DIVISIBLE for side in zip(*sizes, strict=True))
        batch = torch.stack([F.pad(x, (0, W - x.shape[2], 0, H - x.shape[1])) for x in prepared])
        return ImageList(batch, sizes), targets

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image is scaled."""
        return scaled_size(height, width, self.min_size, self.max_size)

    def _scaled(self, image: Tensor) -> Tensor:
        size = self.scaled_size(*image.shape[1:])
        if size == tuple(image.shape[1:]):
            return image
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

    def postprocess(
        self, result: list[Target], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[Target]:
        """Return the detections in pixels of the images as they came; masks stay squares over their boxes."""
        if self.training:  # there are none
            return result
        for found, scaled, own in zip(result, image_shapes, original_image_sizes, strict=True):
            ratio = [own[1] / scaled[1], own[0] / scaled[0]] * 2
            found["boxes"] = found["boxes"] * torch.tensor(ratio, device=found["boxes"].device)
        return result


class PyramidNeck(nn.Module):
    """An XCiT's pyramid, levelled to one width by a feature pyramid network with a level of stride 64 on top.

    Attributes:
        body: the pyramid.
        fpn: the network.
        out_channels: of every level, as torchvision's detectors ask.
        strides: of the levels.
    """

    def __init__(self, body: XCiTPyramid, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(body.out_channels), out_channels, extra_blocks=LastLevelMaxPool())
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.out_channels = out_channels
        self.strides = (*body.strides, 2 * body.strides[-1])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the five levels, the finest first."""
        return self.fpn({str(i): level for i, level in enumerate(self.body(x))})


class MaskRCNN(GeneralizedRCNN):
    """Finds instances: a class, a box, a mask and a score each. torchvision's conventions.

    In training ``model(images, targets)`` returns a dictionary of losses, in evaluation ``model(images)`` a list of
    detections: ``boxes`` (n, 4) x0, y0, x1, y1 in pixels of the image, ``labels`` (n,) 1 to K, ``scores`` (n,) falling,
    and ``masks`` (n, 1, H, W) probabilities. ``detect`` returns masks as small squares instead: for large images.

    Args:
        body: the pyramid; its model's stem and blocks become the detector's.
        num_classes: K, background not counted.
        out_channels: width of the feature pyramid network.
        box_width: of the box head's linear layers.
        mask_channels: of the mask head's convolutions.
        mask_convs: how many there are.
        with_masks: False for boxes alone.
        box_samples: regions an image that the box head learns from.
        proposals: regions an image that are looked at.
        min_anchor_iou: overlap (IoU) that an instance's best anchors must have to learn it. 0.3 as released, by which
            squares of 17 pixels and less are not learned as proposals; with 0 all are.
        min_size: images are scaled so that the shorter side has so many pixels,
        max_size: and the longer at most so many.
        mean: of each channel of the images, whose values are 0 to 1.
        std: likewise.
        score_thresh: detections below it are dropped.
        nms_thresh: of two detections of a class with a larger overlap (IoU) the lesser is dropped.
        detections_per_img: at most so many are kept.

    Attributes:
        config: the arguments, and the XCiT's under "backbone".
        pretrained_cfg: what the classes are called, and where the weights come from.

    Raises:
        ConfigError: an argument out of its range.
    """

    def __init__(
        self,
        body: XCiTPyramid,
        num_classes: int = 80,
        *,
        out_channels: int = 256,
        box_width: int = 1024,
        mask_channels: int = 256,
        mask_convs: int = 4,
        with_masks: bool = True,
        box_samples: int = 512,
        proposals: int = 1000,
        min_anchor_iou: float = 0.3,
        min_size: int = 800,
        max_size: int = 1333,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
    ) -> None:
        own: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__", "body")}
        _check(own)
        neck = PyramidNeck(body, out_channels)
        super().__init__(
            neck,
            ProposalNetwork(out_channels, neck.strides, proposals, min_iou=min_anchor_iou),
            InstanceHeads(
                out_channels,
                neck.strides[:-1],
                num_classes,
                box_width=box_width,
                mask_channels=mask_channels,
                mask_convs=mask_convs,
                with_masks=with_masks,
                box_samples=box_samples,
                score_thresh=score_thresh,
                nms_thresh=nms_thresh,
                detections_per_img=detections_per_img,
            ),
            DetectionTransform(min_size, max_size, mean, std),
        )
        self.config = own | {"mean": list(mean), "std": list(std)} | {"backbone": body.config, "taps": list(body.taps)}
        self.num_classes = num_classes
        self.pretrained_cfg: dict[str, Any] = {}

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Return losses in training, detections with whole masks in evaluation.

        Args:
            images: each (3, H, W), values 0 to 1, any sizes.
            targets: in training, one an image: ``boxes`` (n, 4) float, ``labels`` (n,) int64 from 1, and ``masks``
                (n, H, W) of 0 and 1, where the model has masks.

        Raises:
            ShapeError: an image or a target of another shape.
        """
        if self.training:
            check_targets(images, targets, self.num_classes, masks=self.roi_heads.has_mask())
            return super().forward(images, targets)
        found = self.detect(images)
        for detections, image in zip(found, images, strict=True):
            if "masks" in detections:
                squares, size = detections["masks"][:, 0], (int(image.shape[1]), int(image.shape[2]))
                detections["masks"] = paste_masks(squares, detections["boxes"], size)[:, None]
        return found

    def detect(self, images: list[Tensor]) -> list[Target]:
        """Return detections as ``forward`` does in evaluation, with masks as squares (n, 1, 28, 28) over their boxes.

        ``xcit.ops.instance_masks.paste_mask`` lays one over its pixels.
        """
        if self.training:
            raise ConfigError("The detector is in training mode; call model.eval() before it detects.")
        return super().forward(images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training, in the backbone's blocks."""
        self.backbone.body.set_grad_checkpointing(enable)


def check_targets(images: Sequence[Tensor], targets: list[Target] | None, num_classes: int, *, masks: bool) -> None:
    """Refuse targets that the losses could not be computed from, or would be wrong with.

    Raises:
        ShapeError: none at all, another number than images, boxes without extent or of another shape, labels that are
            no foreground class, masks that are not of the image's size.
    """
    if targets is None or len(targets) != len(images):
        count = "none" if targets is None else len(targets)
        raise ShapeError(f"Training needs one target an image: there are {len(images)} images and {count} targets.")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes):
            raise ShapeError(
                f"Target {number}: boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}; they must be (n, 4) "
                f"and (n,)."
            )
        if len(labels) and not (int(labels.min()) >= 1 and int(labels.max()) <= num_classes):
            raise ShapeError(f"Target {number}: labels {labels.unique().tolist()}; they must be 1 to {num_classes}.")
        if bool((boxes[:, 2:] <= boxes[:, :2]).any()):
            wrong = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(1)][0].tolist()
            raise ShapeError(f"Target {number}: the box {wrong} has no extent; boxes are x0, y0, x1, y1.")
        if masks and ("masks" not in target or target["masks"].shape != (len(boxes), *image.shape[1:])):
            got = tuple(target["masks"].shape) if "masks" in target else "none"
            raise ShapeError(f"Target {number}: masks are {got}; they must be {(len(boxes), *image.shape[1:])}.")


def _check(config: dict[str, Any]) -> None:
    problems = [
        f"{name} is {config[name]}; it must be {floor} or more"
        for name, floor in {
            "num_classes": 1,
            "out_channels": 1,
            "box_width": 1,
            "mask_channels": 1,
            "mask_convs": 0,
            "min_size": SIZE_DIVISIBLE,
            "max_size": SIZE_DIVISIBLE,
            "detections_per_img": 1,
        }.items()
        if config[name] < floor
    ]
    problems += [
        f"{name} is {config[name]}; it must be between 0 and 1"
        for name in ("score_thresh", "nms_thresh", "min_anchor_iou")
        if not 0 <= config[name] <= 1
    ]
    in_chans = len(config["mean"])
    if len(config["std"]) != in_chans:
        problems.append(f"mean has {in_chans} values and std {len(config['std'])}; each needs one a channel")
    if config["max_size"] < config["min_size"]:
        problems.append(f"max_size is {config['max_size']}, less than min_size, {config['min_size']}")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
