"""One model in one runtime as a call without arguments: the one place where the benchmark meets the exporters.

PyTorch runs the module itself, eagerly or compiled. onnxruntime and OpenVINO run a file that ``xcit.deploy.convert``
writes from it; a file of timm's model is written by the same code as ours.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.bench.deploy_cases import RUNTIMES, TORCH, Runtime
from xcit.bench.deploy_models import make_images
from xcit.errors import BackendError

Step = Callable[[], Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
FILES = {"onnxruntime": ("onnx", ".onnx"), "openvino": ("openvino", ".xml")}
"""Format and ending of what each runtime runs."""
EXPORTED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
"""Precisions as the exporter calls them."""
NUM_CALIBRATION = 4
"""Images of noise that int8 is calibrated on: it is its speed that is measured, not its accuracy."""
RATE = 1e-7
"""Of learning: so small that a hundred steps leave the weights' size, and so the arithmetic, as it was."""

_log = logging.getLogger("xcit")


def refusal(runtime: Runtime, dtype: str, device_type: str) -> str | None:
    """Return why a runtime cannot run this here, in a sentence, or None if it can."""
    if dtype == "float16" and device_type == "cpu":
        return "float16 is for CUDA: on a CPU it is slower than float32; take bfloat16."
    if runtime in TORCH:
        return "int8 is what onnxruntime and openvino run; take one of them." if dtype == "int8" else None
    if device_type != "cpu":
        return f"{runtime} is measured on the CPU only; take eager or compile, or --device cpu."
    if runtime == "onnxruntime" and dtype == "bfloat16":
        return "onnxruntime's CPU provider has no matrix product in bfloat16; take float32, or another runtime."
    needed = (runtime, "nncf") if (runtime, dtype) == ("openvino", "int8") else (runtime,)
    for package in needed:
        if importlib.util.find_spec(package) is None:
            return f'{package} is not installed; `pip install "xcit[export]"` brings it.'
    return None


def choose_runtimes(names: Sequence[str], dtype: str, device_type: str) -> list[Runtime]:
    """Return the runtimes to measure.

    Args:
        names: of ``RUNTIMES``; none means all that can run this here, and a log line says what is left out and why.
        dtype: float32, bfloat16, float16 or int8.
        device_type: "cpu" or "cuda".

    Raises:
        BackendError: a named runtime cannot run this here, or none can.
    """
    found: list[Runtime] = []
    reasons = []
    for runtime in RUNTIMES:
        if names and runtime not in names:
            continue
        reason = refusal(runtime, dtype, device_type)
        if reason is None:
            found.append(runtime)
        elif names:
            raise BackendError(reason)
        else:
            reasons.append((runtime, reason))
    if not found:
        raise BackendError(reasons[0][1])
    for runtime, reason in reasons:
        _log.info("%s, %s: left out. %s", runtime, dtype, reason)
    return found


def write_file(module: nn.Module, images: Tensor, runtime: Runtime, dtype: str, stem: Path) -> Path:
    """Write what a runtime other than torch's runs, for images of exactly this shape, and return its path.

    Raises:
        ExportError: the module cannot be written in the runtime's format.
        BackendError: a package that writes it is missing.
    """
    from xcit.deploy.convert import write_artefact

    format, ending = FILES[runtime]
    path = stem.with_name(stem.name + ending)
    calibration = None
    if dtype == "int8":
        calibration = [*make_images(images.shape[-1], max(NUM_CALIBRATION, len(images))).numpy()]
    write_artefact(module, images, path, format=format, dtype=EXPORTED[dtype], calibration=calibration)
    return path


def file_step(path: Path, images: Tensor, threads: int) -> Step:
    """Return a call that runs a file on the images: NumPy in, NumPy out, as an application would."""
    from xcit.inference.runtimes import open_session

    session = open_session(path, threads=threads)
    batch = images.numpy()
    return lambda: session(batch)


def forward_step(module: nn.Module, images: Tensor, runtime: Runtime, dtype: str, device: torch.device) -> Step:
    """Return a call that runs a module in PyTorch without gradients; the module is moved, and its type changed."""
    module = module.to(device=device, dtype=DTYPES[dtype])
    batch = images.to(device, DTYPES[dtype])
    call = torch.compile(module, dynamic=False) if runtime == "compile" else module

    def step() -> Any:
        with torch.inference_mode():
            return call(batch)

    return step


def training_step(
    module: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime, dtype: str, device: torch.device
) -> Step:
    """Return a call that trains a module by one step and returns its logits.

    Forward, cross-entropy, backward, AdamW; weights and optimiser in float32, a narrower type by autocast. All drop
    rates are as the model was built, 0.
    """
    module = module.to(device).train()
    batch, targets = images.to(device), labels.to(device)
    call = torch.compile(module, dynamic=False) if runtime == "compile" else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
            logits = call(batch)
            loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        return logits.detach()

    return step


def output_of(result: Any) -> np.ndarray:
    """Return what a step gave, its first output if there are several, in float64."""
    while isinstance(result, list | tuple):
        result = result[0]
    if isinstance(result, Tensor):
        result = result.detach().double().cpu().numpy()
    return np.asarray(result, dtype=np.float64)


def versions() -> dict[str, str]:
    """Return the versions of the runtimes besides torch's own; empty where one is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in FILES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
