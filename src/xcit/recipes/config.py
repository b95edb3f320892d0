"""What a run of supervised classification needs to be told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from xcit.recipes.settings import Range, RunConfig, Share


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and the weights it begins with. Its classes follow from the data."""

    name: str = "xcit_small_12_p16"
    """An XCiT architecture (``xcit models``), or a peer from timm as timm:NAME."""
    pretrained: str = "none"
    """Initial weights: none (random), released (the architecture's own), a released checkpoint's name, or a file."""
    drop_path_rate: Annotated[float, Range(0, 0.9)] = 0.0
    """Stochastic depth of every XCA block."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    surgery: str = "none"
    """Copy the patch embedding from this checkpoint (name or file) and freeze it: steadies very large models."""
    variant: str = "none"
    """Ablation: what of the architecture is replaced (``xcit.models.variants``)."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Other arguments of the model's class, such as depth."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at which size."""

    root: str = ""
    """Folder, CSV file, pattern of tar shards, or the local copy of a named data set; empty for the embedded digits."""
    format: Literal[
        "auto", "folder", "csv", "shards", "cifar10", "cifar100", "flowers102", "stanford_cars", "inat18", "inat19",
        "digits",
    ] = "auto"  # fmt: skip
    """What lies there; auto finds out a folder, a CSV or shards."""
    download: bool = False
    """Fetch a named data set if it is not there."""
    val_fraction: Annotated[float, Range(0.01, 0.5)] = 0.1
    """Share of the training images to choose by, where the data has no validation part of its own; stratified."""
    split_seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Which images those are."""
    image_size: Annotated[int, Range(8, 4096)] = 224
    """Pixels a side of what the model sees."""
    in_chans: Literal[1, 3] = 3
    """Channels: 3, or 1 for grey images."""
    crop_pct: Annotated[float, Range(0.1, 1)] = 1.0
    """Share of the resized image that evaluation crops; 1 is the paper's protocol."""
    normalize: Literal["weights", "data"] = "weights"
    """Mean and standard deviation: of the initial weights (random ones: ImageNet's), or measured on the images."""
    max_bad_fraction: Share = 0.1
    """Stop if more than this share of the images cannot be decoded; fewer are skipped and listed."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weigh rare classes up in the loss."""
    num_workers: Annotated[int, Range(-1, 256)] = -1
    """Processes a device that prepare images; -1 takes as many as the machine has cores to spare, 0 none."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How each training image is distorted anew in every epoch."""

    crop: Literal["resized", "pad", "none"] = "resized"
    """A random part, resized; a shift within a border of 4 pixels (small images); or the whole, as in evaluation."""
    min_area: Annotated[float, Range(0.01, 1)] = 0.08
    """Smallest share of the image that a random part has."""
    hflip: Share = 0.5
    """Probability of mirroring left and right."""
    vflip: Share = 0.0
    """Probability of mirroring top and bottom."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; empty for none."""
    color_jitter: Annotated[float, Range(0, 1)] = 0.4
    """Brightness, contrast and saturation by up to this factor; RandAugment takes its place where both are given."""
    degrees: Annotated[float, Range(0, 180)] = 0.0
    """Rotation by up to so many degrees either way."""
    translate: Annotated[float, Range(0, 0.5)] = 0.0
    """Shift by up to this share of the side."""
    scale: Annotated[float, Range(0, 0.9)] = 0.0
    """Zoom by up to this share, in or out."""
    shear: Annotated[float, Range(0, 60)] = 0.0
    """Shear by up to so many degrees, in both directions."""
    erase: Share = 0.25
    """Probability that a rectangle is painted over with noise."""
    mixup: Annotated[float, Range(0, 10)] = 0.8
    """Alpha of the Beta distribution that pairs of images are mixed by; 0 does not mix."""
    cutmix: Annotated[float, Range(0, 10)] = 1.0
    """Likewise, for pasting a rectangle of the other image; 0 does not paste."""
    mix_prob: Share = 1.0
    """Share of the batches that are mixed or pasted."""
    cutmix_share: Share = 0.5
    """Of these, how many are pasted where both are on."""
    repeats: Annotated[int, Range(1, 16)] = 3
    """Repeated augmentation: how often an image is drawn in an epoch; an epoch keeps its length, so that it sees
    only so many of all images."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, schedule and loss."""

    opt: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov's momentum 0.9."""
    batch_size: Annotated[int, Range(1, 1 << 20)] = 1024
    """Images a step, over all devices and accumulated gradients together."""
    accumulate: Annotated[int, Range(1, 1024)] = 1
    """Parts in which a device computes its share of the batch, to save memory."""
    lr: Annotated[float, Range(0, 1e3)] = 5e-4
    """Peak learning rate, at lr_batch images a step."""
    lr_batch: Annotated[int, Range(0, 1 << 20)] = 512
    """The peak of this run is lr · batch_size / lr_batch; 0: lr itself."""
    min_lr: Annotated[float, Range(0, 1e3)] = 1e-5
    """Where the cosine ends."""
    warmup_epochs: Annotated[float, Range(0, 1000)] = 5.0
    """Length of the linear rise, by the step."""
    warmup_lr: Annotated[float, Range(0, 1e3)] = 1e-6
    """Where it begins."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.05
    """Of matrices, kernels and, as in the released code, temperatures (``xcit.tasks.optim``)."""
    label_smoothing: Annotated[float, Range(0, 0.9)] = 0.1
    """Share of the target that is spread over all classes."""
    clip_grad: Annotated[float, Range(0, 1e6)] = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: Annotated[float, Range(0, 0.9999999)] = 0.0
    """Decay a step of the averaged weights, which are evaluated beside the raw ones; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from a teacher."""

    kind: Literal["none", "hard", "soft"] = "none"
    """The teacher's most probable class (the paper's), or its whole distribution."""
    teacher: str = "timm:regnety_160.deit_in1k"
    """timm:NAME, timm:NAME=FILE, a released XCiT checkpoint's name, or a file that xcit wrote."""
    alpha: Share = 0.5
    """Weight of the teacher's part of the loss."""
    tau: Annotated[float, Range(0.01, 100)] = 1.0
    """Temperature of the soft distribution."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A complete run of supervised classification."""

    lengths: ClassVar[tuple[str, ...]] = ("optim.warmup_epochs",)
    task: Literal["classification"] = "classification"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def contradictions(self) -> Iterator[str]:
        """Yield each pair of settings that cannot both be honoured, with the way out."""
        yield from super().contradictions()
        optim, augment, compute, data = self.optim, self.augment, self.compute, self.data
        if (augment.mixup or augment.cutmix) and augment.mix_prob and self.micro_batch_size % 2:
            yield (
                f"mixup pairs the images of a batch, and {self.micro_batch_size} on a device are odd; take an even "
                f"number, or augment.mixup=0 augment.cutmix=0"
            )
        if data.class_weights != "none" and (augment.mixup or augment.cutmix) and augment.mix_prob:
            yield "data.class_weights needs hard targets, but mixup and cutmix make soft ones; switch one of them off"
        if optim.warmup_epochs >= self.epochs and optim.warmup_epochs:
            yield (
                f"optim.warmup_epochs is {optim.warmup_epochs:g} of {self.epochs} epochs in all; raise --epochs, or "
                f"lower optim.warmup_epochs"
            )
        if self.distill.kind != "none" and self.distill.alpha == 0:
            yield "distill.alpha is 0, so that the teacher is not listened to; raise it, or set distill.kind to none"
        if self.distill.kind != "soft" and self.distill.tau != 1:
            yield f"distill.tau is {self.distill.tau:g}, which only distill.kind=soft uses; leave it at 1"
        if compute.strategy == "fsdp" and optim.ema_decay:
            yield "compute.strategy=fsdp shards the weights, so that optim.ema_decay cannot average them; set it to 0"
        if compute.strategy == "fsdp" and optim.clip_grad:
            yield "compute.strategy=fsdp shards the gradient, whose norm optim.clip_grad would need; set it to 0"
        if self.model.pretrained != "none" and self.model.variant != "none":
            yield "model.variant changes the architecture, which model.pretrained has no weights for; drop one"
        if self.model.name.startswith("timm:") and (self.model.surgery != "none" or self.model.variant != "none"):
            yield "model.surgery and model.variant are for XCiT; drop them for a model of timm"
        if data.format == "digits" and data.root:
            yield "data.format=digits is the embedded set; drop data.root, or write it out by xcit data digits"
        if data.format != "digits" and not data.root:
            yield "data.root is empty; name the images with --data"
        if data.download and data.format in ("auto", "folder", "csv", "shards", "digits"):
            yield f"data.download is for named data sets; data.format is {data.format}"
