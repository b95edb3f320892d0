"""Both forms of XCA over a grid of sizes on a GPU, with and without kernels, and what their times are made of.

The time of a form is fitted by a sum whose terms say what grows with what, in nanoseconds:

    token form         products * B (4 N C^2 + 2 N C d)     + values * B N C                       + call
    covariance form    products * B 2 N C^2                 + values * B N C + square * B (3 C^3 + 2 C^2 d) + call

``products`` run on the matrix units in the tokens' type, ``square`` (what is (C, C) an image) in float32 at least,
which is slower; ``values`` pass through memory. No term is negative. Relative errors are least squares: small sizes
count as much as large ones. In training the terms are of forward and backward pass together.

Legend: B batch, N tokens, C channels, h heads, d = C / h.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcit.bench import results, timer
from xcit.bench.cases import MODES, WIDTHS, XCACase
from xcit.bench.contenders import SEED, randomize
from xcit.bench.gpu_budget import Budget
from xcit.bench.gpu_checks import relative_difference
from xcit.bench.gpu_rows import Row, environment
from xcit.bench.results import ENVIRONMENT
from xcit.bench.runner import TOLERANCES, OutputsDifferError
from xcit.errors import DataError, XCiTError
from xcit.files import write_atomic
from xcit.models.layers import XCA
from xcit.ops.kernels import Kernels, interpreted, observe_kernels
from xcit.ops.xca import XCAWeights, xca

FORMS = ("tokens", "covariance")
COLUMNS = (
    *("date", "embed_dim", "num_heads", "batch_size", "num_tokens", "mode", "dtype", "form", "kernels", "kernels_run"),
    *("median_ms", "p25_ms", "p75_ms", "rounds", "max_rel_diff", *ENVIRONMENT, "triton", "code"),
)
"""Of ``gpu_xca_forms.csv``."""
SHAPES = (
    (196, 64),
    (784, 16),
    (2304, 32),
    (196, 256),
    (4096, 8),
    (2304, 1),
    (784, 1),
    (16384, 4),
    (196, 1),
    (16384, 1),
)
"""Tokens and batch, what decides most first."""
GRID: tuple[XCACase, ...] = tuple(
    XCACase(width, heads, batch, tokens, mode)
    for tokens, batch in SHAPES
    for width, heads in sorted(WIDTHS, key=lambda each: each[0] != 384)
    for mode in MODES
)
QUICK = tuple(XCACase(128, 4, batch, tokens, mode) for tokens, batch in ((64, 1), (256, 2)) for mode in MODES)
PLAN = timer.Plan(warmup=2, min_rounds=5, max_rounds=20, budget_s=0.2, min_sample_ms=2.0)
LEAST_POINTS = 5


def path(results_dir: Path) -> Path:
    """Return the CSV file that the rows stand in."""
    return results_dir / "gpu_xca_forms.csv"


# --- measuring --------------------------------------------------------------------------------------------------------


def run(
    grid: Sequence[XCACase],
    device: torch.device,
    *,
    dtype: str = "bfloat16",
    out: Path | None,
    budget: Budget | None = None,
    plan: timer.Plan = PLAN,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Time both forms of one XCA layer at every size; each size's rows are on disk before the next begins.

    Args:
        grid: sizes, what decides most first.
        device: where.
        dtype: of tokens and weights.
        out: the CSV file that grows; None keeps no record.
        budget: of time; what it does not suffice for is said.
        plan: how long to time a size.
        again: measure what the file has from this device and code, too.
        say: takes lines.

    Raises:
        OutputsDifferError: at the end, when the rest is on disk: a form or a kernel differed from the token form in
            float32 by more than rounding, and was not timed.
    """
    budget = budget or Budget(None)
    here, rows, failed = environment(device.type), [], []  # type: ignore[var-annotated]
    has_kernels = "kernels" in inspect.signature(xca).parameters and (device.type == "cuda" or interpreted())
    if not has_kernels:
        say("Here XCA has no kernels to choose; its forms are measured in plain PyTorch.")
    same = ("hardware", "torch", "code")
    done = {
        _key(row)
        for row in (results.read(out, COLUMNS) if out else [])
        if not again and row["dtype"] == dtype and all(row[name] == here[name] for name in same)
    }
    for i, case in enumerate(grid):
        if tuple(str(value) for value in vars(case).values()) in done:
            continue
        if budget.left_s <= 0:
            say(f"Time is up: {len(grid) - i} sizes are left; the same command goes on.")
            break
        found = _measure(case, device, dtype, plan, has_kernels, say, failed)
        found = [row | {"date": results.now()} | here for row in found]
        if out:
            results.append(out, found, COLUMNS)
        rows += found
        times = ", ".join(f"{row['form']} {row['kernels']} {float(row['median_ms']):.3f} ms" for row in found)
        say(f"{case}, {dtype}: {times}.")
    if failed:
        raise OutputsDifferError(
            f"{len(failed)} of what was asked for differed and was not timed; the first: {failed[0]}"
        )
    return rows


def _measure(
    case: XCACase,
    device: torch.device,
    dtype: str,
    plan: timer.Plan,
    has_kernels: bool,
    say: Callable[[str], None],
    failed: list[str],
) -> list[Row]:
    torch.manual_seed(SEED)
    layer = XCA(case.embed_dim, case.num_heads)
    randomize(layer)
    draw = torch.Generator().manual_seed(SEED)
    x = torch.randn(case.batch_size, case.num_tokens, case.embed_dim, generator=draw).to(device)
    cotangent = torch.randn(x.shape, generator=draw).to(device)
    layer.to(device)
    if case.mode == "training":
        x.requires_grad_()
    truth = _evidence(_step(layer, x, cotangent, case, "tokens", {}), x)
    narrow = getattr(torch, dtype)
    layer.to(narrow)
    x, cotangent = x.detach().to(narrow).requires_grad_(x.requires_grad), cotangent.to(narrow)
    choices: Iterable[tuple[str, Kernels]] = itertools.product(
        FORMS, ("plain", "triton") if has_kernels else ("plain",)
    )
    steps: dict[tuple[str, str], Callable[[], Tensor]] = {}
    ran: dict[tuple[str, str], list[str]] = {}
    apart: dict[tuple[str, str], float] = {}
    for form, kernels in choices:
        step = _step(layer, x, cotangent, case, form, {"kernels": kernels} if has_kernels else {})
        try:
            with observe_kernels() as seen:
                found = _evidence(step, x)
        except XCiTError as error:
            if kernels == "plain":
                raise
            say(f"{case}: the {form} form is left out with kernels. {error}")
            continue
        if kernels == "plain" and seen:
            raise OutputsDifferError(f"{case}: the {form} form, plain, ran the kernels {', '.join(seen)}.")
        if kernels == "triton" and not seen:
            say(f"{case}: the {form} form has no kernel of its own here.")
            continue
        apart[form, kernels] = max(map(relative_difference, found, truth))
        if not apart[form, kernels] <= TOLERANCES[narrow]:
            failed.append(
                f"{case}: the {form} form, {kernels}, differs from float32's token form by {apart[form, kernels]:.1e} "
                f"in {dtype}; at most {TOLERANCES[narrow]:.0e} is rounding. It is not timed."
            )
            say(failed[-1])
            continue
        steps[form, kernels], ran[form, kernels] = step, seen
    if not steps:
        return []
    samples = timer.time_interleaved({" ".join(key): step for key, step in steps.items()}, plan, device.type)
    rows = []
    for form, ran_with in steps:
        own = samples[f"{form} {ran_with}"]
        spread = timer.spread(own)
        rows.append(
            dict.fromkeys(COLUMNS, "")
            | {name: str(value) for name, value in vars(case).items()}
            | {"dtype": dtype, "form": form, "kernels": ran_with}
            | {"kernels_run": "+".join(sorted(set(ran[form, ran_with]))), "rounds": str(len(own))}
            | {"median_ms": f"{spread.median:.4f}", "p25_ms": f"{spread.p25:.4f}", "p75_ms": f"{spread.p75:.4f}"}
            | {"max_rel_diff": f"{apart[form, ran_with]:.1e}"}
        )
    return rows


def _evidence(step: Callable[[], Tensor], x: Tensor) -> list[Tensor]:
    """Return copies of a step's output and, in training, of the gradient that it leaves."""
    y = step().detach().clone()
    return [y] if x.grad is None else [y, x.grad.clone()]


def _step(
    layer: XCA, x: Tensor, cotangent: Tensor, case: XCACase, form: str, options: dict[str, Any]
) -> Callable[[], Tensor]:
    weights: XCAWeights = layer._weights()
    parameters: list[nn.Parameter] = list(layer.parameters())

    def infer() -> Tensor:
        with torch.inference_mode():
            return xca(x, weights, form=form, **options)  # type: ignore[arg-type]

    def train() -> Tensor:
        for tensor in (x, *parameters):
            tensor.grad = None
        y = xca(x, weights, form=form, **options)  # type: ignore[arg-type]
        y.backward(cotangent)
        return y

    return train if case.mode == "training" else infer


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("embed_dim", "num_heads", "batch_size", "num_tokens", "mode"))


# --- fitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What a call of one form costs, in nanoseconds; see the module's text."""

    products: float
    values: float
    square: float
    call: float

    def ns(self, form: str, *, embed_dim: int, num_heads: int, batch_size: int, num_tokens: int) -> float:
        """Return the time of a call."""
        parts = sizes(form, embed_dim=embed_dim, num_heads=num_heads, batch_size=batch_size, num_tokens=num_tokens)
        return float(np.dot(parts, (self.products, self.values, self.square, self.call)))


@dataclass(frozen=True)
class Fit:
    """Both forms' terms for one way to run them, and how well a choice by them does on what they were fitted to."""

    tokens: Terms
    covariance: Terms
    worst_choice: float
    """The least, over the grid, of the better form's time over the chosen one's; 1 where every choice is right."""
    wrong: int
    """Sizes at which the slower form is chosen."""
    num_sizes: int


def sizes(form: str, *, embed_dim: int, num_heads: int, batch_size: int, num_tokens: int) -> tuple[float, ...]:
    """Return what a form's terms are multiplied with: products, values, square, call."""
    N, C, B, d = num_tokens, embed_dim, batch_size, embed_dim / num_heads
    if form == "tokens":
        return float(B * (4 * N * C**2 + 2 * N * C * d)), float(B * N * C), 0.0, 1.0
    return float(B * 2 * N * C**2), float(B * N * C), float(B * (3 * C**3 + 2 * C**2 * d)), 1.0


def fit_terms(points: Sequence[tuple[tuple[float, ...], float]]) -> Terms:
    """Fit a form's terms.

    Args:
        points: what the terms are multiplied with, and the time in nanoseconds, of each size.

    Raises:
        DataError: fewer sizes than are needed.
    """
    if len(points) < LEAST_POINTS:
        raise DataError(f"A form's cost is fitted to {LEAST_POINTS} sizes or more; there are {len(points)}.")
    matrix = np.array([np.array(parts) / ns for parts, ns in points])
    return Terms(*nonnegative_least_squares(matrix, np.ones(len(points))))


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Return the x >= 0 for which |matrix x − target| is least, for a few unknowns: every choice of zeros is tried.

    Of the exact solution those components that are not zero solve the plain problem in their columns.
    """
    columns = matrix.shape[1]
    scale = np.where(norms := np.linalg.norm(matrix, axis=0), norms, 1.0)
    best, lowest = np.zeros(columns), float(target @ target)
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            part = matrix[:, chosen] / scale[list(chosen)]
            x, *_ = np.linalg.lstsq(part, target, rcond=None)
            if (x < 0).any():
                continue
            residual = float(((part @ x - target) ** 2).sum())
            if residual < lowest * (1 - 1e-12):
                best, lowest = np.zeros(columns), residual
                best[list(chosen)] = x / scale[list(chosen)]
    return [float(value) for value in best]


def fit_rows(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Fit]:
    """Fit what was measured; of a size that was measured more than once the last run counts.

    Returns:
        By hardware, dtype, mode, and kernels. Ways with fewer than ``LEAST_POINTS`` sizes are left out.
    """
    times: dict[tuple[str, str, str, str], dict[tuple[str, ...], dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        way = row["hardware"], row["dtype"], row["mode"], row["kernels"]
        times.setdefault(way, {}).setdefault(_key(row), {})[row["form"]] = 1e6 * float(row["median_ms"])
    fits = {}
    for way, by_size in times.items():
        both = {key: found for key, found in by_size.items() if len(found) == len(FORMS)}
        if len(both) < LEAST_POINTS:
            continue
        named = {
            key: dict(zip(("embed_dim", "num_heads", "batch_size", "num_tokens"), map(int, key[:4]), strict=True))
            for key in both
        }
        terms = {
            form: fit_terms([(sizes(form, **named[key]), found[form]) for key, found in both.items()]) for form in FORMS
        }
        shares = []
        for key, found in both.items():
            chosen = min(FORMS, key=lambda form: terms[form].ns(form, **named[key]))
            shares.append(min(found.values()) / found[chosen])
        fits[way] = Fit(
            terms["tokens"], terms["covariance"], min(shares), sum(share < 1 for share in shares), len(shares)
        )
    return fits


def write_fit(rows: Iterable[Row], target: Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fit what was measured and write the terms as JSON, the last hardware's of every dtype, mode and kernels.

    Raises:
        DataError: nothing with enough sizes was measured.
        ExportError: the file cannot be written.
    """
    fits = fit_rows(rows)
    if not fits:
        raise DataError(
            f"No dtype has {LEAST_POINTS} sizes in both forms yet; `python -m xcit.bench gpu-calibrate` measures them."
        )
    content: dict[str, Any] = {"unit": "nanoseconds; see xcit.bench.gpu_calibrate", "fits": []}
    for (hardware, dtype, mode, kernels), fit in fits.items():
        content["fits"].append(
            {"hardware": hardware, "dtype": dtype, "needs_grad": mode == "training", "kernels": kernels}
            | {form: vars(getattr(fit, form)) for form in FORMS}
            | {"worst_choice": fit.worst_choice, "wrong": fit.wrong, "num_sizes": fit.num_sizes}
        )
        say(
            f"{hardware}, {dtype}, {mode}, {kernels}: {fit.wrong} of {fit.num_sizes} sizes get the slower form, "
            f"at worst {fit.worst_choice:.2f} of the better one's speed."
        )
    write_atomic(target, (json.dumps(content, indent=2) + "\n").encode())
    return content
