"""What is measured: the suites, their cases, and the columns of their CSV files. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from xcit.bench.results import ENVIRONMENT

Mode = Literal["inference", "training"]


@dataclass(frozen=True)
class XCACase:
    """One XCA layer. "training" is its forward and backward pass, the input's gradient included."""

    embed_dim: int
    num_heads: int
    batch_size: int
    num_tokens: int
    mode: Mode

    def __str__(self) -> str:
        shape = f"{self.batch_size} × {self.num_tokens} tokens"
        return f"XCA {self.embed_dim}/{self.num_heads}, {shape}, {self.mode}"


@dataclass(frozen=True)
class BackboneCase:
    """A whole classifier on square images. "training" is one step: forward, cross-entropy, backward, AdamW."""

    architecture: str
    image_size: int
    batch_size: int
    mode: Mode

    def __str__(self) -> str:
        return f"{self.architecture} at {self.image_size} px, batch {self.batch_size}, {self.mode}"


@dataclass(frozen=True)
class TrainingCase:
    """A training step as a run takes it: mixing, forward, loss on soft targets, backward, AdamW, schedule."""

    architecture: str
    image_size: int
    batch_size: int

    @property
    def mode(self) -> Mode:
        """It trains."""
        return "training"

    def __str__(self) -> str:
        return f"{self.architecture} at {self.image_size} px, batch {self.batch_size}, whole training step"


@dataclass(frozen=True)
class PyramidCase:
    """The maps at strides 4, 8, 16 and 32. "training" is a forward and a backward pass from gradients of all levels.

    The image is padded to multiples of 32 before it is measured: 800 x 1333 px to 800 x 1344.
    """

    architecture: str
    height: int
    width: int
    batch_size: int
    mode: Mode

    def __str__(self) -> str:
        return f"{self.architecture} pyramid of {self.height} × {self.width} px, batch {self.batch_size}, {self.mode}"


@dataclass(frozen=True)
class LoadingCase:
    """An epoch of JPEG files as they are read, distorted and put into batches."""

    num_images: int
    image_size: int
    batch_size: int
    num_workers: int

    def __str__(self) -> str:
        size = f"{self.num_images} images to {self.image_size} px"
        return f"{size}, batch {self.batch_size}, {self.num_workers} worker processes"


Case = XCACase | BackboneCase | TrainingCase | PyramidCase


@dataclass(frozen=True)
class Suite:
    """A set of cases with one CSV file.

    Args:
        name: of the verb, and of the file in the results folder.
        case_type: its fields are the file's first columns.
        cases: all of them.
        quick_cases: what ``--quick`` takes.
        baseline: the competitor that ratios are against, "timm" or one of our forms.
        contenders: ours, by the form of XCA that they are asked for.
        timed: False measures memory only.
    """

    name: str
    case_type: type[XCACase] | type[BackboneCase] | type[TrainingCase] | type[PyramidCase]
    cases: tuple[Case, ...]
    quick_cases: tuple[Case, ...]
    baseline: str = "timm"
    contenders: tuple[str, ...] = ("tokens", "covariance", "auto")
    timed: bool = True

    @property
    def ratio_column(self) -> str:
        """The column that says how many times faster a competitor was than the baseline."""
        return f"ratio_vs_{self.baseline}"

    @property
    def case_columns(self) -> tuple[str, ...]:
        """The columns that name a case."""
        return tuple(field.name for field in fields(self.case_type))

    @property
    def columns(self) -> tuple[str, ...]:
        """The file's header."""
        times = ("median_ms", "p25_ms", "p75_ms", self.ratio_column, "rounds") if self.timed else ()
        measured = (*times, "peak_mib", "saved_mib", "max_rel_diff")
        return ("date", *self.case_columns, "dtype", "competitor", "form", *measured, *ENVIRONMENT)

    def path(self, results: Path) -> Path:
        """The suite's file in a results folder."""
        return results / f"{self.name}.csv"


MODES: tuple[Mode, ...] = ("inference", "training")

WIDTHS = ((128, 4), (192, 4), (384, 8), (512, 8), (768, 16))
"""Width and heads of every size in the zoo: nano, tiny, small, medium, large."""

XCA = Suite(
    name="xca",
    case_type=XCACase,
    cases=tuple(XCACase(384, 8, b, n, mode) for mode in MODES for b, n in ((4, 2304), (2, 4096), (1, 16384))),
    quick_cases=tuple(XCACase(384, 8, 1, n, mode) for mode in MODES for n in (196, 2304)),
)

XCA_FORMS = Suite(
    name="xca_forms",
    case_type=XCACase,
    cases=tuple(
        XCACase(dim, heads, batch, tokens, mode)
        for mode in MODES
        for dim, heads in WIDTHS
        for tokens, batches in (
            (196, (1, 8)),
            (576, (1, 8)),
            (784, (1, 8)),
            (2304, (1, 4)),
            (4096, (1, 2)),
            (16384, (1,)),
        )
        for batch in batches
    ),
    quick_cases=tuple(XCACase(dim, heads, 1, 784, mode) for mode in MODES for dim, heads in WIDTHS[:2]),
    baseline="tokens",
    contenders=("tokens", "covariance"),
)
"""Both forms over a grid of sizes: what the automatic rule (``xcit.ops.xca.choose_form``) is fitted to."""

XCA_MEMORY = Suite(
    name="xca_memory",
    case_type=XCACase,
    cases=tuple(XCACase(dim, heads, 4, 2304, "training") for dim, heads in WIDTHS),
    quick_cases=(XCACase(128, 4, 1, 2304, "training"),),
    timed=False,
)

BACKBONE = Suite(
    name="backbone",
    case_type=BackboneCase,
    cases=(
        BackboneCase("xcit_tiny_12_p8", 224, 1, "inference"),
        BackboneCase("xcit_small_12_p16", 224, 1, "inference"),
        BackboneCase("xcit_small_12_p16", 224, 8, "inference"),
        BackboneCase("xcit_small_12_p16", 1024, 1, "inference"),
        BackboneCase("xcit_small_12_p8", 224, 1, "inference"),
        BackboneCase("xcit_small_12_p8", 384, 1, "inference"),
        BackboneCase("xcit_small_12_p8", 512, 1, "inference"),
        BackboneCase("xcit_medium_24_p16", 224, 1, "inference"),
        BackboneCase("xcit_tiny_12_p8", 224, 2, "training"),
        BackboneCase("xcit_small_12_p16", 224, 4, "training"),
        # of one image in training, timm's stem has wrong gradients on the CPU (see xcit.models.layers): two, then
        BackboneCase("xcit_small_12_p8", 224, 2, "training"),
        BackboneCase("xcit_small_12_p8", 384, 2, "training"),
    ),
    quick_cases=(
        BackboneCase("xcit_small_12_p16", 224, 1, "inference"),
        BackboneCase("xcit_tiny_12_p8", 384, 1, "inference"),
        BackboneCase("xcit_nano_12_p8", 224, 2, "training"),
    ),
)

TRAINING = Suite(
    name="training",
    case_type=TrainingCase,
    cases=(TrainingCase("xcit_small_12_p16", 224, 4), TrainingCase("xcit_small_12_p8", 384, 2)),
    quick_cases=(TrainingCase("xcit_nano_12_p8", 224, 2),),
    contenders=("auto",),
)

PYRAMID = Suite(
    name="pyramid",
    case_type=PyramidCase,
    cases=(
        PyramidCase("xcit_small_12_p16", 800, 1333, 1, "inference"),
        PyramidCase("xcit_small_12_p8", 800, 1333, 1, "inference"),
        PyramidCase("xcit_small_12_p16", 800, 1333, 1, "training"),
        PyramidCase("xcit_tiny_12_p8", 800, 1333, 1, "training"),
    ),
    quick_cases=tuple(PyramidCase("xcit_nano_12_p16", 320, 533, 1, mode) for mode in MODES),
    contenders=("auto",),
)

LOADING_CASES = tuple(LoadingCase(128, 224, 32, num_workers) for num_workers in (0, 1, 2))
LOADING_COLUMNS = (
    "date",
    *(field.name for field in fields(LoadingCase)),
    "competitor",
    "images_per_second",
    "median_ms",
    "p25_ms",
    "p75_ms",
    "ratio_vs_timm",
    "rounds",
    *ENVIRONMENT,
)
"""Of ``loading.csv``; the times are of one epoch."""

SUITES = {suite.name: suite for suite in (XCA, XCA_FORMS, XCA_MEMORY, BACKBONE, TRAINING, PYRAMID)}
