"""A small XCiT whose every value counts, for the tests of what happens to weights."""

import pytest
import torch

from xcit.models.xcit import XCiT

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


@pytest.fixture
def small(randomize):
    """Build a small model in eval mode; options replace those of SMALL."""

    def build(seed=0, **options):
        return randomize(XCiT(**SMALL | options), seed).eval()

    return build


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
