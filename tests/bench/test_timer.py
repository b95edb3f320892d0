"""The timer against a clock that the test turns: what it reports is then known exactly."""

import pytest

from xcit.bench import timer


class Clock:
    """Time that passes only when a competitor runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def step(self, name, milliseconds):
        def run():
            self.calls.append(name)
            self.now += milliseconds(len(self.calls)) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timer.time, "perf_counter", lambda: clock.now)
    return clock


def test_a_sample_is_the_time_of_one_call(clock):
    steps = {"a": clock.step("a", lambda _: 4.0), "b": clock.step("b", lambda _: 1.0)}
    samples = timer.time_interleaved(steps, timer.Plan(warmup=1, min_rounds=3, max_rounds=3, min_sample_ms=10))
    assert samples == {"a": pytest.approx([4.0] * 3), "b": pytest.approx([1.0] * 3)}
    # warm-up once, one call to find the repeats, then 10 repeats a round so that the fastest fills 10 ms
    assert clock.calls.count("b") == 1 + 1 + 3 * 10


def test_competitors_take_turns_and_the_order_rotates(clock):
    steps = {name: clock.step(name, lambda _: 5.0) for name in "abc"}
    timer.time_interleaved(steps, timer.Plan(warmup=0, min_rounds=3, max_rounds=3, min_sample_ms=1))
    assert "".join(clock.calls[3:]) == "abc" + "bca" + "cab"


def test_the_paired_ratio_survives_a_machine_that_slows_down(clock):
    # a machine that gets slower all the time: within a round both competitors meet nearly the same machine
    steps = {
        "timm": clock.step("timm", lambda calls: 3.0 * 1.02**calls),
        "ours": clock.step("ours", lambda calls: 1.0 * 1.02**calls),
    }
    samples = timer.time_interleaved(steps, timer.Plan(warmup=0, min_rounds=40, max_rounds=40, min_sample_ms=0))
    assert max(samples["ours"]) > 4 * min(samples["ours"])
    assert timer.paired_ratio(samples["timm"], samples["ours"]) == pytest.approx(3.0, rel=0.025)


def test_rounds_stop_at_the_budget_but_not_before_the_least(clock):
    plan = timer.Plan(warmup=0, min_rounds=2, max_rounds=100, budget_s=1.0, min_sample_ms=0)
    slow = timer.time_interleaved({"a": clock.step("a", lambda _: 2000.0)}, plan)
    assert len(slow["a"]) == 2
    quick = timer.time_interleaved({"a": clock.step("a", lambda _: 99.0)}, plan)
    assert len(quick["a"]) == 11  # the first round after a second does not start


def test_the_spread_is_median_and_quartiles():
    assert timer.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == timer.Spread(median=3.0, p25=2.0, p75=4.0)
    assert timer.spread([7.0]) == timer.Spread(7.0, 7.0, 7.0)
