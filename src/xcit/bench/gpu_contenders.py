"""The competitors of one case of `python -m xcit.bench gpu`: built, run, compared.

Whatever stands for one XCiT has the same random weights: timm's module, ours, and ours folded. The measure of what a
competitor returns is the eager float32 model of those weights, timm's; a peer's is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xcit.bench.contenders import SEED, randomize
from xcit.bench.deploy_models import NUM_CLASSES, TABLE_UP_TO, make_images, make_labels
from xcit.bench.gpu_cases import COMPILED, PRECISIONS, Entry, GpuCase, Precision
from xcit.deploy.fold_report import count_multiply_adds
from xcit.errors import BackendError
from xcit.inference.devices import synchronize
from xcit.models.factory import from_timm
from xcit.models.folded_copy import folded_copy
from xcit.models.zoo import ARCHITECTURES
from xcit.ops.kernels import Kernels, interpreted, observe_kernels
from xcit.ops.xca import observe_forms
from xcit.recipes.imagenet import DROP_PATH
from xcit.recipes.peers import create_peer

Step = Callable[[], Tensor]

RATE = 1e-7
"""Of learning: so small that a hundred steps leave the weights' size, and so the arithmetic, as it was."""
LOSS_SCALE = 1024.0
"""With which float16 begins; activations of random weights need no more."""
WARMUP = 3
"""Calls before anything is measured: CUDA graphs run, record and replay in the first three."""
MODES = {"compile": "default", "autotune": "max-autotune", "graphs": "reduce-overhead"}
"""torch.compile's, by our names."""

_parts: dict[str, torch.dtype] = {n: getattr(torch, n) for n in ("float32", "bfloat16", "float16")}


class NoKernelsError(BackendError):
    """A model that cannot choose its kernels, or a device without any."""


@dataclass
class Running:
    """A competitor that has answered."""

    entry: Entry
    module: nn.Module
    step: Step
    """What is measured; returns logits."""
    clear: Callable[[], None]
    """Drops what a step leaves behind and the next one would free: gradients."""
    reset: Callable[[], None]
    """Gives the weights and the statistics back that it began with: training steps move them."""
    held_bytes: int
    """Weights, statistics, optimiser."""
    build_s: float
    """Until it had answered a few times, compiling included."""
    call_s: float = 0.0
    """Of the last of those calls."""
    kernels_run: tuple[str, ...] = ()
    """The kernels that were seen to run, each once; of a compiled model, in a forward pass of the module itself."""
    form: str = ""
    """Of XCA, where a step shows it."""
    graphs: int = 0
    """That torch.compile made; 0 without it."""
    difference: float = float("nan")
    """From what it is measured by; see ``xcit.bench.gpu_checks``."""


def dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the type of weights and images, and that of the matrix products."""
    chosen = PRECISIONS[precision]
    return _parts[chosen.weights], _parts[chosen.arithmetic]


def build_module(entry: Entry, image_size: int, device: torch.device, *, drop_path: float | None = None) -> nn.Module:
    """Build a competitor's model; the same weights each time on a kind of device.

    Args:
        entry: which.
        image_size: side of the images.
        device: where.
        drop_path: its rate, for training; None for evaluation mode without any.

    Returns:
        A float32 module, in training mode if a rate is given. Peers keep timm's own initial values.

    Raises:
        NoKernelsError: kernels are asked for where there are none.
        UnknownNameError: timm has no such model.
        ConfigError: it does not take images of that size, or cannot be folded.
    """
    torch.manual_seed(SEED)
    options: dict[str, Any] = {} if not drop_path else {"drop_path_rate": drop_path}
    training = drop_path is not None
    with device:
        if entry.model not in ARCHITECTURES:
            return _peer(entry.model, image_size, options).train(training)
        reference = create_peer(f"{entry.model}_224", num_classes=NUM_CLASSES, options=options)
    randomize(reference)
    reference.train(training)
    if entry.source == "timm":
        return reference
    with device:
        module: nn.Module = from_timm(reference)
    if entry.source == "folded":
        tables = [(image_size, image_size)] if image_size <= TABLE_UP_TO else []
        module = folded_copy(module, image_sizes=tables)
    choose_kernels(module, entry.kernels, device)
    return module


def choose_kernels(module: nn.Module, kernels: Kernels, device: torch.device) -> None:
    """Tell a model of ours which kernels to run.

    Raises:
        NoKernelsError: Triton's, of a model that cannot choose, or on a CPU without Triton's interpreter.
    """
    choose = getattr(module, "set_kernels", None)
    if choose is not None:
        choose(kernels)
    if kernels == "plain":
        return
    if choose is None:
        raise NoKernelsError(f"{type(module).__name__} has no set_kernels: this version has no kernels for it.")
    if device.type != "cuda" and not interpreted():
        raise NoKernelsError("Triton's kernels run on CUDA devices; they are left out on this one.")


def drop_path_of(case: GpuCase) -> float | None:
    """Return the published rate of a training case's model; None of inference."""
    return DROP_PATH[case.model] if case.mode == "training" else None


def start(case: GpuCase, entry: Entry, device: torch.device) -> Running:
    """Build a competitor, compile it if that is its way, and let it answer a few times.

    Raises:
        Exception: whatever a model, a compiler or a kernel raises.
    """
    began = time.perf_counter()
    module = build_module(entry, case.image_size, device, drop_path=drop_path_of(case))
    make = training_step if case.mode == "training" else forward_step
    graphs_before = _graphs()
    reset = _resetter(module) if case.mode == "training" else _nothing
    step, tensors, clear = make(module, case, entry, device)
    ran: list[str] = []
    forms: list[str] = []
    if entry.run in COMPILED:
        # seen in the module itself: dynamo would compile once for being watched, and again for not being
        if entry.is_ours:
            with observe_kernels() as ran:
                forward_step(module, case, replace(entry, run="eager"), device)[0]()
        with compiler_settings(case):
            step()
    else:
        with observe_kernels() as ran, observe_forms() as forms:
            step()
    synchronize(device)
    for _ in range(1, WARMUP):
        last = time.perf_counter()
        with compiler_settings(case):
            step()
        synchronize(device)
    clear()
    return Running(
        entry,
        module,
        step,
        clear,
        reset,
        held_bytes=sum(t.numel() * t.element_size() for t in tensors()),
        build_s=time.perf_counter() - began,
        call_s=time.perf_counter() - last,
        kernels_run=tuple(dict.fromkeys(ran)),
        form="+".join(sorted(set(forms))),
        graphs=_graphs() - graphs_before,
    )


_Made = tuple[Step, Callable[[], Sequence[Tensor]], Callable[[], None]]


def forward_step(module: nn.Module, case: GpuCase, entry: Entry, device: torch.device) -> _Made:
    """Return a forward pass without gradients as a call, what it holds, and a call that has nothing to clear."""
    weights, _ = dtypes(case.precision)
    layout = torch.channels_last if entry.run == "channels-last" else torch.preserve_format
    module = module.to(device=device, dtype=weights)
    if entry.run == "channels-last":
        module = module.to(memory_format=torch.channels_last)
    batch = make_images(case.image_size, case.batch_size).to(device, weights).contiguous(memory_format=layout)
    call, context, graphed = compiled(module, case, entry), _autocast(case.precision, device), _has_graphs(case, entry)

    def step() -> Tensor:
        if graphed:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode(), context():
            return call(batch)

    return step, lambda: [*module.parameters(), *module.buffers()], _nothing


def training_step(module: nn.Module, case: GpuCase, entry: Entry, device: torch.device) -> _Made:
    """Return a whole training step as a call that returns its logits, what it holds, and what clears gradients."""
    weights, _ = dtypes(case.precision)
    layout = torch.channels_last if entry.run == "channels-last" else torch.preserve_format
    module = module.to(device=device, dtype=weights)
    if entry.run == "channels-last":
        module = module.to(memory_format=torch.channels_last)
    batch = make_images(case.image_size, case.batch_size).to(device, weights).contiguous(memory_format=layout)
    targets = make_labels(case.batch_size).to(device)
    call, context = compiled(module, case, entry), _autocast(case.precision, device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, fused=True)
    narrow = PRECISIONS[case.precision].autocast == "float16"
    scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=narrow)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with context():
            logits = call(batch)
            loss = F.cross_entropy(logits, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return logits.detach()

    def tensors() -> list[Tensor]:
        state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
        return [*module.parameters(), *module.buffers(), *state]

    return step, tensors, lambda: optimizer.zero_grad(set_to_none=True)


def compiled(module: nn.Module, case: GpuCase, entry: Entry) -> Callable[[Tensor], Tensor]:
    """Return a module as its competitor calls it."""
    if entry.run not in COMPILED:
        return module
    mode = MODES[entry.run]
    if entry.run == "autotune" and case.mode == "training":
        mode = "max-autotune-no-cudagraphs"  # a throughput step's graphs would hold its activations for ever
    return torch.compile(module, dynamic=False, mode=mode)


@contextmanager
def compiler_settings(case: GpuCase) -> Iterator[None]:
    """Draw random numbers in a compiled training step as eager mode does, so that the two can be compared."""
    if case.mode == "inference":
        yield
        return
    import torch._inductor.config as inductor  # seconds, where nothing else is compiled

    with inductor.patch(fallback_random=True):
        yield


def shared_evidence(running: Running) -> dict[str, Tensor]:
    """Return logits and gradients of a first training step from a seed, by parameter, in float32 copies.

    The weights and statistics are those before any step: steps go a way of their own from each rounding.
    """
    running.clear()
    running.reset()
    torch.manual_seed(SEED)
    logits = running.step()
    found = {"output": logits.float().clone()}
    found |= {name: p.grad.float().clone() for name, p in running.module.named_parameters() if p.grad is not None}
    running.clear()
    return found


def checked_evidence(
    entry: Entry, case: GpuCase, precision: str, device: torch.device, num_images: int
) -> dict[str, Tensor]:
    """Return logits and gradients of one eager step without stochastic depth, by parameter, in float32 copies.

    Args:
        entry: its source and kernels count; it runs eagerly.
        case: its model and size count.
        precision: of ``PRECISIONS``.
        device: where.
        num_images: at once: few, so that timm's float32 model fits.
    """
    small = replace(case, batch_size=num_images, precision=precision)
    module = build_module(entry, case.image_size, device, drop_path=0.0)
    eager = replace(entry, run="eager")
    step, _, clear = training_step(module, small, eager, device)
    return shared_evidence(Running(eager, module, step, clear, _nothing, held_bytes=0, build_s=0.0))


def true_logits(entry: Entry, case: GpuCase, device: torch.device, *, chunk: int = 32) -> Tensor:
    """Return a case's logits as timm's eager float32 model gives them, or a peer's own, (batch, classes).

    Args:
        entry: a peer, or any other.
        case: its images count.
        device: where.
        chunk: images at once, so that float32 fits where a narrower type does.
    """
    of_timm = entry if entry.source == "peer" else Entry("timm", entry.model, "eager")
    module = build_module(of_timm, case.image_size, device)
    images = make_images(case.image_size, case.batch_size)
    exact = torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else nullcontext()
    with torch.inference_mode(), exact:
        return torch.cat([module(part.to(device)) for part in images.split(chunk)])


def multiply_adds(entry: Entry, case: GpuCase, device: torch.device) -> int:
    """Count multiply-adds of one image in inference, of the competitor's plain definition at the case's batch.

    Convolutions and matrix products count, on shapes alone.
    """
    module = build_module(replace(entry, kernels="plain"), case.image_size, device)
    module = module.to(dtypes(case.precision)[0])
    like = torch.empty((), device=device, dtype=dtypes(case.precision)[0])
    shape = (case.batch_size, 3, case.image_size, case.image_size)
    # attention as one product after the other: not every fused kernel of it is known to the counter
    with sdpa_kernel(SDPBackend.MATH):
        return count_multiply_adds(module, shape, like) // case.batch_size


def _nothing() -> None:
    pass


def _resetter(module: nn.Module) -> Callable[[], None]:
    """Return a call that gives a module its present weights and statistics back; they are kept on the host."""
    began = {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}

    def reset() -> None:
        module.load_state_dict(began)

    return reset


def _peer(name: str, image_size: int, options: dict[str, Any]) -> nn.Module:
    import timm

    known = timm.get_pretrained_cfg(name) if name in timm.list_models() else None
    sized = {"img_size": image_size} if known is not None and known.fixed_input_size else {}
    return create_peer(name, num_classes=NUM_CLASSES, options=sized | options)


def _autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    chosen: Precision = PRECISIONS[precision]
    if not chosen.autocast:
        return nullcontext
    return lambda: torch.autocast(device.type, _parts[chosen.autocast])


def _has_graphs(case: GpuCase, entry: Entry) -> bool:
    return entry.run in ("graphs", "autotune") and case.mode == "inference"


def _graphs() -> int:
    import sys

    found = sys.modules.get("torch._dynamo.utils")  # not there as long as nothing was compiled
    return 0 if found is None else int(found.counters["stats"]["unique_graphs"])
