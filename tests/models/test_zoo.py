"""The zoo's tables against the models they describe, and against timm's registry."""

import re
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xcit.errors import UnknownNameError
from xcit.models.xcit import XCiT
from xcit.models.zoo import ARCHITECTURES, CHECKPOINTS, default_checkpoint, find

IMAGENET = [c for c in CHECKPOINTS.values() if c.task == "classification"]
DINO = [c for c in CHECKPOINTS.values() if c.task == "self-supervised"]

# Section 1.3 of the facts sheet: depth, width, heads, eta, tokens_norm.
SIZES = {
    "nano_12": (12, 128, 4, 1.0, False),
    "tiny_12": (12, 192, 4, 1.0, True),
    "tiny_24": (24, 192, 4, 1e-5, True),
    "small_12": (12, 384, 8, 1.0, True),
    "small_24": (24, 384, 8, 1e-5, True),
    "medium_24": (24, 512, 8, 1e-5, True),
    "large_24": (24, 768, 16, 1e-5, True),
}


def built(architecture, **options):
    with torch.device("meta"):
        return XCiT(**architecture.config | options)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_how_many_there_are():
    assert len(ARCHITECTURES) == 14
    tasks = Counter(c.task for c in CHECKPOINTS.values())
    assert tasks == {"classification": 42, "self-supervised": 4, "detection": 8, "segmentation": 16}
    # every size in both patch sizes, plain, distilled and distilled at 384
    assert Counter((c.image_size, c.distilled) for c in IMAGENET) == {
        (224, False): 14,
        (224, True): 14,
        (384, True): 14,
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [16, 8])
def test_architectures(size, patch_size):
    architecture = ARCHITECTURES[f"xcit_{size}_p{patch_size}"]
    depth, width, heads, eta, tokens_norm = SIZES[size]
    assert architecture.config == {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "eta": eta,
        "tokens_norm": tokens_norm,
    }
    model = built(architecture)
    assert (len(model.blocks), len(model.cls_attn_blocks)) == (depth, 2)
    assert model.head.out_features == 1000
    assert count(model) == architecture.num_params


def test_parameters_are_those_of_the_built_models():
    counts = {name: count(built(architecture)) for name, architecture in ARCHITECTURES.items()}
    assert {c.stem: c.num_params for c in IMAGENET} == {c.stem: counts[c.architecture] for c in IMAGENET}
    # literal figures, so that a change of model and table together shows
    literal = {"xcit_nano_12_p8": 3_049_016, "xcit_small_12_p16": 26_253_304, "xcit_large_24_p16": 189_096_136}
    assert {name: counts[name] for name in literal} == literal


def test_dino_parameters_are_those_of_models_without_classifier():
    for checkpoint in DINO:
        assert checkpoint.num_params == count(built(ARCHITECTURES[checkpoint.architecture], num_classes=0))
    assert CHECKPOINTS["dino_xcit_small_12_p16_pretrain"].num_params == 25_868_304


def test_multiply_adds_are_those_of_the_built_models():
    stated = {(c.architecture, c.image_size): c.gmacs_port for c in IMAGENET}
    assert len({(c.architecture, c.image_size, c.gmacs_port) for c in IMAGENET}) == len(stated)  # one a pair
    for architecture in ARCHITECTURES.values():
        model = built(architecture, attn_form="tokens").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224, device="meta"))
        gmacs = counter.get_total_flops() / 2e9
        assert stated[architecture.id, 224] == pytest.approx(gmacs, rel=0.015), architecture.id
        # all but the class token's share is linear in the tokens
        linear = stated[architecture.id, 224] * (384 / 224) ** 2
        assert stated[architecture.id, 384] == pytest.approx(linear, rel=0.005), architecture.id


def test_released_code_computes_more_queries():
    for c in (*IMAGENET, *DINO):
        architecture = ARCHITECTURES[c.architecture]
        tokens = (c.image_size // architecture.patch_size) ** 2
        queries = 2 * tokens * architecture.embed_dim**2 / 1e9
        assert c.gmacs_official == pytest.approx(c.gmacs_port + queries, abs=0.0015)


def test_urls():
    urls = [c.url for c in CHECKPOINTS.values()]
    assert len(set(urls)) == 70
    assert all(re.fullmatch(r"https://dl\.fbaipublicfiles\.com(/[a-z0-9_]+)+\.pth", url) for url in urls)
    assert all(url.endswith(f"/{stem}.pth") for stem, url in zip(CHECKPOINTS, urls, strict=True))
    base = "https://dl.fbaipublicfiles.com"
    assert {
        f"{base}/xcit/xcit_large_24_p8_384_dist.pth",
        f"{base}/dino/dino_xcit_medium_24_p8_pretrain/dino_xcit_medium_24_p8_pretrain.pth",
        f"{base}/xcit/coco/maskrcnn_xcit_small_24_p16.pth",
        f"{base}/xcit/ade/sem_fpn_xcit_tiny_12_p8.pth",
        f"{base}/xcit/ade/upernet_xcit_medium_24_p16.pth",
    } <= set(urls)


def test_timm_says_the_same():
    import timm

    assert {c.timm_id for c in IMAGENET} == set(timm.list_pretrained("xcit*"))
    for c in IMAGENET:
        cfg = timm.get_pretrained_cfg(c.timm_id)
        assert cfg.url == c.url
        ours = c.pretrained_cfg
        assert tuple(ours["input_size"]) == cfg.input_size
        assert (tuple(ours["mean"]), tuple(ours["std"])) == (cfg.mean, cfg.std)
        assert (ours["crop_pct"], ours["interpolation"]) == (cfg.crop_pct, cfg.interpolation)
    for name in {c.timm_id.partition(".")[0] for c in IMAGENET}:  # untagged: what timm itself takes by default
        default = timm.get_pretrained_cfg(name)
        assert find(name)[1].url == default.url


def test_metrics():
    def metric(stem, name, source):
        (value,) = [m.value for m in CHECKPOINTS[stem].metrics if (m.name, m.source) == (name, source)]
        return value

    assert metric("xcit_large_24_p8_384_dist", "ImageNet top-1", "xcit README") == 86.0
    assert metric("xcit_large_24_p8_384_dist", "ImageNet top-5", "timm") == 97.69
    assert metric("xcit_nano_12_p16_224", "ImageNet top-1", "timm") == 69.982
    assert metric("xcit_small_12_p8_224_dist", "ImageNet-V2 top-1", "timm") == 73.91
    assert metric("xcit_medium_24_p16_384_dist", "ImageNet-ReaL top-1", "timm") == 89.472
    assert metric("dino_xcit_medium_24_p8_pretrain", "ImageNet linear top-1", "dino README") == 80.3
    assert metric("maskrcnn_xcit_small_24_p8", "COCO mask AP", "xcit detection/README") == 43.0
    assert metric("sem_fpn_xcit_small_24_p8", "ADE20k mIoU", "xcit semantic_segmentation/README") == 47.1
    assert metric("upernet_xcit_small_24_p8", "ADE20k mIoU", "xcit semantic_segmentation/README") == 48.1
    for c in IMAGENET:  # timm measured the released files again; the README rounds to one decimal
        readme, timm, top5, v2, real = (m.value for m in c.metrics)
        assert abs(readme - timm) <= 0.12
        assert v2 < timm < real < top5


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("xcit_small_12_p16_224", "xcit_small_12_p16_224"),
        ("xcit_small_12_p16_224_dist", "xcit_small_12_p16_224_dist"),
        ("xcit_small_12_p16_224.fb_in1k", "xcit_small_12_p16_224"),
        ("xcit_small_12_p16_224.fb_dist_in1k", "xcit_small_12_p16_224_dist"),
        ("xcit_small_12_p16_384", "xcit_small_12_p16_384_dist"),
        ("xcit_small_12_p16_384.fb_dist_in1k", "xcit_small_12_p16_384_dist"),
        ("dino_xcit_small_12_p16", "dino_xcit_small_12_p16_pretrain"),
        ("maskrcnn_xcit_small_12_p16", "maskrcnn_xcit_small_12_p16"),
    ],
)
def test_names(name, stem):
    architecture, checkpoint = find(name)
    assert checkpoint is CHECKPOINTS[stem]
    assert architecture.id == "xcit_small_12_p16"


def test_an_architecture_is_no_checkpoint_but_has_a_default_one():
    architecture, checkpoint = find("xcit_tiny_24_p8")
    assert checkpoint is None
    assert default_checkpoint(architecture).stem == "xcit_tiny_24_p8_224_dist"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("xcit_smal_12_p16", "xcit_small_12_p16"),
        ("xcit_small_12_p16_224.fb_distin1k", "xcit_small_12_p16_224.fb_dist_in1k"),
        ("xcit_nano_12_p16_224dist", "xcit_nano_12_p16_224_dist"),
        ("xcit_small_12_cp16_dino", None),
    ],
)
def test_unknown_names_have_near_ones(name, near):
    with pytest.raises(UnknownNameError, match=re.escape(repr(name))) as caught:
        find(name)
    assert caught.value.suggestions
    assert near is None or near in caught.value.suggestions


def test_pretrained_cfg():
    cfg = CHECKPOINTS["dino_xcit_small_12_p16_pretrain"].pretrained_cfg
    assert cfg == {
        "input_size": [3, 224, 224],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "label_set": None,
        "class_names": None,
        "checkpoint": "dino_xcit_small_12_p16_pretrain",
        "architecture": "xcit_small_12_p16",
    }
    assert CHECKPOINTS["xcit_nano_12_p8_384_dist"].pretrained_cfg["label_set"] == "imagenet-1k"
