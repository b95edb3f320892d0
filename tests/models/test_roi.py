"""Regions: pooled from the right level as a plain loop does, heads without a background box, losses by definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xcit.models.roi import BoxHead, InstanceHeads, MaskPredictor, RegionPooler, box_losses, mask_loss
from xcit.ops.instance_masks import crop_masks

STRIDES = (4, 8, 16, 32)


def naive_roi_align(level, box, side, stride):
    """RoIAlign, aligned, ceil(extent / side) samples each way a cell: one feature map (C, H, W) in NumPy."""
    C, H, W = level.shape
    x0, y0, x1, y1 = (v / stride - 0.5 for v in box)
    h, w = (y1 - y0) / side, (x1 - x0) / side
    ny, nx = max(1, math.ceil(h)), max(1, math.ceil(w))

    def at(y, x):
        if y < -1 or y > H or x < -1 or x > W:
            return np.zeros(C)
        y, x = max(y, 0.0), max(x, 0.0)
        i, j = min(int(y), H - 1), min(int(x), W - 1)
        k, m = min(i + 1, H - 1), min(j + 1, W - 1)
        a, b = (0.0 if i == H - 1 else y - i), (0.0 if j == W - 1 else x - j)
        return (
            level[:, i, j] * (1 - a) * (1 - b)
            + level[:, k, j] * a * (1 - b)
            + level[:, i, m] * (1 - a) * b
            + level[:, k, m] * a * b
        )

    out = np.zeros((C, side, side))
    for r in range(side):
        for c in range(side):
            points = [
                at(y0 + h * (r + (s + 0.5) / ny), x0 + w * (c + (t + 0.5) / nx)) for s in range(ny) for t in range(nx)
            ]
            out[:, r, c] = np.mean(points, axis=0)
    return out


def test_pooling_is_the_plain_loop():
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 2, 256 // s, 320 // s)) for s in STRIDES]
    boxes = [
        np.array([[3.0, 4, 60, 50], [10, 10, 140, 160], [0, 0, 319, 255], [5.2, 7.7, 8, 9]]),
        np.array([[0.0, 0, 111.9, 112], [0, 0, 112, 112], [-20, -10, 30, 20]]),
    ]
    features = {str(i): torch.from_numpy(x) for i, x in enumerate([*maps, maps[-1][:, :, ::2, ::2]])}
    got = RegionPooler(7, STRIDES)(features, [torch.from_numpy(b) for b in boxes], [(256, 320)] * 2)
    number, used = 0, set()
    for image, found in enumerate(boxes):
        for box in found:
            side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            level = min(3, max(0, math.floor(math.log2(side / 56 + 1e-6))))
            used.add(level)
            want = naive_roi_align(maps[level][image], box, 7, STRIDES[level])
            np.testing.assert_allclose(got[number].numpy(), want, atol=1e-9)
            number += 1
    assert used == {0, 1, 2}


def test_no_regions():
    features = {str(i): torch.zeros(1, 5, 8, 8) for i in range(4)}
    assert RegionPooler(7, STRIDES)(features, [torch.zeros(0, 4)], [(64, 64)]).shape == (0, 5, 7, 7)


def test_the_background_has_no_box_and_no_mask():
    torch.manual_seed(0)
    head = BoxHead(8, 7, 16, 3)
    logits, codes = head(torch.randn(5, 8, 7, 7))
    assert logits.shape == (5, 4)
    assert codes.shape == (5, 16)
    assert (codes[:, :4] == 0).all()
    assert (codes[:, 4:] != 0).all()
    assert MaskPredictor(8, 3)(torch.randn(2, 8, 14, 14)).shape == (2, 3, 28, 28)


def test_box_losses_are_their_definitions():
    torch.manual_seed(0)
    logits, codes, targets = torch.randn(5, 4), torch.randn(5, 16), torch.randn(5, 4)
    labels = torch.tensor([0, 3, 1, 0, 2])
    got = box_losses(logits, codes, labels, targets)
    torch.testing.assert_close(got["loss_classifier"], F.cross_entropy(logits, labels))
    want = sum((codes[i, 4 * k : 4 * k + 4] - targets[i]).abs().sum() for i, k in enumerate(labels.tolist()) if k) / 5
    torch.testing.assert_close(got["loss_box_reg"], want)


def test_mask_loss_is_its_definition():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 4, 28, 28), (torch.rand(3, 28, 28) < 0.5).float()
    labels = torch.tensor([4, 1, 2])
    want = np.mean([F.binary_cross_entropy(logits[i, k - 1].sigmoid(), truth[i]).item() for i, k in enumerate(labels)])
    assert mask_loss(logits, truth, labels).item() == pytest.approx(want, rel=1e-5)


def test_no_positive_region_still_reaches_every_weight():
    logits = torch.randn(0, 4, 28, 28, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(0, 28, 28), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


def test_targets_of_masks_follow_the_matched_instance(monkeypatch):
    """The square that a region learns is its instance's mask within the region, not within the instance's box."""
    torch.manual_seed(0)
    heads = InstanceHeads(8, STRIDES, 2, box_width=16, mask_channels=8, mask_convs=1).train()
    masks = torch.zeros(2, 128, 128)
    masks[0, 10:60, 10:60], masks[1, 70:120, 30:100] = 1, 1
    target = {
        "boxes": torch.tensor([[10.0, 10, 60, 60], [30, 70, 100, 120]]),
        "labels": torch.tensor([2, 1]),
        "masks": masks.to(torch.uint8),
    }
    seen = {}
    monkeypatch.setattr(
        "xcit.models.roi.mask_loss", lambda logits, truth, labels: seen.update(t=truth, k=labels) or logits.sum() * 0
    )
    proposals = torch.tensor([[12.0, 12, 58, 58], [20, 60, 100, 128], [0, 0, 5, 5]])
    features = {str(i): torch.randn(1, 8, 128 // s, 128 // s) for i, s in enumerate(STRIDES)}
    heads(features, [proposals], [(128, 128)], [target])
    assert sorted(seen["k"].tolist()) == [1, 1, 2, 2]  # two proposals, and the ground truth itself
    for truth, label in zip(seen["t"], seen["k"].tolist(), strict=True):
        number = 0 if label == 2 else 1
        regions = torch.stack((proposals[number], target["boxes"][number]))
        squares = crop_masks(masks[[number, number]], regions, 28)
        assert any(torch.equal(truth, square) for square in squares)
