"""Giant images against the same model on the whole image."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xcit.errors import CheckpointError, ConfigError, ShapeError
from xcit.inference.attention_maps import class_attention
from xcit.inference.giant import GiantImages
from xcit.inference.giant_heads import low_rows
from xcit.inference.segment_image import segment_image
from xcit.models.folded_copy import folded_copy
from xcit.models.pyramid import XCiTPyramid
from xcit.models.row_maps import Whole, pooled_evenly
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.upernet import UperNet
from xcit.models.xcit import XCiT

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
SCALING = {"mean": MEAN, "std": STD}
TINY = {"num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 4}
SIZES = [(8, 8), (61, 133), (200, 33), (97, 96)]
LIMIT = {torch.float64: 1e-11, torch.float32: 1e-5}


def image_of(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)


def prepared(image: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.from_numpy(image).double() / 255
    x = (x - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(STD, dtype=torch.float64)
    return x.permute(2, 0, 1).unsqueeze(0).to(dtype)


def difference(found: Any, expected: Any) -> float:
    found, expected = (torch.as_tensor(np.asarray(each)).double() for each in (found, expected))
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def make(randomize):
    def make(patch_size: int = 8, dtype: torch.dtype = torch.float64, **options: Any) -> XCiT:
        return randomize(XCiT(**TINY | {"patch_size": patch_size} | options)).to(dtype).eval()

    return make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("band", [1, 2, 3, 7, None])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [8, 16])
def test_logits_and_features(patch_size: int, size: tuple[int, int], band: int | None, dtype, make) -> None:
    if min(size) < patch_size:
        size = (16, 16)
    model, image = make(patch_size, dtype), image_of(size)
    truth = XCiT(**TINY | {"patch_size": patch_size}).eval().double()
    truth.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, tokens = truth(prepared(image)), truth.forward_features(prepared(image))
    giant = GiantImages(model, band=band, **SCALING)
    found = giant.classify(image)
    assert difference(found.logits, logits[0]) < LIMIT[dtype]
    assert difference(found.features, tokens[0, 0]) < LIMIT[dtype]
    features = giant.features(image, dtype="float64")
    assert features.shape[:2] == tuple(-(-side // patch_size) for side in size)
    assert difference(features.reshape(-1, 32), tokens[0, 1:]) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("band", [2, None])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_half_precision_is_no_worse_than_over_the_whole_image(patch_size: int, band: int | None, dtype, make) -> None:
    model, image = make(patch_size), image_of((97, 160))
    half = make(patch_size)
    half.load_state_dict(model.state_dict())
    half.to(dtype)
    with torch.no_grad():
        truth = model.forward_features(prepared(image))[0, 1:]
        whole = half.forward_features(prepared(image, dtype))[0, 1:].double()
    found = torch.from_numpy(GiantImages(half, band=band, **SCALING).features(image, dtype="float64")).view_as(truth)
    assert 0 < (found - truth).norm() < 1.5 * (whole - truth).norm()


@pytest.mark.parametrize("band", [1, 4, None])
def test_features_of_a_block(band: int | None, make) -> None:
    model, image = make(), image_of((61, 133))
    with torch.no_grad():
        expected = model.forward_intermediates(prepared(image), intermediates_only=True)
    giant = GiantImages(model, band=band, **SCALING)
    for block in (0, 2, -1):
        found = giant.features(image, block=block, dtype="float64")
        assert difference(found, expected[block][0].permute(1, 2, 0)) < 1e-11


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"num_classes": 0},
        {"num_classes": 0, "global_pool": "avg"},
        {"variant": "no_lpi"},
        {"variant": "linear_patch"},
        {"use_pos": False},
        {"cls_attn_layers": 1},
        {"cls_attn_layers": 3, "tokens_norm": False},
        {"qkv_bias": False},
    ],
    ids=str,
)
def test_every_kind_of_model(options: dict[str, Any], make) -> None:
    model, image = make(**options), image_of((61, 133))
    with torch.no_grad():
        expected = model(prepared(image))[0]
    found = GiantImages(model, band=3, **SCALING).classify(image)
    assert difference(found.features if model.num_classes == 0 else found.logits, expected) < 1e-11
    assert (found.logits is None) == (model.num_classes == 0)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("band", [1, 5, None])
def test_attention(band: int | None, layer: int, make) -> None:
    model, image = make(), image_of((61, 133))
    expected = class_attention(model, prepared(image), layer)
    found = GiantImages(model, band=band, **SCALING).attend(image, layer=layer)
    assert difference(found.patches, expected.patches[0].transpose(1, 2, 0)) < 1e-6  # it is float32
    assert difference(found.own, expected.own[0]) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [(32, 32), (61, 133), (200, 70)])
@pytest.mark.parametrize("band", [1, 5, None])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_a_pyramid(patch_size: int, band: int | None, size: tuple[int, int], dtype, make, randomize) -> None:
    pyramid = randomize(XCiTPyramid(make(patch_size))).double().eval()
    with torch.no_grad():
        expected = pyramid(prepared(image_of(size)))
    giant = GiantImages(pyramid.to(dtype), band=band, **SCALING)
    for found, level in zip(giant.pyramid(image_of(size), dtype="float64"), expected, strict=True):
        assert difference(found, level[0].permute(1, 2, 0)) < LIMIT[dtype]


def segmenter(kind: type[nn.Module], patch_size: int, make, randomize) -> Any:
    model = kind(XCiTPyramid(make(patch_size)), 7, channels=8, **SCALING)
    return randomize(model).double().eval()


@pytest.mark.parametrize("size", [(32, 32), (61, 133), (300, 70), (20, 50)])
@pytest.mark.parametrize("band", [1, 5, None])
@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("kind", [UperNet, SemanticFPN])
def test_segmentation(kind, patch_size: int, band: int | None, size, make, randomize) -> None:
    model, image = segmenter(kind, patch_size, make, randomize), image_of(size)
    expected = segment_image(model, torch.from_numpy(image).permute(2, 0, 1), native=True)
    found = GiantImages(model, band=band).segment(image, scores=True)
    assert found.labels.dtype == np.uint8
    assert found.scores.dtype == np.float16
    # the whole way scales the pixels in float32
    assert (found.labels != expected.labels).mean() < 1e-3
    assert np.abs(found.scores.astype(float) - expected.scores).max() < 2e-3


@pytest.mark.parametrize("kind", [UperNet, SemanticFPN])
@pytest.mark.parametrize("rows", [1, 2, 9, 1000])
def test_logits_of_a_segmenter(kind, rows: int, make, randomize) -> None:
    model = segmenter(kind, 8, make, randomize)
    x = prepared(image_of((97, 141)))
    with torch.no_grad():
        expected = model.forward_low(x)
        low = low_rows(
            folded_copy(model), [Whole(level) for level in model.backbone(x)], partial(pooled_evenly, band=3)
        )
        reader = low.reader()
        found = torch.cat([reader.rows(t, min(low.height, t + rows)) for t in range(0, low.height, rows)], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_on_disk_as_in_memory(make, randomize, tmp_path) -> None:
    image = image_of((61, 133))
    model = make()
    for name, model_, call in [
        ("classify", model, lambda giant: giant.classify(image)),
        ("features", model, lambda giant: giant.features(image)),
        ("block", model, lambda giant: giant.features(image, block=1)),
        ("attend", model, lambda giant: giant.attend(image)),
        ("pyramid", XCiTPyramid(make()).double(), lambda giant: giant.pyramid(image)),
        ("segment", segmenter(UperNet, 8, make, randomize), lambda giant: giant.segment(image, scores=True)),
    ]:
        in_memory = call(GiantImages(model_, band=3, **SCALING))
        work = tmp_path / name
        on_disk = call(on_the_disk(model_, work=work))
        for a, b in zip(_flat(in_memory), _flat(on_disk), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not list(work.iterdir())


def _flat(found: Any) -> list[np.ndarray]:
    return [found] if isinstance(found, np.ndarray) else [each for each in found if each is not None]


def on_the_disk(model: nn.Module, **options: Any) -> GiantImages:
    giant = GiantImages(model, band=3, memory=1, **SCALING, **options)
    return giant


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_other_bands(channels: int, make) -> None:
    model, image = make(in_chans=channels), image_of((40, 40), channels)
    with pytest.raises(ConfigError, match=rf"mean and deviation the image's {channels} bands"):
        GiantImages(model)
    giant = GiantImages(model, mean=[0.5] * channels, std=[0.25] * channels)
    x = torch.from_numpy(image).double().permute(2, 0, 1).unsqueeze(0) / 255
    with torch.no_grad():
        assert difference(giant.classify(image).logits, model((x - 0.5) / 0.25)[0]) < 1e-11
    with pytest.raises(ConfigError, match=f"has 5 bands and the model takes {channels}"):
        giant.classify(image_of((40, 40), 5))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "float32", "float64", "bool", "int64"])
def test_every_type_of_pixels(dtype: str, make) -> None:
    model = make()
    values = np.random.default_rng(0).random((40, 40, 3))
    scale = {"uint16": 65535, "uint32": 2**32 - 1, "int16": 100, "int64": 100}.get(dtype, 1)
    image = (values * scale).round().astype(dtype) if dtype[0] in "iub" else values.astype(dtype)
    white = scale if dtype[0] == "u" else 1
    x = torch.from_numpy(image.astype(np.float64) / white)
    x = (
        ((x - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(STD, dtype=torch.float64))
        .permute(2, 0, 1)
        .unsqueeze(0)
    )
    with torch.no_grad():
        assert difference(GiantImages(model, **SCALING).classify(image).logits, model(x)[0]) < 1e-11


def test_what_is_no_measurement_counts_as_the_mean(make, caplog) -> None:
    model = make()
    image = np.random.default_rng(0).random((40, 40, 3))
    filled = image.copy()
    image[3:20, 5:9], filled[3:20, 5:9] = np.nan, MEAN
    giant = GiantImages(model, **SCALING)
    assert difference(giant.classify(image).logits, giant.classify(filled).logits) < 1e-12
    assert caplog.text.count("no measurements") == 1


def test_a_model_that_was_passed_stays_as_it_was(make) -> None:
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    GiantImages(model, **SCALING).classify(image_of((40, 40)))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_progress_goes_from_nothing_to_all(make) -> None:
    told: list[tuple[str, float]] = []
    giant = GiantImages(make(), band=2, progress=lambda what, share: told.append((what, share)), **SCALING)
    giant.features(image_of((61, 133)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert {what for what, _ in told} >= {"embedding", "layer 1 of 4", "layer 4 of 4", "reading out"}


def test_what_a_model_cannot_give(make) -> None:
    classifier, pyramid = GiantImages(make(), **SCALING), GiantImages(XCiTPyramid(make()), **SCALING)
    averaging = GiantImages(make(global_pool="avg"), **SCALING)
    image = image_of((40, 40))
    for call, message in [
        (lambda: pyramid.classify(image), "nothing to classify"),
        (lambda: pyramid.attend(image), "nothing to attend"),
        (lambda: pyramid.features(image), "name a block"),
        (lambda: classifier.pyramid(image), "no pyramid"),
        (lambda: classifier.segment(image), "no segmenter"),
        (lambda: classifier.features(image, block=4), "the blocks 0 to 3"),
        (lambda: classifier.attend(image, layer=2), "has 2 layers"),
        (lambda: averaging.attend(image), "has 0 layers"),
        (lambda: pyramid.pyramid(image_of((24, 60))), "needs 4 x 4"),
        (lambda: GiantImages(nn.Linear(2, 2)), "Expected an XCiT"),
        (lambda: GiantImages(make(), mean=MEAN, std=(1, 0, 1)), "above 0"),
        (lambda: GiantImages(make(), band=0, **SCALING), "one row"),
        (lambda: GiantImages(make(), memory="much", **SCALING), "4GiB"),
        (lambda: classifier.classify(image, level=1), "open already"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ShapeError, match="less than one patch"):
        classifier.classify(image_of((7, 40)))


@pytest.mark.parametrize("place", ["stem", "layer", "head"])
def test_values_that_are_not_finite(place: str, make, tmp_path) -> None:
    model = make()
    with torch.no_grad():
        if place == "stem":
            model.patch_embed.proj[0][0].weight.fill_(float("nan"))
        elif place == "layer":
            model.blocks[2].mlp.fc2.bias[0] = float("inf")
        else:
            model.head.bias[0] = float("nan")
    giant = GiantImages(model, **SCALING)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        giant.classify(image_of((40, 40)))
    if place != "head":
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            giant.features(image_of((40, 40)), tmp_path / "a.npy", block=3)
        assert not list(tmp_path.iterdir())
