"""How much memory there is, as the system and the limits on the process tell."""

import os
import sys

import pytest
import torch

from xcit.inference import devices
from xcit.inference.devices import available_bytes, bytes_text

CPU = torch.device("cpu")


def limit(folder, most, used, cached, version=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (most, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    word = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{word} {cached}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(CPU) < total


@pytest.mark.parametrize(
    ("version", "line", "inside"),
    [(2, "0::/job/step", "job/step"), (1, "9:cpu,memory:/job/step", "memory/job/step"), (2, "0::/outside", ".")],
)
def test_limits_of_control_groups(tmp_path, version, line, inside):
    """What is cached of files can be freed. A container sees its own group at the top, under another's name."""
    limit(tmp_path / inside, 1000, 700, 50, version)
    (tmp_path / "groups").write_text(f"{line}\n12:pids:/job\n")
    assert devices._group_bytes(tmp_path, tmp_path / "groups") == [350]


def test_every_group_above_counts(tmp_path):
    limit(tmp_path / "job/step", "max", 10, 0)
    limit(tmp_path / "job", 1000, 900, 0)
    limit(tmp_path, 5000, 6000, 0)
    (tmp_path / "groups").write_text("0::/job/step\n")
    assert devices._group_bytes(tmp_path, tmp_path / "groups") == [100, 0]
    assert devices._group_bytes(tmp_path, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("system", "groups", "expected"), [(9, [], 9), (9, [7, 8], 7), (None, [4], 4), (None, [], None)]
)
def test_the_least_counts(monkeypatch, system, groups, expected):
    monkeypatch.setattr(devices, "_system_bytes", lambda: system)
    monkeypatch.setattr(devices, "_group_bytes", lambda: groups)
    assert available_bytes(CPU) == expected


def test_on_a_card_what_pytorch_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert available_bytes(torch.device("cuda", 0)) == 140


def test_amounts_in_words():
    assert [bytes_text(n) for n in (2**20, 2**30, 2**40)] == ["1 MiB", "1.0 GiB", "1,024.0 GiB"]
