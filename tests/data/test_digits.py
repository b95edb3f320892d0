"""The digits and their three parts, against scikit-learn's own arrays and torchvision's own transforms."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms import InterpolationMode, v2

from xcit.data.digits import digit_preprocessing, digit_splits
from xcit.errors import ConfigError


@pytest.fixture(scope="module")
def splits():
    return digit_splits()


@pytest.fixture(scope="module")
def preprocessing(splits):
    return digit_preprocessing(splits.train, 32)


def test_parts_are_disjoint_and_together_all(splits):
    indices = np.concatenate([part.indices for part in splits])
    assert sorted(indices) == list(range(1797))
    assert [len(part) for part in splits] == [1149, 288, 360]


def test_parts_hold_the_digits_they_say(splits):
    data = load_digits()
    for part in splits:
        assert part.images.dtype == np.uint8
        assert np.array_equal(part.labels, data.target[part.indices])
        assert np.abs(part.images / 255 - data.images[part.indices] / 16).max() <= 0.5 / 255 + 1e-12


def test_parts_are_stratified(splits):
    whole = np.bincount(load_digits().target) / 1797
    for part in splits:
        share = np.bincount(part.labels, minlength=10)
        assert np.abs(share - whole * len(part)).max() <= 1


@pytest.mark.parametrize("val_fraction", [0.1, 0.2, 0.5])
def test_the_held_out_part_never_changes(val_fraction):
    """Pinned: were it to change, choices made on the other parts would have been made on some of its digits."""
    torch.manual_seed(np.random.default_rng().integers(1 << 30))
    test = digit_splits(val_fraction).test
    digest = hashlib.sha256(test.indices.astype("<i8").tobytes()).hexdigest()
    assert digest == "2fbaae31b8c6aad12464a07771b64269876d904bfed86f77a63c8265fa201621"


def test_validation_share_out_of_range():
    with pytest.raises(ConfigError, match=r"val_fraction is 0.9; it must be between 0.05 and 0.5"):
        digit_splits(0.9)


def test_images_are_torchvisions(splits, preprocessing):
    reference = v2.Compose(
        [
            v2.Resize(32, InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    for i in range(0, len(splits.val), 50):
        image = preprocessing(splits.val.picture(i))
        assert image.shape == (1, 32, 32)
        torch.testing.assert_close(image, reference(splits.val.picture(i)))


def test_training_images_are_normalised(splits, preprocessing):
    images = torch.stack([preprocessing(splits.train.picture(i)) for i in range(len(splits.train))])
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_ink_is_white(splits, preprocessing):
    """A zero's centre is paper, its left rim ink; and paper is darker."""
    zeros = splits.train.subset(np.flatnonzero(splits.train.labels == 0))
    mean = torch.stack([preprocessing(zeros.picture(i)) for i in range(len(zeros))]).mean(dim=0)
    assert mean[0, 16, 16] < 0 < mean[0, 16, 8:12].max()
