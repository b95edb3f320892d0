"""A folded classifier where a classifier is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import xcit
from xcit.deploy.fold import fold
from xcit.errors import ConfigError
from xcit.models.xcit import XCiT

CFG = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}


@pytest.fixture
def model(randomize) -> XCiT:
    model = randomize(XCiT(patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=4)).eval()
    model.pretrained_cfg = {**CFG, "interpolation": "bicubic"}
    return model


def test_a_predictor_takes_it(model: XCiT) -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(7)]
    expected = xcit.Predictor(model)(images, top_k=5)
    for folded in (fold(model).model, torch.compile(fold(model).model, backend="eager")):
        found = xcit.Predictor(folded, batch_size=3)(images, top_k=5)
        assert [p.error for p in found] == [None] * 7
        assert [[label.index for label in p.labels] for p in found] == [
            [label.index for label in p.labels] for p in expected
        ]
        assert found[0].labels[0].probability == pytest.approx(expected[0].labels[0].probability, rel=1e-5)


def test_what_needs_the_weights_refuses_it(model: XCiT, tmp_path: Path) -> None:
    folded = fold(model).model
    with pytest.raises(ConfigError, match="FoldedXCiT"):
        xcit.save_checkpoint(folded, tmp_path / "folded.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="FoldedXCiT"):
        xcit.FeatureExtractor(folded)
