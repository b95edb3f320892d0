"""What a run of self-supervised training with DINO needs to be told. No label is used to learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from xcit.recipes.settings import Range, RunConfig, Share


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which model, and the weights it begins with."""

    name: str = "xcit_small_12_p16"
    """An XCiT architecture (``xcit models``)."""
    pretrained: str = "none"
    """Initial weights: none (random), a released checkpoint's name, or a file; a classifier's head is dropped."""
    drop_path_rate: Annotated[float, Range(0, 0.9)] = 0.1
    """Stochastic depth of every XCA block of the student; the teacher has none."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Other arguments of the model's class, such as depth."""


@dataclass(frozen=True, kw_only=True)
class UnlabelledDataConfig:
    """Which images."""

    root: str = ""
    """Folder, CSV file, pattern of tar shards, or the local copy of a named data set; empty for the embedded digits."""
    format: Literal[
        "auto", "images", "folder", "csv", "shards", "cifar10", "cifar100", "flowers102", "stanford_cars", "inat18",
        "inat19", "digits",
    ] = "auto"  # fmt: skip
    """What lies there; images: all images of a folder at any depth, without labels. auto takes labels where there are
    some, for the k-NN probe alone."""
    download: bool = False
    """Fetch a named data set if it is not there."""
    val_fraction: Annotated[float, Range(0.01, 0.5)] = 0.1
    """Share of the labelled images to probe with, where the data has no validation part of its own."""
    split_seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Which images those are."""
    in_chans: Literal[1, 3] = 3
    """Channels: 3, or 1 for grey images."""
    crop_pct: Annotated[float, Range(0.1, 1)] = 0.875
    """Share of the resized image that evaluation crops: 224 of 256, the protocol of the published figures."""
    normalize: Literal["weights", "data"] = "weights"
    """Mean and standard deviation: of the initial weights (random ones: ImageNet's), or measured on the images."""
    max_bad_fraction: Share = 0.1
    """Stop if more than this share of the images cannot be decoded; fewer are skipped and listed."""
    num_workers: Annotated[int, Range(-1, 256)] = -1
    """Processes a device that prepare images; -1 takes as many as the machine has cores to spare, 0 none."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How the views of an image are made: two global crops, and local ones for the student alone."""

    global_size: Annotated[int, Range(8, 4096)] = 224
    """Pixels a side of the global crops."""
    local_size: Annotated[int, Range(8, 4096)] = 96
    """Pixels a side of the local crops."""
    num_local: Annotated[int, Range(0, 64)] = 8
    """Local crops an image."""
    global_min_area: Annotated[float, Range(0.01, 1)] = 0.4
    """Smallest share of the image in a global crop."""
    global_max_area: Annotated[float, Range(0.01, 1)] = 1.0
    """Largest."""
    local_min_area: Annotated[float, Range(0.01, 1)] = 0.05
    """Smallest share of the image in a local crop."""
    local_max_area: Annotated[float, Range(0.01, 1)] = 0.4
    """Largest."""
    hflip: Share = 0.5
    """Probability of mirroring left and right."""
    vflip: Share = 0.0
    """Probability of mirroring top and bottom."""
    degrees: Annotated[float, Range(0, 180)] = 0.0
    """Rotation by up to so many degrees either way."""
    brightness: Annotated[float, Range(0, 1)] = 0.4
    """Factor by which brightness changes at most."""
    contrast: Annotated[float, Range(0, 1)] = 0.4
    """Likewise contrast."""
    saturation: Annotated[float, Range(0, 1)] = 0.2
    """Likewise saturation."""
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    """Turn of the colour circle by which hue changes at most."""
    jitter_prob: Share = 0.8
    """Probability of these four."""
    grey_prob: Share = 0.2
    """Probability of taking the colour away."""
    blur_first: Share = 1.0
    """Probability of a Gaussian blur in the first global crop."""
    blur_second: Share = 0.1
    """Likewise in the second."""
    blur_local: Share = 0.5
    """Likewise in the local ones."""
    blur_min_radius: Annotated[float, Range(0.01, 100)] = 0.1
    """Its smallest standard deviation, in pixels of the crop."""
    blur_max_radius: Annotated[float, Range(0.01, 100)] = 2.0
    """Its largest."""
    solarize: Share = 0.2
    """Probability of inverting the bright half of all values in the second global crop."""


@dataclass(frozen=True, kw_only=True)
class DinoOptimConfig:
    """Optimiser (AdamW) and schedules."""

    batch_size: Annotated[int, Range(1, 1 << 20)] = 1024
    """Images a step, over all devices and accumulated gradients together."""
    accumulate: Annotated[int, Range(1, 1024)] = 1
    """Parts in which a device computes its share of the batch, to save memory; batch norm sees a part at a time."""
    lr: Annotated[float, Range(0, 1e3)] = 5e-4
    """Peak learning rate, at lr_batch images a step."""
    lr_batch: Annotated[int, Range(0, 1 << 20)] = 256
    """The peak of this run is lr · batch_size / lr_batch; 0: lr itself."""
    min_lr: Annotated[float, Range(0, 1e3)] = 1e-6
    """Where the cosine ends."""
    warmup_epochs: Annotated[float, Range(0, 1000)] = 10.0
    """Length of the linear rise, by the step."""
    warmup_lr: Annotated[float, Range(0, 1e3)] = 0.0
    """Where it begins."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.04
    """At the beginning, of everything but vectors and biases."""
    weight_decay_end: Annotated[float, Range(0, 10)] = 0.4
    """At the end; a cosine in between."""
    clip_grad: Annotated[float, Range(0, 1e6)] = 3.0
    """Largest norm of each parameter's gradient by itself; 0 does not clip."""
    freeze_last_layer: Annotated[float, Range(0, 1000)] = 1.0
    """Epochs in which the head's last layer stays as it is."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The projection head of student and teacher."""

    out_dim: Annotated[int, Range(2, 1 << 20)] = 65536
    """Outputs. Few images need few: some hundred for some thousand images."""
    hidden_dim: Annotated[int, Range(1, 1 << 16)] = 2048
    """Width of its hidden layers."""
    bottleneck_dim: Annotated[int, Range(1, 1 << 16)] = 256
    """Width before the last layer."""
    norm_last_layer: bool = True
    """Keep the norms of the last layer's weights at 1: steadier; without it small models may do better."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The momentum teacher and the loss."""

    momentum: Annotated[float, Range(0, 1)] = 0.996
    """Share of itself that the teacher keeps a step at the beginning; rises to 1 by a cosine. Small batches need
    more: 0.9995 at 256 images."""
    temp: Annotated[float, Range(0.001, 1)] = 0.04
    """Temperature of its outputs. Above 0.07 runs tend to collapse."""
    warmup_temp: Annotated[float, Range(0.001, 1)] = 0.04
    """At the beginning."""
    warmup_temp_epochs: Annotated[float, Range(0, 1000)] = 0.0
    """Epochs of the linear rise from there."""
    student_temp: Annotated[float, Range(0.001, 1)] = 0.1
    """Temperature of the student's outputs."""
    center_momentum: Annotated[float, Range(0, 0.9999)] = 0.9
    """Share of itself that the centre of the teacher's outputs keeps a step."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The look at what the features are good for, by k nearest neighbours, where the data has labels."""

    every: Annotated[int, Range(0, 100_000)] = 10
    """Epochs between two looks; 0 for none. The last epoch is always looked at."""
    k: Annotated[int, Range(1, 10_000)] = 20
    """Neighbours that vote."""
    temperature: Annotated[float, Range(0.001, 10)] = 0.07
    """Of the weight exp(cosine / temperature) of a neighbour's vote."""
    max_images: Annotated[int, Range(10, 1 << 30)] = 50_000
    """At most so many training images are asked, and about at most so many others, spread evenly through each set."""


@dataclass(frozen=True, kw_only=True)
class DinoConfig(RunConfig):
    """A complete run of self-supervised training with DINO (Caron et al., 2021)."""

    lengths: ClassVar[tuple[str, ...]] = (
        "optim.warmup_epochs",
        "optim.freeze_last_layer",
        "teacher.warmup_temp_epochs",
    )
    task: Literal["dino"] = "dino"
    model: BackboneConfig = field(default_factory=BackboneConfig)
    data: UnlabelledDataConfig = field(default_factory=UnlabelledDataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    optim: DinoOptimConfig = field(default_factory=DinoOptimConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def contradictions(self) -> Iterator[str]:
        """Yield each pair of settings that cannot both be honoured, with the way out."""
        yield from super().contradictions()
        optim, crops, data, teacher = self.optim, self.crops, self.data, self.teacher
        if self.micro_batch_size < 2:
            yield f"optim.batch_size is {optim.batch_size}; batch norm needs two images or more at once on each device"
        if self.patience:
            yield "patience is for a figure that images with labels give; DINO keeps its last epoch; set it to 0"
        if self.compute.strategy == "fsdp":
            yield "compute.strategy=fsdp shards the weights, which the teacher follows one by one; take ddp"
        for name, value in (
            ("optim.warmup_epochs", optim.warmup_epochs),
            ("optim.freeze_last_layer", optim.freeze_last_layer),
            ("teacher.warmup_temp_epochs", teacher.warmup_temp_epochs),
        ):
            if value and value >= self.epochs:
                yield f"{name} is {value:g} of {self.epochs} epochs in all; raise --epochs, or lower {name}"
        if teacher.warmup_temp != teacher.temp and not teacher.warmup_temp_epochs:
            yield "teacher.warmup_temp is for the first teacher.warmup_temp_epochs, which are 0; raise them"
        for part in ("global", "local"):
            low, high = getattr(crops, f"{part}_min_area"), getattr(crops, f"{part}_max_area")
            if low > high:
                yield f"crops.{part}_min_area is {low:g}, above crops.{part}_max_area, {high:g}"
        if crops.blur_min_radius > crops.blur_max_radius:
            yield (
                f"crops.blur_min_radius is {crops.blur_min_radius:g}, above crops.blur_max_radius, "
                f"{crops.blur_max_radius:g}"
            )
        if crops.num_local and crops.local_size > crops.global_size:
            yield (
                f"crops.local_size is {crops.local_size}, more than crops.global_size, {crops.global_size}; lower it, "
                f"such as --set crops.local_size={max(8, crops.global_size // 2)}"
            )
        if data.format == "digits" and data.root:
            yield "data.format=digits is the embedded set; drop data.root, or write it out by xcit data digits"
        if data.format != "digits" and not data.root:
            yield "data.root is empty; name the images with --data"
        if data.download and data.format in ("auto", "images", "folder", "csv", "shards", "digits"):
            yield f"data.download is for named data sets; data.format is {data.format}"
