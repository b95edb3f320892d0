"""The quickstart's settings: what was chosen on the validation part, and nothing else."""

import pytest

from xcit.recipes.config import AugmentConfig, OptimConfig
from xcit.recipes.digits import EPOCHS, NUM_TRAIN, digits_quickstart, expected_minutes


def test_the_settings_are_those_that_were_chosen():
    config = digits_quickstart()
    assert config.epochs == EPOCHS == 40
    assert (config.data.format, config.data.image_size, config.data.in_chans) == ("digits", 32, 1)
    assert (config.data.normalize, config.data.val_fraction) == ("data", 0.2)
    distortions = {"degrees": 12.0, "translate": 0.1, "scale": 0.15, "shear": 8.0}
    off = {"hflip": 0.0, "rand_augment": "", "color_jitter": 0.0, "erase": 0.0, "cutmix": 0.0}
    assert config.augment == AugmentConfig(crop="none", mixup=0.2, repeats=1, **distortions, **off)
    steps = NUM_TRAIN // 64
    assert config.optim == OptimConfig(
        batch_size=64,
        lr=2e-3,
        lr_batch=0,
        min_lr=2e-5,
        warmup_epochs=round(0.075 * 40 * steps) / steps,  # 7.5 % of all steps
        warmup_lr=2e-5,
        weight_decay=0.05,
        label_smoothing=0.1,
        ema_decay=0.0,
    )


def test_the_number_of_digits_to_train_on():
    from xcit.data.digits import digit_splits

    assert len(digit_splits(digits_quickstart().data.val_fraction).train) == NUM_TRAIN


@pytest.mark.parametrize(
    ("epochs", "text"), [(1, "less than a minute"), (40, "about a minute"), (100, "about 3 minutes")]
)
def test_how_long_it_takes(epochs, text):
    assert expected_minutes(epochs) == text
