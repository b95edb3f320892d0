"""A run from settings to folder: what it leaves, that its figures are true, and that a resumed one ends the same."""

import importlib.util
import io
import json
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from xcit.errors import BackendError, CheckpointError, ConfigError, ExportError, XCiTError
from xcit.inference.predictor import Predictor
from xcit.recipes import checkpointing
from xcit.recipes.build import build
from xcit.recipes.classification_job import ClassificationJob
from xcit.recipes.config import AugmentConfig, OptimConfig
from xcit.recipes.config_file import read_config
from xcit.recipes.interrupts import StoppedError, StopRequest
from xcit.recipes.run_folder import new_run, open_run
from xcit.recipes.settings import write_config
from xcit.recipes.train import train
from xcit.tasks.classification import ClassificationTask

_spec = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("runs.py"))
runs = importlib.util.module_from_spec(_spec)
sys.modules["runs"] = runs
_spec.loader.exec_module(runs)
TINY, STEPS = runs.TINY, runs.STEPS


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with runs.one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """The page takes seconds to draw; the whole run below has it."""
    monkeypatch.setattr("xcit.recipes.classification_job.write_report", lambda *_: None)


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it, nothing is saved."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, its figures, and what it said where there is no terminal."""
    console = Console(file=io.StringIO(), width=100)
    run = new_run(tmp_path_factory.mktemp("runs") / "whole")
    metrics = train(TINY, run, console=console)
    return run, metrics, console.file.getvalue()


def at_step(monkeypatch, step, action):
    """Do something when the training step of a number begins."""
    training_step = ClassificationTask.training_step

    def wrapped(task, batch, batch_idx):
        if task.current_epoch * STEPS + batch_idx == step:
            action(task)
        return training_step(task, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", wrapped)


def kill_at(monkeypatch, run, step, config=TINY):
    def kill(task):
        raise Killed

    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            train(config, run)


def test_everything_is_there(finished):
    run, _, _ = finished
    names = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}
    assert names >= {
        "model.safetensors", "model_last.safetensors", "model_ema.safetensors", "last.ckpt", "config.yaml",
        "metrics.json", "metrics.jsonl", "metrics.csv", "provenance.json", "report.html", "curves.png",
        "confusion_matrix.png", "attention.png",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".partial")]
    for name in names:
        if name.endswith(".png"):
            with Image.open(run.root / name) as image:
                image.load()
    assert yaml.safe_load(run.config.read_text())["model"]["options"]["embed_dim"] == 32
    assert read_config(run.config) == TINY


def test_provenance_names_code_command_and_machine(finished):
    run, _, _ = finished
    (session,) = json.loads(run.provenance.read_text())["sessions"]
    assert session["seed"] == 3
    assert session["environment"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert session["environment"]["device"].startswith("cpu")
    assert session["command"]


def test_figures_agree_with_each_other(finished):
    run, metrics, _ = finished
    content = json.loads(run.metrics.read_text())
    assert content["test"] == metrics.to_dict()
    assert [row["epoch"] for row in content["epochs"]] == [1, 2, 3]
    assert content["val"] == max(content["epochs"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    rows = runs.history(run)
    for name in ("val_loss", "train_loss", "ema_val_accuracy", "images_per_second"):
        assert [float(row[name]) for row in rows] == pytest.approx([r[name] for r in content["epochs"]], rel=1e-5)
    epochs = [row for row in runs.log_lines(run) if "val_loss" in row]
    assert [row["val_loss"] for row in epochs] == [row["val_loss"] for row in content["epochs"]]
    assert metrics.num_images == 60
    assert f"{100 * metrics.accuracy:.1f} %" in run.report.read_text()


def test_the_accuracy_is_that_of_the_files_a_user_has(finished):
    """Every held-out image, through the predictor."""
    run, metrics, _ = finished
    files = sorted((runs.digits_folder() / "test").rglob("*.png"))
    predictions = Predictor(run.model, device="cpu")(files, top_k=1)
    confusion = np.zeros((10, 10), dtype=int)
    for file, prediction in zip(files, predictions, strict=True):
        confusion[int(file.parent.name), prediction.labels[0].index] += 1
    assert np.array_equal(confusion, metrics.confusion)


def test_averaged_weights_are_the_formula(finished, tmp_path):
    """Recomputed from the raw weights after each step."""
    seen = []

    class Recording(ClassificationTask):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            seen.append((self.model.head.weight.detach().clone(), self.ema.module.head.weight.detach().clone()))

    import lightning

    parts = build(TINY)
    parts.task.__class__ = Recording
    began = parts.task.model.head.weight.detach().clone()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(parts.task, parts.train_loader)
    average = began
    assert len(seen) == 4
    for raw, averaged in seen:
        average = 0.9 * average + 0.1 * raw
        torch.testing.assert_close(averaged, average)


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(0.5, 3.0), (0.9, 1.0), (0.8, 0.5)], 2),  # accuracy decides
        ([(0.9, 3.0), (0.9, 1.0), (0.9, 2.0)], 2),  # then the loss
        ([(0.1, 3.0), (0.2, 2.0), (0.3, 1.0)], 3),
        ([(0.9, 1.0), (0.2, 2.0), (0.9, 1.0)], 1),  # then the earlier
    ],
)
@pytest.mark.parametrize("figure", ["val_accuracy", "val_map"])
def test_the_best_epoch_is_kept(tmp_path, figures, best, figure):
    saved = []
    run = new_run(tmp_path / "run")
    job = ClassificationJob(TINY)
    job.save = lambda model, path: saved.append((model, path))
    keeper = checkpointing.RunKeeper(run, job, settings={}, stop=StopRequest())
    keeper._start_clock()

    class Trainer:
        optimizers = (torch.optim.SGD([torch.zeros(1)], lr=0.1),)
        save_checkpoint = staticmethod(lambda path: None)
        is_global_zero, world_size, global_step, max_epochs, loggers = True, 1, 0, 3, ()

    for epoch, (accuracy, loss) in enumerate(figures):
        Trainer.current_epoch = epoch
        logged = {"train_loss": 1.0, "val_loss": loss, figure: accuracy}
        keeper.on_train_epoch_end(
            Trainer, SimpleNamespace(model=epoch + 1, epoch_figures=lambda logged=logged: logged, ema=None)
        )
    assert saved[-1] == (best, run.model)
    assert keeper.best["epoch"] == best


def test_a_run_killed_before_its_best_weights_were_written_writes_them(finished, tmp_path, monkeypatch):
    """The state of the best epoch is there, the weights are not: they are written from the state."""
    run = new_run(tmp_path / "run")

    def stop(keeper, task):
        if keeper.history:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.RunKeeper, "_keep_best", stop)
        with pytest.raises(Killed):
            train(TINY, run)
    whole, metrics, _ = finished
    assert not run.model.exists()
    assert run.last.exists()
    assert train(TINY, open_run(run.root)) == metrics
    runs.assert_same_run(run, whole)


def test_what_is_said_without_a_terminal(finished):
    _, _, said = finished
    assert "10 classes: 190 images to train on, 50 to choose by, 60 held out" in said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("epoch")] == [
        ["epoch", "1/3"], ["epoch", "2/3"], ["epoch", "3/3"]
    ]  # fmt: skip
    assert "img/s" in said
    assert "\x1b" not in said
    assert "\r" not in said


def test_a_long_run_says_about_ten_lines(tmp_path):
    console = Console(file=io.StringIO(), width=100)
    data = replace(TINY.data, image_size=8)
    small = replace(TINY, epochs=30, data=data, optim=OptimConfig(batch_size=190, warmup_epochs=1))
    small = replace(small, augment=replace(TINY.augment, degrees=0, mixup=0, cutmix=0))
    train(small, new_run(tmp_path / "run"), console=console)
    assert console.file.getvalue().count("\nepoch") == 10


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [0, 1e-9], ids=["saved each epoch", "saved each step"])
@pytest.mark.parametrize(
    "step", [STEPS, STEPS + 4, 2 * STEPS - 1, 3 * STEPS - 1], ids=["between", "within", "at an end", "at the very end"]
)
def test_a_killed_run_ends_the_same(finished, tmp_path, monkeypatch, step, minutes):
    whole, metrics, _ = finished
    config = replace(TINY, compute=replace(TINY.compute, checkpoint_minutes=minutes))
    run = new_run(tmp_path / "run")
    kill_at(monkeypatch, run, step, config)
    assert len(runs.history(run)) == step // STEPS
    assert not run.metrics.exists()
    assert Predictor(run.model, device="cpu").class_names[0] == "0"  # usable as it is
    torch.manual_seed(999)

    done = []
    with monkeypatch.context() as patch:
        begin = ClassificationTask.on_train_batch_start
        patch.setattr(
            ClassificationTask,
            "on_train_batch_start",
            lambda task, batch, i: (done.append(task.current_epoch * STEPS + i), begin(task, batch, i))[1],
        )
        assert train(config, open_run(run.root)) == metrics
    # With a state each step only the step that was killed is done again; at an epoch's last one, the one before too.
    first = step // STEPS * STEPS if not minutes else step
    assert done == list(range(first, 3 * STEPS))
    settings = read_config(run.config)
    assert settings == config
    runs.assert_same_run(run, whole)


def test_a_run_killed_several_times_ends_the_same(finished, tmp_path, monkeypatch):
    whole, metrics, _ = finished
    config = replace(TINY, compute=replace(TINY.compute, checkpoint_minutes=1e-9))
    run = new_run(tmp_path / "run")
    for step in (1, 2, 9, 13, 14, 17, 25):
        kill_at(monkeypatch, open_run(run.root) if run.config.exists() else run, step, config)
    assert train(config, open_run(run.root)) == metrics
    runs.assert_same_run(run, whole)
    assert len(json.loads(run.provenance.read_text())["sessions"]) == 8


def test_gradients_in_parts_are_gone_on_with_between_whole_steps(tmp_path, monkeypatch):
    config = replace(
        TINY,
        epochs=2,
        optim=replace(TINY.optim, accumulate=2, clip_grad=0.5),
        compute=replace(TINY.compute, checkpoint_minutes=1e-9),
    )
    whole, run = new_run(tmp_path / "whole"), new_run(tmp_path / "run")
    metrics = train(config, whole)

    batches = []

    def kill_at_batch(task, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 2 * STEPS + 6:
            raise Killed

    with monkeypatch.context() as patch:
        begin = ClassificationTask.on_train_batch_start
        patch.setattr(
            ClassificationTask,
            "on_train_batch_start",
            lambda task, batch, i: (kill_at_batch(task, batch, i), begin(task, batch, i))[1],
        )
        with pytest.raises(Killed):
            train(config, run)
    assert train(config, open_run(run.root)) == metrics
    runs.assert_same_run(run, whole)


def test_a_run_killed_before_anything_was_saved_begins_anew(finished, tmp_path, monkeypatch):
    whole, metrics, _ = finished
    run = new_run(tmp_path / "run")
    kill_at(monkeypatch, run, 2)
    assert not run.last.exists()
    assert train(TINY, open_run(run.root)) == metrics
    runs.assert_same_run(run, whole)


def test_a_run_stopped_after_training_only_writes_its_report(finished, tmp_path, monkeypatch):
    _, metrics, _ = finished
    run = new_run(tmp_path / "run")

    def stop(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("xcit.recipes.classification_job.write_report", stop)
        with pytest.raises(Killed):
            train(TINY, run)
    state = run.last.read_bytes()
    assert train(TINY, open_run(run.root)) == metrics
    assert run.last.read_bytes() == state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [STEPS + 3, 2 * STEPS - 1], ids=["within", "at the end of an epoch"])
def test_a_polite_stop_saves_the_state_first(finished, tmp_path, monkeypatch, number, step):
    whole, metrics, _ = finished
    before = signal.getsignal(number)
    run = new_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda task: signal.raise_signal(number))
        with pytest.raises(StoppedError, match=number.name) as stopped:
            train(TINY, run)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    state = torch.load(run.last, weights_only=True)
    assert state["global_step"] == step + 1
    assert train(TINY, open_run(run.root)) == metrics
    runs.assert_same_run(run, whole)


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    def twice(task):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    run = new_run(tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, run)
    assert not run.last.exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_without_progress_ends_early_and_stays_ended(tmp_path, monkeypatch):
    config = replace(TINY, epochs=12, patience=2, optim=replace(TINY.optim, lr=0.0, min_lr=0.0, warmup_lr=0.0))
    run = new_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("xcit.recipes.classification_job.write_report", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(config, run)
    epochs = len(runs.history(run))
    assert 3 <= epochs < 12
    state = run.last.read_bytes()
    train(config, open_run(run.root))
    assert run.last.read_bytes() == state


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_state_of_other_settings_is_refused(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run")
    kill_at(monkeypatch, run, STEPS + 1)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=r"\(epochs\) are not those that .* was trained with"):
        train(replace(TINY, epochs=9), open_run(run.root))
    with pytest.raises(ConfigError, match=r"\(model\) are not those that .* was trained with"):
        train(replace(TINY, model=replace(TINY.model, drop_path_rate=0.2)), open_run(run.root))
    assert run.config.read_bytes() == before  # with which the run can be gone on with after all


def test_something_else_than_a_state_is_refused(tmp_path):
    run = new_run(tmp_path / "run")
    write_config(TINY, run.config)
    torch.save({"state_dict": {}}, run.last)
    with pytest.raises(CheckpointError, match="is not the state of a run"):
        train(TINY, open_run(run.root))


def test_a_damaged_state_is_refused(tmp_path):
    run = new_run(tmp_path / "run")
    write_config(TINY, run.config)
    run.last.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="is truncated"):
        train(TINY, open_run(run.root))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_diverging_keeps_the_last_good_state(tmp_path, monkeypatch, value):
    at_step(monkeypatch, STEPS + 2, lambda task: task.model.head.weight.data.fill_(value))
    run = new_run(tmp_path / "run")
    with pytest.raises(XCiTError) as error:
        train(TINY, run)
    message = str(error.value)
    assert f"The loss became nan at step {STEPS + 3} (epoch 2), with a learning rate of" in message
    assert f"The last good state, after step {STEPS}, is {run.last}" in message
    assert "lower --lr" in message
    assert len(runs.history(run)) == 1
    state = torch.load(run.last, weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_last_good_state(finished, tmp_path, monkeypatch):
    whole, metrics, _ = finished
    run = new_run(tmp_path / "run")
    write = checkpointing.write_atomic
    states = []

    def full(path, data):
        if path == run.last:
            states.append(data)
            if len(states) == 2:
                raise ExportError(f"{path} could not be written: No space left on device; 1.0 MiB are needed.")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "write_atomic", full)
        with pytest.raises(ExportError, match=r"last\.ckpt could not be written: No space left"):
            train(TINY, run)
    assert run.last.read_bytes() == states[0]
    assert train(TINY, open_run(run.root)) == metrics
    runs.assert_same_run(run, whole)


def test_an_unavailable_device_costs_nothing(finished, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    run = new_run(tmp_path / "run")
    write_config(TINY, run.config)
    run.last.write_bytes(b"of an earlier run")
    with pytest.raises(BackendError, match="'cuda' is not available"):
        train(replace(TINY, compute=replace(TINY.compute, device="cuda")), new_run(run.root, overwrite=True))
    assert run.last.read_bytes() == b"of an earlier run"


def test_more_processes_than_were_started_are_refused(tmp_path):
    with pytest.raises(BackendError, match=r"started 1 processes, but compute\.devices x compute\.num_nodes is 2"):
        train(replace(TINY, compute=replace(TINY.compute, devices=2)), new_run(tmp_path / "run"))


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="num_heads is 5; it must divide embed_dim, which is 32"):
        build(replace(TINY, model=replace(TINY.model, options=TINY.model.options | {"num_heads": 5})))
    with pytest.raises(ConfigError, match="fewer than the 2000 of one step"):
        build(replace(TINY, optim=replace(TINY.optim, batch_size=2000)))
    with pytest.raises(ConfigError, match="means weights; name the architecture xcit_nano_12_p8"):
        build(replace(TINY, model=replace(TINY.model, name="xcit_nano_12_p8_224_dist")))


def test_the_seed_decides_the_weights():
    def head(seed):
        return build(replace(TINY, seed=seed)).task.model.head.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_peer_of_timm_trains_by_the_same_recipe(tmp_path):
    from xcit.recipes.peers import is_peer, load_peer

    model = replace(TINY.model, name="timm:resnet10t", options={}, drop_path_rate=0.0)
    augment = AugmentConfig(crop="none", hflip=0, rand_augment="", erase=0, repeats=1)
    config = replace(TINY, epochs=2, model=model, augment=augment, optim=replace(TINY.optim, ema_decay=0))
    run = new_run(tmp_path / "run")
    metrics = train(config, run)
    assert is_peer(run.model)
    peer = load_peer(run.model)
    assert peer.class_names == metrics.class_names
    assert peer.model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    assert not run.ema_model.exists()


def test_other_warnings_are_heard():
    from xcit.recipes.quiet import quiet_lightning

    with quiet_lightning(), pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)
