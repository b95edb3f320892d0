"""All recipes by name, and the table of them in the documents."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from xcit.errors import UnknownNameError
from xcit.recipes.ablations import ablation_recipes
from xcit.recipes.detection import detection_recipes
from xcit.recipes.digits import digits_recipes
from xcit.recipes.dino import dino_recipes
from xcit.recipes.finetune import own_recipes
from xcit.recipes.imagenet import imagenet_recipes
from xcit.recipes.recipe import Recipe
from xcit.recipes.segmentation import segmentation_recipes
from xcit.recipes.transfer import transfer_recipes

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            *own_recipes(),
            *digits_recipes(),
            *dino_recipes(),
            *detection_recipes(),
            *segmentation_recipes(),
            *imagenet_recipes(),
            *transfer_recipes(),
            *ablation_recipes(),
        )
    }
)
"""What ``xcit train`` can be asked for, a user's own images first."""


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        UnknownNameError: with the nearest known names.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES, "`xcit train --list` shows all; a file's name ends in .yaml.")
    return RECIPES[name]


def recipes_table() -> str:
    """Return all recipes as a Markdown table."""
    lines = ["| recipe | what it trains | target | cost | status | notes |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{r.name}` | {r.summary} | {r.target or '–'} | {r.cost or 'as your data'} | {r.status} | {r.notes or '–'} |"
        for r in RECIPES.values()
    ]
    return "\n".join(lines)
