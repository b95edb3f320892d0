"""The recipes for a user's own images."""

from xcit.recipes.finetune import finetune, own_recipes, scratch
from xcit.recipes.settings import check_config, override


def test_finetuning_begins_with_released_weights_and_hardly_distorts():
    config = finetune()
    assert (config.model.name, config.model.pretrained) == ("xcit_small_12_p16", "released")
    assert config.data.class_weights == "none"
    assert config.augment.repeats == 1
    assert config.augment.min_area > 0.08
    assert config.lr < scratch().lr


def test_the_learning_rate_is_the_written_one_whatever_the_batch():
    for make in (finetune, scratch):
        assert override(make(), {"optim.batch_size": 8}).lr == make().optim.lr


def test_scratch_begins_with_random_weights():
    config = scratch()
    assert config.model.pretrained == "none"
    assert config.epochs > finetune().epochs


def test_a_small_change_leaves_them_usable():
    """What a user may type: a few epochs, small images, another model, grey pictures, class weights."""
    for make in (finetune, scratch):
        changes = {
            "data.root": "photos",
            "epochs": 3,
            "data.image_size": 32,
            "data.in_chans": 1,
            "model.name": "xcit_nano_12_p8",
            "model.pretrained": "none",
            "data.class_weights": "balanced",
            "augment.mixup": 0.0,
            "optim.batch_size": 16,
        }
        config = override(make(), changes)
        if config.optim.warmup_epochs >= 3:
            config = override(config, {"optim.warmup_epochs": 1})
        assert check_config(config) is config


def test_both_say_what_was_run():
    assert [recipe.name for recipe in own_recipes()] == ["finetune", "scratch"]
    assert all(recipe.status == "partial" and recipe.notes for recipe in own_recipes())
