import subprocess
import sys

import pytest
import torch

from xcit.bench import deploy, deploy_memory, deploy_models, deploy_runtimes
from xcit.bench.deploy_cases import DeployCase, Entry
from xcit.errors import BackendError

CASE = DeployCase("xcit", "xcit_nano_12_p16", 64, 1)
ENTRY = Entry("timm", "xcit_nano_12_p16", 64, "eager")
REQUEST = deploy_memory.Request(CASE, ENTRY, "float32", "cpu", 1)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is Linux'")


@linux
def test_the_peak_is_what_a_step_touches(monkeypatch):
    calls = []

    def step():
        calls.append(torch.ones(48 * 2**18))  # 48 MiB of float32
        block = calls.pop()
        calls.append(None)
        return float(block[-1])

    monkeypatch.setattr(deploy_models, "build", lambda *args: torch.nn.Identity())
    monkeypatch.setattr(deploy_runtimes, "forward_step", lambda *args: step)
    peak = deploy_memory.measure_here(REQUEST)
    assert len(calls) == 2  # once to warm up, once measured
    assert 47 < peak.step_mib < 60
    assert peak.process_mib > peak.step_mib + 50


@linux
def test_what_is_free_when_the_step_begins_counts_again(monkeypatch):
    small = [bytearray(100_000) for _ in range(400)]  # 38 MiB in pieces that the allocator would keep for itself
    del small
    monkeypatch.setattr(deploy_models, "build", lambda *args: torch.nn.Identity())
    monkeypatch.setattr(
        deploy_runtimes,
        "forward_step",
        lambda *args: lambda: sum(len(b) for b in [bytearray(100_000) for _ in range(400)]),
    )
    assert deploy_memory.measure_here(REQUEST).step_mib > 35


@linux
def test_a_process_of_its_own_measures_a_model():
    peak = deploy_memory.measure_apart(REQUEST)
    assert 0 < peak.step_mib < 60
    assert peak.process_mib > 100  # torch alone is


def test_a_process_that_the_system_killed_says_so(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, -9, "", ""))
    said = []
    assert deploy_memory.measure_apart(REQUEST) is None
    assert deploy._memory(REQUEST, said.append) == {}
    assert said == [f"{CASE}: timm eager did not fit into memory when it ran alone."]


def test_a_process_that_failed_gives_its_last_words(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nValueError: odd\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: failed)
    with pytest.raises(BackendError, match=r"timm eager in xcit/.* could not be measured: ValueError: odd"):
        deploy_memory.measure_apart(REQUEST)


def test_another_system_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(deploy_memory, "RESET", tmp_path / "none")
    with pytest.raises(BackendError, match="--no-memory"):
        deploy_memory.measure_here(REQUEST)
