"""Optimiser and schedule of supervised training: what is decayed, and how fast the weights move at which step.

Which parameters decay. The released training built its optimiser with timm's factory (timm 0.4), which asks the model
for names to leave alone and otherwise decays everything but vectors and biases. Hence

* decayed: kernels and matrices, and the temperatures of XCA, (heads, 1, 1). XCA itself asks for its temperature to be
  left alone, but the factory asked the outermost model only, which does not name it. The projection of the positional
  encoding is decayed too: the released model names a ``pos_embed``, which no parameter of it is called.
* not decayed: the class token, by name; LayerScale, norms and all biases, for their shape.

The published weights come from that, so it is what ``decay_table`` gives.

The schedule is a function of the step alone: a linear rise, then a cosine over the whole length of the run, of which
the rise covers the beginning. The released code moved its schedule by the epoch and one epoch late: it set the rate of
epoch e + 1 by ``step(e)``, so that its first two epochs both ran at ``warmup_lr``. That is not copied.

Source: facebookresearch/xcit, main.py and xcit.py; Loshchilov and Hutter, "Decoupled weight decay regularization",
2019, and "SGDR", 2017.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

BETAS = (0.9, 0.999)
EPS = 1e-8
MOMENTUM = 0.9
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")
"""What FSDP and torch.compile add to the names of the parameters below them."""


def decay_table(model: nn.Module) -> dict[str, bool]:
    """Return by name whether weight decay applies to a parameter, in the model's order; frozen ones are left out.

    Args:
        model: of this package or of timm. ``model.no_weight_decay()``, where it exists, names what to leave alone;
            timm's names may hold the shell's wildcards.
    """
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    return {
        name: not (p.ndim <= 1 or name.endswith(".bias") or any(fnmatchcase(name, pattern) for pattern in spared))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def parameter_groups(
    model: nn.Module, weight_decay: float, table: Mapping[str, bool] | None = None
) -> list[dict[str, Any]]:
    """Return a model's parameters in two groups for an optimiser: without weight decay, and with.

    Args:
        model: see ``decay_table``.
        weight_decay: of the second group.
        table: ``decay_table(model)`` of an earlier moment. FSDP lays parameters out flat and renames them, so that
            their shape says nothing any more: take the table before it wraps the model.

    Returns:
        Groups that are not empty, each with ``params`` and ``weight_decay``.
    """
    if table is None:
        table = decay_table(model)
    parameters = {_plain(name): p for name, p in model.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name, decayed in table.items() if decayed is chosen], "weight_decay": value}
        for chosen, value in ((False, 0.0), (True, weight_decay))
    ]
    return [group for group in groups if group["params"]]


def _plain(name: str) -> str:
    """Return a parameter's own name, without what wrappers put between."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def build_optimizer(
    model: nn.Module,
    *,
    opt: Literal["adamw", "sgd"],
    lr: float,
    weight_decay: float,
    table: Mapping[str, bool] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimiser of all parameters that are not frozen.

    Args:
        model: on the device where it will be trained.
        opt: "adamw" (betas 0.9 and 0.999, eps 1e-8), or "sgd" with Nesterov's momentum 0.9.
        lr: peak learning rate.
        weight_decay: see ``decay_table``. AdamW multiplies it by the learning rate; SGD adds it to the gradient.
        table: see ``parameter_groups``.

    Cost:
        On the CPU PyTorch's fused kernels run, in a fifth of the time of its loop over parameters (S12/8, 26 M
        parameters, two cores: 19 against 121 ms a step) and with the same equations. On a GPU PyTorch chooses.
    """
    groups = parameter_groups(model, weight_decay, table)
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    fused = True if on_cpu else None
    optimizer: torch.optim.Optimizer
    if opt == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True, fused=fused)
    if on_cpu:
        # Fused optimisers announce that they undo float16's loss scaling themselves, for which Lightning then refuses
        # to clip gradients. On the CPU there is no such scaling (float16 training is for GPUs), so nothing to undo.
        optimizer._step_supports_amp_scaling = False
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    total_steps: int,
) -> CosineLRScheduler:
    """Return the schedule, which has set the learning rate of step 0.

    After each step call ``step_update(num_updates=steps_done)``. It keeps no state: whoever resumes calls that once.

    Args:
        optimizer: every group of it follows ``lr_at``.
        lr: peak learning rate.
        min_lr: where the cosine ends, at ``total_steps``, and what stays after it.
        warmup_lr: of step 0, if there are ``warmup_steps``.
        warmup_steps: length of the linear rise; 0 begins at the peak.
        total_steps: length of the run, the rise included.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=total_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        t_in_epochs=False,
    )
    schedule.step_update(num_updates=0)
    return schedule


def lr_at(step: int, *, lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, of the schedule that ``build_schedule`` makes.

    warmup_lr + (lr - warmup_lr) · step / warmup_steps during the rise; afterwards
    min_lr + (lr - min_lr) · (1 + cos(π · step / total_steps)) / 2. The cosine counts from step 0, as timm's does, so
    that the rate right after the rise is a little under the peak.
    """
    if step < warmup_steps:
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    if step >= total_steps:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / total_steps))
