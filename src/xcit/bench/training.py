"""A whole training step through the task that trains (``xcit.tasks.classification``), for our model and for timm's.

Both go through the same code, which is what a run does with a batch: seeds, mixing, model, loss on soft targets,
backward pass, AdamW with its decay groups, the schedule. Only the model differs, and both have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning
import torch
from torch import Tensor, nn

from xcit.bench.cases import TrainingCase
from xcit.data.batches import LabelledImages
from xcit.recipes.augment import batch_mixer
from xcit.recipes.config import AugmentConfig, OptimConfig
from xcit.recipes.quiet import quiet_lightning
from xcit.recipes.settings import ComputeConfig
from xcit.tasks.classification import ClassificationTask
from xcit.tasks.task import Schedule

NUM_CLASSES = 1000
RATE = 1e-7
"""Of learning: so small that a hundred steps leave the weights' size, and so the arithmetic, as it was."""


def make_task(model: nn.Module, seed: int, *, compiled: bool = False) -> ClassificationTask:
    """Return the task that trains a model as the paper's recipe does, but for the learning rate."""
    optim = OptimConfig()
    return ClassificationTask(
        model,
        schedule=Schedule(lr=RATE, min_lr=RATE, warmup_lr=RATE, warmup_steps=0, total_steps=10**6),
        opt=optim.opt,
        weight_decay=optim.weight_decay,
        mixer=batch_mixer(AugmentConfig(), NUM_CLASSES, optim.label_smoothing),
        compile=compiled,
        channels_last=ComputeConfig().channels_last,
        seed=seed,
    )


def make_batch(case: TrainingCase, device: torch.device, seed: int) -> LabelledImages:
    """Return a batch of noise with random labels."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, generator=draw)
    labels = torch.randint(NUM_CLASSES, (case.batch_size,), generator=draw)
    everything = torch.arange(case.batch_size), torch.ones(case.batch_size, dtype=torch.bool)
    return LabelledImages(*(tensor.to(device) for tensor in (images, labels, *everything)))


def training_step(task: ClassificationTask, batch: LabelledImages) -> Callable[[], Tensor]:
    """Return what Lightning's loop does with a batch, as a call that returns the loss.

    The batch is the first of its epoch each time, so that every call draws alike.
    """
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="gpu" if batch.images.is_cuda else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    task.trainer = trainer
    parts = task.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    trainer.strategy.optimizers = [optimizer]

    def step() -> Tensor:
        task.on_train_batch_start(batch, 0)
        # the mixer writes into what it is given
        loss = task.training_step(batch._replace(images=batch.images.clone()), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.lr_scheduler_step(scheduler, None)
        task.on_train_batch_end({"loss": loss.detach()}, batch, 0)
        return loss.detach()

    return step
