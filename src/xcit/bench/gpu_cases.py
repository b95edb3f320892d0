"""What `python -m xcit.bench gpu` measures: cases by name, and who competes in each. Nothing here computes.

A case is called GROUP/MODEL/SIZE/BATCH/PRECISION, for example ``inference/xcit_small_12_p8/384/64/bfloat16``: what is
done, the model, the side of the square image in pixels, how many images at once (``max``: as many as gain anything),
and how numbers are held.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from xcit.bench.cases import Mode
from xcit.bench.results import ENVIRONMENT
from xcit.errors import ConfigError, UnknownNameError
from xcit.models.zoo import ARCHITECTURES
from xcit.ops.kernels import Kernels

Source = Literal["timm", "ours", "folded", "peer"]
Run = Literal["eager", "channels-last", "compile", "autotune", "graphs"]

RUNS: dict[Run, str] = {
    "eager": "PyTorch as it is",
    "channels-last": "eager, weights and images in channels-last layout",
    "compile": "torch.compile",
    "autotune": "torch.compile, mode max-autotune (in training max-autotune-no-cudagraphs)",
    "graphs": "torch.compile, mode reduce-overhead: CUDA graphs",
}
COMPILED: tuple[Run, ...] = ("compile", "autotune", "graphs")
GROUPS: dict[str, str] = {
    "inference": "logits of a batch, without gradients",
    "training": "a whole step: forward pass with the published stochastic depth, cross-entropy, backward pass, AdamW",
}


class Precision(NamedTuple):
    """How numbers are held, by the names that torch has for its types."""

    weights: str
    """Of weights and images."""
    autocast: str = ""
    """Of what torch.autocast narrows; "" without it."""

    @property
    def arithmetic(self) -> str:
        """The type of the matrix products."""
        return self.autocast or self.weights


PRECISIONS: dict[str, Precision] = {
    "bfloat16": Precision("bfloat16"),
    "amp-bfloat16": Precision("float32", "bfloat16"),
    "amp-float16": Precision("float32", "float16"),
    "float32": Precision("float32"),
}
"""Training in amp-float16 scales the loss (``torch.amp.GradScaler``)."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

FOUND = 0
"""A batch that is found by doubling; its name is ``max``."""
SMALLEST = 32
"""Side in pixels: what all models here can take."""

PEERS: dict[tuple[str, int], tuple[str, ...]] = {
    ("xcit_small_12_p16", 224): (
        "deit_small_patch16_224",
        "deit3_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
    ),
}
"""Models of timm of like multiply-adds (4.5 to 4.8 G), by the XCiT and the size in whose cases they run."""

COLUMNS = (
    *("date", "case", "model", "source", "run", "kernels", "mode", "precision", "image_size", "batch_size"),
    *("median_ms", "p10_ms", "p90_ms", "rounds", "images_per_second", "ratio_vs_timm_eager"),
    *("peak_mib", "held_mib", "multiply_adds", "tflops", "matrix_tflops", "matrix_share"),
    *("floor_mib", "copy_gbs", "copy_share", "floor_ms", "floor_share"),
    *("max_rel_diff", "form", "kernels_run", "graphs", "build_s"),
    *ENVIRONMENT,
    *("triton", "code"),
)
"""Of ``gpu.csv``. ``peak_mib`` is what a process that ran only this would allocate, ``held_mib`` of it are weights and
optimiser. ``multiply_adds`` are of one image in inference; ``tflops`` count two operations each, of a training step
three passes' worth. ``matrix_tflops`` and ``copy_gbs`` are what a large product and a large copy reached in the same
run, ``matrix_share`` is the part of the one that ``tflops`` are, ``copy_share`` the part of the other that moving
``floor_mib`` in that time is (``xcit.bench.gpu_floors``). ``graphs`` counts what torch.compile made. ``code`` tells the
package's equations and models apart (``xcit.bench.gpu.code_digest``)."""


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "gpu.csv"


@dataclass(frozen=True)
class GpuCase:
    """One comparison: what is run, and at which size.

    Args:
        group: of ``GROUPS``.
        model: an XCiT architecture.
        image_size: side of the square image in pixels.
        batch_size: images at once; ``FOUND`` to find it.
        precision: of ``PRECISIONS``.
    """

    group: str
    model: str
    image_size: int
    batch_size: int
    precision: str

    def __str__(self) -> str:
        batch = "max" if self.batch_size == FOUND else self.batch_size
        return f"{self.group}/{self.model}/{self.image_size}/{batch}/{self.precision}"

    @property
    def mode(self) -> Mode:
        """What a measured call does."""
        return "training" if self.group == "training" else "inference"


@dataclass(frozen=True)
class Entry:
    """A competitor of a case.

    Args:
        source: "timm", "ours", "folded" (ours, folded), or "peer" (another model of timm).
        model: an XCiT architecture, or timm's name of a peer.
        run: of ``RUNS``.
        kernels: "plain" PyTorch, or "triton": ours with its kernels.
        tier: 1 is what the headline needs most, 2 the rest of it, 3 what only the full set has.
    """

    source: Source
    model: str
    run: Run
    kernels: Kernels = "plain"
    tier: int = field(default=1, compare=False)

    def __str__(self) -> str:
        who = self.model if self.source == "peer" else self.source
        return f"{who} {self.run}" + (" triton" if self.kernels == "triton" else "")

    @property
    def is_ours(self) -> bool:
        """Whether its time depends on this package's code."""
        return self.source in ("ours", "folded")


def baseline(case: GpuCase) -> Entry:
    """Return the competitor that every round has, and ratios are against: timm's eager model."""
    return Entry("timm", case.model, "eager")


def competitor(row: Mapping[str, str]) -> str:
    """Return the name of a row's competitor."""
    return str(Entry(row["source"], row["model"], row["run"], row["kernels"]))  # type: ignore[arg-type]


_SMALL16, _SMALL8, _LARGE8 = "xcit_small_12_p16", "xcit_small_12_p8", "xcit_large_24_p8"

HEADLINE: tuple[GpuCase, ...] = (
    GpuCase("inference", _SMALL16, 224, 256, "bfloat16"),
    GpuCase("inference", _SMALL8, 384, 64, "bfloat16"),
    GpuCase("training", _SMALL16, 224, 256, "amp-bfloat16"),
    GpuCase("inference", _SMALL16, 224, 1, "bfloat16"),
    GpuCase("inference", _LARGE8, 384, 32, "bfloat16"),
    GpuCase("training", _SMALL8, 384, 32, "amp-bfloat16"),
    GpuCase("inference", _SMALL8, 384, 1, "bfloat16"),
    GpuCase("inference", _SMALL8, 1024, 8, "bfloat16"),
    GpuCase("training", _LARGE8, 384, 8, "amp-bfloat16"),
    GpuCase("training", _SMALL8, 1024, 4, "amp-bfloat16"),
    GpuCase("inference", _SMALL8, 1024, 1, "bfloat16"),
    GpuCase("inference", _LARGE8, 384, 1, "bfloat16"),
)
"""In the order of their importance. Throughput batches are such that timm's training step fits into 80 GB."""
CASES: tuple[GpuCase, ...] = (
    *HEADLINE,
    *(
        replace(case, precision=precision)
        for case in HEADLINE
        for precision in ("bfloat16", "amp-bfloat16", "amp-float16")
        if precision != case.precision and case.batch_size > 1
    ),
)
"""The full set: every throughput case in the other precisions too."""
QUICK = (
    GpuCase("inference", "xcit_nano_12_p16", 64, 1, "float32"),
    GpuCase("training", "xcit_nano_12_p16", 64, 2, "float32"),
)


def select(names: Sequence[str], *, batch: int | None = None) -> list[GpuCase]:
    """Return the cases that names or patterns mean, each once, in the order of the names.

    Args:
        names: names of cases, listed or not, or patterns of the shell over the listed ones; none: the headline.
        batch: takes the place of every throughput batch.

    Raises:
        UnknownNameError: a pattern that no listed case fits; an unknown group, model or precision.
        ConfigError: a name that is no case.
    """
    chosen: dict[GpuCase, None] = dict.fromkeys(() if names else HEADLINE)
    for name in names:
        found = [case for case in CASES if fnmatchcase(str(case), name)]
        if not found and re.search(r"[*?\[]", name):
            raise UnknownNameError("case", name, map(str, CASES), "`python -m xcit.bench gpu --list` has all of them.")
        chosen |= dict.fromkeys(found or [parse(name)])
    if batch is not None and batch < 1:
        raise ConfigError(f"The batch is {batch}; it must be one image or more.")
    if batch is not None:
        chosen = {case if case.batch_size == 1 else replace(case, batch_size=batch): None for case in chosen}
    return list(chosen)


def parse(name: str) -> GpuCase:
    """Return the case of a name, listed or not.

    Raises:
        UnknownNameError: an unknown group, model or precision.
        ConfigError: not GROUP/MODEL/SIZE/BATCH/PRECISION, or an image or a batch that is too small.
    """
    match = re.fullmatch(r"(\w+)/(\w+)/(\d+)/(\d+|max)/([\w-]+)", name)
    if not match:
        raise ConfigError(
            f"{name!r} is not the name of a case: it must be GROUP/MODEL/SIZE/BATCH/PRECISION, such as {CASES[0]}; "
            "`python -m xcit.bench gpu --list` has some."
        )
    group, model, precision = match[1], match[2], match[5]
    for kind, value, known in (
        ("group of cases", group, GROUPS),
        ("architecture", model, ARCHITECTURES),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise UnknownNameError(kind, value, known, f"There are {', '.join(known)}.")
    size, batch = int(match[3]), FOUND if match[4] == "max" else int(match[4])
    if size < SMALLEST or match[4] == "0":
        raise ConfigError(f"{name}: the size must be {SMALLEST} px or more, and the batch one image or more.")
    return GpuCase(group, model, size, batch, precision)


def entries(case: GpuCase, *, most_tier: int = 3, keep: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Entry]:
    """Return a case's competitors, the baseline first, then by tier.

    Args:
        case: which.
        most_tier: the last tier that is taken.
        keep: patterns of the shell; a competitor's name must fit one of them, where there are any.
        skip: patterns; what fits one of these is left out. The baseline always stays.

    Raises:
        UnknownNameError: a pattern that fits no competitor of any case.
    """
    first = baseline(case)
    found = [entry for entry in _of_case(case) if entry.tier <= most_tier and entry != first]
    for pattern in (*keep, *skip):
        if not any(fnmatchcase(name, pattern) for name in _names()):
            raise UnknownNameError("competitor", pattern, _names(), f"There are {', '.join(_names())}.")
    taken = [
        entry
        for entry in found
        if (not keep or any(fnmatchcase(str(entry), pattern) for pattern in keep))
        and not any(fnmatchcase(str(entry), pattern) for pattern in skip)
    ]
    return [first, *sorted(taken, key=lambda entry: entry.tier)]


def _of_case(case: GpuCase) -> Iterable[Entry]:
    kind = "training" if case.mode == "training" else "one" if case.batch_size == 1 else "many"
    for tier, (source, run, kernels) in _COMPETITORS[kind]:
        yield Entry(source, case.model, run, kernels, tier)
    for peer in PEERS.get((case.model, case.image_size), ()):
        yield Entry("peer", peer, "eager", tier=2)
        yield Entry("peer", peer, "graphs" if kind == "one" else "compile", tier=2)


_Competitor = tuple[Source, Run, Kernels]
_COMPETITORS: dict[str, tuple[tuple[int, _Competitor], ...]] = {
    "many": (
        (1, ("timm", "eager", "plain")),
        (1, ("timm", "channels-last", "plain")),
        (1, ("timm", "compile", "plain")),
        (1, ("ours", "eager", "plain")),
        (1, ("folded", "eager", "plain")),
        (1, ("folded", "eager", "triton")),
        (1, ("folded", "compile", "triton")),
        (2, ("folded", "compile", "plain")),
        (2, ("timm", "autotune", "plain")),
        (3, ("ours", "eager", "triton")),
        (3, ("ours", "compile", "plain")),
        (3, ("ours", "compile", "triton")),
        (3, ("timm", "graphs", "plain")),
        (3, ("folded", "graphs", "plain")),
        (3, ("folded", "graphs", "triton")),
        (3, ("ours", "graphs", "plain")),
        (3, ("ours", "graphs", "triton")),
    ),
    "one": (
        (1, ("timm", "eager", "plain")),
        (1, ("timm", "graphs", "plain")),
        (1, ("ours", "eager", "plain")),
        (1, ("folded", "eager", "plain")),
        (1, ("folded", "eager", "triton")),
        (1, ("folded", "graphs", "triton")),
        (2, ("folded", "graphs", "plain")),
        (2, ("timm", "channels-last", "plain")),
        (2, ("timm", "compile", "plain")),
        (2, ("folded", "compile", "triton")),
        (3, ("timm", "autotune", "plain")),
        (3, ("folded", "compile", "plain")),
        (3, ("ours", "eager", "triton")),
        (3, ("ours", "compile", "plain")),
        (3, ("ours", "compile", "triton")),
        (3, ("ours", "graphs", "plain")),
        (3, ("ours", "graphs", "triton")),
    ),
    "training": (
        (1, ("timm", "eager", "plain")),
        (1, ("timm", "compile", "plain")),
        (1, ("ours", "eager", "plain")),
        (1, ("ours", "eager", "triton")),
        (1, ("ours", "compile", "triton")),
        (2, ("timm", "channels-last", "plain")),
        (2, ("ours", "compile", "plain")),
        (3, ("timm", "autotune", "plain")),
    ),
}
"""By what is measured: batches, single images, training steps. Nothing folded trains, and no graph holds a step."""


def _names() -> list[str]:
    cases = [*CASES, *(GpuCase("inference", model, size, 1, "bfloat16") for model, size in PEERS)]
    return list(dict.fromkeys(str(entry) for case in cases for entry in _of_case(case)))
