"""The competitors of a case: timm's module and ours with the same weights, the same input and the same step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.bench import pyramid
from xcit.bench.cases import BackboneCase, Case, Mode, PyramidCase, TrainingCase, XCACase
from xcit.models.factory import from_timm
from xcit.models.layers import XCA

SEED = 2106
OUTPUT = "output"
"""What the evidence of an output is called; several of them have their number after it."""


@dataclass(frozen=True)
class Contender:
    """One competitor.

    Args:
        name: "timm", or the form of XCA that ours is asked for; with " compiled" after it under torch.compile.
        module: whose parameters and gradients are looked at.
        step: what is measured; returns the output, or the outputs.
        clear: drops what a step leaves behind, so that the next one starts as the first did.
        uncompared: parameters whose gradient says nothing: nothing but rounding is in it.
    """

    name: str
    module: nn.Module
    step: Callable[[], Tensor | list[Tensor]]
    clear: Callable[[], None]
    uncompared: frozenset[str] = frozenset()

    @property
    def shows_form(self) -> bool:
        """Whether a step tells which form of XCA ran: timm's has one, and a compiled graph does not tell."""
        return not (self.name.startswith("timm") or self.name.endswith("compiled"))

    def evidence(self) -> dict[str, Tensor]:
        """The output of one step and the gradients it left, by parameter; what competitors are compared by."""
        self.clear()
        output = self.step()
        outputs = {OUTPUT: output} if isinstance(output, Tensor) else {f"{OUTPUT} {i}": y for i, y in enumerate(output)}
        evidence = {name: y.detach().clone() for name, y in outputs.items()}
        evidence |= {
            name: p.grad.clone()
            for name, p in self.module.named_parameters()
            if p.grad is not None and name not in self.uncompared
        }
        self.clear()
        return evidence


def build(
    case: Case, names: tuple[str, ...], *, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> list[Contender]:
    """Make a case's competitors.

    Args:
        case: sizes and mode.
        names: "timm" and forms of XCA.
        device: where they run.
        dtype: of weights and input.
        compiled: add each of timm and "auto" under torch.compile as well.

    Returns:
        In the order of ``names``, the compiled ones last. All have equal weights, every one of them random (LayerScale,
        temperatures and batch-norm statistics too), so that a difference anywhere shows in the outputs.
    """
    torch.manual_seed(SEED)
    modules = _modules(case, names)
    contenders = []
    for name, module in modules.items():
        module.to(device=device, dtype=dtype).train(case.mode == "training")
        contenders.append(_contender(name, module, module, case, device, dtype))
    if compiled:
        for name in ("timm", "auto"):
            # a copy: training steps move the weights, and the pair would move the same ones
            module = copy.deepcopy(modules[name])
            contenders.append(_contender(f"{name} compiled", module, torch.compile(module), case, device, dtype))
    return contenders


def randomize(module: nn.Module) -> None:
    """Give every parameter and every batch-norm statistic a random value of a size that keeps activations near one."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("temperature"):
                p.uniform_(0.5, 2.0)
            elif "gamma" in name:
                p.uniform_(0.2, 0.8)
            elif name.endswith("bias"):
                p.normal_(std=0.2)
            elif p.ndim == 1:  # the scale of a norm
                p.normal_(mean=1.0, std=0.2)
            else:
                p.normal_(std=p[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def _modules(case: Case, names: tuple[str, ...]) -> dict[str, nn.Module]:
    if isinstance(case, XCACase):
        return _xca_modules(case, names)
    if isinstance(case, PyramidCase):
        return pyramid.make_pyramids(_timm_model(case.architecture), names, randomize)
    return _backbone_modules(case.architecture, names)


def _timm_model(architecture: str) -> nn.Module:
    import timm

    model = timm.create_model(f"{architecture}_224", pretrained=False)
    randomize(model)
    return model


def _xca_modules(case: XCACase, names: tuple[str, ...]) -> dict[str, nn.Module]:
    from timm.models import xcit as timm_xcit

    reference = timm_xcit.XCA(case.embed_dim, num_heads=case.num_heads, qkv_bias=True)
    randomize(reference)
    modules: dict[str, nn.Module] = {}
    for name in names:
        if name == "timm":
            modules[name] = reference
            continue
        modules[name] = XCA(case.embed_dim, case.num_heads, form=name)  # type: ignore[arg-type]
        modules[name].load_state_dict(reference.state_dict())
    return modules


def _backbone_modules(architecture: str, names: tuple[str, ...]) -> dict[str, nn.Module]:
    reference = _timm_model(architecture)
    modules: dict[str, nn.Module] = {}
    for name in names:
        if name == "timm":
            modules[name] = reference
            continue
        model = from_timm(reference)
        model.set_attn_form(name)  # type: ignore[arg-type]
        modules[name] = model
    return modules


def _contender(
    name: str, module: nn.Module, call: Callable[..., Any], case: Case, device: torch.device, dtype: torch.dtype
) -> Contender:
    if isinstance(case, TrainingCase):
        from xcit.bench.training import make_batch, make_task, training_step  # Lightning takes seconds to import

        task = make_task(module, SEED, compiled=call is not module).to(device)
        step = training_step(task, make_batch(case, device, SEED))
        return Contender(name, module, step, lambda: module.zero_grad(set_to_none=True))
    # every competitor draws its input from the same seed: equal, but with gradients of its own
    draw = torch.Generator().manual_seed(SEED)
    x = _input(case, draw).to(device, dtype)
    make: Callable[..., Callable[[], Tensor | list[Tensor]]] = _STEPS[type(case), case.mode]

    def clear() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None

    uncompared = pyramid.only_rounding(module) if isinstance(case, PyramidCase) else frozenset()
    return Contender(name, module, make(module, call, x, draw, clear), clear, uncompared)


def _input(case: XCACase | BackboneCase | PyramidCase, draw: torch.Generator) -> Tensor:
    if isinstance(case, XCACase):
        return torch.randn(case.batch_size, case.num_tokens, case.embed_dim, generator=draw)
    if isinstance(case, PyramidCase):
        return pyramid.make_images(case, draw)
    return torch.randn(case.batch_size, 3, case.image_size, case.image_size, generator=draw)


def _inference(
    module: nn.Module, call: Callable[..., Any], x: Tensor, draw: torch.Generator, clear: Callable[[], None]
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.inference_mode():
            return call(x)

    return step


def _layer_training(
    module: nn.Module, call: Callable[..., Any], x: Tensor, draw: torch.Generator, clear: Callable[[], None]
) -> Callable[[], Tensor]:
    x.requires_grad_()
    cotangent = torch.randn(x.shape, generator=draw).to(x)

    def step() -> Tensor:
        clear()
        y = call(x)
        y.backward(cotangent)
        return y

    return step


def _backbone_training(
    module: nn.Module, call: Callable[..., Any], x: Tensor, draw: torch.Generator, clear: Callable[[], None]
) -> Callable[[], Tensor]:
    labels = torch.randint(1000, (x.shape[0],), generator=draw).to(x.device)
    # a rate so small that a hundred steps leave the weights' size, and so the arithmetic, as it was
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-7)

    def step() -> Tensor:
        clear()
        logits = call(x)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        return logits

    return step


_STEPS: dict[tuple[type, Mode], Callable[..., Callable[[], Tensor | list[Tensor]]]] = {
    (XCACase, "inference"): _inference,
    (XCACase, "training"): _layer_training,
    (BackboneCase, "inference"): _inference,
    (BackboneCase, "training"): _backbone_training,
    (PyramidCase, "inference"): _inference,
    (PyramidCase, "training"): pyramid.training_step,
}
