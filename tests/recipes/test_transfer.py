"""Transfer as DeiT's author described it."""

import pytest

from xcit.errors import UnknownNameError
from xcit.recipes.transfer import TARGETS, transfer, transfer_recipes

SMALL = ("cifar10", "cifar100", "flowers102", "stanford_cars")
LARGE = ("inat18", "inat19")


def test_all_six_are_there():
    assert set(TARGETS) == {*SMALL, *LARGE}


@pytest.mark.parametrize("dataset", SMALL)
def test_small_sets(dataset):
    """Issue #45 of facebookresearch/deit."""
    config = transfer(dataset)
    assert (config.epochs, config.optim.opt, config.optim.batch_size) == (1000, "sgd", 768)
    assert config.lr == 0.01
    assert config.optim.weight_decay == 1e-4
    assert (config.augment.erase, config.model.drop_path_rate) == (0.0, 0.0)


@pytest.mark.parametrize("dataset", LARGE)
def test_large_sets(dataset):
    """Issue #105: the learning rate is the one after scaling."""
    config = transfer(dataset)
    assert (config.epochs, config.optim.opt, config.optim.batch_size) == (360, "adamw", 768)
    assert config.lr == 7.5e-5
    assert config.optim.weight_decay == 0.05
    assert (config.augment.erase, config.model.drop_path_rate) == (0.1, 0.1)


@pytest.mark.parametrize("dataset", [*SMALL, *LARGE])
def test_the_rest_is_as_on_imagenet(dataset):
    config = transfer(dataset)
    augment = config.augment
    assert config.data.format == dataset
    assert (augment.rand_augment, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (augment.repeats, config.optim.label_smoothing, config.optim.warmup_epochs) == (3, 0.1, 5.0)
    assert config.model.pretrained == "released"


def test_another_model():
    assert transfer("cifar10", "xcit_nano_12_p16").model.name == "xcit_nano_12_p16"
    stem = transfer("cifar10", "xcit_nano_12_p16_384_dist").model
    assert (stem.name, stem.pretrained) == ("xcit_nano_12_p16", "xcit_nano_12_p16_384_dist")
    with pytest.raises(UnknownNameError, match="xcit_nano_12_p16"):
        transfer("cifar10", "xcit_nano_12_p17")
    with pytest.raises(UnknownNameError, match=r"Unknown data set 'cifar'\. Did you mean"):
        transfer("cifar")


def test_what_stands_in_is_said():
    for recipe in transfer_recipes():
        assert recipe.status == "not run"
        assert "stand in" in recipe.notes
        assert "unchecked" in recipe.target
