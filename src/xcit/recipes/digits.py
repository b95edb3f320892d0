"""Recipes on the embedded handwritten digits."""

from __future__ import annotations

from xcit.recipes.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from xcit.recipes.recipe import Recipe, training_cost

EPOCH_SECONDS = 1.6
"""Of the quickstart, on two CPU cores."""
NUM_TRAIN = 1_149
"""Digits that are trained on."""
EPOCHS = 40
GMACS = 0.01727
"""1e9 multiply-adds of the quickstart's model at 32 px."""


def digits_quickstart() -> TrainConfig:
    """Return the settings of ``xcit quickstart``: a small XCiT on the digits, about two minutes on two CPU cores.

    Size, epochs and augmentation were chosen on the validation part, over three seeds.
    """
    return TrainConfig(
        recipe="digits_quickstart",
        epochs=EPOCHS,
        model=ModelConfig(name="xcit_nano_12_p8", options={"depth": 4, "tokens_norm": True}),
        data=DataConfig(format="digits", val_fraction=0.2, image_size=32, in_chans=1, normalize="data"),
        augment=AugmentConfig(
            crop="none",
            hflip=0.0,
            rand_augment="",
            color_jitter=0.0,
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
            warmup_epochs=3.0,
            warmup_lr=2e-5,
            weight_decay=0.05,
            label_smoothing=0.1,
        ),
    )


def expected_minutes(epochs: int) -> str:
    """Say how long so many epochs of the quickstart take on two CPU cores."""
    minutes = epochs * EPOCH_SECONDS / 60
    if minutes < 1:
        return "less than a minute"
    return "about a minute" if round(minutes) == 1 else f"about {minutes:.0f} minutes"


def digits_recipes() -> list[Recipe]:
    """Return the recipes on the digits that are no ablations."""
    return [
        Recipe(
            name="digits_quickstart",
            make=digits_quickstart,
            summary="a small XCiT on the embedded digits, in about two minutes on two CPU cores",
            source="this package",
            target="99 % of the held-out digits",
            cost=training_cost(EPOCHS, NUM_TRAIN, GMACS),
            status="reproduced",
        )
    ]
