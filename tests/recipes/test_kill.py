"""Real processes, really killed: SIGKILL at random moments, in the middle of a write, and what is left then."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from xcit.recipes.settings import write_config

sys.path.insert(0, str(Path(__file__).parent))
import detection_runs
import runs
import segmentation_runs

pytestmark = pytest.mark.slow

CONFIG = replace(runs.TINY, epochs=6, compute=replace(runs.TINY.compute, checkpoint_minutes=1e-9))
TOTAL = CONFIG.epochs * runs.STEPS

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from xcit.recipes import checkpointing, classification_job, detection_job, segmentation_job, train as training
from xcit.recipes.config_file import read_config
from xcit.recipes.run_folder import open_run
from xcit.tasks.classification import ClassificationTask
from xcit.tasks.detection import DetectionTask
from xcit.tasks.segmentation import SegmentationTask

torch.set_num_threads(1)
kind, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
classification_job.write_report = detection_job.write_detection_report = lambda *_: None
segmentation_job.write_segmentation_report = lambda *_: None
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)

if kind == "step":  # when a training step begins
    def killed(step):
        def killed_step(task, batch, batch_idx):
            if task.global_step == number:
                kill()
            return step(task, batch, batch_idx)
        return killed_step
    for kind_of_task in (ClassificationTask, DetectionTask, SegmentationTask):
        kind_of_task.training_step = killed(kind_of_task.training_step)
if kind == "write":  # half-way through the bytes of a saved state
    write, count = checkpointing.write_atomic, 0
    def killed_write(path, data):
        global count
        count += 1
        if count == number:
            path.with_name(f".{path.name}.0123.partial").write_bytes(data[: len(data) // 2])
            kill()
        write(path, data)
    checkpointing.write_atomic = killed_write
if kind == "rename":  # the bytes are on the disk, the name is not theirs yet
    replaced, count = Path.replace, 0
    def killed_replace(path, target):
        global count
        count += 1
        if count == number:
            kill()
        return replaced(path, target)
    Path.replace = killed_replace
config = read_config(folder / "config.yaml")
training.train(config, open_run(folder))
"""


def child(kind, number, folder):
    code = textwrap.dedent(CHILD)
    return subprocess.run(
        [sys.executable, "-c", code, kind, str(number), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.timeout(900)
def test_killed_again_and_again_a_run_ends_bitwise_the_same(tmp_path):
    draw = random.Random()  # other moments each time; the message names them
    kills = [("step", draw.randint(1, 12)), ("write", draw.randint(2, 12)), ("rename", draw.randint(1, 12))]
    kills += [("step", draw.randint(20, 30)), ("write", draw.randint(1, 4)), ("step", TOTAL - 2)]
    assert_same_in_spite_of(kills, CONFIG, tmp_path)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tiny_run", [detection_runs.tiny, segmentation_runs.tiny])
def test_a_killed_run_on_scenes_ends_bitwise_the_same(tmp_path, tiny_run):
    tiny = tiny_run(detection_runs.scenes(tmp_path / "scenes"))
    config = replace(tiny, compute=replace(tiny.compute, checkpoint_minutes=1e-9))
    draw = random.Random()
    kills = [("step", draw.randint(1, 2)), ("write", draw.randint(1, 3)), ("step", 3), ("rename", draw.randint(1, 3))]
    assert_same_in_spite_of(kills, config, tmp_path)


def assert_same_in_spite_of(kills, config, tmp_path):
    from xcit.recipes.run_folder import RunFolder

    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    for each in (whole, run):
        each.root.mkdir()
        write_config(config, each.config)
    done = child("none", 0, whole.root)
    assert done.returncode == 0, done.stderr
    codes = []
    for kill in kills:
        if run.metrics.exists():
            break  # one came too late
        killed = child(*kill, run.root)
        assert killed.returncode in (-signal.SIGKILL, 0), f"{kills}: {killed.stderr}"
        codes.append(killed.returncode)
    assert -signal.SIGKILL in codes, f"{kills}: {codes}"
    if not run.metrics.exists():
        done = child("none", 0, run.root)
        assert done.returncode == 0, f"{kills}: {done.stderr}"
    try:
        runs.assert_same_run(run, whole)
    except AssertionError as err:
        raise AssertionError(f"killed at {kills}: {err}") from err
    assert not list(run.root.rglob("*.partial"))
