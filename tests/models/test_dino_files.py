"""DINO's files in the released formats, made here as its training code makes them, into models and back."""

import argparse

import pytest
import torch
from torch import nn

from xcit.errors import CheckpointError, ConfigError
from xcit.models.dino_files import load_dino, save_dino
from xcit.models.dino_head import DINOHead, DINOModel
from xcit.models.factory import create_model
from xcit.models.weights import load_checkpoint
from xcit.models.xcit import XCiT

NANO = {"patch_size": 16, "embed_dim": 128, "depth": 12, "num_heads": 4, "tokens_norm": False, "num_classes": 0}
SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}


class MultiCropWrapper(nn.Module):
    """The layout of the released code's networks: a backbone whose classifier is gone, and a head with weight norm."""

    def __init__(self, backbone, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.backbone = backbone
        self.head = nn.Module()
        dim = backbone.embed_dim
        self.head.mlp = nn.Sequential(nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 12))
        self.head.last_layer = nn.utils.weight_norm(nn.Linear(12, 40, bias=False))
        with torch.no_grad():
            for p in self.head.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
            self.head.last_layer.weight_g.fill_(1)

    def forward(self, x):
        z = nn.functional.normalize(self.head.mlp(self.backbone(x)), dim=-1)
        return self.head.last_layer(z)


pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


@pytest.fixture
def released(tmp_path, randomize):
    """Return a full training checkpoint, and the networks that are in it."""

    def make(options=NANO, name="full_checkpoint.pth", prefix="module.", **more):
        networks = {
            kind: MultiCropWrapper(randomize(XCiT(**options), seed), seed).eval()
            for seed, kind in enumerate(("student", "teacher"), start=1)
        }
        content = {
            kind: {f"{prefix}{key}": value for key, value in network.state_dict().items()}
            for kind, network in networks.items()
        }
        content |= {
            "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 300,
            "args": argparse.Namespace(arch="xcit_nano_12_p16", local_crops_scale=(0.05, 0.4), output_dir="."),
            "dino_loss": {"center": torch.zeros(1, 40)},
            "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
        }
        torch.save(content | more, tmp_path / name)
        return tmp_path / name, networks

    return make


@pytest.fixture
def photos():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_full_checkpoint_with_its_head(released, photos, network, prefix):
    path, networks = released(prefix=prefix)
    model = load_dino(path, network)
    assert isinstance(model, DINOModel)
    assert model.state_dict().keys() == networks[network].state_dict().keys()
    found, expected = model.eval()([photos])[0], networks[network](photos)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # torch's weight norm sums in another order
    for name, value in networks[network].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.head.norm_last_layer
    assert model.backbone.config["tokens_norm"] is False  # the architecture's, which the weights do not show


@torch.no_grad()
def test_a_full_checkpoint_without_its_head(released, photos):
    path, networks = released()
    for network in ("student", "teacher"):
        model = load_dino(path, network, head=False)
        assert type(model) is XCiT
        assert torch.equal(model.eval()(photos), networks[network].backbone(photos))
    assert torch.equal(load_dino(path, head=False).eval()(photos), networks["teacher"].backbone(photos))

    model = create_model("xcit_nano_12_p16", num_classes=0)
    load_checkpoint(model, path, dino_network="student")
    assert torch.equal(model.eval()(photos), networks["student"].backbone(photos))
    model = create_model("xcit_nano_12_p16", pretrained=path)
    assert torch.equal(model.eval()(photos), networks["teacher"].backbone(photos))


@torch.no_grad()
def test_a_backbone_alone_has_no_head(released, photos, tmp_path):
    _, networks = released()
    path = tmp_path / "pretrain.pth"
    torch.save(networks["teacher"].backbone.state_dict(), path)
    assert torch.equal(load_dino(path, head=False).eval()(photos), networks["teacher"].backbone(photos))
    with pytest.raises(CheckpointError, match=r"backbone alone, without a projection head; pass head=False"):
        load_dino(path)
    with pytest.raises(CheckpointError, match="no DINO training checkpoint, so it has no teacher"):
        load_dino(path, "teacher", head=False)


@torch.no_grad()
def test_one_networks_weights_with_a_head(released, photos, tmp_path):
    _, networks = released()
    torch.save(networks["student"].state_dict(), tmp_path / "student.pth")
    model = load_dino(tmp_path / "student.pth").eval()
    torch.testing.assert_close(model([photos])[0], networks["student"](photos), rtol=1e-4, atol=1e-5)


def test_learnt_lengths_go_on_being_learnt(released):
    path, networks = released()
    with torch.no_grad():
        networks["teacher"].head.last_layer.weight_g.mul_(1.5)
    torch.save({"teacher": networks["teacher"].state_dict()}, path)
    model = load_dino(path, "teacher")
    assert not model.head.norm_last_layer
    assert model.head.last_layer.weight_g.requires_grad
    assert torch.equal(model.head.last_layer.weight_g, torch.full((40, 1), 1.5))


def test_options_of_the_backbone(released):
    path, _ = released()
    assert load_dino(path, "student", drop_path_rate=0.2).backbone.config["drop_path_rate"] == 0.2
    with pytest.raises(ConfigError, match="no option 'drop_path'"):
        load_dino(path, drop_path=0.2)


@torch.no_grad()
def test_a_custom_size_needs_to_be_told_what_weights_do_not_show(released, photos):
    path, networks = released(SMALL)
    with pytest.raises(CheckpointError, match=r"custom size \(embed_dim 16, depth 1.*pass tokens_norm=True or"):
        load_dino(path)
    model = load_dino(path, tokens_norm=True).eval()
    torch.testing.assert_close(model([photos])[0], networks["teacher"](photos), rtol=1e-4, atol=1e-5)


# --- what is wrong with a file ---------------------------------------------------------------------------------------


def changed(path, change):
    content = torch.load(path, weights_only=False)
    change(content["teacher"])
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.head.mlp.2.bias"), r"mlp\.2\.bias is missing in the file, expected \(24,\)"),
        (lambda s: s.pop("module.head.last_layer.weight_g"), r"last_layer\.weight_g is missing"),
        (lambda s: s.pop("module.head.last_layer.weight_v"), "head of other parts than DINO's"),
        (lambda s: s.update({"module.head.mlp.1.running_mean": torch.zeros(24)}), "without batch norm: mlp.1.running"),
        (lambda s: s.update({"module.head.mlp.0.bias": torch.full((24,), torch.nan)}), "NaN or infinite"),
        (lambda s: s.update({"module.backbone.norm.bias": torch.full((128,), torch.inf)}), "NaN or infinite"),
        (lambda s: s.pop("module.backbone.norm.bias"), "lacks weights that the model needs"),
        (lambda s: s.pop("module.backbone.cls_token"), "holds no XCiT: its keys begin with"),
    ],
)
def test_heads_and_backbones_that_do_not_fit(released, change, message):
    path, _ = released()
    with pytest.raises(CheckpointError, match=message):
        load_dino(changed(path, change))


def test_a_checkpoint_without_the_network_asked_for(released, tmp_path):
    path, networks = released()
    torch.save({"teacher": networks["teacher"].state_dict(), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="without a student"):
        load_dino(path, "student")
    with pytest.raises(CheckpointError, match="There is no file"):
        load_dino(tmp_path / "nothing.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match="empty"):
        load_dino(tmp_path / "empty.pth")


# --- out -------------------------------------------------------------------------------------------------------------


def pair(randomize, **options):
    head = {"out_dim": 40, "hidden_dim": 24, "bottleneck_dim": 12}
    backbone = SMALL | {"tokens_norm": False} | options
    return [
        randomize(DINOModel(XCiT(**backbone | extra), DINOHead(16, **head)), seed)
        for seed, extra in enumerate(({"drop_path_rate": 0.1}, {}))
    ]


@torch.no_grad()
def test_a_round_trip_of_any_size(randomize, tmp_path, photos):
    student, teacher = pair(randomize)
    teacher.backbone.pretrained_cfg = {"input_size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.2] * 3}
    path = save_dino(tmp_path / "run" / "dino.pth", student, teacher, 12, center=torch.arange(40.0))
    for name, network in (("student", student), ("teacher", teacher)):
        again = load_dino(path, name)
        assert again.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())
        assert again.backbone.config == teacher.backbone.config
        assert again.backbone.pretrained_cfg["mean"] == [0.1] * 3
        assert torch.equal(again.eval()([photos]), network.eval()([photos]))
    assert load_dino(path, "student", drop_path_rate=0.1).backbone.config == student.backbone.config
    model = create_model(path)  # the file describes itself
    assert torch.equal(model.eval()(photos), teacher.backbone(photos))


@torch.no_grad()
def test_the_file_is_what_dinos_own_code_reads(randomize, tmp_path, photos):
    student, teacher = pair(randomize)
    path = save_dino(tmp_path / "dino.pth", student, teacher, 12, center=torch.arange(40.0))
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    assert content["epoch"] == 12
    assert vars(content["args"])["out_dim"] == 40
    assert torch.equal(content["dino_loss"]["center"], torch.arange(40.0)[None])
    theirs = MultiCropWrapper(XCiT(**teacher.backbone.config), 0)
    for name, network in (("student", student), ("teacher", teacher)):
        wrapped = nn.Module()  # DistributedDataParallel, as far as names go
        wrapped.module = theirs
        wrapped.load_state_dict(content[name], strict=True)
        torch.testing.assert_close(theirs.eval()(photos), network.eval()([photos])[0], rtol=1e-4, atol=1e-5)
    # its evaluation strips the prefixes by hand
    stripped = {k.replace("module.", "").replace("backbone.", ""): v for k, v in content["teacher"].items()}
    backbone = XCiT(**teacher.backbone.config)
    assert set(backbone.state_dict()) <= set(stripped)


def test_nothing_is_saved_of_a_network_that_diverged(randomize, tmp_path):
    student, teacher = pair(randomize)
    path = save_dino(tmp_path / "dino.pth", student, teacher, 1)
    before = path.read_bytes()
    with torch.no_grad():
        student.head.mlp[0].weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"The student has NaN .* stays as it was"):
        save_dino(path, student, teacher, 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["dino.pth"]


def test_a_place_that_cannot_be_written_to(randomize, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        save_dino(tmp_path / "file" / "dino.pth", *pair(randomize), 1)
