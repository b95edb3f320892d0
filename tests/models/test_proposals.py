"""Anchors and box codes against plain loops over the released configuration; losses against their definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.image_list import ImageList

from xcit.models.proposals import AnchorMatcher, Anchors, ProposalNetwork, TwoSidedBoxCoder

STRIDES = (4, 8, 16, 32, 64)


def naive_anchors(stride, rows, columns):
    """Scale 8, height by width 0.5, 1, 2, centred on the cell's corner, row by row, nothing rounded."""
    return [
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        for y in range(0, rows * stride, stride)
        for x in range(0, columns * stride, stride)
        for w, h in ((8 * stride / math.sqrt(r), 8 * stride * math.sqrt(r)) for r in (0.5, 1.0, 2.0))
    ]


def test_anchors():
    """At 800 x 1,088 px the top level has 13 x 17 cells, which 800 // 13 would space 61 px apart instead of 64."""
    grids = [(200, 272), (100, 136), (50, 68), (25, 34), (13, 17)]
    images = ImageList(torch.zeros(2, 3, 800, 1088), [(800, 1088), (790, 1000)])
    first, second = Anchors(STRIDES)(images, [torch.zeros(2, 1, *grid, dtype=torch.float64) for grid in grids])
    want = [box for stride, grid in zip(STRIDES, grids, strict=True) for box in naive_anchors(stride, *grid)]
    np.testing.assert_allclose(first.numpy(), want, rtol=1e-6)
    assert torch.equal(first, second)


def naive_decode(code, box, weights):
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    limit = abs(math.log(16 / 1000))
    dx, dy, dw, dh = (c / s for c, s in zip(code, weights, strict=True))
    x, y = x0 + w / 2 + dx * w, y0 + h / 2 + dy * h
    w, h = (side * math.exp(max(-limit, min(limit, d))) for side, d in ((w, dw), (h, dh)))
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_box_codes(weights):
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(-50, 500, (40, 2)), rng.uniform(1, 300, (40, 2))
    boxes = np.concatenate((corner, corner + side), 1)
    codes = rng.normal(size=(40, 3, 4)) * (2, 2, 30, 30)  # far beyond both limits of growth
    coder = TwoSidedBoxCoder(weights)
    got = coder.decode(torch.from_numpy(codes).flatten(1), [torch.from_numpy(boxes)])
    want = [[naive_decode(c, box, weights) for c in row] for row, box in zip(codes, boxes, strict=True)]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


def test_encoding_is_the_inverse():
    rng = np.random.default_rng(1)
    boxes, other = (
        torch.from_numpy(np.concatenate((c, c + s), 1))
        for c, s in ((rng.uniform(0, 50, (30, 2)), rng.uniform(5, 90, (30, 2))) for _ in range(2))
    )
    coder = TwoSidedBoxCoder((10.0, 10.0, 5.0, 5.0))
    (codes,) = coder.encode([other], [boxes])
    torch.testing.assert_close(coder.decode(codes, [boxes])[:, 0], other)


def naive_nms(boxes, scores, threshold):
    order, kept = np.argsort(-scores, kind="stable"), []
    for i in order:
        if all(iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0, w) * max(0, h)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def test_proposals_are_those_of_a_plain_loop():
    """The best of each level, clipped to the image, suppressed within the level, the best of all in falling order."""
    torch.manual_seed(0)
    rpn = ProposalNetwork(8, (16, 32)).eval().double()
    rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"] = 60, 40
    for p in rpn.parameters():
        torch.nn.init.normal_(p, std=0.4)
    features = {"0": torch.randn(1, 8, 6, 9).double(), "1": torch.randn(1, 8, 3, 5).double()}
    images = ImageList(torch.zeros(1, 3, 96, 144), [(90, 131)])
    with torch.no_grad():
        (got,), losses = rpn(images, features)
        logits, deltas = rpn.head(list(features.values()))
    assert losses == {}
    boxes, scores = [], []
    for stride, level_logits, level_deltas in zip((16, 32), logits, deltas, strict=True):
        rows, columns = level_logits.shape[2:]
        anchors = naive_anchors(stride, rows, columns)
        score = level_logits[0].permute(1, 2, 0).flatten().numpy()
        code = level_deltas[0].view(3, 4, rows, columns).permute(2, 3, 0, 1).reshape(-1, 4).tolist()
        best = np.argsort(-score)[:60]
        mine = np.array([naive_decode(code[i], anchors[i], (1, 1, 1, 1)) for i in best])
        mine[:, 0::2], mine[:, 1::2] = mine[:, 0::2].clip(0, 131), mine[:, 1::2].clip(0, 90)
        extent = ((mine[:, 2:] - mine[:, :2]) >= 1e-3).all(1)
        mine, score = mine[extent], score[best][extent]
        kept = naive_nms(mine, score, 0.7)
        boxes += [mine[kept]]
        scores += [score[kept]]
    boxes, scores = np.concatenate(boxes), np.concatenate(scores)
    want = boxes[np.argsort(-scores, kind="stable")[:40]]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


def test_losses_are_their_definitions():
    torch.manual_seed(0)
    rpn = ProposalNetwork(8, STRIDES)
    labels = [torch.tensor([1.0, 0, 0, -1, 1]), torch.tensor([0.0, 0, 0, 0, -1])]
    targets = [torch.randn(5, 4) for _ in range(2)]
    objectness, codes = torch.randn(10, 1), torch.randn(10, 4)
    score, box = rpn.compute_loss(objectness, codes, labels, targets)
    sampled = [i for i, label in enumerate(torch.cat(labels).tolist()) if label >= 0]  # fewer than 256: all of them
    truth = torch.cat(labels)[sampled]
    torch.testing.assert_close(score, F.binary_cross_entropy(objectness[sampled, 0].sigmoid(), truth))
    want = sum((codes[i] - torch.cat(targets)[i]).abs().sum() for i in (0, 4)) / len(sampled)
    torch.testing.assert_close(box, want)


def test_no_anchor_to_learn_from_gives_no_nan():
    rpn = ProposalNetwork(8, STRIDES)
    nothing = [torch.full((4,), -1.0)]
    losses = rpn.compute_loss(torch.randn(4, 1), torch.randn(4, 4), nothing, [torch.zeros(4, 4)])
    assert [loss.item() for loss in losses] == [0, 0]


def naive_assignment(overlaps, min_iou):
    """mmdetection's rule as its documentation tells it, an anchor and an instance at a time; -1 negative, -2 unused."""
    instances, anchors = overlaps.shape
    assigned = []
    for a in range(anchors):
        most = overlaps[:, a].max()
        assigned.append(int(overlaps[:, a].argmax()) if most >= 0.7 else -1 if most < 0.3 else -2)
    for g in range(instances):
        best = overlaps[g].max()
        if best >= min_iou:
            for a in range(anchors):
                if overlaps[g, a] == best:
                    assigned[a] = g
    return assigned


@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.5])
def test_anchors_learn_what_the_released_rule_says(min_iou):
    rng = np.random.default_rng(3)
    matcher, seen = AnchorMatcher(0.7, 0.3, min_iou), set()
    for _ in range(200):
        overlaps = rng.uniform(0, rng.uniform(0.2, 1), (int(rng.integers(1, 5)), 12)).round(1)  # many ties
        want = naive_assignment(overlaps, min_iou)
        assert matcher(torch.from_numpy(overlaps)).tolist() == want
        seen |= set(want)
    assert seen == {-2, -1, 0, 1, 2, 3}


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation gave, in bytes; views count as what they show."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *found])
        return out


def test_matching_takes_little_memory():
    """Beside the overlaps there is nothing of instances times anchors."""
    overlaps, matches = torch.rand(64, 4096), torch.full((4096,), -1)
    with Largest() as largest:
        AnchorMatcher(0.7, 0.3, 0.3).set_low_quality_matches_(matches, matches, overlaps)
    assert (matches >= 0).any()
    assert 0 < largest.size <= matches.nbytes


def test_a_small_instance_is_learned_where_asked_for():
    """A box of 8 px overlaps the smallest anchor, of 32 px, by 1/16."""
    anchors = Anchors((4,))(ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)]), [torch.zeros(1, 1, 8, 8)])
    small = [{"boxes": torch.tensor([[12.0, 12, 20, 20]])}]
    for min_iou, learned in ((0.3, False), (0.0, True)):
        (labels,), _ = ProposalNetwork(8, (4,), min_iou=min_iou).assign_targets_to_anchors(anchors, small)
        assert bool((labels == 1).any()) is learned
