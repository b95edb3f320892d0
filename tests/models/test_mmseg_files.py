"""mmsegmentation's files: names listed by hand from its modules, round trips, and what the files say of the classes."""

import pytest
import torch

from xcit.errors import CheckpointError, ConfigError
from xcit.models.mmseg_files import from_mmseg, is_mmseg, shown, to_mmseg
from xcit.models.segmenters import create_segmenter

COMMON = [
    "backbone.patch_embed.proj.0.0.weight",
    "backbone.patch_embed.proj.6.1.running_mean",
    "backbone.pos_embeder.token_projection.weight",
    "backbone.blocks.3.attn.temperature",
    "backbone.blocks.3.local_mp.bn.weight",
    "backbone.blocks.0.gamma3",
    "backbone.fpn1.0.weight",
    "backbone.fpn1.1.running_var",
    "backbone.fpn1.3.bias",
    "backbone.fpn2.0.weight",
    "decode_head.conv_seg.weight",
    "decode_head.conv_seg.bias",
]
UPERNET = [
    *(f"decode_head.psp_modules.{i}.1" for i in range(4)),
    *(f"decode_head.{part}.{i}" for part in ("lateral_convs", "fpn_convs") for i in range(3)),
    "decode_head.bottleneck",
    "decode_head.fpn_bottleneck",
    "auxiliary_head.convs.0",
]
SEM_FPN = [f"decode_head.scale_heads.{i}" for i in ("0.0", "1.0", "2.0", "2.2", "3.0", "3.2", "3.4")]
STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BLOCK = ["conv.weight", *(f"bn.{part}" for part in STATISTICS)]
HEADS = {
    "upernet": {f"{name}.{part}" for name in UPERNET for part in BLOCK}
    | {"auxiliary_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"},
    "sem_fpn": {f"{name}.{part}" for name in SEM_FPN for part in BLOCK}
    | {f"neck.{c}.{i}.conv.{p}" for c in ("lateral_convs", "fpn_convs") for i in range(4) for p in ("weight", "bias")},
}


def tiny(head, **options):
    return create_segmenter("xcit_nano_12_p16", head=head, num_classes=3, depth=4, channels=12, **options)


@pytest.mark.parametrize("head", HEADS)
def test_the_names_are_mmsegmentations(head):
    names = set(tiny(head).state_dict())
    assert {key for key in names if not key.startswith("backbone.")} == HEADS[head] | set(COMMON[-2:])
    assert set(COMMON) <= names
    assert not [key for key in names if "cls_" in key or key.startswith(("backbone.norm", "backbone.head"))]


@pytest.mark.parametrize("head", HEADS)
def test_a_round_trip(head, randomize, tmp_path):
    model = randomize(tiny(head))
    cfg = {"class_names": ["a", "b", "c"], "palette": [[0, 1, 2], [3, 4, 5], [255, 0, 9]], "mean": [0.0, 0.0, 0.0]}
    torch.save(to_mmseg(model.state_dict(), cfg), tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content["meta"] == {"CLASSES": ("a", "b", "c"), "PALETTE": cfg["palette"]}
    assert is_mmseg(content)
    state, said = from_mmseg(content, "a.pth")
    assert said == {"class_names": cfg["class_names"], "palette": cfg["palette"]}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    again = to_mmseg(state, said)
    assert again["meta"] == content["meta"]
    assert again["state_dict"].keys() == content["state_dict"].keys()


def test_other_wrappings_and_generations():
    weights = tiny("sem_fpn").state_dict()
    for content in (
        weights,
        {f"module.{key}": tensor for key, tensor in weights.items()},
        {"meta": {"dataset_meta": {"classes": ["a", "b", "c"], "palette": None}}, "state_dict": weights},
    ):
        assert is_mmseg(content)
        state, said = from_mmseg(content, "it.pth")
        assert state.keys() == weights.keys()
        assert said == ({"class_names": ["a", "b", "c"]} if "meta" in content else {})
    for meta in ({"CLASSES": ("a", "b")}, {"CLASSES": "abc"}, {"CLASSES": None, "PALETTE": [[0, 0, 256]] * 3}, "text"):
        assert from_mmseg({"meta": meta, "state_dict": weights}, "it.pth")[1] == {}


def test_what_is_no_segmenter():
    assert not is_mmseg([1])
    assert not is_mmseg({"backbone.body.a": torch.zeros(1)})
    assert not is_mmseg({"state_dict": {"roi_head.bbox_head.fc_cls.weight": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        from_mmseg([1], "it.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        from_mmseg({"state_dict": {}}, "it.pth")
    with pytest.raises(ConfigError, match="no segmenter's weights: the names begin with 'a'"):
        to_mmseg({"a": torch.zeros(1)})


@pytest.mark.parametrize(
    "options",
    [{"head": "upernet"}, {"head": "upernet", "auxiliary_channels": 0}, {"head": "sem_fpn", "fpn_channels": 24}],
)
def test_shapes_show_the_arguments(options):
    model = tiny(**options, in_chans=2, mean=(0.5, 0.5), std=(0.5, 0.5))
    found = shown(model.state_dict())
    told = {key: value for key, value in found.items() if key != "backbone"}
    assert told == {key: model.config[key] for key in told}
    sizes = ("patch_size", "embed_dim", "depth", "num_heads", "in_chans")
    assert [found["backbone"][key] for key in sizes] == [model.config["backbone"][key] for key in sizes]


def test_shapes_of_something_else():
    state = tiny("upernet").state_dict()
    assert shown({k: t for k, t in state.items() if "psp_modules" not in k}) is None
    assert shown(state | tiny("sem_fpn").state_dict()) is None
    assert shown({k: t for k, t in state.items() if not k.startswith("backbone.blocks")}) is None
    assert shown({k: t for k, t in state.items() if not k.startswith("backbone.patch_embed")}) is None
    assert shown({k: t for k, t in state.items() if "conv_seg" not in k}) is None
    assert (
        shown({k: t for k, t in state.items() if not k.startswith(("backbone.blocks.2", "backbone.blocks.3"))}) is None
    )
