"""The paper's questions in small: what each part of XCiT is worth, and how its peers do under the same budget.

Every run is the quickstart's (``xcit.recipes.digits``) cut to a quarter: the embedded digits at 32 px, 16 patches of
8 px, 10 epochs, less than a minute on two CPU cores. After the quickstart's 40 epochs all are right on 358 to 360 of
the 360 held-out digits, and nothing can be told apart. The baseline is the quickstart's model; a variant differs from
it in one thing alone. The peers are timm's, made as large as the baseline: 1.2 M parameters against 1.3 M. 16 tokens
and 1,149 images are far from what the paper measures: what comes out says how the parts act in small, not how they rank
on ImageNet.

Source: the ablations of the paper (no LPI, no L2 norm, no temperature, linear patch projection). One head and average
pooling are questions of this package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from xcit.recipes.config import ModelConfig, TrainConfig
from xcit.recipes.digits import NUM_TRAIN, digits_quickstart
from xcit.recipes.recipe import Recipe, training_cost

EPOCHS = 10
WARMUP_EPOCHS = 0.75

Options = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Contestant:
    """A model of the comparison, and how it differs from the baseline."""

    summary: str
    gmacs: float
    """1e9 multiply-adds at 32 px."""
    variant: str = "none"
    options: Options = field(default_factory=dict)
    """Of XCiT, on top of the baseline's; or all those of a peer."""
    peer: str = ""
    """Name in timm, where it is no XCiT."""


CONTESTANTS: dict[str, Contestant] = {
    "digits_xcit": Contestant("the baseline: XCiT of 4 blocks, 128 wide", 0.01727),
    "digits_no_lpi": Contestant("without local patch interaction", 0.01712, "no_lpi"),
    "digits_no_qk_norm": Contestant("without the L2 norm of queries and keys", 0.01727, "no_qk_norm"),
    "digits_no_temperature": Contestant("without the learned temperature", 0.01727, "no_temperature"),
    "digits_one_head": Contestant("one head of 128 channels instead of four of 32", 0.01884, options={"num_heads": 1}),
    "digits_linear_patch": Contestant("a linear patch projection instead of the stem", 0.01497, "linear_patch"),
    "digits_avg_pool": Contestant("average pooling instead of class attention", 0.01582, "avg_pool"),
    "digits_vit": Contestant(
        "peer: ViT of 6 blocks, 128 wide, patches of 8 px",
        0.02063,
        options={"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        peer="vit_tiny_patch16_224",
    ),
    "digits_swin": Contestant(
        "peer: Swin of two stages, 96 and 192 wide, patches of 4 px, windows of 4",
        0.03018,
        options={
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": 96,
            "depths": "2,2",
            "num_heads": "3,6",
            "window_size": 4,
        },
        peer="swin_tiny_patch4_window7_224",
    ),
    "digits_resnet": Contestant(
        "peer: ResNet-10, 32 to 256 wide, a last grid of 4 x 4",
        0.02197,
        options={"layers": "1,1,1,1", "channels": "32,64,128,256", "output_stride": 8},
        peer="resnet18",
    ),
}
"""By the name of the recipe, the baseline first."""


def ablation(name: str) -> TrainConfig:
    """Return the settings of one run of the comparison.

    Args:
        name: one of ``CONTESTANTS``.
    """
    contestant, base = CONTESTANTS[name], digits_quickstart()
    if contestant.peer:
        model = ModelConfig(name=f"timm:{contestant.peer}", options=dict(contestant.options))
    else:
        options = base.model.options | contestant.options
        model = replace(base.model, variant=contestant.variant, options=options)
    optim = replace(base.optim, warmup_epochs=WARMUP_EPOCHS)
    return replace(base, recipe=name, epochs=EPOCHS, model=model, optim=optim)


def ablation_recipes() -> list[Recipe]:
    """Return all runs of the comparison as recipes."""
    return [
        Recipe(
            name=name,
            make=partial(ablation, name),
            summary=f"digits, {contestant.summary}",
            source="timm" if contestant.peer else "this package, after the paper's ablations",
            target="",
            cost=training_cost(EPOCHS, NUM_TRAIN, contestant.gmacs),
            status="partial",
            notes="Run with three seeds." + (" The learning rate was chosen for XCiT." if contestant.peer else ""),
        )
        for name, contestant in CONTESTANTS.items()
    ]
