"""The paper's training on ImageNet-1k, for each of the 42 released classifiers by the name of its file.

``xcit_small_12_p16_224`` is training from random weights, ``..._224_dist`` the same with a teacher, ``..._384_dist``
goes on from the latter at 384 px. Batch, learning rate, schedule and augmentation are the defaults of the released
code; what differs between sizes is stochastic depth.

Where the released code is silent or this differs from it:

* Stochastic depth is published for S12/16 alone (README). T12, S12/8, S24 and M24 have that of the released detection
  configs, which fine-tune the same backbones. For nano (0), T24 (0.05) and L24 (0.25 and 0.3) it is from memory of the
  paper's appendix, not checked against it.
* The settings of the 384 px fine-tuning were never published (issues #19 and #20 of facebookresearch/xcit). DeiT's
  stand in: 30 epochs, batch 512, learning rate 5e-6, weight decay 1e-8. Stochastic depth and teacher stay as before.
* float16 autocast is replaced by bfloat16, which needs no loss scaling and runs on CPUs as well.
* The released code's first two epochs both run at the warm-up learning rate, since its schedule comes one epoch late.
  Here the rate moves with every step.
* Averaged weights (EMA) are evaluated beside the raw ones; the published files hold raw ones.

Source: facebookresearch/xcit: main.py, datasets.py, engine.py, README.md, issues #1 and #19; facebookresearch/deit:
README.md (384 px).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from xcit.errors import UnknownNameError
from xcit.models.zoo import CHECKPOINTS, Checkpoint
from xcit.recipes.config import AugmentConfig, DataConfig, DistillConfig, ModelConfig, OptimConfig, TrainConfig
from xcit.recipes.recipe import Recipe, training_cost
from xcit.recipes.settings import ComputeConfig

NUM_IMAGES = 1_281_167
"""In ImageNet-1k's training part."""
EPOCHS = 400
EPOCHS_384 = 30
TEACHER = "timm:regnety_160.deit_in1k"
"""The teacher of the released code, RegNetY-16GF as DeiT trained it."""

DROP_PATH = {
    "xcit_nano_12_p16": 0.0,
    "xcit_nano_12_p8": 0.0,
    "xcit_tiny_12_p16": 0.0,
    "xcit_tiny_12_p8": 0.0,
    "xcit_tiny_24_p16": 0.05,
    "xcit_tiny_24_p8": 0.05,
    "xcit_small_12_p16": 0.05,
    "xcit_small_12_p8": 0.05,
    "xcit_small_24_p16": 0.1,
    "xcit_small_24_p8": 0.1,
    "xcit_medium_24_p16": 0.15,
    "xcit_medium_24_p8": 0.15,
    "xcit_large_24_p16": 0.25,
    "xcit_large_24_p8": 0.3,
}
"""Stochastic depth of every XCA block; the module's text says which are from memory."""
DROP_PATH_RECALLED = ("xcit_nano_12", "xcit_tiny_24", "xcit_large_24")

AUGMENT = AugmentConfig(
    crop="resized",
    min_area=0.08,
    hflip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    mix_prob=1.0,
    cutmix_share=0.5,
    repeats=3,
)
OPTIM = OptimConfig(
    opt="adamw",
    batch_size=1024,
    lr=5e-4,
    lr_batch=512,
    min_lr=1e-5,
    warmup_epochs=5.0,
    warmup_lr=1e-6,
    weight_decay=0.05,
    label_smoothing=0.1,
    clip_grad=0.0,
    ema_decay=0.99996,
)
OPTIM_384 = replace(OPTIM, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8)
DISTILL = DistillConfig(kind="hard", teacher=TEACHER, alpha=0.5, tau=1.0)


def imagenet(stem: str) -> TrainConfig:
    """Return the settings that a released classifier is trained with; the images' place is for the user to name.

    Args:
        stem: of its file, such as ``xcit_small_12_p16_224_dist``.

    Raises:
        UnknownNameError: no such classifier.
    """
    classifiers = [name for name, c in CHECKPOINTS.items() if c.task == "classification"]
    if stem not in classifiers:
        raise UnknownNameError("ImageNet recipe", stem, classifiers, "A recipe is called like the file it leads to.")
    checkpoint = CHECKPOINTS[stem]
    fine_tuned = checkpoint.image_size == 384
    return TrainConfig(
        recipe=stem,
        epochs=EPOCHS_384 if fine_tuned else EPOCHS,
        model=ModelConfig(
            name=checkpoint.architecture,
            pretrained=_start(checkpoint) if fine_tuned else "none",
            drop_path_rate=DROP_PATH[checkpoint.architecture],
        ),
        data=DataConfig(image_size=checkpoint.image_size, crop_pct=1.0, normalize="weights"),
        augment=AUGMENT,
        optim=OPTIM_384 if fine_tuned else OPTIM,
        distill=DISTILL if checkpoint.distilled else DistillConfig(),
        compute=ComputeConfig(precision="bf16"),
    )


def imagenet_recipes() -> list[Recipe]:
    """Return the 42 recipes."""
    return [_recipe(checkpoint) for checkpoint in CHECKPOINTS.values() if checkpoint.task == "classification"]


def _start(checkpoint: Checkpoint) -> str:
    """Name the file that a 384 px model goes on from."""
    return checkpoint.stem.replace("_384_", "_224_")


def _recipe(checkpoint: Checkpoint) -> Recipe:
    stem, size = checkpoint.stem, checkpoint.image_size
    top1 = next(m.value for m in checkpoint.metrics if m.name == "ImageNet top-1" and m.source == "xcit README")
    assert checkpoint.gmacs_port is not None
    cost = training_cost(EPOCHS_384 if size == 384 else EPOCHS, NUM_IMAGES, checkpoint.gmacs_port)
    summary = f"{checkpoint.architecture} on ImageNet-1k at {size} px"
    notes = []
    if size == 384:
        summary += f", from {_start(checkpoint)}, distilled"
        notes.append("The published settings are unknown; DeiT's for 384 px stand in.")
    elif checkpoint.distilled:
        summary += " from random weights, distilled"
    else:
        summary += " from random weights"
    if checkpoint.architecture.startswith(DROP_PATH_RECALLED):
        notes.append(f"Stochastic depth {DROP_PATH[checkpoint.architecture]:g} is from memory of the paper.")
    elif checkpoint.architecture != "xcit_small_12_p16":
        notes.append(f"Stochastic depth {DROP_PATH[checkpoint.architecture]:g} is that of the detection config.")
    return Recipe(
        name=stem,
        make=partial(imagenet, stem),
        summary=summary,
        source="facebookresearch/xcit, main.py and README" + ("; facebookresearch/deit, README" if size == 384 else ""),
        target=f"{top1:.1f} % top-1 on ImageNet-1k, {size} px",
        cost=cost + (", and the teacher's forward passes" if checkpoint.distilled else ""),
        status="not run",
        notes=" ".join(notes),
    )
