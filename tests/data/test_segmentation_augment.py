"""Distortions of images with masks: against the colour spaces of the standard library, and the rules as published."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xcit.data.mask_set import IGNORE
from xcit.data.sampling import seeded
from xcit.data.segmentation_augment import (
    SegmentationAugment,
    saturated,
    scaled_image,
    scaled_mask,
    turned,
    varied,
)
from xcit.errors import ConfigError

PLAIN = {"hflip": 0.0, "distort": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def picture(height=60, width=80, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def coordinates(height=60, width=80):
    """A mask that tells where each pixel came from."""
    return torch.arange(height * width, dtype=torch.int32).reshape(height, width)


# --- colours ----------------------------------------------------------------------------------------------------------


def colours():
    """Random ones, and those at which formulas break: greys, pure colours, two equal channels, black, white."""
    special = [(a, b, c) for a in (0, 0.5, 1) for b in (0, 0.5, 1) for c in (0, 0.5, 1)]
    random = np.random.default_rng(0).random((200, 3))
    return np.concatenate([special, random])


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.0, 1.5, 10.0])
def test_saturation(factor):
    expected = []
    for colour in colours():
        h, s, v = colorsys.rgb_to_hsv(*colour)
        expected.append(colorsys.hsv_to_rgb(h, min(1, s * factor), v))
    found = saturated(torch.tensor(colours().T[:, None]), factor)[:, 0].T
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])
def test_hue(turns):
    expected = []
    for colour in colours():
        h, s, v = colorsys.rgb_to_hsv(*colour)
        expected.append(colorsys.hsv_to_rgb((h + turns) % 1, s, v))
    found = turned(torch.tensor(colours().T[:, None]), turns)[:, 0].T
    np.testing.assert_allclose(found, expected, atol=1e-9)


def distorted(image, draws, augment):
    """Read the published order off a list of draws: brightness; contrast, first or last; saturation; hue."""
    draws = iter(draws)
    image = [[float(v) for v in pixel] for pixel in image]

    def number(limit, centre):
        return centre - limit + 2 * limit * next(draws)

    def clipped(change):
        return [[min(1.0, max(0.0, change(v))) for v in pixel] for pixel in image]

    def in_hsv(change):
        return [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in image]

    if next(draws) < augment.distort:
        delta = number(augment.brightness, 0)
        image = clipped(lambda v: v + delta)
    contrast = number(augment.contrast, 1) if next(draws) < augment.distort else 1
    first = next(draws) < 0.5
    if first:
        image = clipped(lambda v: v * contrast)
    if next(draws) < augment.distort:
        saturation = number(augment.saturation, 1)
        image = in_hsv(lambda h, s, v: (h, min(1, s * saturation), v))
    if next(draws) < augment.distort:
        turn = number(augment.hue, 0)
        image = in_hsv(lambda h, s, v: ((h + turn) % 1, s, v))
    if not first:
        image = clipped(lambda v: v * contrast)
    return image, first


def test_photometric_distortion():
    augment = SegmentationAugment((4, 5), 4, 16, (1, 1), 1.0, hflip=0.0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image, orders = picture(4, 5), set()
    pixels = (image.double() / 255).flatten(1).T.tolist()
    for seed in range(40):
        with seeded(seed):
            found, _ = augment(image, coordinates(4, 5))
        with seeded(seed):  # the same numbers: ratio, crop, mirror, then colours
            torch.rand(())
            torch.randint(0, 1, ()), torch.randint(0, 1, ())
            torch.rand(())
            draws = [float(torch.rand(())) for _ in range(20)]
        expected, first = distorted(pixels, draws, augment)
        orders.add(first)
        normal = (np.array(expected) - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
        np.testing.assert_allclose(found.flatten(1).T, normal, atol=2e-5)
    assert orders == {True, False}


def test_colours_stay_by_default_half_the_time():
    image = picture(32, 32)
    augment = SegmentationAugment((32, 32), 32, 128, (1, 1), hflip=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    with seeded(0):
        unchanged = sum(
            torch.allclose(augment(image, torch.zeros(32, 32, dtype=torch.int32))[0] * 255, image.float(), atol=1e-3)
            for _ in range(400)
        )
    assert 10 <= unchanged <= 45  # 1 in 16 is 25


def test_negatives():
    image = picture(8, 8)
    found, _ = SegmentationAugment((8, 8), 8, 32, (1, 1), invert=1.0, **PLAIN)(image, coordinates(8, 8))
    torch.testing.assert_close(found, 1 - image.float() / 255)


# --- where things are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30, 40), (60, 80), (61, 83), (150, 200), (1, 2)])
def test_scaling(size):
    image, mask = picture(), coordinates()
    whole = F.interpolate(image[None].double(), size, mode="bilinear", align_corners=False)[0]
    assert (scaled_image(image, size).double() - whole).abs().max() < 1 + 1e-9  # which it is rounded to
    nearest = F.interpolate(mask[None, None].double(), size, mode="nearest")[0, 0]
    torch.testing.assert_close(scaled_mask(mask, size).double(), nearest)


@pytest.mark.parametrize("seed", range(5))
def test_crops_and_mirrors(seed):
    image, mask = picture(), coordinates()
    augment = SegmentationAugment((32, 40), 60, 240, (1, 1), hflip=0.5, distort=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    with seeded(seed):
        found, places = augment(image, mask)
    assert (found.dtype, places.dtype, found.shape, places.shape) == (torch.float32, torch.int64, (3, 32, 40), (32, 40))
    assert torch.equal((found * 255).round().byte(), image.flatten(1)[:, places.flatten()].reshape(3, 32, 40))
    step = int(places[0, 1] - places[0, 0])
    assert step in (1, -1)
    start = places[0, 0] if step == 1 else places[0, -1]
    expected = mask[int(start) // 80 :][:32, int(start) % 80 :][:, :40].long()
    assert torch.equal(places if step == 1 else places.flip(1), expected)


def test_every_crop_and_both_mirrors_come():
    augment = SegmentationAugment((59, 79), 60, 240, (1, 1), cat_max_ratio=1.0, hflip=0.5, distort=0.0)
    with seeded(0):
        corners = {tuple(augment(picture(), coordinates())[1][0, [0, -1]].tolist()) for _ in range(100)}
    ends = [(start, start + 78) for start in (0, 1, 80, 81)]
    assert corners == {*ends, *(end[::-1] for end in ends)}


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (10, 80)])
def test_sizes_before_the_crop(height, width):
    """A ratio from 0.5 to 2 of the published pair, here of a tenth; the shorter side decides but in long images."""
    augment, shapes = SegmentationAugment((500, 900), 51, 204, cat_max_ratio=1.0, **PLAIN), []
    for seed in range(20):
        with seeded(seed):
            ratio = 0.5 + 1.5 * float(torch.rand(()))
        with seeded(seed):
            _, places = augment(picture(height, width), coordinates(height, width))
        inside = places != IGNORE
        found = int(inside[:, 0].sum()), int(inside[0].sum())
        scale = min(int(204 * ratio) / max(height, width), int(51 * ratio) / min(height, width))
        assert found == (int(height * scale + 0.5), int(width * scale + 0.5))
        shapes.append(found[0])
    assert max(shapes) > 2 * min(shapes)


def test_small_images_are_padded_after_they_are_normalised():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    augment = SegmentationAugment((40, 32), 20, 80, (1, 1), hflip=0.0, distort=0.0)
    found, mask = augment(image, torch.full((20, 30), 7, dtype=torch.int32))
    assert (found.shape, mask.shape) == ((3, 40, 32), (40, 32))
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found[:, :20, :30], black[:, None, None].expand(3, 20, 30))
    assert (mask[:20, :30] == 7).all()
    assert (found[:, 20:] == 0).all()
    assert (found[:, :, 30:] == 0).all()
    assert (mask[20:] == IGNORE).all()
    assert (mask[:, 30:] == IGNORE).all()


# --- the 75 % rule ----------------------------------------------------------------------------------------------------


def plainly_varied(mask, ratio):
    counts = {}
    for value in mask.flatten().tolist():
        if value != IGNORE:
            counts[value] = counts.get(value, 0) + 1
    return len(counts) > 1 and max(counts.values()) < ratio * sum(counts.values())


def test_the_rule():
    cases = [[0, 0, 0, 1], [0, 0, 1, 1], [3, 3], [IGNORE] * 4, [IGNORE, 5], [0, 0, 0, 1, IGNORE, IGNORE, 2], [2, 0]]
    rng = np.random.default_rng(0)
    cases += [rng.choice([IGNORE, 0, 1, 9], 16, p=rng.dirichlet([0.4] * 4)).tolist() for _ in range(100)]
    verdicts = []
    for case in cases:
        verdicts.append(varied(torch.tensor([case]), 0.75))
        assert verdicts[-1] == plainly_varied(np.array(case), 0.75), case
    assert verdicts[:7] == [False, True, False, False, False, True, True]
    assert 20 < sum(verdicts) < 90


def test_crops_follow_the_rule():
    """Two classes meet in the middle: most crops show one alone, and up to ten of them are drawn again."""
    mask = (torch.arange(400).expand(20, 400) >= 200).int()
    image = torch.zeros(3, 20, 400, dtype=torch.uint8)
    good = {}
    for ratio in (1.0, 0.75):
        augment = SegmentationAugment((20, 20), 20, 400, (1, 1), cat_max_ratio=ratio, **PLAIN)
        with seeded(1):
            good[ratio] = sum(plainly_varied(augment(image, mask)[1], 0.75) for _ in range(800)) / 800
    once = 9 / 381  # starts from 186 to 194: more than 5 of 20 columns of either
    assert abs(good[1.0] - once) < 0.017
    assert abs(good[0.75] - (1 - (1 - once) ** 11)) < 0.05  # one, and ten more


# --- all together -----------------------------------------------------------------------------------------------------


def test_the_same_draws_give_the_same_bytes():
    augment, image, mask = SegmentationAugment((48, 48), 60, 240), picture(), coordinates() % 5
    results = []
    for seed in (3, 3, 4):
        torch.rand(seed)  # whatever was drawn before
        with seeded(seed):
            results.append(augment(image, mask))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_released_numbers():
    augment = SegmentationAugment()
    assert (augment.crop_size, augment.short_side, augment.max_size) == ((512, 512), 512, 2048)
    assert (augment.ratio_range, augment.cat_max_ratio, augment.hflip, augment.invert) == ((0.5, 2.0), 0.75, 0.5, 0)
    assert (255 * augment.brightness, augment.contrast, augment.saturation) == (32, 0.5, 0.5)
    assert 180 * augment.hue == 18
    torch.manual_seed(0)
    image, mask = augment(picture(), coordinates() % 150)
    assert (image.shape, mask.shape) == ((3, 512, 512), (512, 512))
    assert int(mask.max()) < 150


def test_numbers_out_of_range():
    for options, match in (
        ({"crop_size": (0, 5)}, "crop_size is"),
        ({"ratio_range": (2, 1)}, "ratio_range is"),
        ({"short_side": 3}, "short_side is 3; it must be 2 or more after the smallest ratio"),
        ({"max_size": 5}, "max_size is 5; it must be short_side, which is 512, or more"),
        ({"hflip": 1.5, "hue": 0.6}, r"hflip is 1\.5; .*; hue is 0\.6"),
        ({"std": (1, 0, 1)}, "std is"),
    ):
        with pytest.raises(ConfigError, match=match):
            SegmentationAugment(**options)
