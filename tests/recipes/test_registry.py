"""All recipes by name: complete, usable, honest about what they are."""

import subprocess
import sys

import pytest

from xcit.errors import UnknownNameError
from xcit.models.zoo import CHECKPOINTS
from xcit.recipes.config_file import config_from_dict
from xcit.recipes.recipe import training_cost
from xcit.recipes.registry import RECIPES, find_recipe, recipes_table
from xcit.recipes.settings import check_config, override, to_yaml

STATUSES = ("reproduced", "partial", "not run")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_can_be_followed(recipe):
    """Its settings are whole and do not contradict each other once the images are named, and survive a file."""
    import yaml

    config = recipe.make()
    assert config.recipe == recipe.name
    if getattr(config.data, "format", "") != "digits":
        assert not config.data.root
        config = override(config, {"data.root": "somewhere"})
    assert check_config(config) is config
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config


def test_the_names():
    classifiers = {stem for stem, c in CHECKPOINTS.items() if c.task == "classification"}
    assert len(classifiers) == 42
    assert classifiers <= set(RECIPES)
    others = set(RECIPES) - classifiers
    assert {name for name in others if name.startswith("transfer_")} == {
        f"transfer_{name}" for name in ("cifar10", "cifar100", "flowers102", "stanford_cars", "inat18", "inat19")
    }
    assert {"finetune", "scratch", "digits_quickstart", "digits_xcit", "digits_vit"} <= others
    assert list(RECIPES)[:2] == ["finetune", "scratch"]
    assert all(name == recipe.name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_says_what_it_is(recipe):
    assert recipe.summary
    assert recipe.source
    assert recipe.status in STATUSES
    assert recipe.notes or recipe.status != "partial", "the notes say which part"
    assert "|" not in "".join((recipe.summary, recipe.target, recipe.cost, recipe.notes)), "it breaks the table"


def test_nothing_on_imagenet_or_in_the_transfer_table_is_claimed():
    claimed = {name for name, recipe in RECIPES.items() if recipe.status == "reproduced"}
    own = {
        "digits_quickstart",
        "dino_digits",
        "detect_scenes",
        "segment_scenes",
        "segment_scenes_upernet",
        *(name for name in RECIPES if name.startswith("digits_")),
    }
    assert claimed <= own


def test_an_unknown_name_gets_near_ones():
    with pytest.raises(UnknownNameError, match=r"Unknown recipe 'finetun'. Did you mean 'finetune'"):
        find_recipe("finetun")
    assert find_recipe("finetune") is RECIPES["finetune"]


def test_the_table_has_a_row_for_each():
    head, rule, *rows = recipes_table().splitlines()
    assert len(rows) == len(RECIPES)
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    assert rows[0].startswith("| `finetune` |")


def test_listing_needs_no_torch():
    heavy = ("torch", "timm", "numpy", "lightning")
    code = f"import sys, xcit.recipes.registry; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_costs_are_products():
    assert training_cost(400, 1_281_167, 4.815) == "400 epochs x 1.28 M images x 4.82 G x 3 = 7.4 E multiply-adds"
    assert training_cost(40, 1_149, 0.01727) == "40 epochs x 1,149 images x 0.0173 G x 3 = 2.38 T multiply-adds"
    assert training_cost(1, 1, 0.001) == "1 epochs x 1 images x 0.001 G x 3 = 0.003 G multiply-adds"
