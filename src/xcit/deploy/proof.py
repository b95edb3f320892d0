"""The proof of an exported file: run it in its runtime and compare it with the model in float64.

The reference is the model as it was before anything was folded or converted, in double precision. What is compared is
every output on several images and sizes; errors are relative to the largest magnitude of the reference's output.

How much a file may err:
* float32: 1e-4. XCiT's own float32 forward pass is 1e-7 to 1e-5 from float64, by its depth; folding and another
  runtime's order of sums change as much again. A mistake in a graph, in a weight or in the border changes far more.
* float16 and bfloat16: 4 times what the model itself loses in eager mode in that type on the same images, and at least
  what rounding the output to that type costs.
* int8: 0.3, on real images (those of the calibration), since its ranges are of such. That catches what is broken;
  whether the decisions suffice, ``judge`` says, whose figures stand in the proof as well.

Legend: B batch, C channels, H x W the image.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcit.errors import ExportError
from xcit.inference.runtimes import Session

TOLERANCE_FP32 = 1e-4
TOLERANCE_INT8 = 0.3
"""Trained models lose 0.02 to 0.12 where nothing is wrong."""
TIMES_EAGER = 4.0
"""What a lower precision may lose, in multiples of what eager mode loses in it."""
EAGER = {"fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ("noise", "soft noise", "ramp", "board", "grey")
"""Of images: pixels independent of each other, smooth blobs, a gradient with its edge, sharp squares, a constant."""
_BLOB = 8
"""Pixels a side of a blob and of a square."""


@dataclass(frozen=True)
class Case:
    """One batch through both."""

    shape: tuple[int, int, int, int]
    """Of the images."""
    largest: float
    """Magnitude of the reference's outputs: the largest of the output that came off worst."""
    absolute: float
    """The largest difference of that output."""
    relative: float
    """Of the two above."""
    tolerance: float
    """What ``relative`` may be."""
    agreeing: int | None
    """Images (or pixels) whose likeliest class is the reference's; None where outputs are no class scores."""
    compared: int | None
    """Of how many."""
    clear: int | None
    """Of these, how many are decided by more than twice the tolerance; all of them must agree."""
    clear_agreeing: int | None

    @property
    def passed(self) -> bool:
        """Whether the file may be used."""
        return self.relative <= self.tolerance and self.clear == self.clear_agreeing


@dataclass(frozen=True)
class Proof:
    """How an exported file compares with its model."""

    runtime: str
    version: str
    format: str
    dtype: str
    cases: tuple[Case, ...]
    arithmetic: str = ""
    """In which types the runtime computes here."""
    int8: dict[str, Any] | None = None
    """Of an int8 file: what it was calibrated on, what it loses, which layers are not int8."""

    @property
    def passed(self) -> bool:
        """Whether every case is within its tolerance."""
        return all(case.passed for case in self.cases)

    @property
    def worst(self) -> Case:
        """The case nearest to its tolerance, or farthest beyond."""
        return max(self.cases, key=lambda case: case.relative / case.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in the ``.proof.json`` beside the file."""
        return {
            "passed": self.passed,
            "reference": f"the model before folding, float64, torch {torch.__version__}",
            "runtime": self.runtime,
            "version": self.version,
            "format": self.format,
            "dtype": self.dtype,
            "arithmetic": self.arithmetic,
            "machine": platform.machine(),
            "max_absolute_error": max(case.absolute for case in self.cases),
            "max_relative_error": max(case.relative for case in self.cases),
            "cases": [
                {
                    "shape": list(case.shape),
                    "max_absolute_error": case.absolute,
                    "max_relative_error": case.relative,
                    "largest_output": case.largest,
                    "tolerance": case.tolerance,
                    "top1_agreeing": case.agreeing,
                    "top1_compared": case.compared,
                    "top1_clear": case.clear,
                    "top1_clear_agreeing": case.clear_agreeing,
                    "passed": case.passed,
                }
                for case in self.cases
            ],
            **({} if self.int8 is None else {"int8": self.int8}),
        }

    def to_json(self) -> bytes:
        """Return ``to_dict`` as the file's content."""
        return (json.dumps(self.to_dict(), indent=2) + "\n").encode()


def prove(
    session: Session,
    model: nn.Module,
    shapes: Sequence[tuple[int, int, int, int]],
    *,
    dtype: str,
    mean: Sequence[float],
    std: Sequence[float],
    scores: bool,
    images_of: Callable[[tuple[int, int, int, int], int], Tensor] | None = None,
) -> Proof:
    """Compare an exported file with the model that it was made of.

    Args:
        session: the file, loaded.
        model: the original; it stays as it is.
        shapes: of the batches (B, C, H, W).
        dtype: of the file: "fp32", "fp16", "bf16" or "int8".
        mean: with which images are normalised, a value a channel,
        std: likewise.
        scores: whether the outputs are class scores, along axis 1, so that the likeliest classes can be compared.
        images_of: returns the images of a shape, given how many were shown before; None for ``proof_images``.

    Returns:
        The figures. Whether they suffice, ``Proof.passed`` says.

    Raises:
        ExportError: an output that is not finite, or other outputs than the model's.
    """
    reference = copy.deepcopy(model).eval().to("cpu", torch.float64)
    eager = copy.deepcopy(model).eval().to("cpu", EAGER[dtype]) if dtype in EAGER else None
    cases = []
    shown = 0
    for shape in shapes:
        images = proof_images(shape, mean, std, first=shown) if images_of is None else images_of(shape, shown)
        shown += shape[0]
        with torch.no_grad():
            wanted = _arrays(reference(images.double()), "float64")
            rough = None if eager is None else _arrays(eager(images.to(EAGER[dtype])), dtype)
        got = session(images.numpy())
        if [g.shape for g in got] != [w.shape for w in wanted]:
            raise ExportError(
                f"The file's outputs are {[g.shape for g in got]} for images {shape}, the model's "
                f"{[w.shape for w in wanted]}."
            )
        tolerance = TOLERANCE_INT8 if dtype == "int8" else TOLERANCE_FP32
        if rough is not None:
            lost = max(_errors(r, w)[1] for r, w in zip(rough, wanted, strict=True))
            tolerance = max(TIMES_EAGER * lost, torch.finfo(EAGER[dtype]).eps)
        cases.append(_case(shape, got, wanted, tolerance, scores))
    return Proof(session.runtime, session.version, session.format, dtype, tuple(cases))


def proof_images(
    shape: tuple[int, int, int, int], mean: Sequence[float], std: Sequence[float], *, first: int = 0
) -> Tensor:
    """Return images for a proof: of each of ``KINDS`` in turn, with values 0 to 1 before they are normalised.

    Args:
        shape: (B, C, H, W).
        mean: a value a channel.
        std: likewise.
        first: with which kind to begin, from 0.

    Returns:
        float32 (B, C, H, W); the same for the same arguments.
    """
    B, C, H, W = shape
    rng = np.random.default_rng([B, C, H, W, first])
    pictures = list(islice(_pictures(rng, C, H, W), first % len(KINDS), first % len(KINDS) + B))
    pixels = np.round(np.stack(pictures) * 255) / 255  # as images of 8 bits have them
    normal = (pixels - np.reshape(mean, (1, -1, 1, 1))) / np.reshape(std, (1, -1, 1, 1))
    return torch.from_numpy(normal.astype(np.float32))


def failure(proof: Proof, name: str) -> ExportError:
    """Return the error for a file that does not reproduce its model."""
    worst = proof.worst
    agreement = ""
    if worst.clear != worst.clear_agreeing:
        agreement = f", and {worst.clear_agreeing} of {worst.clear} clear decisions agree"
    return ExportError(
        f"{name} does not reproduce the model: in {proof.runtime} {proof.version} its output differs from float64 by "
        f"{worst.relative:.1e} of the largest value for images {tuple(worst.shape)}, where {worst.tolerance:.1e} is "
        f"allowed for {proof.dtype}{agreement}. Nothing was kept; take another --dtype or --format."
    )


def write_proof(proof: Proof, path: Path) -> Path:
    """Write the proof's figures to a file."""
    path.write_bytes(proof.to_json())
    return path


def _pictures(rng: np.random.Generator, C: int, H: int, W: int) -> Iterator[np.ndarray]:
    rows, columns = np.mgrid[0:H, 0:W]
    while True:
        yield rng.random((C, H, W))
        coarse = rng.random((C, -(-H // _BLOB) + 1, -(-W // _BLOB) + 1))
        y, x = rows / _BLOB, columns / _BLOB
        top, left = y.astype(int), x.astype(int)
        dy, dx = y - top, x - left
        upper = coarse[:, top, left] * (1 - dx) + coarse[:, top, left + 1] * dx
        lower = coarse[:, top + 1, left] * (1 - dx) + coarse[:, top + 1, left + 1] * dx
        yield upper * (1 - dy) + lower * dy
        slopes = rng.random((C, 1, 1))
        yield slopes * rows / max(1, H - 1) + (1 - slopes) * columns / max(1, W - 1)
        yield np.broadcast_to((rows // _BLOB + columns // _BLOB) % 2, (C, H, W)) * rng.random((C, 1, 1))
        yield np.broadcast_to(rng.random((C, 1, 1)), (C, H, W))


def _case(
    shape: tuple[int, int, int, int],
    got: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    tolerance: float,
    scores: bool,
) -> Case:
    errors = []
    for ours, theirs in zip(got, wanted, strict=True):
        if not np.isfinite(ours).all():
            raise ExportError(f"The file returns values that are not finite for images {shape}.")
        absolute, relative = _errors(ours, theirs)
        errors.append((relative, absolute, float(np.abs(theirs).max())))
    relative, absolute, largest = max(errors)
    if not scores:
        return Case(shape, largest, absolute, relative, tolerance, None, None, None, None)
    (ours,), (theirs,) = got, wanted
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    clear = np.ones_like(same)
    if theirs.shape[1] > 1:
        highest = np.partition(theirs, -2, axis=1)
        margin = np.take(highest, -1, axis=1) - np.take(highest, -2, axis=1)
        clear = margin > 2 * tolerance * largest
    return Case(
        shape, largest, absolute, relative, tolerance,
        int(same.sum()), same.size, int(clear.sum()), int((same & clear).sum()),
    )  # fmt: skip


def _errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the largest difference, and that over the reference's largest magnitude."""
    absolute, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return absolute, absolute / largest if largest > 0 else absolute


def _arrays(outputs: Any, where: str) -> list[np.ndarray]:
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    arrays = [tensor.double().numpy() for tensor in tensors]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ExportError(f"The model itself returns values that are not finite in {where}; take a wider --dtype.")
    return arrays
