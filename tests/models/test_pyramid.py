"""The pyramid: the released geometry, the blocks' own features, any size, any checkpoint, other people's decoders."""

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

import xcit
from xcit.errors import ConfigError, ShapeError
from xcit.models.pyramid import STRIDES, XCiTPyramid, create_pyramid, default_taps
from xcit.models.xcit import XCiT


def small(patch_size=16, depth=4, **options):
    torch.manual_seed(0)
    return XCiT(patch_size, embed_dim=32, depth=depth, num_heads=4, num_classes=3, **options)


@pytest.mark.parametrize(("depth", "taps"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (3, (0, 0, 1, 2))])
def test_taps_are_the_released_ones(depth, taps):
    assert default_taps(depth) == taps


@pytest.mark.parametrize("patch_size", [8, 16])
def test_levels_are_the_blocks_features_brought_to_their_strides(patch_size, randomize):
    """Recomputed from timm's verb and plain operations."""
    model = randomize(small(patch_size)).eval()
    pyramid = randomize(XCiTPyramid(model)).eval()
    x = torch.randn(2, 3, 96, 160)
    a, b, c, d = _taps(model, x)
    up = nn.functional.conv_transpose2d
    if patch_size == 16:
        first, norm, _, last = pyramid.fpn1
        fine = up(nn.functional.gelu(norm(up(a, first.weight, first.bias, 2))), last.weight, last.bias, 2)
        want = [fine, up(b, pyramid.fpn2[0].weight, pyramid.fpn2[0].bias, 2), c, nn.functional.max_pool2d(d, 2)]
    else:
        fine = up(a, pyramid.fpn1[0].weight, pyramid.fpn1[0].bias, 2)
        want = [fine, b, nn.functional.max_pool2d(c, 2), nn.functional.max_pool2d(d, 4)]
    got = pyramid(x)
    for level, expected, stride in zip(got, want, STRIDES, strict=True):
        assert level.shape == (2, 32, 96 // stride, 160 // stride)
        torch.testing.assert_close(level, expected, atol=1e-5, rtol=1e-4)


def _taps(model, x):
    features = dict(enumerate(model.forward_intermediates(x, intermediates_only=True)))
    return [features[i] for i in default_taps(len(model.blocks))]


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("size", [(33, 47), (100, 61), (64, 250)])
def test_any_size(patch_size, size):
    levels = XCiTPyramid(small(patch_size)).eval()(torch.randn(1, 3, *size))
    grid = [-(-side // patch_size) for side in size]
    for level, stride in zip(levels, STRIDES, strict=True):
        assert list(level.shape[2:]) == [g * patch_size // stride for g in grid]


def test_too_small_an_image_is_refused():
    with pytest.raises(ShapeError, match=r"grid of 1 x 2 patches.* needs 2 x 2: enlarge or pad.*16 px"):
        XCiTPyramid(small())(torch.randn(1, 3, 16, 32))
    with pytest.raises(ShapeError, match="needs 4 x 4"):
        XCiTPyramid(small(8))(torch.randn(1, 3, 24, 32))


def test_from_any_checkpoint(tmp_path):
    model = small().eval()
    xcit.save_checkpoint(model, tmp_path / "m.safetensors", class_names=list("abc"))
    pyramid = create_pyramid(tmp_path / "m.safetensors").eval()
    for name, tensor in pyramid.state_dict().items():
        if not name.startswith("fpn"):
            torch.testing.assert_close(tensor, model.state_dict()[name])
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in XCiT(
        **(xcit.create_model("xcit_nano_12_p16").config | {"num_classes": 0})
    ).state_dict().items()}}, tmp_path / "dino.pth")  # fmt: skip
    dino = create_pyramid("xcit_nano_12_p16", tmp_path / "dino.pth")
    want = torch.load(tmp_path / "dino.pth", weights_only=True)["teacher"]
    assert torch.equal(dino.blocks[11].mlp.fc1.weight, want["module.backbone.blocks.11.mlp.fc1.weight"])


def test_torchvisions_fpn_takes_it():
    pyramid = XCiTPyramid(small())
    fpn = FeaturePyramidNetwork(list(pyramid.out_channels), 16)
    out = fpn({str(i): level for i, level in enumerate(pyramid(torch.randn(1, 3, 64, 64)))})
    assert [tuple(x.shape) for x in out.values()] == [(1, 16, 64 // s, 64 // s) for s in pyramid.strides]


def test_every_weight_learns_and_checkpointing_changes_nothing():
    pyramid = XCiTPyramid(small(drop_path_rate=0.2)).train()
    x = torch.randn(2, 3, 64, 96)
    grads = []
    for enable in (False, True):
        pyramid.set_grad_checkpointing(enable)
        pyramid.zero_grad()
        torch.manual_seed(3)
        sum(level.square().mean() for level in pyramid(x)).backward()
        grads.append({n: p.grad.clone() for n, p in pyramid.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([0, 1, 2], "it must be 4"),
        ([0, 1, 2, 4], "blocks 0 to 3"),
        ([3, 2, 1, 0], "sort them"),
        ([0, 1, 2, -5], "0 to 3"),
        (3, "taps is 3; it must be 4 of the model's blocks 0 to 3"),
        ("0123", "taps is '0123'; it must be 4"),
        ([0, 1, 1.5, 3], r"taps is \[0, 1, 1.5, 3\]; it must be 4"),
    ],
)
def test_taps_that_do_not_exist(taps, message):
    with pytest.raises(ConfigError, match=message):
        XCiTPyramid(small(), taps)
    assert XCiTPyramid(small(), [0, 1, -2, -1]).taps == (0, 1, 2, 3)


def test_too_shallow_a_model():
    with pytest.raises(ConfigError, match="3 XCA blocks or more"):
        XCiTPyramid(small(depth=2))


def test_blocks_after_the_last_tap_are_dropped():
    assert len(XCiTPyramid(small(depth=6), [0, 1, 2, 3]).blocks) == 4


def test_compiles_and_exports():
    pyramid = XCiTPyramid(small()).eval()
    x = torch.randn(1, 3, 64, 96)
    program = torch.export.export(pyramid, (x,))
    for got, want in zip(program.module()(x), pyramid(x), strict=True):
        torch.testing.assert_close(got, want)
