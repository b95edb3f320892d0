"""Folded layers over their own tokens in bands, against the same layers as plain expressions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xcit.bench.memory import peak_mib
from xcit.deploy.fold import fold
from xcit.models import folded_inplace, folded_stem
from xcit.models.folded_layers import FoldedBlock, FoldedClassBlock
from xcit.models.pyramid import XCiTPyramid
from xcit.models.variants import BlockWithoutLPI
from xcit.models.xcit import XCiT
from xcit.ops.xca import observe_forms
from xcit.ops.xca_form import Form

TINY = {"patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
GRIDS = [(1, 1), (1, 7), (9, 1), (5, 6), (11, 3)]
BANDS = [1, 2, 6, 13, 4096]
"""Tokens; of less than a row of patches the band is one row."""


def in_bands(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    for name in ("BAND_TOKENS", "PART_TOKENS", "LPI_TOKENS"):
        monkeypatch.setattr(folded_inplace, name, tokens)


@pytest.fixture
def block(randomize) -> FoldedBlock:
    return FoldedBlock(randomize(XCiT(**TINY)).double().eval().blocks[0], "covariance", torch.float64)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_bands_of_every_height_give_the_same(
    grid: tuple[int, int], band: int, block: FoldedBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bands(monkeypatch, band)
    monkeypatch.setattr(folded_inplace, "MLP_TOKENS", max(1, band // 2))
    x = torch.randn(3, grid[0] * grid[1], 32, dtype=torch.float64)
    expected = block(x, *grid)
    found = block(x, *grid, overwrite=True)
    assert found.data_ptr() == x.data_ptr()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["tokens", "covariance", "auto"])
def test_the_form_is_the_one_asked_for(form: Form, block: FoldedBlock) -> None:
    block.attn.form = form
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    expected = block(x, 3, 4)
    with observe_forms() as forms:
        torch.testing.assert_close(block(x, 3, 4, overwrite=True), expected, rtol=1e-12, atol=1e-12)
    assert forms == ["tokens" if form == "auto" else form]


def test_a_layer_without_lpi(randomize) -> None:
    model = randomize(XCiT(**TINY, variant="no_lpi")).double().eval()
    assert isinstance(model.blocks[0], BlockWithoutLPI)
    block = FoldedBlock(model.blocks[0], "covariance", torch.float64)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x, 3, 4), block(x.clone(), 3, 4, overwrite=True), rtol=1e-12, atol=1e-12)


def test_another_activation_is_kept(randomize, block: FoldedBlock) -> None:
    block.mlp[1], block.local_mp.act = nn.SiLU(), nn.GELU("tanh")
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x, 3, 4), block(x.clone(), 3, 4, overwrite=True), rtol=1e-12, atol=1e-12)


def test_nothing_is_overwritten_unasked_or_where_gradients_are_kept(block: FoldedBlock) -> None:
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    kept = x.clone()
    block(x, 3, 4)
    assert torch.equal(x, kept)
    assert block(x.requires_grad_(), 3, 4, overwrite=True).requires_grad
    assert torch.equal(x, kept)


def test_images_stay_and_can_be_differentiated(randomize) -> None:
    model = randomize(XCiT(**TINY)).double().eval()
    folded = fold(model).model
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    kept = images.clone()
    first = folded(images)
    assert torch.equal(images, kept)
    assert torch.equal(folded(images), first)
    gradients = [
        torch.autograd.grad(each(leaf).sum(), leaf)[0]
        for each in (model, folded)
        for leaf in [images.clone().requires_grad_()]
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_autocast_is_left_to_the_plain_path(randomize) -> None:
    model = randomize(XCiT(**TINY)).eval()
    folded = fold(model).model
    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = folded(images)
    truth = model(images)
    assert (found - truth).norm() / truth.norm() < 0.05


@pytest.mark.parametrize("patch_size", [8, 16])
def test_a_pyramids_levels_are_of_their_layers(patch_size: int, randomize, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bands(monkeypatch, 9)
    model = XCiT(**TINY | {"patch_size": patch_size, "depth": 5})
    pyramid = randomize(XCiTPyramid(model, taps=(0, 1, 2, 3))).double().eval()
    folded = fold(pyramid).model
    images = torch.randn(1, 3, 96, 70, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(folded(images), pyramid(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens_norm", [False, True])
@pytest.mark.parametrize("band", BANDS)
def test_class_attention_in_bands_of_every_size(
    band: int, tokens_norm: bool, randomize, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize(XCiT(**TINY, tokens_norm=tokens_norm)).double().eval()
    block, plain = FoldedClassBlock(model.cls_attn_blocks[0]), model.cls_attn_blocks[0]
    cls, x = torch.randn(3, 1, 32, dtype=torch.float64), torch.randn(3, 13, 32, dtype=torch.float64)
    expected = plain(torch.cat((cls, 5 * x), dim=1)).split((1, 13), dim=1)
    in_bands(monkeypatch, band)
    given = 5 * x  # scores far apart
    alone = block.class_token(cls, given)
    assert torch.equal(given, 5 * x)
    patches = block.patch_tokens(given.clone(), overwrite=True)
    found = block(cls, given, overwrite=True)
    assert found[1].data_ptr() == given.data_ptr()
    for one, other in ((found[0], expected[0]), (alone, expected[0]), (found[1], expected[1]), (patches, expected[1])):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"tokens_norm": False}, {"variant": "avg_pool"}], ids=str)
def test_a_whole_model_takes_little_more_than_its_tokens(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bands(monkeypatch, 512)
    monkeypatch.setattr(folded_stem, "TILE_BYTES", 2**20)
    folded = fold(XCiT(**TINY | {"embed_dim": 128} | options).eval()).model
    x = torch.randn(1, 3, 1024, 1536)
    tokens_mib = 128 * 192 * 128 * 4 / 2**20
    with torch.inference_mode():
        peak = peak_mib(lambda: folded(x), "cpu")
    assert peak < (2.5 if options.get("variant") else 1.5) * tokens_mib  # pooling norms them all at once


def test_the_hidden_layer_never_exists_as_a_whole() -> None:
    block = FoldedBlock(XCiT(**TINY | {"embed_dim": 128}).eval().blocks[0], "covariance", torch.float32)
    x = torch.randn(1, 32 * 1024, 128)
    tokens_mib = x.numel() * 4 / 2**20
    with torch.inference_mode():
        plain = peak_mib(lambda: block(x, 128, 256), "cpu")
        in_place = peak_mib(lambda: block(x, 128, 256, overwrite=True), "cpu")
    assert in_place < 1.5 * tokens_mib < 8 * tokens_mib < plain
