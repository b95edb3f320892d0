"""Training transforms against timm's own, and the mixing of a batch."""

import pickle
import random

import numpy as np
import pytest
import timm.data.auto_augment
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.recipes.augment import batch_mixer, train_transform
from xcit.recipes.config import AugmentConfig

PAPER = AugmentConfig()
STILL = AugmentConfig(crop="none", hflip=0, rand_augment="", color_jitter=0, erase=0, mixup=0, cutmix=0, repeats=1)
RGB = Preprocessing((64, 64))
GREY = Preprocessing((32, 32), mean=(0.3,), std=(0.4,), in_chans=1)


def changed(base, **settings):
    from dataclasses import replace

    return replace(base, **settings)


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def seeded(transform, image, value):
    seed(value)
    return transform(image)


@pytest.fixture(scope="module")
def photo():
    """A picture with structure at all scales, so that no operation leaves it as it is."""
    y, x = np.mgrid[:120, :160]
    noise = np.random.default_rng(0).integers(0, 60, (120, 160, 3))
    waves = np.stack([80 + 70 * np.sin(x / 9), 90 + 80 * np.cos(y / 7), (x + y) * 0.7], axis=2)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def forgiving_timm(monkeypatch):
    """timm with the one operation mended that current Pillow refuses at its full magnitude."""
    posterize = timm.data.auto_augment.posterize
    mended = {
        name: lambda img, bits, **_: posterize(img, bits) if bits else Image.new(img.mode, img.size)
        for name, op in timm.data.auto_augment.NAME_TO_OP.items()
        if op is posterize
    }
    monkeypatch.setattr(timm.data.auto_augment, "NAME_TO_OP", timm.data.auto_augment.NAME_TO_OP | mended)


# --- against timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rand_augment", ["rand-m9-mstd0.5-inc1", ""], ids=["RandAugment", "colour jitter"])
def test_the_papers_transform_is_timms(photo, rand_augment, forgiving_timm):
    """Bit for bit, with the same states of the three generators."""
    theirs = create_transform(
        64,
        is_training=True,
        color_jitter=0.4,
        auto_augment=rand_augment or None,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    ours = train_transform(changed(PAPER, rand_augment=rand_augment), RGB)
    results = [seeded(ours, photo, s) for s in range(150)]
    assert all(torch.equal(result, seeded(theirs, photo, s)) for s, result in enumerate(results))
    assert len({result.sum().item() for result in results}) == 150


def test_vertical_flips_and_smallest_parts_are_timms(photo):
    theirs = create_transform(
        64,
        is_training=True,
        scale=(0.5, 1.0),
        hflip=0.0,
        vflip=0.5,
        color_jitter=None,
        auto_augment=None,
        interpolation="bicubic",
    )
    ours = train_transform(changed(STILL, crop="resized", min_area=0.5, vflip=0.5), RGB)
    assert all(torch.equal(seeded(ours, photo, s), seeded(theirs, photo, s)) for s in range(30))


# --- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocessing", [RGB, Preprocessing((48, 80), crop_pct=0.875), GREY], ids=["RGB", "crop", "L"]
)
def test_without_distortion_it_is_the_evaluations_image(photo, preprocessing):
    image = photo.convert("L") if preprocessing.in_chans == 1 else photo
    assert torch.equal(train_transform(STILL, preprocessing)(image), preprocessing(image))


def test_padding_shifts_by_up_to_four_pixels(photo):
    image = photo.resize((32, 32))
    preprocessing = Preprocessing((32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    transform = train_transform(changed(STILL, crop="pad"), preprocessing)
    bordered = torch.nn.functional.pad(preprocessing(image), (4, 4, 4, 4))
    places = set()
    for s in range(400):
        result = seeded(transform, image, s)
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(result, bordered[:, top : top + 32, left : left + 32])
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 70  # of 81


def test_an_affine_map_moves_a_picture_and_leaves_black(photo):
    preprocessing = Preprocessing((32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    white = Image.new("RGB", (32, 32), "white")
    for settings in ({"degrees": 40.0}, {"translate": 0.4}, {"scale": 0.5}, {"shear": 30.0}):
        transform = train_transform(changed(STILL, **settings), preprocessing)
        results = torch.stack([seeded(transform, white, s) for s in range(20)])
        assert results.min() == 0, settings  # what it uncovered
        assert results.max() == 1, settings
        assert len({result.sum().item() for result in results}) > 5, settings
    still = train_transform(changed(STILL, translate=0.0), preprocessing)
    assert torch.equal(still(white), torch.ones(3, 32, 32))


def test_erasing_paints_noise_of_unit_spread(photo):
    transform = train_transform(changed(STILL, erase=1.0), RGB)
    plain = RGB(photo)
    painted = [(result - plain).ne(0).any(0) for result in (seeded(transform, photo, s) for s in range(40))]
    shares = torch.stack(painted).float().mean((1, 2))
    assert shares.min() > 0.01
    assert shares.max() < 0.4
    noise = torch.cat([seeded(transform, photo, s)[:, mask].flatten() for s, mask in enumerate(painted)])
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("set_of_operations", ["", "-tweights", "-t3a"])
def test_rand_augment_works_on_grey_pictures(photo, set_of_operations):
    transform = train_transform(changed(STILL, rand_augment=f"rand-m9-n4-p1-mstd0.5-inc1{set_of_operations}"), GREY)
    grey = photo.convert("L")
    results = {seeded(transform, grey, s).sum().item() for s in range(120)}
    assert len(results) > 60


def test_the_full_magnitude_of_every_operation_works(photo):
    """timm's Posterize keeps no bit there: a black picture, which current Pillow refuses to make that way."""
    transform = train_transform(changed(STILL, rand_augment="rand-m10-n1-p1-inc1"), RGB)
    black = ((0 - torch.tensor(RGB.mean)) / torch.tensor(RGB.std)).view(3, 1, 1).expand(3, 64, 64)
    results = [seeded(transform, photo, s) for s in range(200)]
    assert any(torch.allclose(result, black) for result in results)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 50), (3000, 3)])
def test_pictures_of_few_pixels(size):
    transform = train_transform(PAPER, RGB)
    for s in range(30):
        assert seeded(transform, Image.new("RGB", size, (200, 10, 10)), s).shape == (3, 64, 64)
    inside = train_transform(changed(STILL, crop="resized"), RGB)
    red = RGB(Image.new("RGB", (9, 9), (200, 10, 10)))
    assert all(torch.equal(seeded(inside, Image.new("RGB", size, (200, 10, 10)), s), red) for s in range(30))


def test_all_draws_follow_the_three_generators(photo):
    transform = train_transform(changed(PAPER, degrees=10.0, vflip=0.5), RGB)
    assert all(torch.equal(seeded(transform, photo, s), seeded(transform, photo, s)) for s in range(20))


def test_a_worker_gets_the_same_transform(photo):
    for settings in (PAPER, changed(PAPER, rand_augment="rand-m10-n4-inc1", degrees=5.0), changed(STILL, crop="pad")):
        transform = train_transform(settings, RGB)
        copy = pickle.loads(pickle.dumps(transform))
        assert all(torch.equal(seeded(transform, photo, s), seeded(copy, photo, s)) for s in range(10))
    assert repr(train_transform(PAPER, RGB)) == (
        "TrainTransform(RandomPart -> RandomHorizontalFlip -> RandAugment -> RandomErasing)"
    )


def test_a_picture_of_another_mode_is_refused(photo):
    with pytest.raises(DataError, match="mode is L, not RGB"):
        train_transform(PAPER, RGB)(photo.convert("L"))
    with pytest.raises(DataError, match="mode is RGB, not L"):
        train_transform(PAPER, GREY)(photo)


@pytest.mark.parametrize(
    "notation", ["rand-m9-noise1", "rand-x9", "m9", "rand-", "augmix-m5", "rand-m9-tall", "rand-n0"]
)
def test_a_slip_in_the_notation_is_refused(notation):
    """timm itself passes over words that it does not know."""
    with pytest.raises(ConfigError, match="must be timm's notation, such as rand-m9"):
        train_transform(changed(PAPER, rand_augment=notation), RGB)


@pytest.mark.parametrize(
    "notation", ["rand", "rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand-mstd101-tweights", "rand-p0.3-mmax20-t3aw"]
)
def test_timms_examples_of_the_notation_are_taken(notation, photo):
    assert train_transform(changed(PAPER, rand_augment=notation), RGB)(photo).shape == (3, 64, 64)


# --- batches ---------------------------------------------------------------------------------------------------------


def batch(size=8, classes=5):
    g = torch.Generator().manual_seed(0)
    return torch.rand(size, 3, 16, 16, generator=g), torch.randint(classes, (size,), generator=g)


def test_mixing_is_timms():
    theirs = Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=0.1,
        num_classes=5,
    )
    ours = batch_mixer(PAPER, 5, 0.1)
    kinds = set()
    for s in range(20):
        (images, labels), (others, _) = batch(), batch()
        seed(s)
        mixed, targets = ours(images, labels)
        seed(s)
        expected, expected_targets = theirs(others, labels)
        assert torch.equal(mixed, expected)
        assert torch.equal(targets, expected_targets)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        kinds.add(bool((mixed == batch()[0]).any()))  # pasting leaves some pixels as they are
    assert kinds == {True, False}


def test_a_share_of_the_batches_is_mixed_and_all_are_smoothed():
    mixer = batch_mixer(changed(PAPER, mix_prob=0.3), 5, 0.1)
    whole = 0
    for s in range(200):
        images, labels = batch()
        seed(s)
        mixed, targets = mixer(images, labels)
        if torch.equal(mixed, batch()[0]):
            whole += 1
            assert torch.allclose(targets, torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.02)
    assert 120 < whole < 160


@pytest.mark.parametrize("settings", [{"mixup": 0.0, "cutmix": 0.0}, {"mix_prob": 0.0}], ids=["both off", "never"])
def test_nothing_mixes_where_all_is_off(settings):
    assert batch_mixer(changed(PAPER, **settings), 5, 0.1) is None


def test_batches_that_cannot_be_mixed_are_refused():
    mixer = batch_mixer(PAPER, 5, 0.1)
    with pytest.raises(ConfigError, match="7 are odd; take an even batch size"):
        mixer(*batch(7))
    with pytest.raises(ConfigError, match="one class each"):
        mixer(batch()[0], torch.zeros(8, 5))
