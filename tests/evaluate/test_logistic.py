"""Logistic regression: an independent minimum, a choice that the test part has no say in, and pixels beside it."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.image_set import DataSplits, ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.evaluate import logistic
from xcit.evaluate.embedding import SetFeatures
from xcit.evaluate.logistic import logistic_probe
from xcit.evaluate.pixels import PrincipalComponents, pixel_preprocessing, pixel_set
from xcit.evaluate.probes import embed_parts, knn_rows, learning_set, logistic_rows, probe_sets, untrained
from xcit.models.xcit import XCiT


def part(count, num_classes=3, dim=6, seed=0, noise=1.0):
    rng = np.random.default_rng([seed, count])
    centres = np.random.default_rng(5).normal(size=(num_classes, dim))
    labels = rng.integers(0, num_classes, count)
    features = centres[labels] + noise * rng.normal(size=(count, dim))
    return (features * np.geomspace(0.01, 100, dim) + 7).astype(np.float32), labels


def minimised(train, test, C, num_classes):
    """Newton-like minimisation of the penalised loss in float64 by torch; return the classes predicted."""
    x, y = torch.from_numpy(train[0]).double(), torch.from_numpy(train[1])
    mean, std = x.mean(0), x.std(0, correction=0)
    x = (x - mean) / std
    W = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([W, b], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ W.T + b, y, reduction="sum") + (W**2).sum() / (2 * C)
        loss.backward()
        return loss

    optimiser.step(closure)
    z = (torch.from_numpy(test[0]).double() - mean) / std
    return (z @ W.T + b).detach().argmax(1).numpy()


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_the_fit_is_the_penalised_minimum_on_standardised_features(C):
    train, test = part(150), part(90)
    result = logistic_probe(train, part(60), test, num_classes=3, strengths=(C,))
    assert result.accuracy.num_correct == (minimised(train, test, C, 3) == test[1]).sum()
    assert result.strength == C
    assert result.converged
    assert 0.5 < result.accuracy.top1 < 1


def test_the_scale_of_a_dimension_does_not_matter():
    train, val, test = part(150), part(60), part(90)
    scaled = [(features * np.float32([1, 1e3, 1e-3, 1, 5, 1]), labels) for features, labels in (train, val, test)]
    first, second = (logistic_probe(*parts, num_classes=3) for parts in ((train, val, test), scaled))
    assert first.val_by_strength == second.val_by_strength
    assert first.accuracy == second.accuracy


def test_validation_chooses_and_the_test_part_does_not():
    train, val, test = part(60, noise=2), part(80, noise=2), part(70, noise=2)
    result = logistic_probe(train, val, test, num_classes=3)
    alone = {
        C: logistic_probe(train, val, val, num_classes=3, strengths=(C,)).accuracy.top1 for C in logistic.STRENGTHS
    }
    assert result.val_by_strength == alone
    best = max(alone.values())
    assert result.strength == min(C for C, accuracy in alone.items() if accuracy == best)
    wrong = (test[0], (test[1] + 1) % 3)
    assert logistic_probe(train, val, wrong, num_classes=3).strength == result.strength
    assert len(set(alone.values())) > 1


def test_classes_without_training_images_are_never_predicted():
    train, test = part(80, num_classes=7), part(70, num_classes=7)
    kept = train[1] != 2
    result = logistic_probe((train[0][kept], train[1][kept]), test, test, num_classes=7, strengths=(1.0,))
    absent = int((test[1] == 2).sum())
    assert absent > 3
    assert result.accuracy.num_top5_correct <= 70 - absent
    only = test[0][test[1] == 2], test[1][test[1] == 2]
    accuracy = logistic_probe((train[0][kept], train[1][kept]), test, only, num_classes=7).accuracy
    assert (accuracy.num_correct, accuracy.num_top5_correct) == (0, 0)


def test_a_dimension_without_variance_is_harmless():
    train, val, test = ((np.c_[x, np.full(len(x), 3.0, np.float32)], y) for x, y in (part(100), part(50), part(40)))
    assert np.isfinite(logistic_probe(train, val, test, num_classes=3).accuracy.top1)


def test_a_fit_that_was_stopped_says_so(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not logistic_probe(part(100), part(50), part(40), num_classes=3).converged


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strengths": ()}, ConfigError, "there must be one or more"),
        ({"strengths": (1, -1)}, ConfigError, "each more than 0"),
        ({"train": (np.zeros((9, 6)), np.zeros(9, int))}, DataError, "All training images are of one class"),
        ({"val": (np.zeros((0, 6)), np.zeros(0, int))}, DataError, "no validation images"),
        (
            {"test": (np.full((3, 6), np.nan), np.zeros(3, int))},
            DataError,
            "features of the test images are not finite",
        ),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        logistic_probe(**{"train": part(50), "val": part(20), "test": part(20), **change}, num_classes=3)


# --- who learns from what, and what stands beside it ------------------------------------------------------------------


class Pictures:
    """A shade and a hue a class; number 7 is broken."""

    def __call__(self, number):
        if number == 7:
            raise DataError("picture 7: is broken.")
        rng = np.random.default_rng(number)
        pixels = 60 + np.array([(120, 0, 0), (0, 120, 0)])[number % 2] + rng.integers(-60, 60, (12, 12, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pictures(start, count):
    numbers = np.arange(start, start + count)
    return ImageSet(("r", "g"), [f"{n}.png" for n in numbers], numbers % 2, Pictures(), numbers)


PREPARED = Preprocessing((8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)


def embed(images):
    return pixel_set(images, PREPARED, num_workers=0)


def test_the_parts_with_and_without_a_test_part():
    train, val, test = pictures(0, 40), pictures(40, 10), pictures(50, 12)
    sets = probe_sets(DataSplits(train, val, test))
    assert (sets.bank, sets.choose, sets.judge, sets.judged_part) == (train, val, test, "test")
    features = embed_parts(embed, sets)
    assert features.learn is features.bank
    assert [len(f.labels) for f in features] == [40, 40, 10, 12]
    assert learning_set(sets) is train

    sets = probe_sets(DataSplits(train, val, None))
    assert (sets.bank, sets.choose, sets.judge, sets.judged_part) == (train, None, val, "val")
    features = embed_parts(embed, sets)
    assert [len(f.labels) for f in features] == [40, 36, 4, 10]
    learnt = learning_set(sets)
    assert len(learnt) == 36
    np.testing.assert_array_equal(embed(learnt).features, features.learn.features)
    chosen = {row.tobytes() for row in features.choose.features}
    assert not chosen & {row.tobytes() for row in features.learn.features}

    for parts in (DataSplits(train, val, test), DataSplits(train, val, None), DataSplits(pictures(0, 2), val, None)):
        features = embed_parts(embed, probe_sets(parts), choosing=False)
        assert [len(f.labels) for f in features] == [len(parts.train)] * 2 + [0, len(parts.test or val)]


def test_rows_of_the_table():
    features = embed_parts(embed, probe_sets(DataSplits(pictures(0, 40), pictures(40, 10), pictures(50, 12))))
    rows = [*knn_rows("pixels", features, 2, (3, 5), 0.07), *logistic_rows("pixels", features, 2)]
    assert [(r.features, r.probe, r.setting.split(" ")[0]) for r in rows] == [
        ("pixels", "k-NN", "k"), ("pixels", "k-NN", "k"), ("pixels", "logistic", "C"),
    ]  # fmt: skip
    assert [r.accuracy.top1 for r in rows] == [1, 1, 1]
    assert [r.accuracy.num_images for r in rows] == [12] * 3


def test_pixels_are_the_prepared_images_on_a_scale_of_1():
    images = pictures(0, 12)
    pixels = embed(images)
    plain = Preprocessing((8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    for n in range(12):
        want = np.zeros(192) if n == 7 else plain(images.open(n)).flatten().numpy()
        np.testing.assert_array_equal(pixels.features[n], want)
    assert 0 <= pixels.features.min() < pixels.features.max() <= 1
    assert [tuple(s) for s in pixels.skipped] == [("7.png", "picture 7: is broken.")]
    assert pixel_preprocessing(PREPARED).image_size == (8, 8)
    assert pixel_preprocessing(Preprocessing((224, 448))).image_size == (32, 64)
    many = ImageSet(("a",), range(10**7), np.zeros(10**7, int), Pictures(), np.zeros(10**7, int))
    with pytest.raises(ConfigError, match="would take 114 GiB of memory"):
        pixel_set(many, Preprocessing((32, 32)))


def test_components_are_those_of_a_singular_value_decomposition():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 9)) @ rng.normal(size=(9, 9)) + 4
    decoded = np.arange(30) != 5
    fitted = SetFeatures(rows.astype(np.float32), np.zeros(30, int), decoded)
    project = PrincipalComponents(fitted, 4)
    kept = fitted.features[decoded].astype(np.float64)
    _, _, V = np.linalg.svd(kept - kept.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((project.directions * V[:4].T).sum(0)), 1, atol=1e-6)
    want = np.abs((fitted.features - kept.mean(0)) @ V[:4].T)
    np.testing.assert_allclose(np.abs(project(fitted).features), want, rtol=1e-4, atol=1e-4)
    assert PrincipalComponents(fitted, 100).directions.shape == (9, 9)


def test_an_untrained_model_is_of_the_seed_alone():
    model = XCiT(embed_dim=16, depth=1, num_heads=2, num_classes=5, patch_size=8, tokens_norm=False)
    model.pretrained_cfg = {"input_size": [3, 8, 8]}
    first = untrained(model, seed=1)
    torch.randn(3)
    second, third = untrained(model, seed=1), untrained(model, seed=2)
    assert torch.equal(first.blocks[0].attn.qkv.weight, second.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, third.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert (first.num_classes, first.config["tokens_norm"], first.training) == (0, False, False)
    assert first.pretrained_cfg == model.pretrained_cfg
