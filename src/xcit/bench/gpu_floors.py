"""The least that an XCiT must do on a device: bytes through its memory and multiply-adds, stage by stage.

A stage is what one kernel can do: it reads its inputs once and writes its output once, with norms, activations,
LayerScale and the residual inside. The floor of a stage is the larger of two times, its bytes at the speed of a copy
and its arithmetic at the speed of a large matrix product; stages come one after another, so theirs is the sum.

Stages of an XCA block, with the tokens (N, C) of each image as unit T and hidden width 4 C:

    covariance form   moment: reads T                      map: reads T, writes T
    token form        qkv: reads T, writes 3 T             gram: reads 2 T       mix and project: reads 2 T, writes T
    LPI               reads T, writes T; in training the batch's statistics take one more pass over T
    network           fc1: reads T, writes 4 T             fc2: reads 5 T, writes T

A backward pass reads a stage's inputs and the gradient of its output, and writes the gradient of its inputs. LPI's
takes two passes, for the sums of batch norm; that of a stem convolution reads the output once more, for the same.
Arithmetic is twice the forward pass's.

Legend: B batch, N tokens, C channels, h heads, d = C / h, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from xcit.bench.cases import Mode
from xcit.bench.gpu_cases import ELEMENT_BYTES, PRECISIONS, GpuCase
from xcit.bench.gpu_peaks import Peaks
from xcit.models.layers import STEM_WIDTHS
from xcit.models.zoo import ARCHITECTURES, Architecture

MIB = 2**20
ADAMW_PASSES = 7
"""Over a float32 parameter: it, its gradient and both moments are read, all but the gradient written."""
NUM_CLASSES = 1000
POSITION = 64
"""Fourier features of a token."""


@dataclass(frozen=True)
class Stage:
    """One kernel's work, as often as the model has it.

    Args:
        name: what it does; those of a block begin with "block".
        count: of them in the model.
        values_in: read once, of the tokens' type.
        values_out: written once, likewise.
        weights: read once, likewise; the gradient of each is written in a backward pass.
        multiply_adds: of the forward pass.
        extra_forward: values that a forward pass in training moves besides.
        extra_backward: likewise, of the backward pass.
    """

    name: str
    count: int
    values_in: float
    values_out: float
    weights: float
    multiply_adds: float
    extra_forward: float = 0.0
    extra_backward: float = 0.0

    def values(self, mode: Mode) -> float:
        """Return the values that one of them moves, in a forward pass or in a training step."""
        forward = self.values_in + self.values_out + self.weights
        if mode == "inference":
            return forward
        backward = 2 * self.values_in + self.values_out + 2 * self.weights
        return forward + self.extra_forward + backward + self.extra_backward

    def operations(self, mode: Mode) -> float:
        """Return multiply-adds of one, in a forward pass or in a training step."""
        return self.multiply_adds * (3 if mode == "training" else 1)


@dataclass(frozen=True)
class Floor:
    """What a call must do at least; times in milliseconds."""

    bytes: float
    multiply_adds: float
    ms: float

    @property
    def mib(self) -> float:
        """The bytes in MiB."""
        return self.bytes / MIB


def stages(
    architecture: Architecture,
    *,
    image_size: int,
    batch_size: int,
    form: Literal["tokens", "covariance"],
    folded: bool,
) -> list[Stage]:
    """Return the stages of a whole classifier.

    Args:
        architecture: which.
        image_size: side of the square images.
        batch_size: B.
        form: of XCA.
        folded: class attention without keys and values of the tokens, the last one for the class token alone; a table
            of positions.
    """
    return [
        *_stem(architecture, image_size, batch_size, folded),
        *_block(architecture, image_size, batch_size, form),
        *_head(architecture, image_size, batch_size, folded),
    ]


def floor(found: Iterable[Stage], mode: Mode, element_bytes: int, peaks: Peaks) -> Floor:
    """Return the floor of stages.

    Args:
        found: of a model, or some of them.
        mode: what a call does; of a training step without the optimiser, which ``model_floor`` adds.
        element_bytes: e.
        peaks: of the device.
    """
    total_bytes = total_adds = ms = 0.0
    for stage in found:
        moved, adds = stage.values(mode) * element_bytes, stage.operations(mode)
        total_bytes += stage.count * moved
        total_adds += stage.count * adds
        ms += stage.count * max(moved / peaks.copy_gbs / 1e6, 2 * adds / peaks.matrix_tflops / 1e9)
    return Floor(total_bytes, total_adds, ms)


def model_floor(case: GpuCase, peaks: Peaks) -> Floor:
    """Return the floor of a case's XCiT, in the form of XCA whose floor is lower; the optimiser's step included."""
    return model_stages(case, peaks)[1]


def model_stages(case: GpuCase, peaks: Peaks) -> tuple[Sequence[Stage], Floor]:
    """Return the stages of the form with the lower floor, and that floor."""
    architecture = ARCHITECTURES[case.model]
    element = ELEMENT_BYTES[PRECISIONS[case.precision].arithmetic]
    found = []
    forms: tuple[Literal["tokens", "covariance"], ...] = ("tokens", "covariance")
    for form in forms:
        of_form = stages(
            architecture,
            image_size=case.image_size,
            batch_size=case.batch_size,
            form=form,
            folded=case.mode == "inference",
        )
        found.append((of_form, floor(of_form, case.mode, element, peaks)))
    best, lowest = min(found, key=lambda each: each[1].ms)
    if case.mode == "training":
        moved = ADAMW_PASSES * architecture.num_params * ELEMENT_BYTES[PRECISIONS[case.precision].weights]
        lowest = Floor(lowest.bytes + moved, lowest.multiply_adds, lowest.ms + moved / peaks.copy_gbs / 1e6)
    return best, lowest


def _stem(architecture: Architecture, image_size: int, batch_size: int, folded: bool) -> Iterable[Stage]:
    side, width, batch = image_size, 3, batch_size
    divisors = STEM_WIDTHS[architecture.patch_size]
    for i, divisor in enumerate(divisors):
        smaller, wider = -(-side // 2), architecture.embed_dim // divisor
        read, written = batch * side**2 * width, batch * smaller**2 * wider
        weights = 9 * width * wider
        yield Stage(f"stem {i + 1}", 1, read, written, weights, batch * smaller**2 * weights, 0.0, written)
        side, width = smaller, wider
    if not folded:  # which has a table
        weights = POSITION * architecture.embed_dim
        yield Stage("position", 1, 0, 0, weights, side**2 * weights)


def _block(
    architecture: Architecture, image_size: int, batch_size: int, form: Literal["tokens", "covariance"]
) -> Iterable[Stage]:
    C, depth, d = architecture.embed_dim, architecture.depth, architecture.embed_dim / architecture.num_heads
    N, B = _num_tokens(architecture, image_size), batch_size
    T, square = B * N * C, B * C**2
    if form == "covariance":
        # symmetric, so half of it is computed; what is (C, C) an image stays in float32, which counts as two values
        yield Stage("block: XCA moment", depth, T, 2 * square, 0, B * N * C**2 / 2)
        chain = B * (3 * C**3 + 2 * C**2 * d)
        yield Stage("block: XCA matrices", depth, 2 * square, square, 4 * C**2, chain)
        yield Stage("block: XCA map", depth, T + square, T, 0, B * N * C**2)
    else:
        yield Stage("block: XCA qkv", depth, T, 3 * T, 3 * C**2, B * 3 * N * C**2)
        yield Stage("block: XCA gram", depth, 2 * T, B * C * d, 0, B * N * C * d)
        yield Stage("block: XCA mix, project", depth, 2 * T + B * C * d, T, C**2, B * (N * C * d + N * C**2))
    yield Stage("block: LPI", depth, T, T, 18 * C, B * 18 * N * C, T, 2 * T)
    hidden = 4 * C
    yield Stage("block: network 1", depth, T, 4 * T, C * hidden, B * N * C * hidden)
    yield Stage("block: network 2", depth, 5 * T, T, C * hidden, B * N * C * hidden)


def _head(architecture: Architecture, image_size: int, batch_size: int, folded: bool) -> Iterable[Stage]:
    C, h = architecture.embed_dim, architecture.num_heads
    N, B = _num_tokens(architecture, image_size), batch_size
    T, layers = B * N * C, 2
    if folded:
        # the query, its product with the keys' weights, the values of the mean, the projection; scores and the mean
        adds = B * (4 * C**2 + 2 * (N + 1) * C * h)
        yield Stage("class attention, not the last", layers - 1, T, T, 4 * C**2, adds)
        yield Stage("class attention, the last", 1, T, B * C, 4 * C**2, adds)
    else:
        adds = B * (C**2 + 2 * (N + 1) * C**2 + 2 * (N + 1) * C + C**2)
        yield Stage("class attention", layers, T, T, 4 * C**2, adds)
    yield Stage("class network", layers, B * C, B * C, 8 * C**2, B * 8 * C**2)
    yield Stage("classifier", 1, B * C, B * NUM_CLASSES, C * NUM_CLASSES, B * C * NUM_CLASSES)


def _num_tokens(architecture: Architecture, image_size: int) -> int:
    side = image_size
    for _ in STEM_WIDTHS[architecture.patch_size]:
        side = -(-side // 2)
    return side**2
