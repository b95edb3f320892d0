"""What a run would do, before it does anything: its data, its model, its steps, its learning rates, its memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xcit.data.image_set import ImageSet
from xcit.inference.costs import count_model_costs
from xcit.recipes.build import Parts, trained_tensors
from xcit.recipes.config import OptimConfig, TrainConfig
from xcit.recipes.dino_config import DinoOptimConfig
from xcit.recipes.job import Fact
from xcit.recipes.recipe import training_cost
from xcit.tasks.optim import lr_at
from xcit.tasks.task import Schedule

PLOT_WIDTH = 60
PLOT_HEIGHT = 6
BLOCKS = " ▁▂▃▄▅▆▇█"


def plan(config: TrainConfig, parts: Parts) -> list[Fact]:
    """Return what a run would do, as pairs of a name and a text.

    Memory is an estimate: weights, gradients, the optimiser's state and averages are exact; the activations are those
    that autograd keeps for the images of one device, counted by following every tensor; scratch space comes on top.
    """
    task, (train, val, test, notes) = parts.task, parts.splits
    model, optim = task.model, config.optim
    size = config.data.image_size
    costs = count_model_costs(model, (config.data.in_chans, size, size))
    trained, total = trained_tensors(model), sum(p.numel() for p in model.parameters())
    steps = parts.train_loader.sampler.num_steps
    images = steps * optim.batch_size
    counts = train.class_counts
    return [
        ("recipe", config.recipe),
        ("data", f"{len(train):,} images to train on, {len(val):,} to choose by, {_held_out(test)}"),
        ("classes", f"{len(train.class_names)}; {int(counts.min()):,} to {int(counts.max()):,} training images each"),
        *(("note", note) for note in notes),
        ("model", f"{config.model.name}, {'random weights' if config.model.pretrained == 'none' else 'pretrained'}"),
        (
            "parameters",
            f"{total / 1e6:.2f} M" + (f", {trained / 1e6:.2f} M of them trained" if trained < total else ""),
        ),
        ("multiply-adds", f"{costs.multiply_adds / 1e9:.3f} G an image of {size} x {size} px, forward"),
        ("steps", f"{config.epochs} epochs x {steps:,} = {config.epochs * steps:,}"),
        ("batch", _batch(config)),
        ("images seen", f"{config.epochs * images:,}, each {_views(config)} an epoch on average"),
        ("compute", training_cost(config.epochs, images, costs.multiply_adds / 1e9)),
        ("learning rate", rate_text(config.lr, optim, task.schedule.warmup_lr, task.schedule.warmup_steps)),
        ("", "\n".join(lr_plot(task.schedule))),
        ("teacher", _teacher(config)),
        ("memory", _memory(config, total, trained, costs.training_bytes)),
    ]


def lr_plot(schedule: Schedule, width: int = PLOT_WIDTH, height: int = PLOT_HEIGHT) -> list[str]:
    """Return the learning rate over the steps as lines of text, the highest first."""
    return lr_lines(partial(lr_at, **schedule._asdict()), schedule.total_steps, width, height)


def lr_lines(
    rate_at: Callable[[int], float], total_steps: int, width: int = PLOT_WIDTH, height: int = PLOT_HEIGHT
) -> list[str]:
    """Return a learning rate over the steps as lines of text, the highest first.

    Args:
        rate_at: of a step, from 0.
        total_steps: of the run.
        width: in characters.
        height: in lines.
    """
    steps = [round(i * (total_steps - 1) / max(1, width - 1)) for i in range(width)]
    rates = [rate_at(step) for step in steps]
    top = max(rates)
    levels = [round(rate / top * height * 8) if top else 0 for rate in rates]
    lines = ["".join(BLOCKS[min(8, max(0, level - 8 * row))] for level in levels) for row in reversed(range(height))]
    lines[0] = f"{lines[0]}  {top:.2g}"
    lines[-1] = f"{lines[-1]}  {rates[-1]:.2g} at step {total_steps:,}"
    return lines


def _held_out(test: ImageSet | None) -> str:
    return f"{len(test):,} held out" if test is not None else "none held out"


def _batch(config: TrainConfig) -> str:
    times = f", {config.optim.accumulate} times" if config.optim.accumulate > 1 else ""
    devices = f" on each of {config.world_size} devices" if config.world_size > 1 else ""
    return f"{config.optim.batch_size} images a step: {config.micro_batch_size} at once{times}{devices}"


def _views(config: TrainConfig) -> str:
    repeats = config.augment.repeats
    return "once" if repeats == 1 else f"drawn {repeats} times with a chance of 1 in {repeats}: once"


def rate_text(lr: float, optim: OptimConfig | DinoOptimConfig, warmup_lr: float, warmup_steps: int) -> str:
    """Return the learning rate in words: its peak and where that comes from, its rise, its end."""
    origin = f" = {optim.lr:g} x {optim.batch_size} / {optim.lr_batch}" if optim.lr_batch else ""
    rise = f"; from {warmup_lr:g} in {warmup_steps:,} steps" if warmup_steps else ""
    return f"peak {lr:.3g}{origin}{rise}; ends at {optim.min_lr:g}"


def _teacher(config: TrainConfig) -> str:
    distill = config.distill
    if distill.kind == "none":
        return "none"
    tau = f", tau {distill.tau:g}" if distill.kind == "soft" else ""
    return f"{distill.teacher}, {distill.kind}, alpha {distill.alpha:g}{tau}"


def _memory(config: TrainConfig, total: int, trained: int, training_bytes: int) -> str:
    """Estimate what a device holds at the height of a step."""
    floats = total + trained * (2 if config.optim.opt == "sgd" else 3) + (total if config.optim.ema_decay else 0)
    if config.compute.strategy == "fsdp":
        floats = floats // config.world_size
    activations = training_bytes * config.micro_batch_size
    if config.compute.precision != "32":
        activations = activations // 2
    if config.model.grad_checkpointing:
        return f"{mib(4 * floats)} for weights and optimiser; activations are computed again where they are needed"
    return (
        f"about {mib(4 * floats + activations)}: {mib(4 * floats)} for weights, gradients and optimiser, "
        f"{mib(activations)} for activations"
    )


def mib(size: float) -> str:
    """Return a number of bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
