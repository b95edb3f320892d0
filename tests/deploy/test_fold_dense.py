"""Folded pyramids, segmenters and detectors against the models that they were made of."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from xcit.deploy.fold import fold
from xcit.errors import ConfigError, ShapeError
from xcit.models.detectors import save_detector
from xcit.models.folded_models import FoldedPyramid
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.pyramid import XCiTPyramid
from xcit.models.segmenters import save_segmenter
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.upernet import UperNet
from xcit.models.xcit import XCiT


def pyramid_of(patch_size: int = 16) -> XCiTPyramid:
    model = XCiT(patch_size, embed_dim=32, depth=4, num_heads=4, num_classes=0)
    return XCiTPyramid(model, taps=[0, 1, 2, 2])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("patch_size", [16, 8])
def test_a_pyramid_gives_the_same_four_maps(patch_size: int, randomize) -> None:
    pyramid = randomize(pyramid_of(patch_size)).double().eval()
    folded = fold(pyramid).model
    assert isinstance(folded, FoldedPyramid)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert len(folded.blocks) == 3
    assert (folded.strides, folded.out_channels, folded.taps) == (pyramid.strides, pyramid.out_channels, pyramid.taps)
    for size in ((32, 32), (33, 100), (64, 47)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        levels = folded(images)
        assert len(levels) == 4
        for ours, theirs in zip(levels, pyramid(images), strict=True):
            assert_close(ours, theirs)
    with pytest.raises(ShapeError, match="coarsest level"):
        folded(torch.randn(1, 3, 16, 64, dtype=torch.float64))


@pytest.mark.parametrize("kind", [UperNet, SemanticFPN])
def test_a_segmenter_names_the_same_pixels(kind: type[nn.Module], randomize) -> None:
    options = {"auxiliary_channels": 8} if kind is UperNet else {"fpn_channels": 8}
    model = randomize(kind(pyramid_of(), 3, channels=8, **options)).double()
    before = copy.deepcopy(model.state_dict())
    result = fold(model)
    folded = result.model
    assert type(folded) is kind
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    batch_norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert result.report.folded["batch norms into the convolution before or after it"] == batch_norms
    model.eval()
    for size in ((64, 96), (50, 41)):
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        assert_close(folded(images), model(images))
    ours, theirs = folded.forward_auxiliary(images)[1], model.forward_auxiliary(images)[1]
    assert (ours is None) == (theirs is None)
    if ours is not None:
        assert_close(ours, theirs)
    with pytest.raises(ConfigError, match="inference alone"):
        folded.train()
    with pytest.raises(ConfigError, match="folded already"):
        fold(folded)


def test_a_detector_finds_the_same(randomize) -> None:
    model = MaskRCNN(
        pyramid_of(),
        2,
        out_channels=16,
        box_width=16,
        mask_channels=8,
        mask_convs=1,
        proposals=20,
        min_size=64,
        max_size=96,
        score_thresh=0.0,
        detections_per_img=5,
    )
    model = randomize(model).double().eval()
    folded = fold(model).model
    assert type(folded) is MaskRCNN
    assert isinstance(folded.backbone.body, FoldedPyramid)
    assert isinstance(model.backbone.body, XCiTPyramid)
    images = [torch.rand(3, 70, 64, dtype=torch.float64), torch.rand(3, 64, 90, dtype=torch.float64)]
    for ours, theirs in zip(folded(images), model(images), strict=True):
        assert len(theirs["boxes"])
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-9)


def test_sizes_below_the_coarsest_level_are_refused() -> None:
    with pytest.raises(ConfigError, match="image_sizes holds 16 x 64; the model takes images of 17 px"):
        fold(pyramid_of(), image_sizes=[(16, 64)])


def test_a_folded_model_is_not_saved(tmp_path: Path) -> None:
    """Its file would describe the model that it was folded from."""
    detector = MaskRCNN(pyramid_of(), num_classes=2)
    for save, model in ((save_detector, detector), (save_segmenter, SemanticFPN(pyramid_of(), 3, channels=8))):
        with pytest.raises(ConfigError, match="save the one that it was folded from"):
            save(fold(model).model, tmp_path / "m.safetensors")
        assert save(model, tmp_path / "m.safetensors").exists()
        (tmp_path / "m.safetensors").unlink()
