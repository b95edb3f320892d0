"""Segmenters by name and as files: whatever goes in comes out, and what does not fit is refused with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import xcit
from xcit.errors import CheckpointError, ConfigError, UnknownNameError
from xcit.models import segmenters
from xcit.models.mmdet_files import to_mmdet
from xcit.models.mmseg_files import to_mmseg
from xcit.models.segmenters import create_segmenter, read_segmenter, reset_classes, save_segmenter
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.upernet import UperNet

WIDTHS = {"upernet": {"channels": 8, "auxiliary_channels": 6}, "sem_fpn": {"channels": 8, "fpn_channels": 10}}
COLOURS = np.array([[0, 0, 0], [255, 0, 7], [1, 2, 3]], np.uint8)


def small(head="upernet", name="xcit_nano_12_p16", **options):
    torch.manual_seed(0)
    return create_segmenter(name, head=head, **{"num_classes": 3, "depth": 4, **WIDTHS[head], **options})


def full(head, name="xcit_nano_12_p16", **options):
    """All twelve blocks, as a file without a description is taken to have."""
    return small(head, name, **{"depth": 12, **options})


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.randn(1, 3, 48, 70, generator=torch.Generator().manual_seed(1)))


def same(a, b):
    return torch.equal(logits(a), logits(b))


@pytest.mark.parametrize("head", WIDTHS)
def test_an_own_file_holds_everything(tmp_path, randomize, head):
    options = {"upernet": {"pool_scales": (1, 4)}, "sem_fpn": {}}[head]
    model = randomize(
        small(head, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), taps=[0, 1, 1, 2], image_size=64, **options)
    )
    assert save_segmenter(model, tmp_path / "s.safetensors", class_names=["a", "b", "c"], palette=COLOURS)
    loaded = create_segmenter(tmp_path / "s.safetensors")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert loaded.pretrained_cfg["class_names"] == ["a", "b", "c"]
    assert loaded.pretrained_cfg["palette"] == COLOURS.tolist()
    assert loaded.pretrained_cfg["label_set"] is None
    assert loaded.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert same(loaded, model)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        pairs = zip(loaded.forward_auxiliary(x), model.forward_auxiliary(x), strict=True)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    other = create_segmenter(tmp_path / "s.safetensors", max_size=256, drop_path_rate=0.1, mean=(0.4, 0.4, 0.4))
    assert (other.max_size, other.config["backbone"]["drop_path_rate"]) == (256, 0.1)
    assert other.pretrained_cfg["mean"] == [0.4, 0.4, 0.4]
    save_segmenter(loaded, tmp_path / "t.safetensors")  # what is known stays
    assert create_segmenter(tmp_path / "t.safetensors").pretrained_cfg == loaded.pretrained_cfg


def test_a_label_set_and_arrays_survive(tmp_path):
    model = small()
    model.pretrained_cfg |= {"label_set": "ade20k", "class_names": ("x", "y", "z"), "palette": COLOURS, "miou": 0.5}
    save_segmenter(model, tmp_path / "s.safetensors")
    cfg = read_segmenter(tmp_path / "s.safetensors").cfg
    assert (cfg["label_set"], cfg["class_names"], cfg["miou"]) == ("ade20k", ["x", "y", "z"], 0.5)
    assert cfg["palette"] == COLOURS.tolist()


@pytest.mark.parametrize("head", WIDTHS)
@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_nano_12_p8"])
def test_mmsegmentations_files(tmp_path, randomize, head, name):
    model = randomize(full(head, name))
    torch.save(to_mmseg(model.state_dict(), {"class_names": ["a", "b", "c"]}), tmp_path / "s.pth")
    for loaded in (
        create_segmenter(name, tmp_path / "s.pth", image_size=64),
        create_segmenter(name, tmp_path / "s.pth", head=head),
        create_segmenter(tmp_path / "s.pth"),
    ):
        assert same(loaded, model)
        assert loaded.pretrained_cfg["class_names"] == ["a", "b", "c"]
    save_segmenter(loaded, tmp_path / "own.safetensors")
    back = to_mmseg(load_file(tmp_path / "own.safetensors"), loaded.pretrained_cfg)
    first = torch.load(tmp_path / "s.pth", weights_only=True)
    assert back["meta"] == first["meta"]
    assert back["state_dict"].keys() == first["state_dict"].keys()
    assert all(torch.equal(back["state_dict"][key], tensor) for key, tensor in first["state_dict"].items())


@pytest.mark.parametrize("stem", ["upernet_xcit_tiny_12_p16", "sem_fpn_xcit_tiny_12_p8"])
def test_a_released_name_means_its_file(tmp_path, monkeypatch, caplog, stem):
    head, _, rest = stem.partition("_xcit_")
    model = create_segmenter(stem)
    torch.save(to_mmseg(model.state_dict(), {"class_names": [str(i) for i in range(150)]}), tmp_path / f"{stem}.pth")
    asked = []
    monkeypatch.setattr(segmenters, "download", lambda url, sha256=None: asked.append(url) or tmp_path / Path(url).name)
    url = f"https://dl.fbaipublicfiles.com/xcit/ade/{stem}.pth"
    loaded = create_segmenter(stem, pretrained=True)
    assert asked == [url]
    assert loaded.num_classes == 150
    assert loaded.head == head
    cfg = loaded.pretrained_cfg
    assert (cfg["label_set"], cfg["class_names"], cfg["palette"]) == ("ade20k", None, None)
    assert (cfg["checkpoint"], cfg["architecture"]) == (stem, f"xcit_{rest}")
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    # by architecture and head, and as a file of that name
    assert create_segmenter(f"xcit_{rest}", True, head=head).pretrained_cfg == cfg
    assert asked == [url] * 2
    caplog.clear()
    with caplog.at_level("INFO", "xcit"):
        assert read_segmenter(tmp_path / f"{stem}.pth").cfg["label_set"] == "ade20k"
    assert "is taken for the released file of that name" in caplog.text


def test_a_name_alone_does_not_make_a_released_file(tmp_path):
    torch.save(to_mmseg(full("upernet").state_dict()), tmp_path / "upernet_xcit_tiny_12_p16.pth")
    assert read_segmenter(tmp_path / "upernet_xcit_tiny_12_p16.pth").cfg == {}
    assert create_segmenter(tmp_path / "upernet_xcit_tiny_12_p16.pth").pretrained_cfg["label_set"] is None


def test_the_weights_decide_about_patch_size_and_head(tmp_path):
    torch.save(to_mmseg(full("sem_fpn", "xcit_nano_12_p8").state_dict()), tmp_path / "s.pth")
    with pytest.raises(CheckpointError, match="is a segmenter on xcit_nano_12_p8, not on xcit_nano_12_p16"):
        create_segmenter("xcit_nano_12_p16", tmp_path / "s.pth")
    with pytest.raises(CheckpointError, match=r"not 'upernet'; ask for head='sem_fpn' \(in training: model.head\), or"):
        create_segmenter("xcit_nano_12_p8", tmp_path / "s.pth", head="upernet")
    with pytest.raises(CheckpointError, match="has the head 'sem_fpn', not 'upernet'"):
        create_segmenter(tmp_path / "s.pth", head="upernet")
    assert isinstance(create_segmenter("xcit_nano_12_p8", tmp_path / "s.pth"), SemanticFPN)


def test_an_architecture_with_other_sizes_is_what_was_asked_for(tmp_path, randomize):
    model = randomize(small(depth=3))
    save_segmenter(model, tmp_path / "s.safetensors")
    assert same(create_segmenter("xcit_nano_12_p16", tmp_path / "s.safetensors", depth=3, drop_path_rate=0.0), model)
    for sizes, sentence in (
        ({}, r"depth 3, .*not on xcit_nano_12_p16; name the architecture and the sizes that its weights are of\."),
        ({"depth": 4}, r"not on xcit_nano_12_p16 with depth 4; name the architecture and the sizes that its weights"),
        ({"depth": 3, "patch_size": 8}, "not on xcit_nano_12_p16 with patch_size 8 and depth 3; name"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            create_segmenter("xcit_nano_12_p16", tmp_path / "s.safetensors", **sizes)
    save_segmenter(full("upernet"), tmp_path / "full.safetensors")
    with pytest.raises(CheckpointError, match="is a segmenter on xcit_nano_12_p16, not on xcit_nano_12_p16 with depth"):
        create_segmenter("xcit_nano_12_p16", tmp_path / "full.safetensors", depth=3)


@pytest.mark.parametrize("head", WIDTHS)
def test_other_classes_get_new_last_layers(tmp_path, head):
    model = small(head)
    save_segmenter(model, tmp_path / "s.safetensors", class_names=["a", "b", "c"], palette=COLOURS)
    tuned = create_segmenter(tmp_path / "s.safetensors", num_classes=7)
    assert tuned.num_classes == tuned.config["num_classes"] == 7
    assert {tuned.pretrained_cfg[key] for key in ("class_names", "label_set", "palette")} == {None}
    before, after = model.state_dict(), tuned.state_dict()
    kept = [key for key in before if "conv_seg" not in key]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert {key for key in before if before[key].shape != after[key].shape} == {k for k in before if "conv_seg" in k}
    assert logits(tuned).shape == (1, 7, 48, 70)
    reset_classes(tuned.double(), 2)
    assert tuned.decode_head.conv_seg.weight.dtype == torch.float64
    with pytest.raises(ConfigError, match="num_classes is 1; it must be 2 or more"):
        reset_classes(tuned, 1)


def test_a_backbone_begins_with_a_classifiers_weights(tmp_path):
    model = xcit.create_model("xcit_nano_12_p16", num_classes=3)
    model.pretrained_cfg = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    xcit.save_checkpoint(model, tmp_path / "c.safetensors")
    segmenter = create_segmenter("xcit_nano_12_p16", backbone=tmp_path / "c.safetensors", channels=8)
    assert isinstance(segmenter, UperNet)
    assert torch.equal(segmenter.backbone.blocks[5].mlp.fc2.weight, model.blocks[5].mlp.fc2.weight)
    assert segmenter.mean == (0.4, 0.4, 0.4)
    own = create_segmenter("xcit_nano_12_p16", backbone=tmp_path / "c.safetensors", channels=8, mean=(0.3, 0.3, 0.3))
    assert (own.mean, own.std) == ((0.3, 0.3, 0.3), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("variant", ["linear_patch", "no_lpi"])
def test_variants_of_xcit_come_back_too(tmp_path, randomize, variant):
    model = randomize(small("sem_fpn", variant=variant))
    save_segmenter(model, tmp_path / "s.safetensors")
    assert same(create_segmenter(tmp_path / "s.safetensors"), model)


def test_damaged_and_foreign_files(tmp_path):
    state = full("upernet").state_dict()

    def refused(name, content, sentence, error=CheckpointError):
        torch.save(content, tmp_path / name)
        with pytest.raises(error, match=sentence):
            create_segmenter(tmp_path / name)

    less = {k: v for k, v in state.items() if not k.startswith("decode_head.bottleneck.bn")}
    refused("a.pth", to_mmseg(less), r"does not fit a UperNet .* 5 missing \(first: decode_head.bottleneck.bn.weight\)")
    refused("b.pth", state | {"decode_head.extra": torch.zeros(1)}, r"1 unexpected \(first: decode_head.extra\)")
    odd = {"decode_head.bottleneck.bn.bias": torch.zeros(9)}
    refused("c.pth", state | odd, r"1 of another shape \(first: decode_head.bottleneck.bn.bias, \(9,\) in the file")
    refused(
        "d.pth", {"conv1.weight": torch.zeros(3)}, r"no UperNet or Semantic FPN on an XCiT: its keys begin with 'conv1"
    )
    refused("e.pth", [1, 2], "holds a list")
    refused("f.pth", {"state_dict": {}}, "holds no weights")
    bad = {"auxiliary_head.conv_seg.bias": torch.full((3,), torch.nan)}
    refused("g.pth", state | bad, "NaN or infinite values in 1 tensors")
    (tmp_path / "h.pth").write_bytes(b"not a file of weights")
    with pytest.raises(CheckpointError, match=r"h\.pth"):
        create_segmenter(tmp_path / "h.pth")
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        create_segmenter(tmp_path / "none.safetensors")
    xcit.save_checkpoint(xcit.create_model("xcit_nano_12_p16", num_classes=3), tmp_path / "i.safetensors")
    with pytest.raises(CheckpointError, match="holds no UperNet or Semantic FPN"):
        create_segmenter(tmp_path / "i.safetensors")
    widths = {"out_channels": 8, "box_width": 8, "mask_channels": 8}
    detector = xcit.create_detector("xcit_nano_12_p16", num_classes=2, depth=3, **widths)
    xcit.save_detector(detector, tmp_path / "k.safetensors")
    torch.save({"state_dict": to_mmdet(detector.state_dict())}, tmp_path / "k.pth")
    for name in ("k.safetensors", "k.pth"):
        with pytest.raises(
            CheckpointError, match=rf"{name} holds a detector; xcit\.create_detector\('.*{name}'\) builds"
        ):
            create_segmenter(tmp_path / name)
    save_segmenter(small(), tmp_path / "j.safetensors")
    for open_other in (xcit.create_model, xcit.create_detector):
        with pytest.raises(
            CheckpointError, match=r"create_segmenter opens it|holds a segmenter; xcit\.create_segmenter"
        ):
            open_other(tmp_path / "j.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head": "fcn"}, "damaged description"),
        ({"head": ["upernet"]}, "damaged description"),
        ({"cfg": [1]}, "damaged description"),
        ({"cfg": {"class_names": ["a"]}}, "damaged description"),
        ({"backbone": None}, "damaged description"),
        ({"taps": None}, None),
        ({"colour": 3}, "options that this xcit does not have: 'colour'"),
        ({"num_classes": 4}, "2 of another shape|4 of another shape"),
        ({"num_classes": None}, "damaged description of its model: num_classes is None; it must be a whole number"),
        ({"channels": "many"}, "damaged description of its model: channels is 'many'"),
        ({"backbone": {"patch_size": 16, "embed_dim": "wide"}}, "damaged description of its model"),
        ({"task": "detection"}, None),  # then the weights alone tell, and here they are too few blocks for the name
    ],
)
def test_a_description_that_does_not_describe(tmp_path, change, sentence):
    save_segmenter(small(), tmp_path / "s.safetensors")
    state = load_file(tmp_path / "s.safetensors")
    cfg = json.dumps(change.pop("cfg", {}))
    config = {"task": "segmentation"} | small().config | change
    metadata = {"xcit.format_version": "1", "xcit.config": json.dumps(config), "xcit.pretrained_cfg": cfg}
    save_file(state, tmp_path / "t.safetensors", metadata=metadata)
    if sentence is None:
        assert create_segmenter(tmp_path / "t.safetensors").config["taps"] == [0, 1, 1, 3]
        return
    with pytest.raises(CheckpointError, match=sentence):
        create_segmenter(tmp_path / "t.safetensors")


def test_what_cannot_be_saved(tmp_path):
    model = small()
    with pytest.raises(ConfigError, match=r"does not end in \.safetensors"):
        save_segmenter(model, tmp_path / "s.pth")
    with pytest.raises(ConfigError, match="2 entries in class_names; the model has 3"):
        save_segmenter(model, tmp_path / "s.safetensors", class_names=["a", "b"])
    with pytest.raises(ConfigError, match="2 entries in palette; the model has 3"):
        save_segmenter(model, tmp_path / "s.safetensors", palette=COLOURS[:2])
    for colour in ([0, 0, 256], [0, 0], 7, ["red", 0, 0]):
        with pytest.raises(ConfigError, match="a colour is red, green and blue"):
            save_segmenter(model, tmp_path / "s.safetensors", palette=[colour] * 3)
    with pytest.raises(ConfigError, match="got XCiT; save_checkpoint writes classifiers"):
        save_segmenter(xcit.create_model("xcit_nano_12_p16"), tmp_path / "s.safetensors")
    with torch.device("meta"), pytest.raises(ConfigError, match="on the meta device"):
        save_segmenter(small(), tmp_path / "s.safetensors")
    with torch.no_grad():
        model.decode_head.conv_seg.bias[0] = torch.inf
    with pytest.raises(CheckpointError, match="NaN or infinite values in 1 tensors"):
        save_segmenter(model, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_and_options_that_do_not_exist():
    with pytest.raises(UnknownNameError, match="upernet_xcit_tiny_12_p16"):
        create_segmenter("upernet_xcit_tiny_12_p61")
    with pytest.raises(UnknownNameError, match=r"Unknown head 'upper'. Did you mean 'upernet'\?"):
        create_segmenter("xcit_nano_12_p16", head="upper")
    with pytest.raises(ConfigError, match=r"UperNet has no option 'chanels'; did you mean 'channels'\?"):
        create_segmenter("xcit_nano_12_p16", chanels=3)
    with pytest.raises(ConfigError, match=r"SemanticFPN has no option 'pool_scales'"):
        create_segmenter("xcit_nano_12_p16", head="sem_fpn", pool_scales=(1, 2))
    with pytest.raises(ConfigError, match="pool_scales is 3; it must be a list of whole numbers"):
        create_segmenter("xcit_nano_12_p16", pool_scales=3)
    with pytest.raises(ConfigError, match=r"no option 'drop_path'; did you mean 'drop_path_rate'\?"):
        create_segmenter("xcit_nano_12_p16", drop_path=0.1)
    with pytest.raises(
        ConfigError,
        match="No segmenter on xcit_nano_12_p16 was released; there are those on xcit_tiny.*take backbone=True, in "
        r"training --pretrained released\.",
    ):
        create_segmenter("xcit_nano_12_p16", pretrained=True)
    with pytest.raises(ConfigError, match=r"is no segmenter; create_segmenter\('xcit_small_12_p16', backbone="):
        create_segmenter("xcit_small_12_p16_224_dist")
    with pytest.raises(ConfigError, match="is a detector; create_detector"):
        create_segmenter("maskrcnn_xcit_tiny_12_p16")
    with pytest.raises(ConfigError, match=r"'sem_fpn'; ask for head='upernet' .* or name sem_fpn_xcit_tiny_12_p16"):
        create_segmenter("upernet_xcit_tiny_12_p16", head="sem_fpn")
    with pytest.raises(ConfigError, match="leave backbone out"):
        create_segmenter("xcit_tiny_12_p16", pretrained=True, backbone=True)
    with pytest.raises(ConfigError, match="brings its own weights"):
        create_segmenter("s.safetensors", pretrained=True)
    with pytest.raises(
        ConfigError, match="backbone is xcit_tiny_12_p16_224, of xcit_tiny_12_p16; the segmenter is to be"
    ):
        create_segmenter("xcit_nano_12_p16", backbone="xcit_tiny_12_p16_224")
