"""The detection task: which weights decay, the schedule of the released configuration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from xcit.models.detectors import create_detector
from xcit.tasks.dense import norm_spared_decay
from xcit.tasks.detection import StepSchedule, build_step_schedule, detected


def test_only_layer_norms_are_spared_from_decay():
    model = create_detector("xcit_nano_12_p16", num_classes=2, out_channels=8, box_width=8, mask_channels=8)
    spared = {name for name, decayed in norm_spared_decay(model).items() if not decayed}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    assert spared == norms
    assert len(norms) == 12 * 3 * 2
    decayed = set(norm_spared_decay(model)) - spared
    assert {"backbone.body.blocks.0.attn.temperature", "backbone.body.blocks.0.gamma1"} <= decayed
    assert "backbone.body.patch_embed.proj.0.1.weight" in decayed  # a batch norm, which is not called norm


def test_steps():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0)
    schedule = build_step_schedule(optimizer, StepSchedule(1e-4, 1e-7, 500, (2700, 3300), 3600))
    rates = []
    for step in range(3601):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(num_updates=step + 1)
    assert rates[0] == pytest.approx(1e-7)
    assert rates[250] == pytest.approx(1e-4 * (1 - (1 - 250 / 500) * (1 - 0.001)))  # mmcv's linear warm-up
    assert rates[500] == rates[2699] == pytest.approx(1e-4)
    assert rates[2700] == rates[3299] == pytest.approx(1e-5)
    assert rates[3300] == rates[3599] == pytest.approx(1e-6)


def test_an_image_is_judged_the_same_whoever_shares_its_batch():
    torch.manual_seed(0)
    model = create_detector("xcit_nano_12_p16", num_classes=2, out_channels=8, box_width=8, mask_channels=8,
                            mask_convs=1, min_size=64, max_size=128, score_thresh=0.0).eval()  # fmt: skip
    annotated = SimpleNamespace(image_ids=np.array([5, 6, 7]), category_ids=np.array([1, 3]))
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 128), torch.rand(3, 64, 64)]
    with torch.no_grad():
        together = detected(model, images, [0, 1, 2], annotated)
        alone = [row for i in range(3) for row in detected(model, images[i : i + 1], [i], annotated)]
    assert len(alone) == len(together) > 10
    together.sort(key=lambda row: row["image_id"])
    for mine, other in zip(together, alone, strict=True):
        assert mine["image_id"] == other["image_id"]
        assert mine["bbox"] == pytest.approx(other["bbox"], abs=0.01)
        assert mine["score"] == pytest.approx(other["score"], abs=1e-4)
