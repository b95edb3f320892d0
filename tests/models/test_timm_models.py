"""timm's models taken over: equal outputs, and a refusal of what has no counterpart."""

import re
from functools import partial

import pytest
import timm
import torch
from timm.models.xcit import Xcit
from torch import nn

from xcit.errors import ConfigError
from xcit.models.factory import create_model, from_timm

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


@pytest.fixture
def theirs(randomize):
    def build(**options):
        return randomize(Xcit(**SMALL | options)).eval()

    return build


def close(a, b):
    return (a - b).norm() <= 1e-12 * b.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 16},
        {"tokens_norm": True, "eta": 1e-5},
        {"num_classes": 0, "in_chans": 1},
        {"global_pool": "avg", "qkv_bias": False},
        {"use_pos_embed": False, "cls_attn_layers": 1, "mlp_ratio": 2.5},
    ],
)
def test_outputs_are_equal(theirs, options):
    original = theirs(**options).double()
    model = from_timm(original)
    images = torch.randn(2, options.get("in_chans", 3), 48, 32, dtype=torch.float64)
    assert close(model(images), original(images))
    assert close(model.forward_features(images), original.forward_features(images))
    assert not model.training


@torch.no_grad()
@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "xcit_tiny_24_p8_384"])
def test_released_sizes(name, randomize):
    original = randomize(timm.create_model(name)).double().eval()
    model = from_timm(original)
    images = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    assert close(model(images), original(images))
    arch = name.rpartition("_")[0]
    assert model.config == create_model(arch).config
    assert model.pretrained_cfg == {
        "input_size": [3, int(name[-3:]), int(name[-3:])],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "label_set": "imagenet-1k",
        "class_names": None,
        "checkpoint": None,
        "architecture": arch,
    }


def test_rates_mode_and_nothing_shared():
    rates = {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.2,
        "proj_drop_rate": 0.3,
        "attn_drop_rate": 0.4,
        "drop_path_rate": 0.5,
    }
    original = Xcit(**SMALL, **rates)
    original.set_grad_checkpointing()
    model = from_timm(original)
    assert {name: model.config[name] for name in rates} == rates
    assert model.training
    assert model.grad_checkpointing
    with torch.no_grad():
        model.cls_token.add_(1)
    assert not torch.equal(model.cls_token, original.cls_token)


def test_another_classifier_has_no_imagenet_names():
    assert from_timm(timm.create_model("xcit_nano_12_p16_224", num_classes=3)).pretrained_cfg["label_set"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"act_layer": nn.ReLU}, "ReLU()"),
        ({"act_layer": partial(nn.GELU, approximate="tanh")}, "GELU(approximate='tanh')"),
        ({"norm_layer": partial(nn.LayerNorm, eps=1e-5)}, "blocks.0.norm1 is LayerNorm((32,), eps=1e-05"),
        ({"norm_layer": timm.layers.RmsNorm}, "RmsNorm"),
        ({"global_pool": ""}, "global_pool is ''"),
    ],
)
def test_options_without_counterpart(theirs, options, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        from_timm(theirs(**options))


def test_changes_without_counterpart(theirs):
    pruned = theirs()
    pruned.prune_intermediate_layers(1)
    with pytest.raises(ConfigError, match="pruned"):
        from_timm(pruned)

    uneven = theirs(drop_path_rate=0.1)
    uneven.blocks[1].drop_path1.drop_prob = 0.2
    with pytest.raises(ConfigError, match="drop_path_rate differs from block to block"):
        from_timm(uneven)

    norm = theirs()
    norm.blocks[0].local_mp.bn.eps = 1e-3
    with pytest.raises(ConfigError, match=r"blocks\.0\.local_mp\.bn is BatchNorm2d\(32, eps=0\.001"):
        from_timm(norm)

    low_rank = theirs()
    low_rank.blocks[0].mlp.fc1 = type("LowRankLinear", (nn.Linear,), {})(32, 128)
    with pytest.raises(ConfigError, match=r"blocks\.0\.mlp\.fc1 is LowRankLinear"):
        from_timm(low_rank)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), "xcit_nano_12_p16_224"])
def test_not_an_xcit_of_timm(other):
    with pytest.raises(ConfigError, match=f"takes a timm Xcit model, not {type(other).__name__}"):
        from_timm(other)


def test_feature_extractors_are_refused():
    extractor = timm.create_model("xcit_nano_12_p16_224", features_only=True)
    with pytest.raises(ConfigError, match="takes a timm Xcit model"):
        from_timm(extractor)
