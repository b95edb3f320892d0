"""The log survives every end of a run with each row once; other loggers are real, or say what to install."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from typing import ClassVar

import pytest
from lightning.pytorch import loggers

from xcit.errors import BackendError, ExportError
from xcit.recipes import logs
from xcit.recipes.logs import MetricsLog, build_loggers
from xcit.recipes.settings import LogConfig


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_come_back_as_they_were(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    given = {"step": 3, "loss": 0.1 + 0.2, "lr": 5e-324, "note": "größer"}
    log.log(given, timing={"images_per_second": 12.5})
    log.log({"epoch": 1, "val_loss": float("inf"), "val_map": float("nan")})
    first, second = rows(log.path)
    assert first.pop("timing") == {"images_per_second": 12.5}
    assert first == given  # floats to the last bit
    assert second == {"epoch": 1, "val_loss": None, "val_map": None}


def test_a_resumed_run_leaves_every_row_once(tmp_path):
    whole, path = MetricsLog(tmp_path / "whole.jsonl"), tmp_path / "metrics.jsonl"
    for step in range(20):
        whole.log({"step": step, "loss": step / 7})

    saved = (0, MetricsLog(path).position())  # step to go on with, and where the log was then
    for stops_after, saves_at in ((6, (0, 4)), (9, (9,)), (11, ()), (20, (15,))):
        log = MetricsLog(path)
        log.rewind(saved[1])
        for step in range(saved[0], stops_after):
            if step in saves_at:
                saved = (step, log.position())
            log.log({"step": step, "loss": step / 7})
    assert path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}'])
def test_a_torn_last_line_goes(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).log({"step": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    log = MetricsLog(path)
    assert path.read_bytes() == whole
    log.log({"step": 2})
    assert rows(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_text('{"step": 1}\n')])
def test_a_log_that_lost_rows_is_gone_on_with_and_said(tmp_path, caplog, change):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log({"step": 1})
    log.log({"step": 2})
    position = log.position()
    change(path)
    MetricsLog(path).rewind(position)
    assert "lacks rows" in caplog.text
    MetricsLog(path).log({"step": 3})
    assert rows(path)[-1] == {"step": 3}


def test_rewinding_to_nothing_empties_it(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log({"step": 1})
    log.rewind(0)
    assert log.position() == 0
    assert log.path.read_bytes() == b""


def test_a_kill_loses_no_row_that_was_logged(tmp_path):
    """SIGKILL at any moment: all rows up to the last are whole, and there are as many as the process counted."""
    program = """
        import sys
        from pathlib import Path
        from xcit.recipes.logs import MetricsLog
        log = MetricsLog(Path(sys.argv[1]))
        for step in range(10**9):
            log.log({"step": step, "filler": "x" * 200})
            print(step, flush=True)
    """
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if int(line) > 50:
                break
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.stdout if line.endswith("\n")]
    MetricsLog(path)
    steps = [row["step"] for row in rows(path)]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= (told[-1] if told else 51)


def test_a_full_disk_is_one_sentence_and_leaves_whole_rows(tmp_path):
    """The system itself ends the write in the middle of a row: no file may be larger here."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log({"step": 1})
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"metrics\.jsonl could not be written: File too large; make room"):
            log.log({"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before
    log.log({"step": 2})
    assert rows(log.path) == [{"step": 1}, {"step": 2}]


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(logs.os, "write", lambda file, data: write(file, data[:5]))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log({"step": 1, "loss": 0.25})
    assert rows(log.path) == [{"step": 1, "loss": 0.25}]


# --- others ----------------------------------------------------------------------------------------------------------


def test_nobody_else_hears_unless_asked(tmp_path):
    assert build_loggers(LogConfig(), tmp_path / "logs") == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run" / "logs"
    for steps in ((10, 20), (30,)):  # a run and its resumption
        (logger,) = build_loggers(LogConfig(tensorboard=True), folder)
        for step in steps:
            logger.log_metrics({"val_accuracy": step / 100, "lr": 1e-3}, step)
        logger.finalize("success")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    seen = [(event.step, round(event.value, 6)) for event in events.Scalars("val_accuracy")]
    assert seen == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert [event.step for event in events.Scalars("lr")] == [10, 20, 30]


@pytest.mark.parametrize(
    ("settings", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb"), ({"mlflow": "file:m"}, "mlflow")],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, settings, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"log\.{package} needs .*: pip install {package}"):
        build_loggers(LogConfig(**settings), tmp_path / "logs")


class Service:
    """Stands in for a service's logger in Lightning."""

    asked: ClassVar[list[dict]] = []
    refuses = ""

    def __init__(self, *_, **options):
        self.asked.append(options)

    @property
    def run_id(self):
        if self.refuses:
            raise RuntimeError(self.refuses)
        return "r1"

    experiment = run_id


@pytest.mark.parametrize(
    ("settings", "logger", "key"),
    [({"wandb": "p"}, "WandbLogger", "id"), ({"mlflow": "http://m"}, "MLFlowLogger", "run_id")],
)
def test_a_service_is_told_of_one_run_however_often_it_is_resumed(tmp_path, monkeypatch, settings, logger, key):
    class Asked(Service):
        asked: ClassVar[list[dict]] = []

    monkeypatch.setattr(loggers, logger, Asked)
    monkeypatch.setattr(logs, "find_spec", lambda name: True)
    for _ in range(3):
        build_loggers(LogConfig(**settings), tmp_path / "myrun" / "logs")
    first, second, third = (options[key] for options in Asked.asked)
    assert second == third
    assert second == (first or "r1")
    assert Asked.asked[0].get("name", Asked.asked[0].get("run_name")) == "myrun"


@pytest.mark.parametrize(
    ("settings", "logger", "match"),
    [
        ({"wandb": "p"}, "WandbLogger", r"W&B does not take the run \(no key found\); log in by `wandb login`"),
        ({"mlflow": "http://m"}, "MLFlowLogger", r"MLflow does not take the run \(no key found\); .*http://m"),
    ],
)
def test_a_service_that_refuses_is_heard_before_the_first_step(tmp_path, monkeypatch, settings, logger, match):
    class Refusing(Service):
        refuses = "no\nkey found"

    monkeypatch.setattr(loggers, logger, Refusing)
    monkeypatch.setattr(logs, "find_spec", lambda name: True)
    with pytest.raises(BackendError, match=match):
        build_loggers(LogConfig(**settings), tmp_path / "run" / "logs")
