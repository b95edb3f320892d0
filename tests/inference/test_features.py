"""Features against the model called by hand, in float64; and what two extractors must share to give the same."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.preprocess import Preprocessing
from xcit.errors import CheckpointError, ConfigError, DataError
from xcit.inference.features import MULTI_SCALE, POOLS, FeatureExtractor
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

CFG = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}


@pytest.fixture
def model(randomize):
    model = randomize(XCiT(embed_dim=32, depth=2, num_heads=4, num_classes=7, patch_size=8))
    model.pretrained_cfg = dict(CFG)
    return model


@pytest.fixture
def photos(tmp_path):
    """Six files; number 3 is no image."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        if i == 3:
            (folder / f"{i}.png").write_bytes(b"nothing of the kind")
        else:
            Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def by_hand(model, batch, pool, p=4.0):
    """The definition, patch by patch, in float64."""
    with torch.no_grad():
        tokens = copy.deepcopy(model).double().eval().forward_features(batch.double()).numpy()
    rows = []
    for image in tokens:
        token, patches = image[0], image[1:]
        mean = sum(patches) / len(patches)
        gem = np.array(
            [(math.fsum(max(v, 1e-6) ** p for v in channel) / len(channel)) ** (1 / p) for channel in patches.T]
        )
        rows.append({"token": token, "avg": mean, "both": np.concatenate([token, mean]), "gem": gem}[pool])
    return np.stack(rows)


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_is_its_definition(model, photos, pool):
    files = [photos / "0.png", photos / "1.png", photos / "2.png"]
    extract = FeatureExtractor(model, pool=pool, batch_size=2)
    vectors = extract(files)
    prepared = torch.stack([Preprocessing.from_cfg(CFG)(Image.open(file)) for file in files])
    want = by_hand(model, prepared, pool)
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, extract.dim) == (3, 64 if pool == "both" else 32)
    np.testing.assert_allclose(vectors, want, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(extract.tensors(prepared[:2]).numpy(), vectors[:2])


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_gem_takes_its_exponent(model, p):
    batch = torch.randn(2, 3, 32, 40)
    got = FeatureExtractor(model, pool="gem", gem_p=p).tensors(batch)
    np.testing.assert_allclose(got.numpy(), by_hand(model, batch, "gem", p), rtol=1e-4, atol=2e-5)


def test_scales_are_bilinear_and_averaged(model):
    batch = torch.randn(2, 3, 64, 48)
    got = FeatureExtractor(model, image_size=(64, 48), scales=MULTI_SCALE).tensors(batch)
    want = 0
    for scale in (1, 1 / math.sqrt(2), 1 / 2):
        size = [int(side * scale) for side in (64, 48)]
        scaled = torch.nn.functional.interpolate(batch, scale_factor=scale, mode="bilinear", align_corners=False)
        assert list(scaled.shape[2:]) == size
        want = want + by_hand(model, scaled, "token") / 3
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=2e-5)


def test_a_classifiers_head_changes_nothing(model):
    image = Image.new("RGB", (40, 40), (200, 50, 90))
    first = FeatureExtractor(model)
    vector, fingerprint = first(image), first.fingerprint
    model.reset_classifier(0)
    second = FeatureExtractor(model)
    np.testing.assert_array_equal(second(image), vector)
    assert second.fingerprint == fingerprint


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_folder_in_order_with_its_broken_file(model, photos, batch_size):
    extract = FeatureExtractor(model, batch_size=batch_size)
    features = list(extract.stream(photos))
    assert [f.path for f in features] == [photos / f"{i}.png" for i in range(6)]
    assert [f.name for f in features] == [str(photos / f"{i}.png") for i in range(6)]
    for i, each in enumerate(features):
        if i == 3:
            assert each.vector is None
            assert each.error.startswith(f"{photos / '3.png'}: is not an image")
        else:
            assert each.error is None
            assert each.vector.shape == (32,)
            assert each.vector.base is None  # not a view that keeps its batch
            np.testing.assert_allclose(each.vector, extract(photos / f"{i}.png")[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"3\.png: is not an image"):
        extract(photos)
    assert extract([]).shape == (0, 32)


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = model.blocks[1].local_mp.bn.running_mean.clone()
    extract = FeatureExtractor(model)
    extract(Image.new("RGB", (9, 9)))
    row = extract.tensors(torch.randn(1, 3, 32, 32))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(model.blocks[1].local_mp.bn.running_mean, statistics)
    assert not row.requires_grad


def test_weights_that_are_not_finite(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(first: blocks\.1\.mlp\.fc1\.weight\)"):
        FeatureExtractor(model)(Image.new("RGB", (9, 9)))


def test_features_that_overflow_cost_only_their_image(model, monkeypatch):
    forward = model.forward_features

    def overflowing(x):
        tokens = forward(x).clone()
        tokens[x.mean(dim=(1, 2, 3)) > 1] = float("inf")
        return tokens

    monkeypatch.setattr(model, "forward_features", overflowing)
    dark, bright = FeatureExtractor(model).stream([Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "white")])
    assert dark.error is None
    assert bright.vector is None
    assert bright.error.startswith("image 1: the model's features are NaN or infinite")


# --- fingerprints and settings ----------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_all_that_features_depend_on(model, tmp_path):
    own = FeatureExtractor(model).fingerprint
    save_checkpoint(model, tmp_path / "m.safetensors")
    loaded = FeatureExtractor(tmp_path / "m.safetensors", device="cpu", batch_size=3)
    assert loaded.fingerprint == own
    others = {
        FeatureExtractor(model, pool="avg").fingerprint,
        FeatureExtractor(model, pool="gem").fingerprint,
        FeatureExtractor(model, pool="gem", gem_p=3).fingerprint,
        FeatureExtractor(model, scales=(1, 0.5)).fingerprint,
        FeatureExtractor(model, image_size=40).fingerprint,
        FeatureExtractor(model, preprocessing=Preprocessing((32, 32))).fingerprint,
        FeatureExtractor(copy.deepcopy(model).double()).fingerprint,
        own,
    }
    assert len(others) == 8
    assert FeatureExtractor(model, gem_p=3).fingerprint == own  # which is of no use without GeM
    extract = FeatureExtractor(model)
    with torch.no_grad():
        model.norm.bias[0] += 1e-3
    assert extract.fingerprint != own


def test_settings_are_plain_and_name_the_model(model, tmp_path):
    save_checkpoint(model, tmp_path / "m.safetensors")
    settings = FeatureExtractor(tmp_path / "m.safetensors", device="cpu", pool="gem", scales=(1, 0.5)).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["model"] == str(tmp_path / "m.safetensors")
    assert (settings["pool"], settings["scales"], settings["gem_p"], settings["dim"]) == ("gem", [1.0, 0.5], 4.0, 32)
    assert settings["preprocessing"]["input_size"] == [3, 32, 32]
    nano = XCiT(patch_size=16, embed_dim=128, depth=12, num_heads=4, tokens_norm=False, num_classes=0)
    assert FeatureExtractor(nano, preprocessing=Preprocessing((32, 32))).settings["architecture"] == "xcit_nano_12_p16"
    assert FeatureExtractor(model).settings["architecture"] == "custom"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "max"}, "pool is 'max'; it must be one of token, avg, both, gem"),
        ({"scales": ()}, "scales are ()"),
        ({"scales": (1, -1)}, "each more than 0"),
        ({"scales": (0.1,)}, "At scale 0.1 an image of 32 px is smaller than one patch of 8; use a scale of 0.25"),
        ({"gem_p": 0}, "gem_p is 0.0"),
        ({"gem_p": float("nan")}, "gem_p is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_size": 4}, "at least one patch of 8 x 8"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ConfigError) as error:
        FeatureExtractor(model, **arguments)
    assert message in str(error.value)


def test_a_model_without_class_token():
    model = XCiT(embed_dim=32, depth=1, num_heads=4, patch_size=8, variant="avg_pool")
    model.pretrained_cfg = dict(CFG)
    assert FeatureExtractor(model, pool="avg")(Image.new("RGB", (9, 9))).shape == (1, 32)
    for pool in ("token", "both"):
        with pytest.raises(ConfigError, match="has no class token"):
            FeatureExtractor(model, pool=pool)


def test_weights_of_an_unnamed_architecture_are_advised_upon(tmp_path):
    model = XCiT(patch_size=16, embed_dim=128, depth=12, num_heads=4, tokens_norm=False, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=r"create_model\('xcit_nano_12_p16', pretrained=.*dino\.pth"):
        FeatureExtractor(tmp_path / "dino.pth", device="cpu")
