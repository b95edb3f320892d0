"""Files in each dialect, of models whose every value is random, give the logits that they gave before."""

import argparse
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from xcit.errors import CheckpointError
from xcit.models.dialects import layout_of, to_official
from xcit.models.factory import create_model
from xcit.models.weights import load_checkpoint

NAMES = ("xcit_nano_12_p16", "xcit_nano_12_p8", "xcit_tiny_12_p16", "xcit_tiny_12_p8")


@pytest.fixture(params=NAMES)
def original(request, randomize):
    model = randomize(create_model(request.param), seed=3).eval()
    model.name = request.param
    return model


def reloaded(original, path, **options):
    """Load into a model of other random values."""
    model = create_model(original.name, num_classes=original.num_classes).eval()
    load_checkpoint(model, path, **options)
    return model


def prefixed(state, *prefixes):
    return {f"{''.join(prefixes)}{key}": value for key, value in state.items()}


@torch.no_grad()
def test_official(original, images, tmp_path):
    torch.save({"model": original.state_dict()}, tmp_path / "official.pth")
    assert torch.equal(reloaded(original, tmp_path / "official.pth")(images), original(images))


@torch.no_grad()
def test_official_training_checkpoint(original, small, images, tmp_path, randomize, caplog):
    average = randomize(create_model(original.name), seed=4).eval()
    optimizer = torch.optim.AdamW(original.parameters())
    content = {
        "model": original.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 399,
        "model_ema": average.state_dict(),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model=original.name, lr=5e-4, output_dir="out"),
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    with caplog.at_level("INFO", "xcit"):
        assert torch.equal(reloaded(original, tmp_path / "checkpoint.pth")(images), original(images))
    assert "ema=True" in caplog.text
    assert torch.equal(reloaded(original, tmp_path / "checkpoint.pth", ema=True)(images), average(images))
    assert not torch.equal(average(images), original(images))


@torch.no_grad()
def test_dino_backbone(original, images, tmp_path):
    original.reset_classifier(0)
    torch.save(original.state_dict(), tmp_path / "backbone.pth")
    assert torch.equal(reloaded(original, tmp_path / "backbone.pth")(images), original(images))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_dino_training_checkpoint(original, images, tmp_path, randomize):
    original.reset_classifier(0)
    student = randomize(create_model(original.name, num_classes=0), seed=5).eval()
    path = tmp_path / "full_checkpoint.pth"
    torch.save(dino_checkpoint(teacher=original, student=student), path)
    assert torch.equal(reloaded(original, path)(images), original(images))
    assert torch.equal(reloaded(original, path, dino_network="teacher")(images), original(images))
    assert torch.equal(reloaded(original, path, dino_network="student")(images), student(images))


def dino_checkpoint(**networks):
    """What DINO's training saves: both networks in multi-crop and DDP wrappers, each with a projection head."""

    class MultiCrop(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone
            self.head = nn.Module()
            self.head.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
            self.head.last_layer = nn.utils.weight_norm(nn.Linear(4, 16, bias=False))

    content = {name: prefixed(MultiCrop(network).state_dict(), "module.") for name, network in networks.items()}
    return content | {
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 300,
        "args": argparse.Namespace(arch="xcit", teacher_temp=0.07, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 16)},
        "fp16_scaler": {"scale": 1024.0},
    }


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm(original, images, tmp_path, suffix):
    import timm
    from timm.models.xcit import checkpoint_filter_fn

    theirs = timm.create_model(f"{original.name}_224").eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(original.state_dict()), theirs))  # timm's own conversion
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), path)
    else:
        safetensors.torch.save_file(theirs.state_dict(), path)
    logits = reloaded(original, path)(images)
    assert torch.equal(logits, original(images))
    expected = theirs(images)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_timm_training_checkpoint(original, images, tmp_path):
    import timm
    from timm.models.xcit import checkpoint_filter_fn

    theirs = timm.create_model(f"{original.name}_224")
    theirs.load_state_dict(checkpoint_filter_fn(dict(original.state_dict()), theirs))
    average = {key: value + 1 for key, value in theirs.state_dict().items()}
    content = {"epoch": 1, "arch": original.name, "state_dict": theirs.state_dict(), "state_dict_ema": average}
    torch.save(content | {"version": 2, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    assert torch.equal(reloaded(original, tmp_path / "last.pth.tar")(images), original(images))


@torch.no_grad()
def test_mmpretrain(original, images, tmp_path):
    content = {"meta": {"epoch": 400, "dataset_meta": {"classes": ("tench",)}}, "state_dict": mmpretrain(original)}
    torch.save(content, tmp_path / "xcit_3rdparty_in1k.pth")
    assert torch.equal(reloaded(original, tmp_path / "xcit_3rdparty_in1k.pth")(images), original(images))


def mmpretrain(model):
    """Lay a model's weights out in a tree of modules that is built as mmpretrain's is, so that it gives the keys."""

    def conv(convolution, norm=None):
        module = nn.Module()
        module.conv = convolution
        if norm is not None:
            module.bn = norm
        return module

    def layer(block):
        module = nn.Module()
        for name in ("norm1", "norm2", "norm3", "gamma1", "gamma2", "gamma3"):
            if hasattr(block, name):
                setattr(module, name, getattr(block, name))
        module.ffn = nn.Module()
        hidden = nn.Sequential(block.mlp.fc1, nn.GELU(), nn.Dropout())
        module.ffn.layers = nn.Sequential(hidden, block.mlp.fc2, nn.Dropout())
        return module

    def xca_layer(block):
        module = layer(block)
        module.attn = block.attn
        module.local_mp = nn.Module()
        module.local_mp.conv1 = conv(block.local_mp.conv1, block.local_mp.bn)
        module.local_mp.conv2 = conv(block.local_mp.conv2)
        return module

    def ca_layer(block):
        module = layer(block)
        module.attn = nn.Module()
        module.attn.proj = block.attn.proj
        for i, name in enumerate("qkv"):
            part = nn.Linear(model.embed_dim, model.embed_dim)
            part.weight.copy_(block.attn.qkv.weight.unflatten(0, (3, -1))[i])
            part.bias.copy_(block.attn.qkv.bias.unflatten(0, (3, -1))[i])
            setattr(module.attn, name, part)
        return module

    backbone = nn.Module()
    backbone.patch_embed = nn.Module()
    stem = [m for m in model.patch_embed.proj if isinstance(m, nn.Sequential)]
    backbone.patch_embed.proj = nn.Sequential(*(conv(*pair) for pair in stem))
    backbone.cls_token = model.cls_token
    backbone.pos_embed = nn.Module()
    backbone.pos_embed.token_projection = conv(model.pos_embeder.token_projection)
    backbone.xca_layers = nn.ModuleList(map(xca_layer, model.blocks))
    backbone.ca_layers = nn.ModuleList(map(ca_layer, model.cls_attn_blocks))
    backbone.norm = model.norm
    classifier = nn.Module()
    classifier.backbone = backbone
    classifier.head = nn.Module()
    classifier.head.fc = model.head
    return classifier.state_dict()


def test_mmpretrain_keys_are_as_in_its_source(small):
    with torch.no_grad():
        keys = mmpretrain(small()).keys()
    assert {
        "backbone.patch_embed.proj.2.conv.weight",
        "backbone.patch_embed.proj.2.bn.running_var",
        "backbone.pos_embed.token_projection.conv.bias",
        "backbone.xca_layers.1.attn.temperature",
        "backbone.xca_layers.1.local_mp.conv1.bn.num_batches_tracked",
        "backbone.xca_layers.1.local_mp.conv2.conv.weight",
        "backbone.xca_layers.1.ffn.layers.0.0.weight",
        "backbone.ca_layers.0.ffn.layers.1.bias",
        "backbone.ca_layers.0.attn.q.bias",
        "head.fc.weight",
    } <= keys


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefixes", [("module.",), ("model.",), ("backbone.",), ("module.", "_orig_mod.")])
def test_wrappers_and_prefixes(small, images, tmp_path, wrapper, prefixes):
    original = small()
    state = prefixed(original.state_dict(), *prefixes)
    torch.save({wrapper: state} if wrapper else state, tmp_path / "wrapped.pth")
    model = small(seed=1)
    load_checkpoint(model, tmp_path / "wrapped.pth")
    assert torch.equal(model(images), original(images))


@torch.no_grad()
def test_without_biases_and_position(small, images):
    original = small(qkv_bias=False, use_pos=False)
    state = dict(original.state_dict())
    for i in range(2):
        q, k, v = state.pop(f"cls_attn_blocks.{i}.attn.qkv.weight").chunk(3)
        state |= {f"cls_attn_blocks.{i}.attn.{n}.weight": t for n, t in (("q", q), ("k", k), ("v", v))}
    translated = to_official(state, name="it")
    assert translated.dialect == "timm"
    model = small(seed=1, qkv_bias=False, use_pos=False)
    model.load_state_dict(translated.state)
    assert torch.equal(model(images), original(images))


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ([1, 2], {}, "holds a list, not a dictionary"),
        ({}, {}, "holds no weights"),
        ({"epoch": 3, "lr": 0.1}, {}, "holds no weights: a dictionary with 'epoch', 'lr'"),
        ({"model": {"a": torch.zeros(1), "b": "text"}}, {}, "holds a str under 'b'"),
        ({"model": {"a": torch.zeros(1)}}, {"ema": True}, "no moving average"),
        ({"model_ema": {"a": torch.zeros(1)}}, {}, "pass ema=True"),
        ({"model": {"a": torch.zeros(1)}, "state_dict": {"a": torch.zeros(1)}}, {}, "weights twice"),
        ({"model": {"a": torch.zeros(1)}}, {"dino_network": "student"}, "no DINO training checkpoint"),
        ({"student": {"a": torch.zeros(1)}}, {}, "without a teacher"),
        ({"state_dict": {"backbone.a": torch.zeros(1), "roi_head.b": torch.zeros(1)}}, {}, "xcit.create_detector"),
        ({"decode_head.conv.weight": torch.zeros(1)}, {}, "xcit.create_segmenter opens it"),
    ],
)
def test_what_holds_no_such_weights(content, options, sentence):
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        to_official(content, name="it.pth", **options)


def test_an_incomplete_class_attention_is_reported_not_hidden(small, tmp_path):
    state = dict(small().state_dict())
    q, k, _ = state.pop("cls_attn_blocks.1.attn.qkv.weight").chunk(3)
    state |= {"cls_attn_blocks.1.attn.q.weight": q, "cls_attn_blocks.1.attn.k.weight": k}
    torch.save(state, tmp_path / "it.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(first: cls_attn_blocks.1.attn.qkv.weight\), 2 unexpected"):
        load_checkpoint(small(), tmp_path / "it.pth")


def test_layout(small):
    layout = layout_of(small(in_chans=2).state_dict())
    assert (layout.patch_size, layout.in_chans, layout.num_classes) == (8, 2, 5)
    assert (layout.embed_dim, layout.depth, layout.num_heads) == (32, 2, 4)
    assert layout.architecture is None
    assert layout_of(create_model("xcit_tiny_24_p16", num_classes=0).state_dict()).architecture.id == "xcit_tiny_24_p16"
    assert layout_of({"conv1.weight": torch.zeros(64, 3, 7, 7)}) is None
