"""A run from settings to folder: what it leaves, that its figures are true, and that a resumed one ends the same."""

import csv
import io
import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from rich.console import Console

from xcit.data.digits import digit_splits
from xcit.errors import BackendError, CheckpointError, ConfigError, ExportError, XCiTError
from xcit.inference.predictor import Predictor
from xcit.recipes import checkpointing
from xcit.recipes.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig, write_config
from xcit.recipes.run_folder import new_run, open_run
from xcit.recipes.train import build, train
from xcit.tasks.classification import ClassificationTask

TINY = TrainConfig(
    recipe="tiny",
    seed=3,
    epochs=3,
    model=ModelConfig(embed_dim=32, depth=1, num_heads=2, cls_attn_layers=1, drop_path_rate=0.1),
    data=DataConfig(image_size=16, batch_size=128),
    augment=AugmentConfig(mixup=0.2, erase=0.1),
    optim=OptimConfig(lr=1e-2),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, its figures, and what it said where there is no terminal."""
    console = Console(file=io.StringIO(), width=100)
    run = new_run(tmp_path_factory.mktemp("runs") / "whole")
    metrics = train(TINY, run, device="cpu", console=console)
    return run, metrics, console.file.getvalue()


def history(run):
    with run.history.open() as file:
        return list(csv.DictReader(file))


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_everything_is_there(finished):
    run, _, _ = finished
    names = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}
    assert names == {
        "model.safetensors", "last.ckpt", "config.yaml", "metrics.json", "metrics.csv", "report.html", "curves.png",
        "confusion_matrix.png", "attention.png", "attention_heads.png", *(f"samples/digit_{i}.png" for i in range(10)),
    }  # fmt: skip
    for name in names:
        if name.endswith(".png"):
            with Image.open(run.root / name) as image:
                image.load()
    assert yaml.safe_load(run.config.read_text())["model"]["embed_dim"] == 32


def test_figures_agree_with_each_other(finished):
    run, metrics, _ = finished
    content = json.loads(run.metrics.read_text())
    assert content["test"] == metrics.to_dict()
    assert [row["epoch"] for row in content["epochs"]] == [1, 2, 3]
    assert content["val"] == max(content["epochs"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    rows = history(run)
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(
        [row["val_loss"] for row in content["epochs"]], rel=1e-5
    )
    assert metrics.num_images == 360
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert f"{100 * metrics.accuracy:.1f} %" in run.report.read_text()


def test_the_accuracy_is_that_of_the_files_a_user_has(finished):
    """Every held-out digit, through the predictor, from the 8 x 8 picture."""
    run, metrics, _ = finished
    test = digit_splits().test
    predictions = Predictor(run.model, device="cpu")([test.picture(i) for i in range(len(test))], top_k=1)
    guesses = np.array([p.labels[0].index for p in predictions])
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (test.labels, guesses), 1)
    assert np.array_equal(confusion, metrics.confusion)


def test_samples_are_held_out_digits_with_the_models_pixels(finished):
    run, _, _ = finished
    test = digit_splits().test
    predictor = Predictor(run.model, device="cpu")
    assert list(predictor.class_names) == [str(i) for i in range(10)]
    for digit in range(10):
        index = int(np.flatnonzero(test.labels == digit)[0])
        (from_file,) = predictor(run.samples / f"digit_{digit}.png")
        (from_picture,) = predictor(test.picture(index))
        assert from_file.labels == from_picture.labels


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(0.5, 3.0), (0.9, 1.0), (0.8, 0.5)], 2),  # accuracy decides
        ([(0.9, 3.0), (0.9, 1.0), (0.9, 2.0)], 2),  # then the loss
        ([(0.1, 3.0), (0.2, 2.0), (0.3, 1.0)], 3),
        ([(0.9, 1.0), (0.2, 2.0), (0.9, 1.0)], 1),  # then the earlier
    ],
)
def test_the_best_epoch_is_kept(tmp_path, figures, best):
    saved = []
    run = new_run(tmp_path / "run")
    keeper = checkpointing.RunKeeper(run, lambda model, path: saved.append((model, path)), settings={})
    epochs = enumerate(figures)

    class Trainer:
        optimizers = (torch.optim.SGD([torch.zeros(1)], lr=0.1),)
        save_checkpoint = staticmethod(lambda path: None)

    for epoch, (accuracy, loss) in epochs:
        Trainer.current_epoch = epoch
        logged = {"train_loss": 1.0, "val_loss": loss, "val_accuracy": accuracy}
        Trainer.callback_metrics = {name: torch.tensor(value) for name, value in logged.items()}
        keeper.on_train_epoch_end(Trainer, SimpleNamespace(model=epoch + 1))
    assert saved[-1] == (best, run.model)
    assert keeper.best["epoch"] == best


def test_a_run_killed_before_its_best_weights_were_written_writes_them(finished, tmp_path, monkeypatch):
    """The state of the best epoch is there, the weights are not: they are written from the state."""
    run = new_run(tmp_path / "run")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.RunKeeper, "_keep_best", lambda *_: None)
        patch.setattr("xcit.recipes.train.create_model", stop)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, run, device="cpu")
    whole, metrics, _ = finished
    assert not run.model.exists()
    assert json.loads(whole.metrics.read_text())["val"]["epoch"] == 3
    assert train(TINY, open_run(run.root), device="cpu") == metrics
    assert_same_weights(weights(run), weights(whole))


def test_what_is_said_without_a_terminal(finished):
    _, _, said = finished
    assert "1,149 digits to train on, 288 to choose by, 360 held out" in said
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("epoch")] == [
        ["epoch", "1/3"], ["epoch", "2/3"], ["epoch", "3/3"]
    ]  # fmt: skip
    assert "\x1b" not in said
    assert "\r" not in said


def test_a_long_run_says_about_ten_lines(tmp_path):
    console = Console(file=io.StringIO(), width=100)
    small = replace(TINY, epochs=30, data=DataConfig(image_size=8, batch_size=1024), augment=AugmentConfig())
    train(small, new_run(tmp_path / "run"), device="cpu", console=console)
    assert console.file.getvalue().count("\nepoch") == 10


def stop_at(monkeypatch, run, step):
    """Train up to one step and be stopped there, the way Ctrl-C does it."""
    training_step = ClassificationTask.training_step

    def step_or_stop(task, batch, batch_idx):
        if task.global_step == step:
            raise KeyboardInterrupt
        return training_step(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, run, device="cpu")


def weights(run):
    return safetensors.torch.load_file(run.model)


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


STEPS = 1149 // 128


@pytest.mark.parametrize("step", [STEPS, STEPS + 4, 3 * STEPS - 1], ids=["between epochs", "within", "at the very end"])
def test_a_resumed_run_ends_the_same(finished, tmp_path, monkeypatch, step):
    whole, metrics, _ = finished
    run = new_run(tmp_path / "run")
    stop_at(monkeypatch, run, step)
    assert len(history(run)) == step // STEPS
    assert not run.metrics.exists()
    assert Predictor(run.model, device="cpu").class_names[0] == "0"  # usable as it is
    torch.manual_seed(999)

    assert train(TINY, open_run(run.root), device="cpu") == metrics
    assert_same_weights(weights(run), weights(whole))
    assert without_time(history(run)) == without_time(history(whole))
    ours, theirs = (torch.load(r.last, weights_only=True) for r in (run, whole))
    for a, b in zip(
        ours["optimizer_states"][0]["state"].values(), theirs["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_a_run_stopped_in_its_first_epoch_begins_anew(finished, tmp_path, monkeypatch):
    whole, metrics, _ = finished
    run = new_run(tmp_path / "run")
    stop_at(monkeypatch, run, 2)
    assert not run.last.exists()
    assert train(TINY, open_run(run.root), device="cpu") == metrics
    assert_same_weights(weights(run), weights(whole))


def test_a_run_stopped_after_training_only_writes_its_report(finished, tmp_path, monkeypatch):
    _, metrics, _ = finished
    run = new_run(tmp_path / "run")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("xcit.recipes.train.write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, run, device="cpu")
    state = run.last.read_bytes()
    assert train(TINY, open_run(run.root), device="cpu") == metrics
    assert run.last.read_bytes() == state
    assert run.report.exists()


def test_ctrl_c_is_heard_again_afterwards(tmp_path, monkeypatch):
    import signal

    before = signal.getsignal(signal.SIGINT)
    stop_at(monkeypatch, new_run(tmp_path / "run"), 2)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_state_of_other_settings_is_refused(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run")
    stop_at(monkeypatch, run, STEPS + 1)
    with pytest.raises(ConfigError, match=r"are not those that .* was trained with"):
        train(replace(TINY, epochs=9), open_run(run.root), device="cpu")
    with pytest.raises(ConfigError, match=r"are not those that .* was trained with"):
        train(replace(TINY, model=replace(TINY.model, depth=2)), open_run(run.root), device="cpu")


def test_something_else_than_a_state_is_refused(tmp_path):
    run = new_run(tmp_path / "run")
    write_config(TINY, run.config)
    torch.save({"state_dict": {}}, run.last)
    with pytest.raises(CheckpointError, match="is not the state of a run"):
        train(TINY, open_run(run.root), device="cpu")


def test_a_damaged_state_is_refused(tmp_path):
    run = new_run(tmp_path / "run")
    write_config(TINY, run.config)
    run.last.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="is truncated"):
        train(TINY, open_run(run.root), device="cpu")


def test_diverging_keeps_the_last_good_epoch(tmp_path, monkeypatch):
    training_step = ClassificationTask.training_step

    def explode(task, batch, batch_idx):
        if task.global_step == STEPS + 2:
            task.model.head.weight.data.fill_(float("inf"))
        return training_step(task, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", explode)
    run = new_run(tmp_path / "run")
    with pytest.raises(XCiTError, match=rf"The loss became nan at step {STEPS + 2} \(epoch 2\).*try a lower lr"):
        train(TINY, run, device="cpu")
    assert len(history(run)) == 1
    state = torch.load(run.last, weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_full_disk_ends_in_a_sentence(tmp_path, monkeypatch):
    def full(path, data):
        raise ExportError(f"{path} could not be written: No space left on device; 1.0 MiB are needed.")

    monkeypatch.setattr(checkpointing, "write_atomic", full)
    with pytest.raises(ExportError, match=r"last\.ckpt could not be written: No space left"):
        train(TINY, new_run(tmp_path / "run"), device="cpu")


def test_an_unavailable_device_costs_nothing(finished, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    run = new_run(tmp_path / "run")
    write_config(TINY, run.config)
    run.last.write_bytes(b"of an earlier run")
    with pytest.raises(BackendError, match="'cuda' is not available"):
        train(TINY, new_run(run.root, overwrite=True), device="cuda")
    assert run.last.read_bytes() == b"of an earlier run"


def test_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="num_heads is 5; it must divide embed_dim, which is 32"):
        build(replace(TINY, model=replace(TINY.model, num_heads=5)))
    with pytest.raises(ConfigError, match="patch_size is 9; XCiT's stem exists for"):
        build(replace(TINY, model=replace(TINY.model, patch_size=9)))


def test_the_seed_decides_the_weights():
    def head(seed):
        return build(replace(TINY, seed=seed)).task.model.head.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_other_warnings_are_heard():
    from xcit.recipes.quiet import quiet_lightning

    with quiet_lightning(), pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)
