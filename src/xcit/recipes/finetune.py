"""A user's own images: fine-tuning released weights, and training from random ones.

These are defaults for small data, hundreds to some ten thousand images, and not from the paper: each image is seen once
an epoch, at the learning rate that is written down, whatever the batch. No class weighs more than another unless
data.class_weights=balanced says so (which needs augment.mixup=0). What turns a class into another must be switched
off by whoever knows the data: augment.hflip=0 for text and digits.
"""

from __future__ import annotations

from xcit.recipes.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from xcit.recipes.recipe import Recipe


def finetune(model: str = "xcit_small_12_p16") -> TrainConfig:
    """Return the settings of fine-tuning released weights on a user's images.

    Mild distortions that keep small objects in the picture, and a learning rate a twentieth of that from random
    weights, so that what the weights know is kept. To begin with random weights after all, raise it: --lr 2e-3.

    Args:
        model: an architecture's id, which begins with its released weights (distilled, 224 px).
    """
    return TrainConfig(
        recipe="finetune",
        epochs=30,
        model=ModelConfig(name=model, pretrained="released", drop_path_rate=0.05),
        data=DataConfig(image_size=224),
        augment=AugmentConfig(
            crop="resized",
            min_area=0.5,
            hflip=0.5,
            rand_augment="rand-m6-mstd0.5-inc1",
            erase=0.1,
            mixup=0.2,
            cutmix=0.0,
            repeats=1,
        ),
        optim=OptimConfig(
            batch_size=64,
            lr=1e-4,
            lr_batch=0,
            min_lr=1e-6,
            warmup_epochs=2.0,
            warmup_lr=1e-6,
            weight_decay=0.05,
            label_smoothing=0.1,
            clip_grad=1.0,
        ),
    )


def scratch(model: str = "xcit_nano_12_p16") -> TrainConfig:
    """Return the settings of training from random weights on a user's images.

    For small or unusual pictures (a few dozen pixels, other colours than photographs), where released weights do not
    help: nothing is cut out, the whole picture is turned, shifted, zoomed and sheared a little. Photographs do better
    with ``finetune``.

    Args:
        model: an architecture's id.
    """
    return TrainConfig(
        recipe="scratch",
        epochs=80,
        model=ModelConfig(name=model, pretrained="none", drop_path_rate=0.0),
        data=DataConfig(image_size=224),
        augment=AugmentConfig(
            crop="none",
            hflip=0.5,
            rand_augment="",
            color_jitter=0.2,
            degrees=12.0,
            translate=0.1,
            scale=0.15,
            shear=8.0,
            erase=0.0,
            mixup=0.2,
            cutmix=0.0,
            repeats=1,
        ),
        optim=OptimConfig(
            batch_size=64,
            lr=2e-3,
            lr_batch=0,
            min_lr=2e-5,
            warmup_epochs=5.0,
            warmup_lr=1e-6,
            weight_decay=0.05,
            label_smoothing=0.1,
            clip_grad=1.0,
        ),
    )


def own_recipes() -> list[Recipe]:
    """Return the recipes for a user's images."""
    return [
        Recipe(
            name="finetune",
            make=finetune,
            summary="xcit_small_12_p16 from its released weights on your own images",
            source="this package",
            target="",
            cost="",
            status="partial",
            notes="Its settings ran from random weights, on the digits; not yet from released ones.",
        ),
        Recipe(
            name="scratch",
            make=scratch,
            summary="xcit_nano_12_p16 from random weights on your own images, small or unlike photographs",
            source="this package",
            target="",
            cost="",
            status="partial",
            notes="Learning rate and distortions were chosen on the digits' validation part (32 px, xcit_nano_12_p8).",
        ),
    ]
