"""The comparison on the digits: one difference each, peers of the same size, one budget."""

from dataclasses import replace

import pytest

from xcit.inference.costs import count_model_costs
from xcit.models.factory import create_model
from xcit.models.xcit import XCiT
from xcit.recipes.ablations import CONTESTANTS, ablation
from xcit.recipes.digits import GMACS, digits_quickstart
from xcit.recipes.peers import create_peer


def build(config):
    model, arguments = config.model, {"num_classes": 10, "in_chans": 1}
    if model.name.startswith("timm:"):
        return create_peer(model.name, **arguments, options=model.options)
    return create_model(model.name, **arguments, variant=model.variant, **model.options)


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_the_baseline_is_the_quickstarts_model():
    """And that is, in full, this one."""
    config = digits_quickstart()
    same = replace(config, recipe="digits_xcit", epochs=10, optim=replace(config.optim, warmup_epochs=0.75))
    assert ablation("digits_xcit") == same
    plain = XCiT(
        patch_size=8,
        in_chans=1,
        num_classes=10,
        embed_dim=128,
        depth=4,
        num_heads=4,
        cls_attn_layers=2,
        eta=1.0,
        tokens_norm=True,
        drop_path_rate=0.0,
    )
    model = create_model(
        config.model.name,
        num_classes=10,
        in_chans=1,
        drop_path_rate=config.model.drop_path_rate,
        **config.model.options,
    )
    assert model.config == plain.config
    assert CONTESTANTS["digits_xcit"].gmacs == GMACS


@pytest.mark.parametrize("name", CONTESTANTS)
def test_only_the_model_differs(name):
    config, quickstart = ablation(name), digits_quickstart()
    assert (config.epochs, config.optim.warmup_epochs) == (10, 0.75)  # a quarter of the quickstart's
    assert (quickstart.epochs, quickstart.optim.warmup_epochs) == (40, 3.0)
    same = replace(config, model=quickstart.model, recipe="digits_quickstart", epochs=40, optim=quickstart.optim)
    assert same == quickstart
    assert config.optim == replace(quickstart.optim, warmup_epochs=0.75)
    assert name == "digits_xcit" or config.model != digits_quickstart().model


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_models_can_be_built_and_cost_what_is_written(name):
    model = build(ablation(name)).eval()
    costs = count_model_costs(model, (1, 32, 32))
    assert costs.multiply_adds / 1e9 == pytest.approx(CONTESTANTS[name].gmacs, abs=5e-6)
    if CONTESTANTS[name].peer:
        assert 0.9 <= size(model) / size(build(ablation("digits_xcit"))) <= 1.1


def test_variants_differ_in_one_thing():
    base = create_model("xcit_nano_12_p8", **digits_quickstart().model.options).config
    for name, contestant in CONTESTANTS.items():
        if contestant.peer or name == "digits_xcit":
            continue
        config = ablation(name).model
        changed = {"variant"} if config.variant != "none" else {"num_heads"}
        theirs = create_model(config.name, variant=config.variant, **config.options).config
        followed = {"global_pool"} if config.variant == "avg_pool" else set()
        assert {key for key in base if base[key] != theirs[key]} == changed | followed
