"""The segmentation task: its loss by hand, which weights decay, the schedule of the released configuration."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from xcit.data.mask_set import IGNORE
from xcit.data.segmentation import MaskedImages
from xcit.models.segmenters import create_segmenter
from xcit.tasks.dense import norm_spared_decay
from xcit.tasks.segmentation import (
    PolySchedule,
    PolyScheduler,
    SegmentationTask,
    counted,
    pixel_loss,
)

SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 4, "cls_attn_layers": 1}


def small(head, **options):
    torch.manual_seed(0)
    return create_segmenter("xcit_nano_12_p16", num_classes=3, head=head, channels=8, **SMALL, **options)


def bilinear(low, size):
    """Every pixel as the mean of its four neighbours, weighted by their distance from its centre; one at a time."""
    (h, w), (H, W) = low.shape, size
    out = np.empty(size)
    for i in range(H):
        for j in range(W):
            y = min(max((i + 0.5) * h / H - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / W - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            t, s = y - y0, x - x0
            out[i, j] = (1 - t) * ((1 - s) * low[y0, x0] + s * low[y0, x1]) + t * (
                (1 - s) * low[y1, x0] + s * low[y1, x1]
            )
    return out


def test_the_loss_is_the_mean_over_all_pixels_ignored_ones_included():
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(2, 3, 3, 4)), rng.integers(-1, 3, (2, 11, 15))
    total = 0.0
    for image, mask in zip(logits, masks, strict=True):
        scores = np.stack([bilinear(channel, mask.shape) for channel in image])
        for i, j in np.ndindex(mask.shape):
            if mask[i, j] != IGNORE:
                total += math.log(np.exp(scores[:, i, j]).sum()) - scores[mask[i, j], i, j]
    got = pixel_loss(torch.from_numpy(logits), torch.from_numpy(masks))
    assert got.item() == pytest.approx(total / masks.size, rel=1e-12)
    assert pixel_loss(torch.from_numpy(logits), torch.full((2, 11, 15), IGNORE)).item() == 0


def test_a_weight_is_a_factor_on_the_loss_of_its_class():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randint(-1, 3, (2, 5, 7))
    masks[masks == -1] = IGNORE
    weights = torch.tensor([0.25, 1.0, 3.0])
    scores = logits.log_softmax(1)
    want = sum(
        -float(weights[masks[b, i, j]] * scores[b, masks[b, i, j], i, j])
        for b, i, j in np.ndindex(2, 5, 7)
        if masks[b, i, j] != IGNORE
    )
    assert pixel_loss(logits, masks, weights).item() == pytest.approx(want / masks.numel(), rel=1e-12)


def test_only_layer_norms_are_spared_from_decay():
    model = small("upernet", auxiliary_channels=8)
    spared = {name for name, decayed in norm_spared_decay(model).items() if not decayed}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    assert spared == norms
    assert "decode_head.conv_seg.bias" in norm_spared_decay(model)


@pytest.mark.parametrize(("power", "min_lr"), [(1.0, 0.0), (0.9, 1e-6)])
def test_the_rate_of_every_step(power, min_lr):
    """mmcv's rule: a power of what is left, and while it warms up (1 - i/n)(1 - ratio) less of that."""
    plan = PolySchedule(6e-5, min_lr, power, 1e-6, 15, 80)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0)
    schedule = PolyScheduler(optimizer, plan)
    for step in range(80):
        regular = (6e-5 - min_lr) * (1 - step / 80) ** power + min_lr
        k = (1 - step / 15) * (1 - 1e-6) if step < 15 else 0.0
        assert optimizer.param_groups[0]["lr"] == pytest.approx(regular * (1 - k), rel=1e-12)
        schedule.step_update(num_updates=step + 1)
    assert plan.at(80) == pytest.approx(min_lr)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("head", ["upernet", "sem_fpn"])
def test_a_step_weighs_the_auxiliary_loss(head, weights):
    torch.manual_seed(1)
    model = small(head).eval()  # no dropout
    task = SegmentationTask(model, schedule=PolySchedule(1e-3, 0, 1, 1, 0, 10), class_weights=weights)
    task.watch = lambda loss, num_images: None
    model.eval()
    batch = MaskedImages(
        torch.randn(2, 3, 64, 96), torch.randint(-1, 3, (2, 64, 96)), torch.arange(2), torch.ones(2, dtype=torch.bool)
    )
    loss = task.training_step(batch, 0)
    low, auxiliary = model.forward_auxiliary(batch.images)
    factors = None if weights is None else torch.tensor(weights)
    want = pixel_loss(low, batch.masks, factors)
    if head == "upernet":
        want = want + 0.4 * pixel_loss(auxiliary, batch.masks, factors)
    torch.testing.assert_close(loss, want)


def test_broken_images_count_nothing():
    model = small("sem_fpn").eval()
    image, mask = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), torch.randint(0, 3, (40, 50))
    mask[:3] = IGNORE
    batch = MaskedImages((image, image), (mask, mask), torch.arange(2), torch.tensor([True, False]))
    assert int(counted(model, batch).sum()) == 37 * 50
