"""How cost grows with the number of tokens: y = a + b N^p, fitted to measured sizes.

The intercept a is what does not depend on the size: reading the weights, the products of d x d matrices of each layer
and image. It is not known beforehand, so it is fitted with the rest: for each exponent p of a fine grid, a and b are a
linear least-squares problem, each point weighted by 1 / y (relative errors count, or the largest size alone would
decide), and a < 0 is not allowed (what costs less than nothing is noise). The p with the least residual is taken. After
a is subtracted, p is thus the slope of the points in a double logarithmic plot.

Source: figure 1 of the paper and its claim of linear complexity in the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xcit.errors import DataError

EXPONENTS = np.round(np.arange(0.3, 3.0005, 0.001), 3)
LEAST_POINTS = 4
"""Sizes: three figures are fitted."""


@dataclass(frozen=True)
class Growth:
    """The fit y = a + b N^p."""

    intercept: float
    """a, in the unit of y."""
    factor: float
    """b."""
    exponent: float
    """p."""
    worst: float
    """The largest |fit − y| / y of a point."""

    def at(self, num_tokens: float) -> float:
        """Return the fitted cost of an image of so many tokens."""
        return self.intercept + self.factor * num_tokens**self.exponent


def fit_growth(num_tokens: Sequence[float], costs: Sequence[float]) -> Growth:
    """Fit the growth of a cost.

    Args:
        num_tokens: of each point.
        costs: of each point, positive.

    Raises:
        DataError: fewer than four sizes, or a cost that is not a positive number.
    """
    n, y = np.asarray(num_tokens, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    if len(set(n.tolist())) < LEAST_POINTS:
        raise DataError(f"A growth is fitted to {LEAST_POINTS} sizes or more; there are {len(set(n.tolist()))}.")
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise DataError("A growth is fitted to positive costs; one of them is not.")
    scale = n.max()  # powers of numbers up to one, which are of like size for every exponent
    slope = (n / scale) ** EXPONENTS[:, None] / y  # (exponents, points); divided by y, the target of all points is one
    constant = 1 / y
    a, b = _lines(slope, constant)
    fitted = a[:, None] * constant + b[:, None] * slope
    best = int(((fitted - 1) ** 2).sum(axis=1).argmin())
    p = float(EXPONENTS[best])
    return Growth(float(a[best]), float(b[best] / scale**p), p, float(np.abs(fitted[best] - 1).max()))


def _lines(slope: np.ndarray, constant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each row of slopes, the a >= 0 and b for which a * constant + b * slope is nearest to one."""
    cc, cs, ss = constant @ constant, slope @ constant, (slope * slope).sum(axis=1)
    c, s = constant.sum(), slope.sum(axis=1)
    a = (ss * c - cs * s) / (cc * ss - cs**2)
    a = np.maximum(a, 0.0)
    return a, (s - a * cs) / ss


# --- measured rows ----------------------------------------------------------------------------------------------------

GROUP = "linear"
COSTS = {"median_ms": "time", "peak_mib": "memory"}
"""What is fitted, by its column."""

Row = Mapping[str, str]


@dataclass(frozen=True)
class Series:
    """One competitor over the sizes: points in the order of their sizes."""

    model: str
    source: str
    runtime: str
    dtype: str
    image_sizes: tuple[int, ...]
    num_tokens: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def name(self) -> str:
        """What it is called in tables and pictures."""
        whose = "" if not self.model.startswith("xcit") else f", {self.source}"
        return f"{self.model}{whose}"


def patch_of(model: str) -> int:
    """Return the side of a token in pixels, as a model's name says it: xcit_small_12_p8, vit_small_patch16_224.

    Raises:
        DataError: the name does not say it.
    """
    match = re.search(r"_p(?:atch)?(\d+)(?:_|$)", model)
    if not match:
        raise DataError(f"The name {model!r} does not say the size of its patches; name a model of one patch size.")
    return int(match[1])


def series_of(rows: Iterable[Row], column: str) -> list[Series]:
    """Sort the linear cases' rows into series; of a size that was measured more than once the last run counts.

    Args:
        rows: of one machine, as the CSV file has them.
        column: of ``COSTS``; rows without it are left out.

    Returns:
        Those of ``LEAST_POINTS`` sizes or more, in the order of their first row.
    """
    found: dict[tuple[str, str, str, str], dict[int, Row]] = {}
    for row in rows:
        if row["case"].split("/")[0] != GROUP or not row[column] or row["batch_size"] != "1":
            continue
        points = found.setdefault((row["model"], row["source"], row["runtime"], row["dtype"]), {})
        size = int(row["image_size"])
        if size not in points or row["date"] >= points[size]["date"]:
            points[size] = row
    series = []
    for (model, source, runtime, dtype), points in found.items():
        if len(points) < LEAST_POINTS:
            continue
        sizes = tuple(sorted(points))
        tokens = tuple((-(-size // patch_of(model))) ** 2 for size in sizes)
        costs = tuple(float(points[size][column]) for size in sizes)
        series.append(Series(model, source, runtime, dtype, sizes, tokens, costs))
    return series
