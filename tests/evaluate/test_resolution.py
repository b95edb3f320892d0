"""The sweep over test resolutions."""

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError
from xcit.evaluate.resolution import parse_sizes, sweep_resolution
from xcit.evaluate.run import evaluate_classifier
from xcit.inference.costs import count_costs
from xcit.models.xcit import XCiT


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("160,224,288", (160, 224, 288)), (" 384 , 160", (160, 384)), ("8,16", (8, 16))],
)
def test_sizes(text, sizes):
    assert parse_sizes(text, 8) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no number"),
        ("160,,224", "'' is no number"),
        ("160;224", "'160;224' is no number"),
        ("160,2e2", "'2e2' is no number"),
        ("-160,224", "'-160' is no number"),
        ("160,²", "'²' is no number"),
        ("160,123456", "'123456' is no number"),
        ("7,160", "has 7; an image must be at least one patch of 8"),
        ("0,160", "has 0; an image"),
        ("160,224,160", "has 160 twice"),
        ("224", "take --image-size 224"),
    ],
)
def test_junk_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_sizes(text, 8)


def read(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_each_point_is_an_evaluation_at_its_size(randomize):
    model = randomize(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=6, patch_size=8))
    images = ImageSet(tuple("abcdef"), [str(i) for i in range(9)], np.arange(9) % 6, read, np.arange(9))
    preprocessing = Preprocessing((32, 32), crop_pct=0.875)
    seen = []
    options = {"device": torch.device("cpu"), "num_workers": 0, "batch_size": 5}
    points = list(
        sweep_resolution(
            model, images, preprocessing, (16, 24, 40), on_progress=lambda *progress: seen.append(progress), **options
        )
    )
    assert [p.image_size for p in points] == [16, 24, 40]
    assert seen == [(16, 5), (16, 9), (24, 5), (24, 9), (40, 5), (40, 9)]
    for point in points:
        size = (point.image_size, point.image_size)
        alone = evaluate_classifier(model, images, Preprocessing(size, crop_pct=0.875), **options)
        assert alone.predicted == point.evaluation.predicted
        assert alone.metrics == point.evaluation.metrics
        assert point.costs == count_costs(model.config, size, "tokens")
    assert len({p.evaluation.metrics.loss for p in points}) == 3  # each size was really another one
