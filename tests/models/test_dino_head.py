"""The projection head and the model of many views, against plain loops and against torch's own weight norm."""

import math

import pytest
import torch
from torch import nn

from xcit.errors import ConfigError, ShapeError
from xcit.models.dino_head import DINOHead, DINOModel, teacher_of
from xcit.models.xcit import XCiT

TINY = {"patch_size": 8, "in_chans": 1, "num_classes": 0, "embed_dim": 16, "depth": 1, "num_heads": 2}


def head(**changes):
    return DINOHead(**{"in_dim": 16, "out_dim": 20, "hidden_dim": 12, "bottleneck_dim": 6} | changes)


def dino(randomize, head_options=None, **options):
    return randomize(DINOModel(XCiT(**TINY | options), head(**head_options or {})))


def views(*sizes, images=3):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(images, 1, size, size, generator=g) for size in sizes]


def test_names_are_those_of_the_released_files():
    assert list(head().state_dict()) == [
        *(f"mlp.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")),
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    shapes = {name: tuple(p.shape) for name, p in head().named_parameters()}
    assert shapes["last_layer.weight_g"] == (20, 1)
    assert shapes["last_layer.weight_v"] == (20, 6)
    assert list(head(num_layers=1).state_dict()) == [
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    with torch.device("meta"):
        released = DINOHead(384)
    assert {k: tuple(v.shape) for k, v in released.state_dict().items()} == {
        "mlp.0.weight": (2048, 384),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight_g": (65536, 1),
        "last_layer.weight_v": (65536, 256),
    }


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_head_is_its_equation(randomize, num_layers):
    network = randomize(head(num_layers=num_layers)).double()
    state, x = network.state_dict(), torch.randn(5, 16, dtype=torch.float64)
    linears = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    for row, found in zip(x, network(x), strict=True):
        for i, name in enumerate(linears):
            row = state[f"{name}.weight"] @ row + state[f"{name}.bias"]
            if i + 1 < len(linears):
                row = row * (1 + torch.erf(row / math.sqrt(2))) / 2
        row = row / row.square().sum().sqrt()
        for k in range(20):
            v = state["last_layer.weight_v"][k]
            logit = state["last_layer.weight_g"][k, 0] * (v @ row) / v.square().sum().sqrt()
            torch.testing.assert_close(found[k], logit)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_the_last_layer_is_torchs_weight_norm(randomize):
    ours = randomize(head(norm_last_layer=False)).double().last_layer
    theirs = nn.utils.weight_norm(nn.Linear(6, 20, bias=False).double())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    for network in (ours, theirs):
        network(x).square().sum().backward()
    for name in ("weight_g", "weight_v"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad)


def test_the_lengths_of_the_last_layer_are_learnt_only_when_asked():
    assert not head().last_layer.weight_g.requires_grad
    assert head(norm_last_layer=False).last_layer.weight_g.requires_grad
    for norm_last_layer in (True, False):
        network = head(norm_last_layer=norm_last_layer)
        assert torch.equal(network.last_layer.weight_g, torch.ones(20, 1))
        assert network(torch.randn(50, 16)).abs().max() <= 1 + 1e-6  # cosines


def test_how_the_head_begins():
    network = head(hidden_dim=500, out_dim=4000, bottleneck_dim=100)
    for i in (0, 2, 4):
        assert network.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not network.mlp[i].bias.any()
    v = network.last_layer.weight_v  # PyTorch's own way for a linear layer: uniform up to 1 / sqrt(fan in)
    assert 0.099 < v.abs().max() <= 0.1
    assert v.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("name", ["in_dim", "out_dim", "hidden_dim", "bottleneck_dim", "num_layers"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        head(**{name: 0})


# --- many views ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_view_gets_the_logits_that_it_gets_alone(randomize):
    network = dino(randomize).double().eval()
    crops = [view.double() for view in views(24, 24, 16, 16, 16)]
    logits = network(crops)
    assert logits.shape == (5, 3, 20)
    for view, found in zip(crops, logits, strict=True):
        torch.testing.assert_close(found, network.head(network.backbone(view)))


@torch.no_grad()
def test_views_of_one_size_are_one_batch_and_the_head_runs_once(randomize):
    network = dino(randomize).train()
    backbone, heads = [], []
    network.backbone.register_forward_pre_hook(lambda _, inputs: backbone.append(tuple(inputs[0].shape)))
    network.head.register_forward_pre_hook(lambda _, inputs: heads.append(tuple(inputs[0].shape)))
    network(views(24, 24, 16, 16, 16, 16))
    assert backbone == [(6, 1, 24, 24), (12, 1, 16, 16)]
    assert heads == [(18, 16)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {2}


def test_views_of_other_images_are_refused(randomize):
    network = dino(randomize)
    with pytest.raises(ShapeError, match="same images"):
        network([*views(16), *views(16, images=2)])
    with pytest.raises(ShapeError, match="same images"):
        network([])


def test_a_backbone_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="classifier for 5"):
        DINOModel(XCiT(**TINY | {"num_classes": 5}), head())
    with pytest.raises(ConfigError, match="takes 8 features, the backbone has 16"):
        DINOModel(XCiT(**TINY), head(in_dim=8))


def test_a_teacher_begins_as_the_student_and_drops_nothing(randomize):
    student = dino(randomize, drop_path_rate=0.5, proj_drop_rate=0.3).double()
    student.backbone.pretrained_cfg = {"mean": [0.5]}
    teacher = teacher_of(student)
    assert teacher.backbone.config == student.backbone.config | {"drop_path_rate": 0.0, "proj_drop_rate": 0.0}
    assert teacher.backbone.pretrained_cfg == {"mean": [0.5]}
    ours, theirs = teacher.state_dict(), student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours.keys() == theirs.keys()
    assert teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert any(p.requires_grad for p in student.parameters())
    crops = [view.double() for view in views(16, 16)]
    assert torch.equal(teacher(crops), teacher(crops))
    assert not torch.equal(student(crops), student(crops))
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))
