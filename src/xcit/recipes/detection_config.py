"""What a run of object detection (Mask R-CNN) needs to be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from xcit.recipes.settings import Range, RunConfig, Share


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Which detector, and the weights it begins with. Its classes follow from the data."""

    name: str = "xcit_small_12_p16"
    """The backbone, an XCiT architecture (``xcit models``)."""
    pretrained: str = "none"
    """Initial weights: none (random), released (the backbone's classifier), coco (the released detector), a released
    checkpoint's name, or a file: of a detector, or of a segmenter, a classifier or DINO, which gives its backbone."""
    drop_path_rate: Annotated[float, Range(0, 0.9)] = 0.0
    """Stochastic depth of every XCA block."""
    grad_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    out_channels: Annotated[int, Range(1, 4096)] = 256
    """Width of the feature pyramid network."""
    box_width: Annotated[int, Range(1, 1 << 16)] = 1024
    """Width of the box head's linear layers."""
    mask_channels: Annotated[int, Range(1, 4096)] = 256
    """Width of the mask head's convolutions."""
    mask_convs: Annotated[int, Range(0, 16)] = 4
    """How many there are."""
    box_samples: Annotated[int, Range(4, 1 << 16)] = 512
    """Regions an image that the box head learns from, a quarter of which may be instances."""
    proposals: Annotated[int, Range(10, 1 << 16)] = 1000
    """Proposals an image that are looked at."""
    min_anchor_iou: Share = 0.3
    """Overlap that an instance's best anchors must have to learn it: 0.3 as released, 0 for small instances too."""
    score_thresh: Share = 0.05
    """Detections below it are dropped."""
    max_detections: Annotated[int, Range(1, 10_000)] = 100
    """At most so many an image are kept."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Other arguments of the backbone's class, such as depth."""


@dataclass(frozen=True, kw_only=True)
class AnnotatedDataConfig:
    """Which images."""

    root: str = ""
    """Folder of a COCO-format data set, or its annotation file (``xcit.data.coco_parts`` says where files may lie)."""
    masks: Literal["auto", "none"] = "auto"
    """auto learns masks where there are any; none learns boxes alone."""
    val_fraction: Annotated[float, Range(0.001, 0.9)] = 0.1
    """Share of the training images to validate on, where the data has no part for it."""
    split_seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Which images those are."""
    image_size: Annotated[int, Range(32, 8192)] = 800
    """Pixels of the shorter side in validation, and in use."""
    max_size: Annotated[int, Range(32, 16384)] = 1333
    """At most so many of the longer side, in training too."""
    max_bad_fraction: Share = 0.1
    """Stop if more than this share of the images cannot be decoded; fewer are skipped and listed."""
    num_workers: Annotated[int, Range(-1, 256)] = -1
    """Processes a device that prepare images; -1 takes as many as the machine has cores to spare, 0 none."""


@dataclass(frozen=True, kw_only=True)
class DetectionAugmentConfig:
    """How training images are distorted."""

    min_short: Annotated[int, Range(32, 8192)] = 480
    """Least length of the shorter side,"""
    max_short: Annotated[int, Range(32, 8192)] = 800
    """and the greatest,"""
    short_step: Annotated[int, Range(1, 8192)] = 32
    """in steps of so many pixels."""
    hflip: Share = 0.5
    """Probability of mirroring left and right."""
    crop_prob: Share = 0.5
    """Probability of a crop between two scalings."""
    crop_min_short: Annotated[int, Range(32, 8192)] = 400
    """Least length of the shorter side before the crop,"""
    crop_max_short: Annotated[int, Range(32, 8192)] = 600
    """and the greatest,"""
    crop_short_step: Annotated[int, Range(1, 8192)] = 100
    """in steps of so many pixels."""
    crop_min: Annotated[int, Range(32, 8192)] = 384
    """Least side of the crop."""
    crop_max: Annotated[int, Range(32, 8192)] = 600
    """Greatest."""
    jitter: Annotated[float, Range(0, 1)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    hue: Annotated[float, Range(0, 0.5)] = 0.0
    """Largest turn of the colour circle."""
    invert: Share = 0.0
    """Probability of the negative, where dark on bright means the same as bright on dark."""


@dataclass(frozen=True, kw_only=True)
class DetectionOptimConfig:
    """Optimiser (AdamW) and schedule."""

    batch_size: Annotated[int, Range(1, 1 << 20)] = 16
    """Images a step, over all devices and accumulated gradients together."""
    accumulate: Annotated[int, Range(1, 1024)] = 1
    """Parts in which a device computes its share of the batch, to save memory; batch norm sees a part at a time."""
    lr: Annotated[float, Range(0, 1e3)] = 1e-4
    """Peak learning rate, at lr_batch images a step."""
    lr_batch: Annotated[int, Range(0, 1 << 20)] = 0
    """The peak of this run is lr · batch_size / lr_batch; 0: lr itself."""
    schedule: Literal["steps", "cosine"] = "steps"
    """steps: a tenth after first_decay and again after second_decay; cosine: down to min_lr over the whole run."""
    first_decay: Annotated[float, Range(0, 100_000)] = 27.0
    """Epochs after which the learning rate falls to a tenth,"""
    second_decay: Annotated[float, Range(0, 100_000)] = 33.0
    """and after which to a hundredth."""
    min_lr: Annotated[float, Range(0, 1e3)] = 0.0
    """Where the cosine ends."""
    warmup_steps: Annotated[int, Range(0, 1 << 30)] = 500
    """Length of the linear rise; at most a tenth of the run."""
    warmup_ratio: Share = 0.001
    """Where it begins, as a share of the peak."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    """Of everything but the layer norms."""
    clip_grad: Annotated[float, Range(0, 1e6)] = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0
    """Decay a step of averaged weights beside the trained ones; 0 keeps none."""

    warmup_epochs: ClassVar[float] = 0.0  # the rise is counted in steps
    warmup_lr: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(RunConfig):
    """A complete run of object detection and instance segmentation."""

    lengths: ClassVar[tuple[str, ...]] = ("optim.first_decay", "optim.second_decay")
    task: Literal["detection"] = "detection"
    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: AnnotatedDataConfig = field(default_factory=AnnotatedDataConfig)
    augment: DetectionAugmentConfig = field(default_factory=DetectionAugmentConfig)
    optim: DetectionOptimConfig = field(default_factory=DetectionOptimConfig)

    def contradictions(self) -> Iterator[str]:
        """Yield each pair of settings that cannot both be honoured, with the way out."""
        yield from super().contradictions()
        optim, augment, data = self.optim, self.augment, self.data
        for low, high in (
            ("min_short", "max_short"), ("crop_min_short", "crop_max_short"), ("crop_min", "crop_max"),
        ):  # fmt: skip
            if getattr(augment, low) > getattr(augment, high):
                yield f"augment.{low} is {getattr(augment, low)}, above augment.{high}, {getattr(augment, high)}"
        if data.image_size > data.max_size:
            yield f"data.image_size is {data.image_size}, above data.max_size, {data.max_size}"
        if augment.max_short > data.max_size:
            yield f"augment.max_short is {augment.max_short}, above data.max_size, {data.max_size}"
        if optim.schedule == "steps" and not optim.first_decay <= optim.second_decay:
            yield f"optim.first_decay is {optim.first_decay:g}, after optim.second_decay, {optim.second_decay:g}"
        if self.compute.strategy == "fsdp":
            yield "compute.strategy=fsdp is not for detectors; take ddp"
        if self.compute.compile:
            yield "compute.compile is not for detectors, whose sizes change with every batch; set it to false"
        if not self.compute.channels_last:
            yield "compute.channels_last=false is not for detectors, whose stem always has channels last; leave it out"
        if not data.root:
            yield "data.root is empty; name the images with --data"
