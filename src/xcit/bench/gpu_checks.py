"""Whether competitors of `python -m xcit.bench gpu` compute the same function: looked at before any of them is timed.

In inference, logits are compared with those of timm's eager float32 model. In training, logits and gradients:

* every source with its kernels, eagerly and without stochastic depth, on a few images, with timm's eager float32 step;
* every way to run it, with the eager step of the same source on the case's own batch, from one seed: the compiler is
  told to draw as eager mode does.

Narrow types differ from float32 by more in a deep network than in a shallow one. So a competitor may differ by what is
rounding in its type, or by twice what timm's own model in that type differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xcit.bench.gpu_cases import Entry, GpuCase
from xcit.bench.gpu_contenders import (
    Running,
    checked_evidence,
    drop_path_of,
    dtypes,
    shared_evidence,
    start,
    true_logits,
)
from xcit.bench.runner import TOLERANCES, OutputsDifferError

OUTPUT = "output"
NUM_IMAGES = 2
"""On which gradients are compared with float32's."""
OF_ONE = 5.0
"""Times the tolerance that the gradient of a single parameter may differ by: rounding is more of few values."""
LEAST_SHARE = 1e-4
"""Of all gradients' norm: a smaller one is compared as if it were this large. That of a key's bias is zero but for
rounding."""
OF_TIMM = 3.0
"""Times the tolerance that timm's own model may differ by."""
OF_TIMMS_OWN = 2.0
"""Times timm's own difference that is accepted of ours."""


class Difference(NamedTuple):
    """How far one step is from another, each relative to the norm of the latter."""

    output: float
    gradients: float
    """Of all shared gradients together; 0 where there are none."""
    worst: float
    """Of the parameter whose gradient differs most."""
    worst_name: str

    @property
    def most(self) -> float:
        """The larger of output and gradients."""
        return max(self.output, self.gradients)


def relative_difference(found: Tensor, truth: Tensor) -> float:
    """Return ‖found − truth‖ / ‖truth‖; infinite where a value is not finite or the shapes differ."""
    if found.shape != truth.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    size, difference = _norm(truth), _norm(found.float() - truth.float())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def compare(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Difference:
    """Compare logits ("output") and the gradients that both name alike; timm names some of class attention's others."""
    shared = [n for n in found if n in truth and n != OUTPUT and found[n].shape == truth[n].shape]
    finite = all(bool(torch.isfinite(found[name]).all()) for name in shared)
    sizes = {name: _norm(truth[name]) for name in shared}
    apart = {name: _norm(found[name] - truth[name]) for name in shared}
    size, difference = (sum(v * v for v in values.values()) ** 0.5 for values in (sizes, apart))
    least = LEAST_SHARE * size
    by_name = {name: apart[name] / max(sizes[name], least) for name in shared if size}
    worst = max(by_name, key=lambda name: by_name[name], default="")
    gradients = (difference / size if size else 0.0) if finite else float("inf")
    return Difference(
        relative_difference(found[OUTPUT], truth[OUTPUT]), gradients, by_name.get(worst, 0.0), worst or OUTPUT
    )


class Checker:
    """Compares the competitors of one case; keeps what they are compared with until ``forget``.

    Args:
        case: which.
        device: where.
        say: takes a line.
    """

    def __init__(self, case: GpuCase, device: torch.device, say: Callable[[str], None]) -> None:
        self.case, self.device, self.say = case, device, say
        self.tolerance = TOLERANCES[dtypes(case.precision)[1]]
        self._logits: dict[str, Tensor] = {}
        self._steps: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        self._truths: dict[str, dict[str, Tensor]] = {}
        self._sources: dict[tuple[str, str, str], Difference] = {}
        self._timms: dict[str, Difference] = {}

    def check(self, running: Running) -> float:
        """Compare a competitor.

        Returns:
            How far it is: the largest of output and gradients together.

        Raises:
            OutputsDifferError: further than rounding, or not finite; with the competitor's name.
        """
        if self.case.mode == "inference":
            return self._check_logits(running)
        entry = running.entry
        of_source = self._of_source(entry)
        own = running.step()  # not compared itself: it must only be finite
        if not bool(torch.isfinite(own).all()):
            raise OutputsDifferError(f"{self.case}: the logits of {str(entry)!r} are not finite. It is not timed.")
        if entry.run == "eager":
            self._steps[_key(entry)] = shared_evidence(running)
            return of_source.most
        found = compare(shared_evidence(running), self._eager_step(entry))
        self._judge(entry, found, "its own eager step", others=2.0)
        return max(of_source.most, found.most)

    def forget(self) -> None:
        """Give the memory back."""
        for kept in (self._logits, self._steps, self._truths):
            kept.clear()

    def _check_logits(self, running: Running) -> float:
        entry = running.entry
        whose = entry.model if entry.source == "peer" else "timm"
        if whose not in self._logits:
            self._logits[whose] = true_logits(entry, self.case, self.device)
        found = Difference(relative_difference(running.step(), self._logits[whose]), 0.0, 0.0, OUTPUT)
        self._judge(entry, found, "the eager float32 model")
        return found.output

    def _of_source(self, entry: Entry) -> Difference:
        """Compare an eager step without stochastic depth with float32's, once for each source with its kernels."""
        key = _key(entry)
        if key not in self._sources:
            truth = entry if entry.source == "peer" else replace(entry, source="timm", kernels="plain")
            if entry.model not in self._truths:
                self._truths[entry.model] = checked_evidence(truth, self.case, "float32", self.device, NUM_IMAGES)
            evidence = checked_evidence(entry, self.case, self.case.precision, self.device, NUM_IMAGES)
            self._sources[key] = compare(evidence, self._truths[entry.model])
        eager = replace(entry, run="eager")
        self._judge(eager, self._sources[key], "timm's eager float32 step, without stochastic depth,")
        return self._sources[key]

    def _eager_step(self, entry: Entry) -> dict[str, Tensor]:
        if _key(entry) not in self._steps:
            self._steps[_key(entry)] = shared_evidence(start(self.case, replace(entry, run="eager"), self.device))
        return self._steps[_key(entry)]

    def _judge(self, entry: Entry, found: Difference, truth: str, *, others: float = 1.0) -> None:
        """Refuse what differs by more than rounding; ``others`` is how many times rounding enters."""
        if entry.source == "timm":
            self._timms[entry.run] = found
        of_timm = self._timms.get(entry.run) or self._timms.get("eager")
        base = others * self.tolerance
        if entry.is_ours:
            known = of_timm or Difference(0.0, 0.0, 0.0, OUTPUT)
            limit = max(base, OF_TIMMS_OWN * known.most)
            limit_of_one = max(OF_ONE * base, 2 * OF_TIMMS_OWN * known.worst)
        else:
            limit = limit_of_one = OF_TIMM * base
            limit_of_one *= OF_ONE
        if found.most <= limit and found.worst <= limit_of_one:
            return
        what = OUTPUT if found.output > limit else f"the gradients, most in {found.worst_name!r}"
        text = (
            f"{self.case}: {str(entry)!r} differs from {truth} by {found.most:.1e} in {what} (by {found.worst:.1e} "
            f"there); at most {limit:.0e} ({limit_of_one:.0e}) is rounding."
        )
        draws = bool(drop_path_of(self.case)) and entry.run != "eager"
        if draws and entry.source in ("timm", "peer") and found.most < float("inf"):
            # what compares steps that draw is the draws' being equal; where they are not even for timm, say so
            self.say(f"{text} Its random numbers may be others here; it is timed, and ours may differ by twice that.")
            return
        raise OutputsDifferError(f"{text} It is not timed.")


def _key(entry: Entry) -> tuple[str, str, str]:
    return entry.source, entry.model, entry.kernels


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
