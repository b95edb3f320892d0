"""What is counted over a validation set, against the whole set at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from xcit.tasks.totals import ValidationTotals

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(23, 4, generator=G)
LABELS = torch.randint(4, (23,), generator=G)
SEVERAL = (torch.rand(23, 4, generator=G) < 0.4).float()


def alone(item):
    return [item]


def counted(labels, sizes, multi_label=False):
    totals = ValidationTotals(multi_label)
    for logits, wanted in zip(LOGITS.split(sizes), labels.split(sizes), strict=True):
        totals.update(logits, wanted)
    return totals


@pytest.mark.parametrize("sizes", [[23], [8, 8, 7], [1] * 23, [0, 22, 1]])
def test_batches_of_any_size_give_the_figures_of_the_whole(sizes):
    found = counted(LABELS, sizes).compute(lambda sums: sums, alone)
    assert found == pytest.approx(
        {
            "val_loss": F.cross_entropy(LOGITS.double(), LABELS).item(),
            "val_accuracy": (LOGITS.argmax(1) == LABELS).sum().item() / 23,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("sizes", [[23], [8, 8, 7]])
def test_several_labels(sizes):
    found = counted(SEVERAL, sizes, multi_label=True).compute(lambda sums: sums, alone)
    each = [average_precision_score(SEVERAL[:, k].numpy(), LOGITS[:, k].numpy()) for k in range(4)]
    assert found == pytest.approx(
        {"val_loss": F.binary_cross_entropy_with_logits(LOGITS, SEVERAL).item(), "val_map": np.mean(each)}, rel=1e-6
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_processes_with_unequal_shares_give_the_figures_of_the_whole(multi_label):
    labels = SEVERAL if multi_label else LABELS
    whole = counted(labels, [23], multi_label).compute(lambda sums: sums, alone)
    first, second = ValidationTotals(multi_label), ValidationTotals(multi_label)
    first.update(LOGITS[:15], labels[:15])
    second.update(LOGITS[15:], labels[15:])
    sums = []
    second.compute(lambda values: sums.append(values) or values, alone)
    found = first.compute(lambda values: values + sums[0], lambda kept: [kept, second._kept])
    assert found == pytest.approx(whole, rel=1e-6)


def test_half_precision_is_summed_in_full():
    totals = ValidationTotals(False)
    totals.update(LOGITS.bfloat16(), LABELS)
    expected = F.cross_entropy(LOGITS.bfloat16().double(), LABELS).item()
    assert totals.compute(lambda sums: sums, alone)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_reset_forgets():
    totals = counted(LABELS, [23])
    totals.reset()
    totals.update(LOGITS[:5], LABELS[:5])
    found = totals.compute(lambda sums: sums, alone)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(LOGITS[:5], LABELS[:5]).item())


def test_nothing_counted_divides_by_nothing():
    assert ValidationTotals(False).compute(lambda sums: sums, alone) == {"val_loss": 0.0, "val_accuracy": 0.0}
