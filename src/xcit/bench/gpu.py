"""`python -m xcit.bench gpu`: rounds of competitors, each compared, then timed in turns, its rows on disk at once.

A round is one case with its competitors of one tier (``xcit.bench.gpu_cases``); rounds come in the order of what is
missed most. timm's eager model is in every round, and ratios are against it within the round. What a file has already
from this device and these versions is left out, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from xcit.bench import memory, results, timer
from xcit.bench.gpu_budget import TIMING_S, Budget, Costs, OutOfTimeError
from xcit.bench.gpu_cases import COLUMNS, COMPILED, FOUND, Entry, GpuCase, baseline, entries
from xcit.bench.gpu_checks import Checker
from xcit.bench.gpu_contenders import NoKernelsError, Running, dtypes, multiply_adds, start
from xcit.bench.gpu_peaks import Peaks, measure_peaks
from xcit.bench.gpu_rows import Row, arithmetic, environment, known_costs, make_row, measured
from xcit.bench.runner import OutputsDifferError
from xcit.errors import BackendError, XCiTError
from xcit.inference.devices import choose_device, is_out_of_memory, synchronize

PLAN = timer.Plan(min_rounds=5, max_rounds=100, budget_s=4.0, min_sample_ms=10.0)
GAIN = 1.03
"""A doubled batch must bring this much more images a second to be taken."""
LARGEST_BATCH = 4096


class Options(NamedTuple):
    """How to measure."""

    device: str = "cuda"
    """Or "cpu", for a look at the benchmark itself."""
    seconds: float | None = None
    """Of the whole run; None for as long as it takes."""
    full: bool = False
    """Competitors of the third tier too."""
    keep: tuple[str, ...] = ()
    """Patterns of competitors; none means all."""
    skip: tuple[str, ...] = ()
    """Patterns of those that are left out."""
    again: bool = False
    """Measure what the file has, too."""
    plan: timer.Plan = PLAN
    """How long to time a round; single images are timed one by one, whatever it says of samples."""


class Round(NamedTuple):
    """What is measured in turns: the baseline and these."""

    case: GpuCase
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return f"{self.case}: {', '.join(map(str, self.entries))}"


class Outcome(NamedTuple):
    """What a run brought."""

    rows: list[Row]
    left: list[Round]
    """What the time did not suffice for."""
    failed: list[str]
    """A line on each competitor that computed something else, or broke."""


def open_device(name: str) -> torch.device:
    """Return the device to measure on.

    Raises:
        BackendError: there is none, or it is neither cpu nor cuda.
    """
    device = choose_device(name)
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"The GPU benchmark measures on cuda, and on cpu to look at itself; got {name!r}.")
    return device


def plan_rounds(cases: Sequence[GpuCase], options: Options, done: set[tuple[str, str]]) -> list[Round]:
    """Return what is to be measured, what is missed most first.

    Args:
        cases: which, in the order of their importance.
        options: how.
        done: case and competitor of what is there already.

    Raises:
        UnknownNameError: a pattern that no competitor fits.
    """
    rounds = []
    most_tier = 3 if options.full else 2
    for tier in range(1, most_tier + 1):
        for case in cases:
            of_case = entries(case, most_tier=most_tier, keep=options.keep, skip=options.skip)
            first, *others = of_case
            wanted = [e for e in others if e.tier == tier and (str(case), str(e)) not in done]
            lonely = tier == 1 and not others and (str(case), str(first)) not in done
            if wanted or lonely:
                rounds.append(Round(case, tuple(wanted)))
    return rounds


def run(
    cases: Sequence[GpuCase],
    options: Options,
    *,
    out: Path | None = None,
    say: Callable[[str], None] = print,
    budget: Budget | None = None,
) -> Outcome:
    """Measure cases; each round's rows are on disk before the next begins.

    Args:
        cases: which, in the order of their importance.
        options: how.
        out: the CSV file that grows; None keeps no record.
        say: takes lines: what is measured and what it will cost, every result, what was left out and why.
        budget: the clock of ``options.seconds``, if it runs already.

    Raises:
        BackendError: the device is not there, or broke so that this process cannot use it any more; what was measured
            before is on disk.
        DataError: the file has other columns.
        UnknownNameError: a pattern that no competitor fits.
    """
    budget = budget or Budget(options.seconds)
    device = open_device(options.device)
    old = results.read(out, COLUMNS) if out else []
    here = environment(device.type)
    session = _Session(device, options, budget, Costs(known_costs(old, here)), say)
    found = [case if case.batch_size != FOUND else session.with_batch(case) for case in cases]
    rounds = plan_rounds(found, options, set() if options.again else measured(old, here))
    say(f"{len(rounds)} rounds of {len({each.case for each in rounds})} cases on {here['hardware']}.")
    rows: list[Row] = []
    left: list[Round] = []
    for each in rounds:
        date = results.now()
        fresh, missed = session.measure(each)
        fresh = [row | {"date": date} | here for row in fresh]
        if out and fresh:
            results.append(out, fresh, COLUMNS)
        rows += fresh
        if missed:
            left.append(Round(each.case, tuple(missed)))
    if left:
        say(f"Time is up: {sum(len(each.entries) for each in left)} competitors are left, the same command goes on:")
        for each in left:
            say(f"  {each}")
    return Outcome(rows, left, session.failed)


class _Session:
    """A run's device and what it has learned."""

    def __init__(
        self, device: torch.device, options: Options, budget: Budget, costs: Costs, say: Callable[[str], None]
    ) -> None:
        self.device, self.options, self.budget, self.costs, self.say = device, options, budget, costs, say
        self.failed: list[str] = []
        self._compiled = False
        self._peaks: dict[str, Peaks] = {}
        self._adds: dict[tuple[str, str, int, int, str], int] = {}

    def measure(self, wanted: Round) -> tuple[list[Row], list[Entry]]:
        """Measure a round; return its rows, and what the time did not suffice for."""
        case = wanted.case
        chosen, missed = self._affordable(wanted)
        if missed and not chosen:
            return [], missed
        names = ", ".join(map(str, (baseline(case), *chosen)))
        cost, left = self._cost(case, chosen), self.budget.left_s
        of_left = "" if left == float("inf") else f", of {left:.0f} s left"
        self.say(f"{case}: {names}; about {cost:.0f} s{of_left}.")
        compiles = any(entry.run in COMPILED for entry in chosen)
        if compiles or self._compiled:
            # a few graphs of one class are kept, and beyond them the compiler gives up without an error; and CUDA
            # graphs keep their memory
            torch.compiler.reset()
            self._compiled = compiles
        self._free()
        self._peaks_of(case)
        checker = Checker(case, self.device, self.say)
        ready: list[tuple[Running, float | None]] = []
        queue = [baseline(case), *chosen]
        while queue:
            entry = queue[0]
            try:
                with self.budget.alarm(self._timing_s([one for one, _ in ready])):
                    began = self._prepare(case, entry, checker)
            except OutOfTimeError:
                missed = [*(e for e in queue if e != baseline(case)), *missed]
                break
            queue.pop(0)
            if began is not None:
                ready.append(began)
            elif not ready:
                self.say(f"{case}: without its baseline, nothing of it is measured.")
                return [], missed
        checker.forget()
        self._free()
        if not ready or (len(ready) == 1 and chosen and missed):
            return [], missed
        try:
            return self._time(case, ready), missed
        except OutOfTimeError:
            return [], [*chosen, *(entry for entry in missed if entry not in chosen)]

    def with_batch(self, case: GpuCase) -> GpuCase:
        """Return a case with the batch from which on timm's eager model gains nothing, or has no room."""
        best, best_rate = 1, 0.0
        size = 1
        while size <= LARGEST_BATCH:
            sized = replace(case, batch_size=size)
            try:
                running = start(sized, baseline(case), self.device)
                plan = timer.Plan(warmup=0, min_rounds=3, max_rounds=3, budget_s=0.0, min_sample_ms=0.0)
                samples = timer.time_interleaved({"": running.step}, plan, self.device.type)[""]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break
            finally:
                running = None  # type: ignore[assignment]
                self._free()
            rate = size / timer.spread(samples).median
            if rate < GAIN * best_rate:
                break
            best, best_rate, size = size, rate, 2 * size
        found = replace(case, batch_size=best)
        self.say(f"{case}: a batch of {best}; more brings no more, or does not fit.")
        return found

    def _affordable(self, wanted: Round) -> tuple[list[Entry], list[Entry]]:
        """Return what of a round fits into the time that is left, and what does not; the last ones go first."""
        chosen = list(wanted.entries)
        missed: list[Entry] = []
        while chosen and not self.budget.fits(self._cost(wanted.case, chosen)):
            missed.insert(0, chosen.pop())
        return chosen, missed

    def _cost(self, case: GpuCase, chosen: Sequence[Entry]) -> float:
        builds = sum(self.costs.build_s(case, entry) for entry in (baseline(case), *chosen))
        return builds + self.options.plan.budget_s + TIMING_S * (len(chosen) + 1)

    def _timing_s(self, ready: Sequence[Running]) -> float:
        """Return the seconds that timing these, and one more, will take."""
        plan = self.options.plan
        rounds = (plan.warmup + 1 + plan.min_rounds) * sum(running.call_s for running in ready)
        return max(plan.budget_s, rounds) + TIMING_S * (len(ready) + 1)

    def _prepare(self, case: GpuCase, entry: Entry, checker: Checker) -> tuple[Running, float | None] | None:
        """Build a competitor, compare it, and measure its memory in MiB; None if it is left out, with a line why."""
        try:
            running = start(case, entry, self.device)
            self.costs.note(case, entry, running.build_s)
            self._check_kernels(case, running)
            running.difference = checker.check(running)
            running.clear()
            self._adds_of(case, entry)
            if entry.run in ("graphs", "autotune") and case.mode == "inference":
                return running, None  # a graph's memory is its own
            self._free()
            return running, memory.peak_mib(running.step, self.device.type)
        except NoKernelsError as error:
            self.say(f"{case}: {entry} is left out. {error}")
        except OutputsDifferError as error:
            self._fail(str(error))
        except Exception as error:  # whatever a compiler or a kernel raises costs its competitor, not the run
            if is_out_of_memory(error):
                self.say(f"{case}: {entry} did not fit into memory and is left out.")
            else:
                if not isinstance(error, XCiTError):
                    traceback.print_exc(file=sys.stderr)
                self._fail(f"{case}: {entry} broke: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                self._check_device(entry)
        self._free()
        return None

    def _check_kernels(self, case: GpuCase, running: Running) -> None:
        wanted, ran = running.entry.kernels, running.kernels_run
        if (wanted == "triton") != bool(ran):
            seen = f"ran {', '.join(ran)}" if ran else "ran none"
            raise OutputsDifferError(
                f"{case}: {running.entry} was asked for {wanted} kernels and {seen}. It is not timed."
            )

    def _check_device(self, entry: Entry) -> None:
        """Stop where a kernel has broken the device for this process: nothing after it would run.

        Raises:
            BackendError: naming the competitor.
        """
        try:
            torch.ones(1, device=self.device).add_(1).item()
        except RuntimeError as error:
            raise BackendError(
                f"{entry} left the device unusable for this process ({str(error).splitlines()[0]}). What was measured "
                f'before is kept; go on with --skip "{entry}".'
            ) from error

    def _time(self, case: GpuCase, ready: list[tuple[Running, float | None]]) -> list[Row]:
        plan = self.options.plan
        if case.batch_size == 1:  # a latency: the device waits for each call
            plan = replace(plan, min_sample_ms=0.0)
        while True:
            steps = {str(running.entry): running.step for running, _ in ready}
            try:
                with self.budget.alarm():
                    samples = timer.time_interleaved(steps, plan, self.device.type)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(ready) == 1:
                    raise
            running, _ = ready.pop()
            self.say(f"{case}: {running.entry} did not fit into memory beside the others and is left out.")
            del running, steps
            self._free()
        peaks = self._peaks_of(case)
        rows = []
        for running, step_mib in ready:
            row = make_row(
                case, running, samples, multiply_adds=self._adds_of(case, running.entry), step_mib=step_mib, peaks=peaks
            )
            rows.append(row)
            self.say(_line(running.entry, row))
        return rows

    def _peaks_of(self, case: GpuCase) -> Peaks:
        name = arithmetic(case)
        if name not in self._peaks:
            self._free()
            self._peaks[name] = measure_peaks(dtypes(case.precision)[1], self.device)
            peaks = self._peaks[name]
            self.say(f"{name}: products reach {peaks.matrix_tflops:.1f} TFLOP/s, copies {peaks.copy_gbs:.0f} GB/s.")
        return self._peaks[name]

    def _adds_of(self, case: GpuCase, entry: Entry) -> int:
        key = (entry.source, entry.model, case.image_size, case.batch_size, case.precision)
        if key not in self._adds:
            self._adds[key] = multiply_adds(entry, case, self.device)
        return self._adds[key]

    def _fail(self, line: str) -> None:
        self.failed.append(line)
        self.say(line)

    def _free(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            synchronize(self.device)
            torch.cuda.empty_cache()


def _line(entry: Entry, row: Row) -> str:
    peak = f", {float(row['peak_mib']):.0f} MiB" if row["peak_mib"] else ""
    floor = f", {100 * float(row['floor_share']):.0f} % of the floor's speed" if row["floor_share"] else ""
    return (
        f"  {entry}: {float(row['median_ms']):.3f} ms ({row['ratio_vs_timm_eager']}×), "
        f"{float(row['images_per_second']):.0f} images/s{peak}, {float(row['tflops']):.1f} TFLOP/s{floor}, "
        f"differs by {row['max_rel_diff']}"
    )
