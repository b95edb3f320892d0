"""The detection task: which weights decay, the schedule of the released configuration."""

import pytest
import torch
from torch import nn

from xcit.models.detectors import create_detector
from xcit.tasks.detection import StepSchedule, build_step_schedule, detection_decay


def test_only_layer_norms_are_spared_from_decay():
    model = create_detector("xcit_nano_12_p16", num_classes=2, out_channels=8, box_width=8, mask_channels=8)
    spared = {name for name, decayed in detection_decay(model).items() if not decayed}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    assert spared == norms
    assert len(norms) == 12 * 3 * 2
    decayed = set(detection_decay(model)) - spared
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
