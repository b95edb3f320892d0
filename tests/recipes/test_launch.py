"""Several processes: what each is told, how they end together, and that none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from xcit.recipes import launch as launching
from xcit.recipes.launch import launch, needs_launch

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
CHILD = (
    "import os, pathlib, signal, sys, time\nhere = pathlib.Path(sys.argv[1]) / os.environ['RANK']\nrank = here.name\n"
)


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    for name in (*NAMES, "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def run(tmp_path, code, processes=3):
    return launch(["-c", CHILD + code, str(tmp_path)], processes)


def gone(tmp_path):
    """Whether every child that noted its process id has ended."""
    for note in tmp_path.glob("*"):
        try:
            os.kill(int(note.read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def wait_for(tmp_path, count):
    deadline = time.monotonic() + 30
    while len([note for note in tmp_path.glob("*") if note.read_text()]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_knows_its_place(tmp_path):
    assert run(tmp_path, f"here.write_text(' '.join(os.environ[name] for name in {NAMES}))") == 0
    rows = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:5] for row in rows] == [[str(r), str(r), "3", "3", "0"] for r in range(3)]
    ports = {int(row[6]) for row in rows}
    assert len(ports) == 1
    assert 1023 < ports.pop() < 65536
    assert {row[5] for row in rows} == {"127.0.0.1"}
    assert not set(NAMES) & os.environ.keys()  # this process is none of them


SAY = "print('out', rank); print('err', rank, file=sys.stderr, flush=True)\n"


@pytest.mark.parametrize(
    ("code", "heard"),
    [
        ("", ["err 0"]),
        ("sys.exit(2)", ["err 0"]),  # all for the same reason, which is told once
        ("sys.exit(2 if rank == '1' else 0)", ["err 0", "err 1"]),
    ],
    ids=["all well", "all fail", "one fails"],
)
def test_the_first_is_heard_and_who_failed_otherwise(tmp_path, capfd, code, heard):
    run(tmp_path, SAY + code)
    out, err = capfd.readouterr()
    assert out.split() == ["out", "0"]
    assert sorted(err.splitlines()) == heard


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(2 if rank == '1' else 0)", 2),
        ("time.sleep(0 if rank == '2' else 0.5); sys.exit({'0': 2, '1': 1, '2': 3}[rank])", 3),  # the first to fail
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == '2' else None", 137),
    ],
)
def test_the_status_tells_of_a_failure(tmp_path, code, status):
    assert run(tmp_path, code) == status


def test_the_others_may_end_by_themselves_and_then_are_ended(tmp_path, monkeypatch):
    """The second fails; the first needs half a second to notice, the third would never."""
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.5)
    code = (
        "here.write_text(str(os.getpid()))\n"
        "if rank == '0':\n    time.sleep(0.5); (here.parent / 'noticed').write_text(str(os.getpid()))\n"
        "if rank == '1':\n    sys.exit(2)\n"
        "if rank == '2':\n    time.sleep(60)\n"
    )
    began = time.monotonic()
    assert run(tmp_path, code) == 2
    assert 1.5 < time.monotonic() - began < 15
    assert (tmp_path / "noticed").exists()
    assert gone(tmp_path)


def test_one_that_is_deaf_to_a_polite_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.5)
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "here.write_text(str(os.getpid()))\n"
        "if rank == '1':\n"
        "    while not (here.parent / '0').exists(): time.sleep(0.02)\n"
        "    sys.exit(2)\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    assert run(tmp_path, code, 2) == 2
    assert time.monotonic() - began < 30
    assert gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(tmp_path, number):
    """Each child saves and exits as a training run does; the handlers of this process are as before."""
    code = (
        "heard = []\n"
        f"signal.signal({int(number)}, lambda *_: heard.append(1))\n"
        "here.write_text(str(os.getpid()))\n"
        "while not heard: time.sleep(0.02)\n"
        "time.sleep(0.3)\n"
        f"sys.exit(128 + {int(number)} if len(heard) == 1 else 1)\n"
    )
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def send():
        wait_for(tmp_path, 2)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert run(tmp_path, code, 2) == 128 + number
    sender.join()
    assert gone(tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_at_the_terminal_reaches_a_child_through_us_only(tmp_path):
    """Children are in groups of their own, which a terminal's Ctrl-C does not reach."""
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpgid(0)))"
    assert launch(["-c", code, str(tmp_path)], 2) == 0
    groups = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    assert len(groups) == 2
    assert str(os.getpgid(0)) not in groups


@pytest.mark.parametrize(
    ("devices", "environment", "needed"),
    [(1, {}, False), (2, {}, True), (2, {"LOCAL_RANK": "0"}, False), (2, {"SLURM_PROCID": "0"}, False)],
)
def test_a_launchers_child_starts_no_others(monkeypatch, devices, environment, needed):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert needs_launch(devices) is needed


def test_starting_processes_needs_no_torch():
    code = "import sys, xcit.recipes.launch; print([m for m in ('torch', 'lightning', 'timm') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
