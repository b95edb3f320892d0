"""What a run would do, told beforehand: against the run itself, and against plain counting."""

from dataclasses import replace

import pytest
import torch

from xcit.inference.costs import count_model_costs
from xcit.recipes.build import build, build_model
from xcit.recipes.config import AugmentConfig, DataConfig, TrainConfig
from xcit.recipes.dry_run import lr_plot, plan
from xcit.recipes.settings import override
from xcit.tasks.optim import lr_at
from xcit.tasks.task import Schedule

BASE = override(
    TrainConfig(
        recipe="mine",
        epochs=4,
        data=DataConfig(format="digits", image_size=16, in_chans=1, num_workers=0, val_fraction=0.2),
        augment=AugmentConfig(repeats=1, rand_augment="", mixup=0, cutmix=0),
    ),
    {
        "model.name": "xcit_nano_12_p8",
        "model.options": {"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2},
        "optim.batch_size": 96,
        "optim.warmup_epochs": 1,
    },
)


def told(config=BASE, **changes):
    return dict(plan(config := override(config, changes), build(config)))


def test_counts_are_those_of_the_parts():
    parts = build(BASE)
    facts = dict(plan(BASE, parts))
    model = parts.task.model
    assert facts["data"] == "1,149 images to train on, 288 to choose by, 360 held out"
    low, high = parts.splits.train.class_counts.min(), parts.splits.train.class_counts.max()
    assert facts["classes"] == f"10; {low} to {high} training images each"
    assert facts["parameters"] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
    madds = count_model_costs(model, (1, 16, 16)).multiply_adds
    assert facts["multiply-adds"].startswith(f"{madds / 1e9:.3f} G an image of 16 x 16 px")
    assert len(list(parts.train_loader)) == 11
    assert facts["steps"] == "4 epochs x 11 = 44"
    assert facts["images seen"].startswith("4,224, ")
    assert facts["compute"].endswith(f" = {3 * madds * 4224 / 1e9:.3g} G multiply-adds")
    assert facts["learning rate"] == "peak 9.38e-05 = 0.0005 x 96 / 512; from 1e-06 in 11 steps; ends at 1e-05"
    assert facts["batch"] == "96 images a step: 96 at once"
    assert facts["teacher"] == "none"
    assert facts["model"] == "xcit_nano_12_p8, random weights"


def test_the_learning_rate_that_is_told_is_the_schedules():
    parts = build(BASE)
    assert parts.task.schedule == Schedule(BASE.lr, 1e-5, 1e-6, 11, 44)
    plain = told(**{"optim.lr_batch": 0, "optim.warmup_epochs": 0})
    assert plain["learning rate"] == "peak 0.0005; ends at 1e-05"


def test_batches_over_devices_and_parts():
    facts = dict(plan(config := override(BASE, {"compute.devices": 2, "optim.accumulate": 4}), build(config)))
    assert facts["batch"] == "96 images a step: 12 at once, 4 times on each of 2 devices"


def test_what_is_frozen_is_not_counted_as_trained(tmp_path):
    from xcit.models.weights import save_checkpoint
    from xcit.recipes.build import choose_preprocessing, open_splits

    splits = open_splits(BASE)
    torch.manual_seed(1)
    donor = build_model(BASE, splits.train.class_names)
    save_checkpoint(
        donor,
        tmp_path / "stem.safetensors",
        class_names=splits.train.class_names,
        preprocessing=choose_preprocessing(BASE, donor, splits.train),
    )
    facts = told(**{"model.surgery": str(tmp_path / "stem.safetensors")})
    stem = sum(p.numel() for p in donor.patch_embed.parameters())
    total = sum(p.numel() for p in donor.parameters())
    assert facts["parameters"] == f"{total / 1e6:.2f} M, {(total - stem) / 1e6:.2f} M of them trained"


def test_repeated_images_are_told():
    assert "drawn 3 times with a chance of 1 in 3" in told(**{"augment.repeats": 3})["images seen"]


@pytest.mark.parametrize(("changes", "floats"), [({}, 4), ({"optim.opt": "sgd"}, 3), ({"optim.ema_decay": 0.9}, 5)])
def test_memory_of_weights_gradients_and_optimiser(changes, floats):
    """AdamW keeps two moments, SGD one; averages are a second copy of the weights."""
    wide = override(BASE, {"model.options.embed_dim": 512, "model.options.num_heads": 8} | changes)
    parts = build(wide)
    total = sum(p.numel() for p in parts.task.model.parameters())
    mib = 4 * floats * total / 2**20
    assert mib > 20
    assert f": {mib:.0f} MiB for weights, gradients and optimiser" in dict(plan(wide, parts))["memory"]


def test_memory_of_activations_goes_with_what_is_computed_at_once():
    def activations(**changes):
        text = told(override(BASE, {"model.options.embed_dim": 128}), **changes)["memory"]
        return float(text.split("optimiser, ")[1].split()[0])

    whole = activations()
    assert whole > 10
    assert activations(**{"optim.accumulate": 4}) == pytest.approx(whole / 4, abs=1)
    assert activations(**{"compute.precision": "bf16"}) == pytest.approx(whole / 2, abs=1)
    assert "computed again" in told(**{"model.grad_checkpointing": True})["memory"]


def test_planning_leaves_the_weights_as_they_are():
    parts = build(BASE)
    model = parts.task.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(BASE, parts)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_plot_is_the_schedule():
    schedule = Schedule(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=100, total_steps=1000)
    lines = lr_plot(schedule, width=40, height=5)
    assert len(lines) == 5
    heights = [sum(" ▁▂▃▄▅▆▇█".index(line[i]) for line in lines) for i in range(40)]
    rates = [lr_at(round(i * 999 / 39), **schedule._asdict()) for i in range(40)]
    assert heights == [round(rate / max(rates) * 40) for rate in rates]
    assert lines[0].endswith("0.00097") or lines[0].endswith("0.00098")
    assert lines[-1].endswith("1e-05 at step 1,000")


def test_a_plot_of_one_step_and_of_no_rate():
    still = Schedule(lr=0.0, min_lr=0.0, warmup_lr=0.0, warmup_steps=0, total_steps=1)
    assert [line[:60] for line in lr_plot(still)] == [" " * 60] * 6
    flat = Schedule(lr=1e-3, min_lr=1e-3, warmup_lr=0.0, warmup_steps=0, total_steps=3)
    assert all(line.startswith("█" * 60) for line in lr_plot(flat))


def test_a_teacher_is_told():
    from xcit.recipes.dry_run import _teacher

    soft = replace(BASE.distill, kind="soft", tau=3.0, alpha=0.25)
    assert _teacher(replace(BASE, distill=soft)) == "timm:regnety_160.deit_in1k, soft, alpha 0.25, tau 3"
    assert _teacher(replace(BASE, distill=replace(soft, kind="hard", tau=1.0))).endswith("hard, alpha 0.25")
