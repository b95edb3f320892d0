"""What a run of semantic segmentation (UperNet or Semantic FPN) needs to be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from xcit.recipes.settings import Range, RunConfig, Share


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Which segmenter, and the weights it begins with. Its classes follow from the data."""

    name: str = "xcit_small_12_p16"
    """The backbone, an XCiT architecture (``xcit models``)."""
    head: Literal["upernet", "sem_fpn"] = "upernet"
    """UperNet, or Semantic FPN."""
    pretrained: str = "none"
    """Initial weights: none (random), released (the backbone's classifier), ade20k (the released segmenter), a released
    checkpoint's name, or a file: of a segmenter, or of a detector, a classifier or DINO, which gives its backbone."""
    drop_path_rate: Annotated[float, Range(0, 0.9)] = 0.0
    """Stochastic depth of every XCA block."""
    grad_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    channels: Annotated[int, Range(0, 1 << 14)] = 0
    """Width of the head; 0 takes the released one, 512 of UperNet, 128 of Semantic FPN."""
    fpn_channels: Annotated[int, Range(0, 1 << 14)] = 0
    """Width of Semantic FPN's pyramid; 0 takes the backbone's."""
    auxiliary_channels: Annotated[int, Range(0, 1 << 14)] = 256
    """Width of UperNet's auxiliary head; 0 for none."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    """Probability of a channel before the last layer of a head."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Other arguments of the backbone's class, such as depth."""


@dataclass(frozen=True, kw_only=True)
class MaskedDataConfig:
    """Which images."""

    root: str = ""
    """Folder of ADE20k, or of images, masks and a classes.txt (``xcit.data.mask_parts`` says what may lie there)."""
    val_fraction: Annotated[float, Range(0.001, 0.9)] = 0.1
    """Share of the training images to validate on, where the data has no part for it."""
    split_seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Which images those are."""
    image_size: Annotated[int, Range(32, 8192)] = 512
    """Pixels of the shorter side in validation, and in use."""
    max_size: Annotated[int, Range(32, 1 << 15)] = 2048
    """At most so many of the longer side."""
    class_weights: dict[str, float] = field(default_factory=dict)
    """Factors on the loss of some classes' pixels, by name, such as 0.2 for a background that is nearly everything;
    of classes that are not named, 1."""
    max_bad_fraction: Share = 0.1
    """Stop if more than this share of the images cannot be used; fewer are skipped and listed."""
    num_workers: Annotated[int, Range(-1, 256)] = -1
    """Processes a device that prepare images; -1 takes as many as the machine has cores to spare, 0 none."""


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentConfig:
    """How training images are distorted."""

    crop_size: Annotated[int, Range(32, 8192)] = 512
    """Side of the square that the model learns from."""
    min_ratio: Annotated[float, Range(0.01, 100)] = 0.5
    """Least factor on data.image_size and data.max_size, to which an image is scaled before the crop,"""
    max_ratio: Annotated[float, Range(0.01, 100)] = 2.0
    """and greatest."""
    cat_max_ratio: Annotated[float, Range(0, 1)] = 0.75
    """A crop with as large a share of one class is drawn again, up to ten times."""
    hflip: Share = 0.5
    """Probability of mirroring left and right."""
    distort: Share = 0.5
    """Probability of each of the four changes of colour that follow."""
    brightness: Share = 0.12549
    """Largest change of the values, of 0 to 1."""
    contrast: Share = 0.5
    """Largest relative change of the values."""
    saturation: Share = 0.5
    """Largest relative change of the saturation."""
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    """Largest turn of the colour circle."""
    invert: Share = 0.0
    """Probability of the negative, where dark on bright means the same as bright on dark."""


@dataclass(frozen=True, kw_only=True)
class SegmentationOptimConfig:
    """Optimiser (AdamW) and schedule."""

    batch_size: Annotated[int, Range(1, 1 << 20)] = 16
    """Images a step, over all devices and accumulated gradients together."""
    accumulate: Annotated[int, Range(1, 1024)] = 1
    """Parts in which a device computes its share of the batch, to save memory; batch norm sees a part at a time."""
    steps_per_epoch: Annotated[int, Range(0, 1 << 30)] = 0
    """Steps between two validations; 0 for one pass over the images. Passes go on across epochs."""
    lr: Annotated[float, Range(0, 1e3)] = 6e-5
    """Peak learning rate, at lr_batch images a step."""
    lr_batch: Annotated[int, Range(0, 1 << 20)] = 0
    """The peak of this run is lr · batch_size / lr_batch; 0: lr itself."""
    power: Annotated[float, Range(0, 10)] = 1.0
    """The rate falls with this power of the share of the run that is left; 1 in a straight line."""
    min_lr: Annotated[float, Range(0, 1e3)] = 0.0
    """Where it ends."""
    warmup_steps: Annotated[int, Range(0, 1 << 30)] = 1500
    """Length of the linear rise; at most a tenth of the run."""
    warmup_ratio: Share = 1e-6
    """Where it begins, as a share of the peak."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.01
    """Of everything but the layer norms."""
    auxiliary_weight: Annotated[float, Range(0, 10)] = 0.4
    """Of UperNet's auxiliary loss."""
    clip_grad: Annotated[float, Range(0, 1e6)] = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0
    """Decay a step of averaged weights beside the trained ones; 0 keeps none."""

    warmup_epochs: ClassVar[float] = 0.0  # the rise is counted in steps
    warmup_lr: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(RunConfig):
    """A complete run of semantic segmentation."""

    task: Literal["segmentation"] = "segmentation"
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    data: MaskedDataConfig = field(default_factory=MaskedDataConfig)
    augment: SegmentationAugmentConfig = field(default_factory=SegmentationAugmentConfig)
    optim: SegmentationOptimConfig = field(default_factory=SegmentationOptimConfig)

    def contradictions(self) -> Iterator[str]:
        """Yield each pair of settings that cannot both be honoured, with the way out."""
        yield from super().contradictions()
        augment, data, model = self.augment, self.data, self.model
        if augment.min_ratio > augment.max_ratio:
            yield f"augment.min_ratio is {augment.min_ratio:g}, above augment.max_ratio, {augment.max_ratio:g}"
        if data.image_size > data.max_size:
            yield f"data.image_size is {data.image_size}, above data.max_size, {data.max_size}"
        if augment.crop_size > data.image_size * augment.max_ratio:
            yield (
                f"augment.crop_size is {augment.crop_size}, more than the {data.image_size * augment.max_ratio:.0f} px "
                f"that the shorter side has at most (data.image_size x augment.max_ratio); lower it"
            )
        defaults, weight = SegmenterConfig(), SegmentationOptimConfig().auxiliary_weight
        if model.head == "upernet" and model.fpn_channels:
            yield "model.fpn_channels is of Semantic FPN; leave it at 0 with model.head=upernet"
        if model.head == "sem_fpn" and model.auxiliary_channels != defaults.auxiliary_channels:
            yield (
                f"model.auxiliary_channels is of UperNet; leave it at {defaults.auxiliary_channels} with "
                f"model.head=sem_fpn"
            )
        if (model.head == "sem_fpn" or not model.auxiliary_channels) and self.optim.auxiliary_weight != weight:
            yield f"optim.auxiliary_weight is {self.optim.auxiliary_weight:g}, but there is no auxiliary head; leave it"
        for name, factor in self.data.class_weights.items():
            if not 0 <= factor <= 1e6:
                yield f"data.class_weights.{name} is {factor:g}; it must be from 0 to 1e+06"
        alone = self.world_size == 1 or self.compute.device == "cpu"  # else batch norms are synchronised
        if self.micro_batch_size == 1 and model.head == "upernet" and alone:
            yield (
                "a device computes one image at once, of which UperNet's batch norms have no statistics; raise "
                "optim.batch_size, or lower optim.accumulate or compute.devices"
            )
        if self.compute.strategy == "fsdp":
            yield "compute.strategy=fsdp is not for segmenters; take ddp"
        if self.compute.compile:
            yield "compute.compile is not for segmenters; set it to false"
        if not self.compute.channels_last:
            yield "compute.channels_last=false is not for segmenters, whose stem always has channels last; leave it out"
        if not data.root:
            yield "data.root is empty; name the images with --data"
