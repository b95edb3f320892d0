"""The competitors of one case of `xcit bench`, built, run once and compared.

The measure of every output is the eager float32 model of the same weights: timm's module, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from xcit.bench import deploy_models, deploy_runtimes
from xcit.bench.cases import BackboneCase
from xcit.bench.contenders import Contender
from xcit.bench.deploy_cases import TORCH, DeployCase, Entry, Source
from xcit.bench.runner import TOLERANCES, OutputsDifferError, compare
from xcit.inference.devices import is_out_of_memory


class Runner(NamedTuple):
    """A competitor that is ready."""

    entry: Entry
    step: deploy_runtimes.Step
    """What is measured."""
    file: Path | None
    """What onnxruntime or OpenVINO runs."""
    multiply_adds: int
    """Of one image, in inference."""
    difference: float
    """How far its output is from the eager float32 model's, relative to that one's norm."""


def prepare(
    case: DeployCase,
    wanted: Sequence[Entry],
    *,
    dtype: str,
    device: torch.device,
    threads: int,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> list[Runner]:
    """Build a case's competitors, run each once, and compare what they compute.

    Args:
        case: sizes and mode.
        wanted: its competitors.
        dtype: "float32", "bfloat16", "float16" or "int8", of the competitors that have none of their own.
        device: where they run.
        threads: of the runtimes that are not torch's.
        folder: where files for runtimes go.
        say: takes a line on a competitor that does not fit into memory.

    Returns:
        Those that fit.

    Raises:
        OutputsDifferError: naming the competitor.
        XCiTError: a model that cannot be built, folded or written in a format.
    """
    if case.group == "training":
        compare_gradients(case, device)
    if any(entry.runtime == "compile" for entry in wanted):
        # a few graphs of one class are kept, and beyond them the compiler gives up without an error
        torch.compiler.reset()
    truths: dict[str, np.ndarray] = {}
    runners: list[Runner] = []
    for number, entry in enumerate(wanted):
        module = deploy_models.build(entry.source, entry.model, entry.image_size)
        multiply_adds = deploy_models.count_multiply_adds(module, entry.image_size)
        stem = folder / str(number)
        own = entry.dtype or dtype
        try:
            if entry.model not in truths:
                truths[entry.model] = _truth(case, entry, device)
            step, file = _step(case, entry, module, dtype=own, device=device, threads=threads, stem=stem)
            output = deploy_runtimes.output_of(step())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            say(f"{case}: {entry} did not fit into memory and is left out.")
            continue
        difference = relative_difference(output, truths[entry.model])
        limit = TOLERANCES[deploy_runtimes.DTYPES[own]]
        if not difference <= limit:
            raise OutputsDifferError(
                f"{case}: {str(entry)!r} differs from the eager float32 model by {difference:.1e} in {own}; at most "
                f"{limit:.0e} is rounding. Nothing was timed."
            )
        runners.append(Runner(entry, step, file, multiply_adds, difference))
    return runners


def compare_gradients(case: DeployCase, device: torch.device) -> None:
    """Hold output and every gradient of our model's eager float32 step to timm's.

    Raises:
        OutputsDifferError: naming the parameter.
    """
    images = deploy_models.make_images(case.image_size, case.batch_size)
    labels = deploy_models.make_labels(case.batch_size)
    sources: tuple[Source, Source] = ("timm", "ours")
    contenders = []
    for source in sources:
        module = deploy_models.build(source, case.model, case.image_size)
        step = deploy_runtimes.training_step(module, images, labels, "eager", "float32", device)
        contenders.append(Contender(source, module, step, lambda: None))  # a step begins with new gradients
    compare(
        contenders, BackboneCase(case.model, case.image_size, case.batch_size, "training"), TOLERANCES[torch.float32]
    )


def relative_difference(ours: np.ndarray, truth: np.ndarray) -> float:
    """Return ‖ours − truth‖ / ‖truth‖; infinite where a value is not finite or the shapes differ."""
    if ours.shape != truth.shape or not np.isfinite(ours).all():
        return float("inf")
    size = float(np.linalg.norm(truth))
    difference = float(np.linalg.norm(ours - truth))
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _truth(case: DeployCase, entry: Entry, device: torch.device) -> np.ndarray:
    source: Source = entry.source if entry.source == "peer" else "timm"
    module = deploy_models.build(source, entry.model, entry.image_size)
    eager = replace(entry, runtime="eager", dtype="")
    step, _ = _step(case, eager, module, dtype="float32", device=device, threads=0, stem=Path())
    return deploy_runtimes.output_of(step())


def _step(
    case: DeployCase, entry: Entry, module: nn.Module, *, dtype: str, device: torch.device, threads: int, stem: Path
) -> tuple[deploy_runtimes.Step, Path | None]:
    """Return what is measured, and the file that it runs, which begins with ``stem``, or None."""
    images = deploy_models.make_images(entry.image_size, case.batch_size)
    if case.mode == "training":
        labels = deploy_models.make_labels(case.batch_size)
        return deploy_runtimes.training_step(module, images, labels, entry.runtime, dtype, device), None
    if entry.runtime in TORCH:
        return deploy_runtimes.forward_step(module, images, entry.runtime, dtype, device), None
    file = deploy_runtimes.write_file(module, images, entry.runtime, dtype, stem)
    return deploy_runtimes.file_step(file, images, threads), file
