"""Distortions of annotated images: sizes as released, boxes that stay where their masks are."""

import numpy as np
import pytest
import torch

from xcit.data.detection_augment import DetectionAugment, Example, cropped, mirrored, scaled
from xcit.data.sampling import seeded


def example(height=120, width=160, n=4, seed=0):
    """Rectangles, each of a colour of its own, with their masks."""
    rng = np.random.default_rng(seed)
    image, masks, boxes = torch.zeros(3, height, width), torch.zeros(n, height, width, dtype=torch.uint8), []
    for i in range(n):
        x, y = int(rng.integers(0, width - 40)), int(rng.integers(0, height - 40))
        w, h = int(rng.integers(10, 40)), int(rng.integers(10, 40))
        image[:, y : y + h, x : x + w] = torch.from_numpy(rng.uniform(0.2, 1, (3, 1, 1))).float()
        masks[i, y : y + h, x : x + w] = 1
        boxes.append([x, y, x + w, y + h])
    return Example(image, torch.tensor(boxes, dtype=torch.float32), torch.arange(1, n + 1), masks)


def extents(masks):
    """Boxes around masks, ends exclusive."""
    found = []
    for mask in masks:
        rows, columns = torch.where(mask.any(1))[0], torch.where(mask.any(0))[0]
        found.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return torch.tensor(found, dtype=torch.float32)


def test_mirrored():
    before = example()
    after = mirrored(before)
    torch.testing.assert_close(extents(after.masks), after.boxes)
    assert torch.equal(after.image[:, :, 0], before.image[:, :, -1])
    again = mirrored(after)
    assert torch.equal(again.image, before.image)
    assert torch.equal(again.boxes, before.boxes)


@pytest.mark.parametrize(
    ("short", "longest", "size"), [(240, 999, (240, 320)), (60, 999, (60, 80)), (600, 200, (150, 200))]
)
def test_scaled(short, longest, size):
    after = scaled(example(), short, longest)
    assert after.image.shape[1:] == after.masks.shape[1:] == size
    torch.testing.assert_close(extents(after.masks), after.boxes, atol=1.0, rtol=0)
    assert set(after.masks.unique().tolist()) == {0, 1}


def test_cropped():
    before = example(seed=3)
    after = cropped(before, 20, 30, 70, 90)
    assert after.image.shape == (3, 70, 90)
    assert torch.equal(after.image, before.image[:, 20:90, 30:120])
    torch.testing.assert_close(extents(after.masks), after.boxes)
    kept = [bool(mask[20:90, 30:120].any()) for mask in before.masks]
    assert after.labels.tolist() == before.labels[torch.tensor(kept)].tolist()


def test_a_crop_may_leave_nothing():
    before = Example(torch.zeros(3, 50, 50), torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([1]), torch.zeros(1, 50, 50))
    after = scaled(cropped(before, 20, 20, 30, 30), 60, 60)
    assert after.boxes.shape == (0, 4)
    assert after.masks.shape == (0, 60, 60)


def test_the_released_policies():
    """Half of the images scaled once, the others around a crop of 384 to 600 px; the sides that there are."""
    short, longest, cropped_sides = [], [], []
    augment = DetectionAugment()
    before = Example(torch.zeros(3, 480, 640), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)
    for seed in range(300):
        with seeded(seed):
            H, W = augment(before).image.shape[1:]
        short.append(min(H, W))
        longest.append(max(H, W))
        cropped_sides.append(abs(W / H - 640 / 480) > 0.01)
    assert max(longest) <= 1333
    assert set(short) - set(range(480, 801, 32)) <= {
        side for side, other in zip(short, longest, strict=True) if other == 1333
    }
    assert len(set(short) & set(range(480, 801, 32))) == 11
    assert 0.4 < np.mean(cropped_sides) < 0.6


def test_windows_are_within_the_range():
    augment = DetectionAugment()
    sides, places = [], []
    for seed in range(200):
        with seeded(seed):
            top, left, height, width = augment._window(500, 1000)
        assert 384 <= height <= 500
        assert 384 <= width <= 600
        assert 0 <= top <= 500 - height
        assert 0 <= left <= 1000 - width
        sides.append(width)
        places.append(left)
    assert max(sides) - min(sides) > 200
    assert max(places) > 500
    with seeded(0):
        assert augment._window(200, 300)[2:] == (200, 300)  # a small image is taken whole


def test_mirroring_colours_and_the_negative():
    before = example()
    same = {"short_sides": (120,), "crop_prob": 0.0}
    assert torch.equal(DetectionAugment(**same, hflip=1.0)(before).image, before.image.flip(2))
    assert torch.equal(DetectionAugment(**same, hflip=0.0, invert=1.0)(before).image, 1 - before.image)
    coloured = DetectionAugment(**same, hflip=0.0, jitter=0.5)(before)
    assert not torch.equal(coloured.image, before.image)
    assert torch.equal(coloured.boxes, before.boxes)
