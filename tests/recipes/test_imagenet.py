"""The paper's recipe, setting by setting, as facebookresearch/xcit's main.py has it."""

import pytest

from xcit.errors import UnknownNameError
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS
from xcit.recipes.config import AugmentConfig, DistillConfig, OptimConfig
from xcit.recipes.imagenet import DROP_PATH, imagenet, imagenet_recipes

STEMS = [stem for stem, c in CHECKPOINTS.items() if c.task == "classification"]


@pytest.mark.parametrize("stem", [s for s in STEMS if "_224" in s])
def test_training_from_scratch_is_the_released_codes(stem):
    config = imagenet(stem)
    assert config.epochs == 400
    assert config.model.name == stem.removesuffix("_dist").removesuffix("_224")
    assert config.model.pretrained == "none"
    assert (config.data.image_size, config.data.in_chans, config.data.crop_pct) == (224, 3, 1.0)
    assert config.optim == OptimConfig(
        opt="adamw",
        batch_size=1024,
        accumulate=1,
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
    assert config.lr == pytest.approx(1e-3)
    assert config.augment == AugmentConfig(
        crop="resized",
        min_area=0.08,
        hflip=0.5,
        vflip=0.0,
        rand_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        degrees=0.0,
        translate=0.0,
        scale=0.0,
        shear=0.0,
        erase=0.25,
        mixup=0.8,
        cutmix=1.0,
        mix_prob=1.0,
        cutmix_share=0.5,
        repeats=3,
    )
    if stem.endswith("_dist"):
        assert config.distill == DistillConfig(kind="hard", teacher="timm:regnety_160.deit_in1k", alpha=0.5, tau=1.0)
    else:
        assert config.distill.kind == "none"


def test_the_learning_rate_goes_with_the_batch():
    from dataclasses import replace

    config = imagenet("xcit_small_12_p16_224")
    assert replace(config, optim=replace(config.optim, batch_size=256)).lr == pytest.approx(5e-4 * 256 / 512)


@pytest.mark.parametrize("stem", [s for s in STEMS if "_384_" in s])
def test_384_px_goes_on_from_224_as_deit_does(stem):
    config = imagenet(stem)
    assert config.model.pretrained == stem.replace("384", "224")
    assert config.model.pretrained in CHECKPOINTS
    assert CHECKPOINTS[config.model.pretrained].architecture == config.model.name
    assert config.data.image_size == 384
    assert (config.epochs, config.optim.batch_size, config.optim.weight_decay) == (30, 512, 1e-8)
    assert config.lr == pytest.approx(5e-6)
    assert config.optim.min_lr == 5e-6
    assert config.distill.kind == "hard"


def test_stochastic_depth_where_it_is_published():
    """S12/16 in the README; the others in the detection configs. What is only remembered is not pinned."""
    assert DROP_PATH["xcit_small_12_p16"] == 0.05
    detection = {"xcit_tiny_12": 0.0, "xcit_small_12": 0.05, "xcit_small_24": 0.1, "xcit_medium_24": 0.15}
    for size, rate in detection.items():
        assert DROP_PATH[f"{size}_p16"] == DROP_PATH[f"{size}_p8"] == rate
    assert set(DROP_PATH) == set(ARCHITECTURES)
    for stem in STEMS:
        config = imagenet(stem)
        assert config.model.drop_path_rate == DROP_PATH[config.model.name]


def test_what_is_unknown_or_remembered_is_said():
    recipes = {recipe.name: recipe for recipe in imagenet_recipes()}
    assert len(recipes) == 42
    for name, recipe in recipes.items():
        assert ("published settings are unknown" in recipe.notes) == ("_384_" in name)
        recalled = name.startswith(("xcit_nano_12", "xcit_tiny_24", "xcit_large_24"))
        assert ("from memory" in recipe.notes) == recalled
        assert ("detection config" in recipe.notes) == (not recalled and not name.startswith("xcit_small_12_p16"))
        assert recipe.status == "not run"


def test_targets_are_the_readmes():
    recipes = {recipe.name: recipe for recipe in imagenet_recipes()}
    assert recipes["xcit_small_12_p16_224"].target == "82.0 % top-1 on ImageNet-1k, 224 px"
    assert recipes["xcit_small_12_p8_224_dist"].target == "84.2 % top-1 on ImageNet-1k, 224 px"
    assert recipes["xcit_large_24_p8_384_dist"].target == "86.0 % top-1 on ImageNet-1k, 384 px"
    assert recipes["xcit_small_12_p16_224"].cost.startswith("400 epochs x 1.28 M images")


def test_an_unknown_file_is_refused():
    with pytest.raises(UnknownNameError, match="xcit_small_12_p16_224"):
        imagenet("xcit_small_12_p16_225")
    with pytest.raises(UnknownNameError):
        imagenet("dino_xcit_small_12_p16_pretrain")
