"""Several processes: the gradients of one, every validation image once, and signals that reach all."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xcit.data.sampling import derive_seed, seed_everything
from xcit.recipes.build import build
from xcit.recipes.job import Share
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import write_config

sys.path.insert(0, str(Path(__file__).parent))
import dino_runs
import runs

pytestmark = pytest.mark.slow

CONFIG = replace(
    runs.TINY,
    epochs=2,
    augment=replace(runs.TINY.augment, repeats=3),
    optim=replace(runs.TINY.optim, opt="sgd", lr=0.05, ema_decay=0.9),
    compute=replace(runs.TINY.compute, devices=2),
)
RECORD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from xcit.recipes import classification_job, train as training
from xcit.recipes.config_file import read_config
from xcit.recipes.run_folder import RunFolder
from xcit.tasks.classification import ClassificationTask
classification_job.write_report = lambda *_: None
folder = Path(sys.argv[1])
seen, judged = [], []
step = ClassificationTask.optimizer_step
def recording(task, *arguments, **options):
    step(task, *arguments, **options)
    seen.append({name: value.clone() for name, value in task.model.state_dict().items()})
ClassificationTask.optimizer_step = recording
validate = ClassificationTask.validation_step
def noting(task, batch, batch_idx):
    judged.extend(batch.indices.tolist())
    return validate(task, batch, batch_idx)
ClassificationTask.validation_step = noting
config = read_config(folder / "config.yaml")
training.train(config, RunFolder(folder))
import os
torch.save({"seen": seen, "judged": judged}, folder / f"record{os.environ['RANK']}.pt")
"""


def by_hand():
    """The weights after each step in one process: the mean of the gradients of the two halves, each with its draws.

    Batch norm sees a half at a time; its running statistics are those of the first half, which the processes share.
    """
    torch.manual_seed(0)
    halves = [build(CONFIG, Share(rank, 2)) for rank in range(2)]
    task = halves[0].task
    model, mixer = task.model.train(), task.mixer
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    from xcit.tasks.optim import build_optimizer, build_schedule

    optimizer = build_optimizer(model, opt="sgd", lr=task.schedule.lr, weight_decay=task.weight_decay)
    schedule = build_schedule(optimizer, **task.schedule._asdict())
    states, step = [], 0
    for epoch in range(CONFIG.epochs):
        for half in halves:
            half.train_loader.sampler.set_epoch(epoch)
        for index, batches in enumerate(zip(*(half.train_loader for half in halves), strict=True)):
            optimizer.zero_grad()
            statistics = None
            for rank, batch in enumerate(batches):
                buffers = {name: value.clone() for name, value in model.named_buffers()}
                seed_everything(derive_seed(CONFIG.seed, epoch, index, rank))
                images, targets = mixer(batch.images.contiguous(memory_format=torch.channels_last), batch.labels)
                (torch.nn.functional.cross_entropy(model(images), targets) / 2).backward()
                if rank == 0:
                    statistics = {name: value.clone() for name, value in model.named_buffers()}
                    for name, value in model.named_buffers():
                        value.copy_(buffers[name])
            for name, value in model.named_buffers():
                value.copy_(statistics[name])
            optimizer.step()
            step += 1
            schedule.step_update(num_updates=step)
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


@pytest.mark.timeout(600)
def test_two_processes_agree_with_one_that_averages_the_halves(tmp_path):
    from xcit.recipes.launch import launch

    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    write_config(CONFIG, run.config)
    assert launch(["-c", RECORD, str(run.root)], 2) == 0
    records = [torch.load(run.root / f"record{rank}.pt") for rank in range(2)]
    with runs.one_thread():
        expected = by_hand()
    assert len(expected) == len(records[0]["seen"]) == 2 * runs.STEPS
    for number, (ours, other, alone) in enumerate(zip(records[0]["seen"], records[1]["seen"], expected, strict=True)):
        for name in alone:
            torch.testing.assert_close(ours[name], alone[name], rtol=2e-4, atol=2e-5, msg=f"step {number}, {name}")
            if "running" not in name and "batches" not in name:
                assert torch.equal(ours[name], other[name]), f"step {number}, {name}"
    # 50 images in batches of one size for each process, twice: every one once an epoch, none twice.
    judged = sorted(records[0]["judged"] + records[1]["judged"])
    assert judged == sorted(list(range(50)) * 2)
    row = json.loads(run.metrics.read_text())["epochs"][-1]
    assert round(50 * row["val_accuracy"], 6) == round(50 * row["val_accuracy"])


LATE = """
import os, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from xcit.recipes import classification_job, train as training
from xcit.recipes.config_file import read_config
from xcit.recipes.run_folder import RunFolder
classification_job.write_report = lambda *_: None
folder = Path(sys.argv[1])
ready = folder / "ready.txt"
if os.environ["RANK"] == "1":
    while not ready.exists():
        time.sleep(0.05)
    time.sleep(1)
build = training.build_trainer
def building(*arguments):
    ready.touch()
    return build(*arguments)
training.build_trainer = building
training.train(read_config(folder / "config.yaml"), RunFolder(folder))
"""


@pytest.mark.timeout(600)
def test_a_process_that_comes_late_finds_what_the_run_begins_with(tmp_path):
    """Its settings and weights are files of the run that it replaces: they go once all processes have read them."""
    from xcit.recipes.launch import launch
    from xcit.recipes.run_folder import new_run
    from xcit.recipes.train import train

    run = new_run(tmp_path / "run")
    once = replace(CONFIG, epochs=1)
    with runs.one_thread():
        train(replace(once, compute=replace(once.compute, devices=1)), run)
    write_config(replace(once, model=replace(once.model, pretrained=str(run.model))), run.config)
    assert run.report.exists()
    assert launch(["-c", LATE, str(run.root)], 2) == 0
    assert not run.report.exists()  # the former run's: the new one wrote none
    assert run.metrics.exists()


CENTRES = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from xcit.recipes import dino_job, train as training
from xcit.recipes.config_file import read_config
from xcit.recipes.run_folder import RunFolder
from xcit.tasks.dino import DinoTask
dino_job.write_dino_report = lambda *_: None
folder, seen = Path(sys.argv[1]), []
step = DinoTask.optimizer_step
def recording(task, *arguments, **options):
    step(task, *arguments, **options)
    weight = next(task.teacher.parameters())
    seen.append((task.center.clone(), weight.detach().clone()))
DinoTask.optimizer_step = recording
training.train(read_config(folder / "config.yaml"), RunFolder(folder))
torch.save(seen, folder / f"centres{os.environ['RANK']}.pt")
"""


@pytest.mark.timeout(600)
def test_two_processes_of_dino_share_centre_teacher_and_probe(tmp_path):
    from xcit.recipes.launch import launch

    config = dino_runs.TINY_DINO
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    write_config(replace(config, compute=replace(config.compute, devices=2)), run.config)
    assert launch(["-c", CENTRES, str(run.root)], 2) == 0
    ours, theirs = (torch.load(run.root / f"centres{rank}.pt") for rank in range(2))
    assert len(ours) == len(theirs) == config.epochs * dino_runs.STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
    assert not torch.equal(ours[0][0], ours[1][0])  # it moves
    content = json.loads(run.metrics.read_text())
    assert content["knn"]["k"]["5"]["num_images"] == 50
    assert content["epochs"][-1]["knn_accuracy"] == content["knn"]["k"]["5"]["accuracy"]


def command(*arguments):
    return [sys.executable, "-m", "xcit.cli.main", "train", *arguments]


def environment():
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_all_processes_and_the_run_is_gone_on_with(tmp_path, number):
    file, out = tmp_path / "config.yaml", tmp_path / "run"
    write_config(replace(CONFIG, epochs=40), file)
    process = subprocess.Popen(
        command(str(file), "--out", str(out)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal's foreground
    )
    history = out / "metrics.csv"
    deadline = time.monotonic() + 200
    while not history.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert f"xcit train --resume {out}" in err
    epochs = len(history.read_text().splitlines()) - 1
    assert 1 <= epochs < 40

    # One process goes on where two stopped.
    text = (out / "config.yaml").read_text()
    assert "devices: 2" in text
    done = subprocess.run(
        command("--resume", str(out), "--devices", "1"), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(history.read_text().splitlines()) == 41


@pytest.mark.timeout(300)
def test_a_mistake_in_several_processes_costs_one_sentence(tmp_path):
    file = tmp_path / "config.yaml"
    write_config(replace(CONFIG, data=replace(CONFIG.data, root=str(tmp_path / "nowhere"))), file)
    done = subprocess.run(
        command(str(file), "--out", str(tmp_path / "run")), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("nowhere") == 1
