"""What `xcit bench` measures: cases by name, and who competes in each. Nothing here computes.

A case is called GROUP/MODEL/SIZE/BATCH, for example ``xcit/xcit_small_12_p8/512/1``: a group of competitors, the model,
the side of the square image in pixels, and how many images at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from xcit.bench.cases import Mode
from xcit.bench.results import ENVIRONMENT
from xcit.errors import ConfigError, UnknownNameError
from xcit.models.zoo import ARCHITECTURES

Source = Literal["timm", "ours", "folded", "peer"]
Runtime = Literal["eager", "compile", "onnxruntime", "openvino"]

RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "onnxruntime", "openvino")
TORCH: tuple[Runtime, ...] = ("eager", "compile")
"""The runtimes that train, and that know CUDA here."""

GROUPS = {
    "xcit": "our XCiT, as it is and folded, against timm's with the same weights",
    "peers": "our folded XCiT against timm's models of like accuracy",
    "precisions": "our folded XCiT in float32, bfloat16 and int8, taking turns",
    "linear": "one model over many sizes: what the growth with the number of tokens is fitted to",
    "training": "a training step of our XCiT against timm's",
    "training-peers": "a training step of our XCiT against timm's models of like accuracy",
}
RATIOS = tuple(f"ratio_vs_{runtime}" for runtime in RUNTIMES)
"""How many times faster a row's competitor is than the case's baseline in that runtime."""
COLUMNS = (
    *("date", "case", "model", "source", "runtime", "mode", "dtype", "image_size", "batch_size"),
    *("median_ms", "p90_ms", "images_per_second", "rounds", *RATIOS),
    *("peak_mib", "process_mib", "multiply_adds", "gflops", "matrix_gflops", "max_rel_diff"),
    *ENVIRONMENT,
    "onnxruntime",
    "openvino",
)
"""Of the CSV file. ``multiply_adds`` are of one image in inference. ``gflops`` is what was done of them in a second,
two operations each, of a training step three passes' worth. ``matrix_gflops`` is what products of large matrices
reached in the same run."""
PRECISIONS = "precisions"
"""The group whose competitors differ in precision."""
PRECISIONS_OF: dict[Runtime, tuple[str, ...]] = {
    "openvino": ("bfloat16", "float32", "int8"),
    "onnxruntime": ("float32", "int8"),
}
"""What each runtime computes in there; the first is what the others of that runtime are measured by, too."""
SMALLEST = 32
"""Side in pixels: what all models here can take."""


@dataclass(frozen=True)
class Peer:
    """A model of timm that an XCiT is compared with.

    Args:
        name: timm's.
        image_size: at which it has its accuracy, in pixels; a case of the XCiT's own size runs it there.
        top1: ImageNet top-1 in percent with the best weights that are trained on ImageNet-1k alone.
    """

    name: str
    image_size: int
    top1: float


PEERS: dict[str, tuple[Peer, ...]] = {
    "xcit_tiny_24_p16": (
        Peer("deit_small_patch16_224", 224, 79.84),
        Peer("swin_tiny_patch4_window7_224", 224, 81.38),
        Peer("convnext_pico", 288, 80.41),
        Peer("cait_xxs36_224", 224, 79.75),
        Peer("regnety_016", 224, 80.67),
        Peer("resnet50", 224, 80.68),
    ),
    "xcit_small_12_p16": (
        Peer("deit_base_distilled_patch16_224", 224, 83.38),
        Peer("swin_small_patch4_window7_224", 224, 83.23),
        Peer("convnext_small", 288, 83.70),
        Peer("cait_s24_224", 224, 83.48),
        Peer("regnety_064", 288, 83.72),
        Peer("resnet152", 288, 83.45),
    ),
    "xcit_small_12_p8": (
        Peer("deit3_base_patch16_224", 224, 83.79),
        Peer("swinv2_small_window16_256", 256, 84.22),
        Peer("convnext_base", 288, 84.43),
        Peer("cait_xs24_384", 384, 84.06),
        Peer("regnety_080", 288, 83.93),
        Peer("resnet200d", 320, 83.96),
    ),
}
"""By the XCiT whose distilled 224 checkpoint is of like accuracy (80.5, 83.4 and 84.3 % there). Source of all figures:
``results/results-imagenet.csv`` of timm's repository, which evaluated every model at the size given here; from one
version of that file to another they differ by a few hundredths."""
OWN_SIZE = 224
"""Of the XCiTs in ``PEERS``."""


@dataclass(frozen=True)
class DeployCase:
    """One comparison: what is run, and at which size.

    Args:
        group: of ``GROUPS``.
        model: an XCiT architecture; in the group "linear" a model of timm as well.
        image_size: side of the square image in pixels.
        batch_size: images at once.
    """

    group: str
    model: str
    image_size: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.group}/{self.model}/{self.image_size}/{self.batch_size}"

    @property
    def mode(self) -> Mode:
        """What a measured call does: a forward pass without gradients, or a whole training step."""
        return "training" if self.group.startswith("training") else "inference"

    @property
    def is_xcit(self) -> bool:
        """Whether ``model`` is one of ours."""
        return self.model in ARCHITECTURES


@dataclass(frozen=True)
class Entry:
    """A competitor of a case.

    Args:
        source: whose model: "timm" (its XCiT, or the model of a linear case), "ours" (as it is), "folded" (ours, by
            ``xcit.deploy.fold``), or "peer".
        model: its name.
        image_size: side of its images in pixels.
        runtime: what runs it.
        dtype: its precision, where a case compares several; "" for the run's.
    """

    source: Source
    model: str
    image_size: int
    runtime: Runtime
    dtype: str = ""

    def __str__(self) -> str:
        return f"{self.model if self.source == 'peer' else self.source} {self.runtime} {self.dtype}".rstrip()


LINEAR_SIZES = (512, 640, 768, 1024, 1280, 1536, 1792, 2048)
LINEAR_MODELS = ("xcit_small_12_p16", "xcit_small_12_p8", "vit_small_patch16_224")

CASES: tuple[DeployCase, ...] = (
    DeployCase("xcit", "xcit_small_12_p16", 224, 1),
    DeployCase("xcit", "xcit_small_12_p16", 224, 8),
    DeployCase("xcit", "xcit_small_12_p16", 512, 1),
    DeployCase("xcit", "xcit_small_12_p16", 1024, 1),
    DeployCase("xcit", "xcit_small_12_p16", 2048, 1),
    DeployCase("xcit", "xcit_small_12_p8", 224, 1),
    DeployCase("xcit", "xcit_small_12_p8", 224, 8),
    DeployCase("xcit", "xcit_small_12_p8", 512, 1),
    DeployCase("xcit", "xcit_small_12_p8", 1024, 1),
    DeployCase("xcit", "xcit_small_12_p8", 2048, 1),
    *(DeployCase("peers", model, OWN_SIZE, 1) for model in PEERS),
    DeployCase("peers", "xcit_small_12_p16", OWN_SIZE, 8),
    DeployCase("peers", "xcit_small_12_p16", 512, 1),
    DeployCase("peers", "xcit_small_12_p16", 1024, 1),
    DeployCase("peers", "xcit_small_12_p16", 2048, 1),
    DeployCase("precisions", "xcit_small_12_p16", 224, 1),
    DeployCase("precisions", "xcit_small_12_p8", 224, 1),
    DeployCase("precisions", "xcit_small_12_p8", 512, 1),
    DeployCase("precisions", "xcit_small_12_p8", 1024, 1),
    *(DeployCase("linear", model, size, 1) for model in LINEAR_MODELS for size in LINEAR_SIZES),
    DeployCase("training", "xcit_small_12_p16", 224, 4),
    DeployCase("training", "xcit_small_12_p8", 224, 2),
    DeployCase("training", "xcit_small_12_p8", 384, 2),
    DeployCase("training-peers", "xcit_small_12_p16", OWN_SIZE, 4),
)
QUICK_CASES = (DeployCase("xcit", "xcit_nano_12_p8", 224, 1),)


def select(names: Sequence[str]) -> list[DeployCase]:
    """Return the cases that names or patterns mean, each once, in the order of the names.

    Args:
        names: names of cases, listed or not, or patterns of the shell over the listed ones, such as ``xcit/*p8/*``.

    Raises:
        UnknownNameError: a pattern that no listed case fits; an unknown group or model.
        ConfigError: a name that is no case, or a case that cannot be run.
    """
    chosen: dict[DeployCase, None] = {}
    for name in names:
        found = [case for case in CASES if fnmatchcase(str(case), name)]
        if not found and re.search(r"[*?\[]", name):
            raise UnknownNameError("case", name, map(str, CASES), "`xcit bench --list` has all of them.")
        chosen |= dict.fromkeys(found or [parse(name)])
    return list(chosen)


def parse(name: str) -> DeployCase:
    """Return the case of a name, listed or not.

    Raises:
        UnknownNameError: an unknown group or model.
        ConfigError: not GROUP/MODEL/SIZE/BATCH, or a case that cannot be run.
    """
    match = re.fullmatch(r"([\w-]+)/([\w.-]+)/(\d+)/(\d+)", name)
    if not match:
        raise ConfigError(
            f"{name!r} is not the name of a case: it must be GROUP/MODEL/SIZE/BATCH, such as {CASES[0]}; "
            "`xcit bench --list` has some."
        )
    group, model, size, batch = match[1], match[2], int(match[3]), int(match[4])
    if group not in GROUPS:
        raise UnknownNameError("group of cases", group, GROUPS, f"There are {', '.join(GROUPS)}.")
    if group.endswith("peers"):
        if model not in PEERS:
            raise UnknownNameError("XCiT with peers", model, PEERS, f"There are peers for {', '.join(PEERS)}.")
    elif group != "linear" and model not in ARCHITECTURES:
        raise UnknownNameError("architecture", model, ARCHITECTURES, "`xcit models` lists them.")
    if size < SMALLEST or batch < 1:
        raise ConfigError(f"{name}: the size must be {SMALLEST} px or more, and the batch one image or more.")
    if group == "training" and batch < 2:
        # see docs/benchmarks.md: what is wrong cannot be compared, and is not timed
        raise ConfigError(
            f"{name}: take a batch of 2 or more; of a single image timm's XCiT has wrong gradients on the CPU."
        )
    return DeployCase(group, model, size, batch)


def entries(case: DeployCase, runtimes: Iterable[Runtime]) -> list[Entry]:
    """Return a case's competitors; the first of each runtime is what the others in that runtime are measured by.

    Args:
        case: which.
        runtimes: of inference; a training step takes those of them that are torch's.
    """
    taken = [runtime for runtime in runtimes if case.mode == "inference" or runtime in TORCH]
    ours: Source = "ours" if case.mode == "training" else "folded"
    found = []
    if case.group == PRECISIONS:
        return [
            Entry(ours, case.model, case.image_size, runtime, dtype)
            for runtime, dtypes in PRECISIONS_OF.items()
            if runtime in taken
            for dtype in dtypes
        ]
    if case.group.endswith("peers"):
        at_home = case.image_size == OWN_SIZE
        found += [Entry(ours, case.model, case.image_size, runtime) for runtime in taken]
        for peer in PEERS[case.model]:
            size = peer.image_size if at_home else case.image_size
            found += [Entry("peer", peer.name, size, runtime) for runtime in taken]
        return found
    found += [Entry("timm", case.model, case.image_size, runtime) for runtime in taken]
    if not case.is_xcit:
        return found
    if ours == "folded" and "eager" in taken and case.group != "linear":
        found.append(Entry("ours", case.model, case.image_size, "eager"))  # what folding alone is worth
    found += [Entry(ours, case.model, case.image_size, runtime) for runtime in taken]
    return found
