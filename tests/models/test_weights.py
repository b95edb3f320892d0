"""Saving and loading: what goes in comes out, and what does not fit is told and touches nothing."""

import json
import logging
import re

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from xcit.errors import CheckpointError, ConfigError
from xcit.models.factory import create_model
from xcit.models.weights import load_checkpoint, read_weights, save_checkpoint
from xcit.models.xcit import XCiT

CFG = {
    "input_size": [3, 40, 24],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


class Preprocessing:
    def to_cfg(self):
        return dict(CFG)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def test_round_trip(small, images, tmp_path):
    model = small(drop_path_rate=0.1, tokens_norm=False, attn_form="tokens")
    names = ["ä", "b b", "c", "d", "e"]
    path = save_checkpoint(model, tmp_path / "it.safetensors", class_names=names, preprocessing=Preprocessing())
    assert path == tmp_path / "it.safetensors"
    rebuilt = create_model(path)
    assert rebuilt.config == model.config
    assert same(rebuilt.state_dict(), model.state_dict())
    assert torch.equal(rebuilt.eval()(images), model(images))
    assert rebuilt.pretrained_cfg == CFG | {
        "class_names": names,
        "label_set": None,
        "checkpoint": None,
        "architecture": None,
    }


def test_the_file_explains_itself_to_other_programs(small, tmp_path):
    model = small()
    save_checkpoint(model, tmp_path / "it.safetensors", class_names="abcde", preprocessing=CFG)
    with safe_open(tmp_path / "it.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"  # by which other libraries know PyTorch's layout
    assert metadata["xcit.format_version"] == "1"
    assert XCiT(**json.loads(metadata["xcit.config"])).config == model.config
    assert json.loads(metadata["xcit.pretrained_cfg"])["class_names"] == list("abcde")
    tensors = safetensors.torch.load_file(tmp_path / "it.safetensors")
    model.load_state_dict(tensors, strict=True)


def test_random_weights_claim_nothing(small, tmp_path):
    assert create_model(save_checkpoint(small(), tmp_path / "it.safetensors")).pretrained_cfg == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_in_the_file_and_converted_for_the_model(small, tmp_path, caplog, dtype):
    model = small().to(dtype)
    save_checkpoint(model, tmp_path / "it.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "it.safetensors"), model.state_dict())

    other = small(seed=1).to(dtype)
    with caplog.at_level("INFO", "xcit"):
        load_checkpoint(other, tmp_path / "it.safetensors")
        assert "converted" not in caplog.text
        rebuilt = create_model(tmp_path / "it.safetensors")
    assert same(other.state_dict(), model.state_dict())
    assert f"stores {str(dtype).removeprefix('torch.')}; converted to the model's float32" in caplog.text
    expected = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    assert same(rebuilt.state_dict(), expected)


def test_wrappers_are_looked_through(small, tmp_path):
    model = small()
    compiled = torch.compile(nn.DataParallel(model))  # wrapped, never run
    save_checkpoint(compiled, tmp_path / "it.safetensors")
    other = small(seed=1)
    load_checkpoint(nn.DataParallel(other), tmp_path / "it.safetensors")
    assert same(other.state_dict(), model.state_dict())


def test_what_save_refuses(small, tmp_path):
    model = small()
    with pytest.raises(ConfigError, match=r"it\.pth does not end in \.safetensors"):
        save_checkpoint(model, tmp_path / "it.pth")
    with pytest.raises(ConfigError, match="There are 2 class_names; the model has 5 classes"):
        save_checkpoint(model, tmp_path / "it.safetensors", class_names=["a", "b"])
    with pytest.raises(ConfigError, match="Expected an XCiT model, got Linear"):
        save_checkpoint(nn.Linear(2, 2), tmp_path / "it.safetensors")
    with torch.device("meta"), pytest.raises(ConfigError, match="meta device"):
        save_checkpoint(XCiT(**model.config), tmp_path / "it.safetensors")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_diverged_model_does_not_replace_a_good_one(small, tmp_path):
    path = tmp_path / "it.safetensors"
    model = small()
    save_checkpoint(model, path)
    before = path.read_bytes()
    model.blocks[1].gamma1[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensors \(first: blocks\.1\.gamma1\)"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before


def test_names_of_a_former_classifier_are_not_saved(small, tmp_path):
    model = small()
    model.pretrained_cfg = CFG | {"class_names": list("abcde"), "label_set": None}
    model.reset_classifier(7)
    assert create_model(save_checkpoint(model, tmp_path / "it.safetensors")).pretrained_cfg["class_names"] is None


# --- what does not fit ------------------------------------------------------------------------------------------------


def refusal(model, path, **options):
    """Load what must be refused, and see that the model is as it was."""
    before, cfg = snapshot(model), dict(model.pretrained_cfg)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, **options)
    assert same(model.state_dict(), before)
    assert model.pretrained_cfg == cfg
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """Save a state dict as others would, and return its path."""

    def save(state, name="it.pth"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def test_another_architecture(saved):
    sentence = refusal(create_model("xcit_nano_12_p16"), saved(create_model("xcit_tiny_12_p8").state_dict()))
    assert "it.pth is another architecture: it looks like xcit_tiny_12_p8 (embed_dim 192" in sentence
    assert "the model is xcit_nano_12_p16 (" in sentence
    # alike: 12 temperatures, 15 batch norms' counts, the classifier's bias; nano/16 has a convolution and its batch
    # norm more
    assert "28 of 383 keys fit, 6 missing (first: patch_embed.proj.6.0.weight)" in sentence
    assert "(first: cls_token, (1, 1, 192) in the file, (1, 1, 128) in the model)" in sentence
    assert re.search(r"create_model\('xcit_tiny_12_p8', pretrained='\S+it\.pth'\)", sentence)


def test_other_heads_alone_are_another_architecture(small, saved):
    sentence = refusal(small(), saved(small(num_heads=2).state_dict()))
    assert "looks like an XCiT of a custom size (embed_dim 32, depth 2, 2 heads, patch size 8)" in sentence
    assert "2 of another shape (first: blocks.0.attn.temperature, (2, 1, 1) in the file, (4, 1, 1)" in sentence


def test_no_xcit_at_all(small, saved):
    sentence = refusal(small(), saved({"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}))
    assert "holds no XCiT: its keys begin with 'conv1.weight', 'bn1.weight'." in sentence


def test_missing_keys(small, saved):
    state = dict(small().state_dict())
    del state["blocks.1.gamma2"], state["norm.bias"]
    sentence = refusal(small(seed=1), saved(state))
    total = len(small().state_dict())
    assert "lacks weights that the model needs" in sentence
    assert f"{total - 2} of {total} keys fit, 2 missing (first: blocks.1.gamma2)." in sentence


def test_extra_keys(small, saved):
    sentence = refusal(small(seed=1), saved(dict(small().state_dict()) | {"dist_token": torch.zeros(1, 1, 32)}))
    assert "has weights that the model does not know" in sentence
    assert "1 unexpected (first: dist_token)" in sentence


def test_other_shapes(small, saved):
    sentence = refusal(small(mlp_ratio=2.0), saved(small().state_dict()))
    assert "does not fit the model" in sentence
    assert "of another shape (first: blocks.0.mlp.fc1.weight, (128, 32) in the file, (64, 32) in the model)" in sentence


def test_another_classifier(small, saved, images):
    path = saved(small(num_classes=9).state_dict())
    model = small(seed=1)
    assert "has a classifier for 9 classes, the model one for 5." in refusal(model, path)
    head = model.head.weight.clone()
    load_checkpoint(model, path, keep_head=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.forward_features(images), small(num_classes=9).forward_features(images))


def test_a_backbone_without_classifier(small, saved):
    path = saved(small(num_classes=0).state_dict())
    sentence = refusal(small(), path)
    assert "is a backbone without a classifier, the model has one for 5 classes" in sentence
    assert "num_classes=0" in sentence
    load_checkpoint(small(seed=1), path, keep_head=True)


def test_a_model_without_classifier(small, saved):
    path = saved(small().state_dict())
    model = small(seed=1, num_classes=0)
    assert "has a classifier for 5 classes, the model has none" in refusal(model, path)
    load_checkpoint(model, path, keep_head=True)
    assert torch.equal(model.norm.weight, small().norm.weight)


def test_other_channels(small, saved):
    sentence = refusal(small(in_chans=1), saved(small().state_dict()))
    assert "is for images of 3 channels, the model for 1." in sentence


@pytest.mark.parametrize("option", [{"tokens_norm": False}, {"global_pool": "avg"}])
def test_options_that_shapes_do_not_show(small, tmp_path, option):
    ((name, value),) = option.items()
    path = save_checkpoint(small(**option), tmp_path / "it.safetensors")
    sentence = refusal(small(), path)
    assert f"was saved with {name}={value!r}, the model has {name}=" in sentence
    load_checkpoint(small(seed=1, **option), path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(small, saved, value):
    state = snapshot(small())
    state["blocks.0.local_mp.bn.running_var"][2] = value
    sentence = refusal(small(seed=1), saved(state))
    assert "NaN or infinite values in 1 tensors (first: blocks.0.local_mp.bn.running_var)" in sentence


def test_integers_are_not_weights(small, saved):
    state = dict(small().state_dict())
    state["norm.weight"] = torch.ones(32, dtype=torch.int8)
    assert "norm.weight is stored as torch.int8" in refusal(small(), saved(state))


def test_metadata_of_a_newer_version(small, tmp_path):
    state = dict(small().state_dict())
    metadata = {"xcit.format_version": "2", "xcit.config": "{}", "xcit.pretrained_cfg": "{}"}
    safetensors.torch.save_file(state, tmp_path / "new.safetensors", metadata)
    assert "format version 2; this xcit reads up to 1. Update xcit" in refusal(small(), tmp_path / "new.safetensors")
    del metadata["xcit.config"]
    safetensors.torch.save_file(state, tmp_path / "bad.safetensors", metadata)
    assert "damaged xcit metadata" in refusal(small(), tmp_path / "bad.safetensors")


# --- what the weights say of images -----------------------------------------------------------------------------------


def test_a_released_file_is_known_by_its_name(saved, caplog):
    model = create_model("xcit_nano_12_p16")
    path = saved({"model": model.state_dict()}, "xcit_nano_12_p16_384_dist.pth")
    with caplog.at_level(logging.INFO, "xcit"):
        load_checkpoint(model, path)
    assert "taken for the released file of that name" in caplog.text
    assert model.pretrained_cfg["input_size"] == [3, 384, 384]
    assert model.pretrained_cfg["label_set"] == "imagenet-1k"
    assert model.pretrained_cfg["checkpoint"] == "xcit_nano_12_p16_384_dist"


def test_a_released_name_with_other_classes_or_architecture_is_not_believed(saved):
    model = create_model("xcit_nano_12_p16", num_classes=10)
    load_checkpoint(model, saved(model.state_dict(), "xcit_nano_12_p16_224.pth"))
    assert model.pretrained_cfg["label_set"] is None
    load_checkpoint(model, saved(model.state_dict(), "xcit_nano_12_p8_224.pth"))
    assert model.pretrained_cfg["checkpoint"] is None
    assert model.pretrained_cfg["architecture"] == "xcit_nano_12_p16"


def test_an_unknown_file_gets_the_common_preparation_and_no_names(small, saved, caplog):
    model = small()
    with caplog.at_level(logging.INFO, "xcit"):
        load_checkpoint(model, saved(model.state_dict()))
    assert "does not say how to prepare images" in caplog.text
    assert model.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]
    assert (model.pretrained_cfg["label_set"], model.pretrained_cfg["class_names"]) == (None, None)


def test_keeping_the_head_forgets_the_names(small, tmp_path):
    path = save_checkpoint(small(), tmp_path / "it.safetensors", class_names="abcde", preprocessing=CFG)
    model = small(seed=1)
    load_checkpoint(model, path, keep_head=True)
    assert model.pretrained_cfg["class_names"] is None
    assert model.pretrained_cfg["mean"] == CFG["mean"]


def test_checksum_of_a_local_file(small, tmp_path):
    path = save_checkpoint(small(), tmp_path / "it.safetensors")
    assert "has the sha256 checksum" in refusal(small(), path, sha256="0" * 64)


def test_read_weights_names_the_dialect(small, saved):
    state = dict(small().state_dict())
    file = read_weights(saved({"model": state}))
    assert (file.dialect, file.layout.depth, file.config, file.cfg) == ("official", 2, None, None)
