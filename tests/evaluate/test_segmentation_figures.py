"""mIoU and its kin, exactly as plain loops count them."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from xcit.data.mask_set import IGNORE
from xcit.errors import ShapeError
from xcit.evaluate import segmentation as module
from xcit.evaluate.segmentation import confusion, segmentation_figures


def counted(pairs, K):
    """Count pixel by pixel."""
    matrix = [[0] * K for _ in range(K)]
    for labels, mask in pairs:
        for label, truth in zip(labels.ravel().tolist(), mask.ravel().tolist(), strict=True):
            if truth != IGNORE:
                matrix[truth][label] += 1
    return matrix


def by_loops(pairs, K):
    """Return miou, macc, aacc, iou, acc from sets of pixels, class by class, as fractions; None for what is not."""
    iou, acc = [], []
    right = total = 0
    for k in range(K):
        both = either = own = 0
        for labels, mask in pairs:
            for label, truth in zip(labels.ravel().tolist(), mask.ravel().tolist(), strict=True):
                if truth == IGNORE:
                    continue
                both += label == k and truth == k
                either += label == k or truth == k
                own += truth == k
        iou.append(Fraction(both, either) if either else None)
        acc.append(Fraction(both, own) if own else None)
        right, total = right + both, total + own
    means = [[value for value in values if value is not None] for values in (iou, acc)]
    miou, macc = (sum(values) / len(values) for values in means)
    return miou, macc, Fraction(right, total), iou, acc


def images(seed, K, types=(np.uint8, np.int32)):
    """Return maps of several sizes; class 1 is never there nor predicted, class 2 is only predicted, 3 only there."""
    rng = np.random.default_rng(seed)
    pairs = []
    for height, width in ((5, 7), (1, 30), (16, 3), (9, 9)):
        labels, mask = rng.integers(0, K, (2, height, width))
        for absent in (labels, mask):
            absent[absent == 1] = 0
        labels[labels == 3] = 4
        mask[mask == 2] = 4
        mask[rng.random(mask.shape) < 0.3] = IGNORE
        mask[: height // 2] = np.where(rng.random(mask[: height // 2].shape) < 0.5, labels[: height // 2], mask[0, 0])
        mask[np.isin(mask, (1, 2))] = 0
        pairs.append((labels.astype(types[0]), mask.astype(types[1])))
    return pairs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strip", [1, 10, 2**22])
def test_figures_are_exactly_those_of_loops(seed, strip, monkeypatch):
    monkeypatch.setattr(module, "STRIP", strip)
    K = 6
    pairs = images(seed, K)
    matrix = sum(confusion(labels, mask, K) for labels, mask in pairs)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == counted(pairs, K)
    found = segmentation_figures(matrix)
    miou, macc, aacc, iou, acc = by_loops(pairs, K)
    assert iou[1] is None
    assert (iou[2], acc[2]) == (0, None)
    assert (iou[3], acc[3]) == (0, 0)
    # A class's figure is one division, hence the fraction itself, rounded once.
    assert [None if math.isnan(v) else v for v in found.iou.tolist()] == [v if v is None else float(v) for v in iou]
    assert [None if math.isnan(v) else v for v in found.acc.tolist()] == [v if v is None else float(v) for v in acc]
    assert found.aacc == float(aacc)
    assert found.miou == pytest.approx(float(miou), abs=1e-15)
    assert found.macc == pytest.approx(float(macc), abs=1e-15)
    assert found.num_pixels == sum((mask != IGNORE).sum() for _, mask in pairs)


def test_tensors_and_arrays_of_any_integer_type():
    want = None
    for types in ((np.uint8, np.int32), (np.uint16, np.int64), (np.int64, np.int16)):
        for labels, mask in images(0, 6, types)[:1]:
            tensors = torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(mask)
            found = confusion(labels, mask, 6)
            want = found if want is None else want
            assert torch.equal(found, want)
            assert torch.equal(confusion(*tensors, 6), want)


def test_large_counts_are_exact():
    matrix = torch.tensor([[2**53 + 1, 0], [1, 2**40]])
    assert segmentation_figures(matrix).num_pixels == 2**53 + 2 + 2**40
    assert torch.equal((matrix + matrix), 2 * segmentation_figures(matrix).matrix)


def test_a_perfect_map_and_a_wrong_one():
    mask = np.array([[0, 1], [2, IGNORE]])
    found = segmentation_figures(confusion(np.where(mask == IGNORE, 0, mask), mask, 4))
    assert (found.miou, found.macc, found.aacc) == (1, 1, 1)
    assert math.isnan(found.iou[3])
    found = segmentation_figures(confusion(np.full((2, 2), 3), mask, 4))
    assert (found.miou, found.macc, found.aacc) == (0, 0, 0)
    assert found.iou.tolist() == [0, 0, 0, 0]
    assert math.isnan(found.acc[3])


def test_agrees_with_scikit_learn():
    from sklearn.metrics import confusion_matrix, jaccard_score

    rng = np.random.default_rng(0)
    labels, mask = rng.integers(0, 5, (2, 40, 50))
    mask[rng.random((40, 50)) < 0.2] = IGNORE
    matrix = confusion(labels, mask, 5)
    counted = mask != IGNORE
    assert (matrix.numpy() == confusion_matrix(mask[counted], labels[counted])).all()
    assert segmentation_figures(matrix).miou == pytest.approx(
        jaccard_score(mask[counted], labels[counted], average="macro")
    )


def test_as_json():
    figures = segmentation_figures(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    found = json.loads(json.dumps(figures.to_dict(["a", "b", "c"]), allow_nan=False))
    assert found["num_pixels"] == 8
    assert found["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert found["classes"][0] == {"name": "a", "iou": 0.75, "acc": 0.75, "num_pixels": 4}
    assert found["classes"][2] == {"name": "c", "iou": None, "acc": None, "num_pixels": 0}
    assert figures.to_dict()["classes"][1]["name"] == "1"
    with pytest.raises(ShapeError, match="There are 2 class_names for figures of 3 classes"):
        figures.to_dict(["a", "b"])


def test_nothing_counted():
    figures = segmentation_figures(confusion(np.zeros((3, 3), int), np.full((3, 3), IGNORE), 2))
    assert math.isnan(figures.miou)
    assert figures.to_dict()["miou"] is None


def test_refusals():
    good = np.zeros((2, 3), int)
    with pytest.raises(ShapeError, match="The labels are 3 x 2, the mask is 2 x 3; bring the labels to the size"):
        confusion(good.T, good, 2)
    with pytest.raises(ShapeError, match="The labels go from -1 to 0; there are the classes 0 to 1"):
        confusion(good - np.eye(2, 3, dtype=int), good, 2)
    with pytest.raises(ShapeError, match=r"The values of the mask go from 0 to 7; .* and -1 for what is ignored"):
        confusion(good, good + 7 * np.eye(2, 3, dtype=int), 2)
    with pytest.raises(ShapeError, match="The labels are float64, the mask is int64; both must be integers"):
        confusion(good.astype(float), good, 2)
    with pytest.raises(ShapeError, match=r"Expected a matrix \(K, K\)"):
        segmentation_figures(torch.zeros(2, 3))
