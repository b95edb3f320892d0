"""Runs of DINO as a user starts them: what they leave, how they are gone on with, what is refused."""

import io
import json
import logging
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import xcit
from xcit.cli.train import show_result
from xcit.errors import ConfigError, DataError
from xcit.models.dino_files import load_dino
from xcit.recipes import dino_report
from xcit.recipes.config_file import read_config
from xcit.recipes.dino import RELEASED, dino_vissl
from xcit.recipes.dino_job import COUNSEL, DinoJob
from xcit.recipes.dino_report import DinoRecord, _key_figures, write_dino_report
from xcit.recipes.registry import RECIPES, find_recipe
from xcit.recipes.run_folder import RunFolder, new_run, open_run
from xcit.recipes.settings import check_config, override, write_config
from xcit.recipes.train import train
from xcit.tasks.dino import FLAT, SHARP, DinoTask

sys.path.insert(0, str(Path(__file__).parent))
import dino_runs
import runs

TINY, STEPS = dino_runs.TINY_DINO, dino_runs.STEPS


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with runs.one_thread():
        yield


@pytest.fixture
def _no_report(monkeypatch):
    monkeypatch.setattr("xcit.recipes.dino_job.write_dino_report", lambda *_: None)


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it, nothing is saved."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    console = Console(file=io.StringIO(), width=120)
    run = new_run(tmp_path_factory.mktemp("runs") / "whole")
    result = train(TINY, run, console=console)
    return run, result, console.file.getvalue()


def kill_at(monkeypatch, run, step, config=TINY):
    training_step = DinoTask.training_step

    def wrapped(task, batch, batch_idx):
        if task.global_step == step:
            raise Killed
        return training_step(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DinoTask, "training_step", wrapped)
        with pytest.raises(Killed):
            train(config, run)


def test_everything_is_there(finished):
    run, result, said = finished
    names = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}
    assert names >= {
        "model.safetensors", "dino_checkpoint.pth", "last.ckpt", "config.yaml", "metrics.csv", "metrics.json",
        "metrics.jsonl", "report.html", "curves.png", "neighbours.png", "attention_heads.png", "provenance.json",
    }  # fmt: skip
    assert "model_last.safetensors" not in names
    assert read_config(run.config) == TINY
    assert "190 images, used without labels; k-NN probe with 50 labelled others" in said
    content = json.loads(run.metrics.read_text())
    assert [row["epoch"] for row in content["epochs"]] == [1, 2, 3]
    assert ["knn_accuracy" in row for row in content["epochs"]] == [False, True, True]
    assert content["knn"]["k"]["5"]["accuracy"] == content["epochs"][-1]["knn_accuracy"]
    assert set(result.knn.accuracies) == {5, 10, 20, 100, 190}
    assert 0 < result.figures["teacher_entropy"] <= result.figures["teacher_spread"] + 1e-6 <= math.log(24) + 1e-5


def test_the_files_hold_the_teacher_and_both_networks(finished):
    run, _, _ = finished
    model = xcit.create_model(str(run.model))
    assert model.num_classes == 0
    assert model.pretrained_cfg["input_size"] == [1, 16, 16]
    teacher, student = (load_dino(run.dino, network) for network in ("teacher", "student"))
    state = torch.load(run.last, weights_only=True)["state_dict"]
    for network, name in ((teacher, "teacher"), (student, "student")):
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[f"{name}.{key}"]), key
    for key, value in teacher.backbone.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    weights = [p for p, _ in zip(teacher.parameters(), student.parameters(), strict=True)]
    assert any(not torch.equal(p, q) for p, q in zip(weights, student.parameters(), strict=True))


@pytest.mark.parametrize("step", [0, 3, STEPS, 2 * STEPS + 2])
@pytest.mark.usefixtures("_no_report")
def test_a_killed_run_ends_bitwise_the_same(finished, tmp_path, monkeypatch, step):
    whole, result, _ = finished
    run = new_run(tmp_path / "run")
    config = replace(TINY, compute=replace(TINY.compute, checkpoint_minutes=1e-9))  # after every step
    kill_at(monkeypatch, run, step, config)
    again = train(config, open_run(run.root))
    assert again.knn == result.knn
    ours, theirs = (torch.load(each.last, weights_only=True) for each in (run, whole))
    runs.assert_same_state(ours, theirs)
    assert runs.log_lines(run) == runs.log_lines(whole)
    for name, value in runs.weights(whole.model).items():
        assert torch.equal(value, runs.weights(run.model)[name]), name
    assert run.model.read_bytes() == whole.model.read_bytes()


def images_in(folder, num, size=(20, 14), start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + num):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def with_data(root, **changes):
    rgb = {"data.root": str(root), "data.in_chans": 3, "data.normalize": "weights", "optim.batch_size": 6}
    return override(TINY, rgb | {"epochs": 1, "optim.warmup_epochs": 0, "optim.freeze_last_layer": 0} | {
        "teacher.warmup_temp": 0.05, "teacher.warmup_temp_epochs": 0} | changes)  # fmt: skip


def test_a_folder_without_labels_is_learned_from(tmp_path, capsys):
    images_in(tmp_path / "d", 8)
    images_in(tmp_path / "d" / "deep" / "er", 6, start=8)
    (tmp_path / "d" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    run = new_run(tmp_path / "run")
    result = train(with_data(tmp_path / "d"), run)
    assert result.knn is None
    assert result.collapse is None  # after one epoch nobody knows
    assert "knn_accuracy" not in json.loads(run.metrics.read_text())["epochs"][0]
    assert "train,broken.png" in run.skipped.read_text()
    assert run.neighbours.exists()
    assert "broken.png" in run.report.read_text()


def test_only_the_training_part_is_learned_from(tmp_path):
    for part, num in (("train", 7), ("val", 3)):
        images_in(tmp_path / "d" / part, num)
    job = DinoJob(with_data(tmp_path / "d"))
    assert len(job.data.train) == 7
    assert "Only the images in" in job.data.notes[0]


def test_folders_are_classes_for_the_probe_alone(tmp_path):
    for name in ("a", "b"):
        images_in(tmp_path / "d" / name, 20)
    job = DinoJob(with_data(tmp_path / "d"))
    assert (len(job.data.train), len(job.data.probe)) == (36, 4)
    job = DinoJob(with_data(tmp_path / "d", **{"data.format": "images"}))
    assert (len(job.data.train), job.data.probe) == (40, None)


def test_folders_that_are_no_classes(tmp_path):
    """An image in each: none could be split off for the probe."""
    for i in range(8):
        images_in(tmp_path / "d" / f"day {i}", 1, start=i)
    with pytest.raises(DataError, match=r"cannot be divided .*data\.format=images takes all images below it"):
        DinoJob(with_data(tmp_path / "d"))
    assert len(DinoJob(with_data(tmp_path / "d", **{"data.format": "images"})).data.train) == 8


def test_one_image_is_too_few(tmp_path):
    images_in(tmp_path / "d", 1)
    with pytest.raises(DataError, match=r"one image to train on, 0\.png; DINO needs two or more"):
        DinoJob(with_data(tmp_path / "d"))


def test_the_probe_takes_as_many_broken_images_as_training(tmp_path, monkeypatch):
    for name in ("a", "b"):
        images_in(tmp_path / "d" / "train" / name, 10)
        images_in(tmp_path / "d" / "val" / name, 4)
    for name in ("a", "b"):
        (tmp_path / "d" / "val" / name / "3.png").write_bytes(b"no")
    folder = tmp_path / "d"
    with pytest.raises(DataError, match=r"k-NN probe failed: .*cannot be decoded.* or begin a run with probe\.every=0"):
        train(with_data(folder), new_run(tmp_path / "strict"))
    result = train(with_data(folder, **{"data.max_bad_fraction": 0.5}), new_run(tmp_path / "lenient"))
    assert result.knn.accuracies[5].num_images == 6
    monkeypatch.setattr("xcit.recipes.dino_job.write_dino_report", lambda *_: None)
    few = {"data.max_bad_fraction": 1.0, "probe.max_images": 10, "probe.k": 400}
    result = train(with_data(folder, **few), new_run(tmp_path / "few"))
    assert result.knn.num_bank == 10
    assert result.knn.of(result.k)[0] == 10  # of 400 that were asked for


def test_a_failing_probe_ends_all_processes_alike(tmp_path, monkeypatch):
    """Only the first process probes: what goes wrong there is what the others hear, who wait for its answer."""
    job = DinoJob(TINY)
    heard = []

    def fail(*_, **__):
        raise DataError("Nothing is left.")

    monkeypatch.setattr("xcit.recipes.dino_job.knn_probe", fail)
    monkeypatch.setattr(DinoTask, "current_epoch", 1)
    monkeypatch.setattr(DinoTask, "global_rank", 0)
    monkeypatch.setattr(DinoTask, "gathered", lambda _, item: heard.append(item) or [item, {}])
    figures = {"teacher_entropy": 1.0, "teacher_spread": 2.0}
    with pytest.raises(DataError, match="k-NN probe failed: Nothing is left"):
        job.task.look(figures)
    monkeypatch.setattr(DinoTask, "global_rank", 1)
    monkeypatch.setattr(DinoTask, "gathered", lambda _, item: [heard[0], item])
    with pytest.raises(DataError, match="k-NN probe failed: Nothing is left"):
        job.task.look(figures)


def test_few_images_have_no_neighbour_twice_or_themselves(tmp_path):
    """Of six images none has six others: there is no sheet of neighbours."""
    images_in(tmp_path / "d", 6)
    run = new_run(tmp_path / "run")
    train(with_data(tmp_path / "d", **{"optim.batch_size": 3}), run)
    assert not run.neighbours.exists()
    assert run.report.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.root": "nowhere"}, "nowhere: is not there"),
        ({"data.format": "images", "data.root": "nowhere"}, "nowhere: is not a folder of images"),
    ],
)
def test_data_that_is_not_there(changes, message):
    with pytest.raises(DataError, match=message):
        DinoJob(override(TINY, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.batch_size": 37, "compute.devices": 2}, "37, which 2 devices x 1 parts do not divide; take 36 or 38"),
        ({"optim.batch_size": 2, "optim.accumulate": 2}, "batch norm needs two images"),
        ({"patience": 3}, "DINO keeps its last epoch"),
        ({"optim.min_lr": 0.1}, "min_lr is 0.1, above the peak"),
        ({"optim.warmup_epochs": 3}, "warmup_epochs is 3 of 3 epochs"),
        ({"teacher.warmup_temp_epochs": 0}, "teacher.warmup_temp is for the first"),
        ({"crops.local_min_area": 0.9}, "crops.local_min_area is 0.9, above crops.local_max_area, 0.4"),
        ({"crops.local_size": 64}, "crops.local_size is 64, more than crops.global_size, 16; lower it, such as --set"),
        ({"data.root": ""}, "data.root is empty"),
        ({"compute.strategy": "fsdp", "compute.devices": 2}, "fsdp shards the weights"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(override(TINY, changes))


def test_unknown_settings_are_named(tmp_path):
    (tmp_path / "c.yaml").write_text("recipe: mine\ntask: dino\nteacher: {momentun: 0.9}\ndistill: {kind: hard}\n")
    with pytest.raises(
        ConfigError, match=r"teacher\.momentun is unknown \(did you mean teacher\.momentum\?\).*"
    ) as error:
        read_config(tmp_path / "c.yaml")
    assert "distill is unknown" in str(error.value)
    (tmp_path / "c.yaml").write_text("recipe: mine\ntask: dinno\n")
    with pytest.raises(ConfigError, match=r"task is 'dinno' \(did you mean dino\?\)"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.usefixtures("_no_report")
def test_a_collapsed_run_is_named(tmp_path, caplog):
    """A teacher that is not sharpened at all gives flat outputs."""
    flat = {"teacher.temp": 1.0, "teacher.warmup_temp": 1.0, "teacher.warmup_temp_epochs": 0, "epochs": 4}
    run = new_run(tmp_path / "run")
    with caplog.at_level(logging.WARNING, "xcit"):
        result = train(override(TINY, flat), run)
    assert result.collapse == FLAT == "all images get the same output, a flat one"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "The run tiny_dino has collapsed: all images get the same output, a flat one (teacher entropy 3.1"
    )
    assert warnings[0].endswith(f"Stop it, and {COUNSEL[FLAT]}.")
    assert json.loads(run.metrics.read_text())["collapse"] == FLAT


def rows_of(*telling, spread=3.0):
    return [
        {"epoch": float(i), "teacher_spread": spread, "teacher_entropy": spread - nats}
        for i, nats in enumerate(telling, 1)
    ]


@pytest.mark.parametrize(
    ("telling", "collapsed_at"),
    [
        ((0.5, 0.5, 0.5, 0.01), []),  # the last epoch alone
        ((0.0, 0.0, 0.0), []),  # the first two are of the warm-up
        ((0.0, 0.0, 0.0, 0.5), []),
        ((0.0, 0.0, 0.0, 0.0), [4]),
        ((0.5, 0.5, 0.01, 0.5, 0.01, 0.02, 0.03), [6, 7]),
        ((0.5, 0.5, 0.01, 0.02, 0.5, 0.01, 0.01), [4, 7]),
    ],
)
def test_one_rule_tells_what_has_collapsed(monkeypatch, caplog, telling, collapsed_at):
    """The warning, what the run comes to and its report: two epochs in a row after the warm-up."""
    job = DinoJob(override(TINY, {"epochs": 20, "optim.warmup_epochs": 2, "probe.every": 0}))
    rows = rows_of(*telling)
    assert [i for i in range(1, len(rows) + 1) if job.collapse(rows[:i])] == collapsed_at
    monkeypatch.setattr(DinoTask, "global_rank", 0)
    for row in rows:
        monkeypatch.setattr(DinoTask, "current_epoch", int(row["epoch"]) - 1)
        with caplog.at_level(logging.WARNING, "xcit"):
            job.task.look({name: value for name, value in row.items() if name != "epoch"})
    assert len(caplog.records) == len([i for i in collapsed_at if i - 1 not in collapsed_at])


@pytest.mark.usefixtures("_no_report")
def test_a_run_that_is_gone_on_with_remembers_what_it_saw(tmp_path, monkeypatch, caplog):
    """Killed between the first silent epoch and the second, it warns after the second; killed later, not again."""
    flat = override(TINY, {"teacher.temp": 1.0, "teacher.warmup_temp": 1.0, "teacher.warmup_temp_epochs": 0})
    run = new_run(tmp_path / "run")
    with caplog.at_level(logging.WARNING, "xcit"):
        kill_at(monkeypatch, run, STEPS + 1, flat)
        assert not caplog.records
        kill_at(monkeypatch, open_run(run.root), 2 * STEPS + 1, flat)
        assert len(caplog.records) == 1
        result = train(flat, open_run(run.root))
    assert len(caplog.records) == 1
    assert result.collapse == FLAT


@pytest.mark.parametrize("probed", [True, False])
def test_the_closing_line_says_what_to_change(finished, probed):
    run, result, _ = finished
    console = Console(file=io.StringIO(), width=200)
    for collapse in (FLAT, SHARP, None):
        show_result(replace(result, collapse=collapse, knn=result.knn if probed else None), run, console)
        said = console.file.getvalue()
        console.file.truncate(0)
        assert ("collapsed" in said) == bool(collapse)
        if collapse:
            assert f"collapsed: {collapse}; " in said
            assert f"Next time, {COUNSEL[collapse]}." in said
            assert ("the probe above" in said) == probed
        assert "of little use" not in said


@pytest.mark.parametrize(
    ("telling", "collapse", "state"),
    [
        ((0.5, 0.01), None, "0.01 nats what .* next to nothing, in too few epochs to call it collapsed"),
        ((0.01, 0.01), FLAT, "collapsed: all images get the same output, a flat one"),
        ((0.01, 0.5), None, "0.50 nats what .* not collapsed"),
    ],
)
def test_the_report_says_the_same(finished, tmp_path, telling, collapse, state):
    run, result, _ = finished
    row = json.loads(run.metrics.read_text())["epochs"][-1]
    history = [row | more for more in rows_of(*telling)]
    job = DinoJob(TINY)
    record = DinoRecord(TINY, history, result.knn, collapse, result.environment, job.data, job.preprocessing)
    figures = " ".join(f"{figure.value} {figure.label}" for figure in _key_figures(record))
    assert re.search(state, figures)


def test_pictures_of_the_report_name_what_they_show(finished, tmp_path, monkeypatch):
    """Heads as --head counts them; neighbours with their rank, similarity and class."""
    run, result, _ = finished
    titles, sheets = [], []
    figure, sheet = dino_report.examples_figure, dino_report.contact_sheet
    monkeypatch.setattr(
        dino_report, "examples_figure", lambda e, names, **more: titles.append(names) or figure(e, names, **more)
    )
    monkeypatch.setattr(dino_report, "contact_sheet", lambda rows, title: sheets.append(rows) or sheet(rows, title))
    job = DinoJob(TINY)
    history = json.loads(run.metrics.read_text())["epochs"]
    record = DinoRecord(TINY, history, result.knn, None, result.environment, job.data, job.preprocessing)
    model = xcit.create_model(str(run.model)).eval()
    write_dino_report(record, RunFolder(tmp_path), model)
    assert titles == [["image", "all heads", "head 0", "head 1"]]
    assert len(sheets) == 1
    assert len(sheets[0]) == 8
    for row in sheets[0]:
        assert re.fullmatch(r"class \d", row.lead.caption)
        assert [cell.caption[0] for cell in row.cells] == list("123456")
        similarities = [float(cell.caption[1:]) for cell in row.cells]
        assert similarities == sorted(similarities, reverse=True)
        assert all(re.fullmatch(r"class \d", cell.name) for cell in row.cells)
        assert [cell.right for cell in row.cells] == [cell.name == row.lead.caption for cell in row.cells]
    with Image.open(tmp_path / "neighbours.png") as drawn:
        drawn.load()


def test_released_models_have_recipes():
    names = [f"dino_{model}{kind}" for model in RELEASED for kind in ("", "_boost")]
    assert set(names) <= set(RECIPES)
    default = find_recipe("dino_xcit_small_12_p16").make()
    assert (default.epochs, default.optim.batch_size, default.lr) == (100, 1024, 2e-3)
    assert (default.teacher.momentum, default.optim.clip_grad, default.head.out_dim) == (0.996, 3.0, 65536)
    assert default.head.norm_last_layer
    boosted = find_recipe("dino_xcit_medium_24_p8_boost").make()
    assert (boosted.epochs, boosted.teacher.temp, boosted.teacher.warmup_temp_epochs) == (300, 0.07, 30)
    published = dino_vissl("xcit_medium_24_p8")
    assert (published.optim.batch_size, published.lr, published.optim.min_lr) == (960, 9.375e-4, 1e-5)
    assert (published.crops.num_local, published.crops.global_min_area, published.model.drop_path_rate) == (
        6,
        0.32,
        0.15,
    )


def test_recipes_are_sound_and_written_and_read_back(tmp_path):
    for name, recipe in RECIPES.items():
        config = recipe.make()
        if config.task != "dino":
            continue
        assert config.recipe == name
        if config.data.format != "digits":
            config = override(config, {"data.root": "somewhere"})
        write_config(check_config(config), tmp_path / "c.yaml")
        assert read_config(tmp_path / "c.yaml") == config


def test_weights_to_begin_with(finished, tmp_path):
    run, _, _ = finished
    config = override(TINY, {"model.pretrained": str(run.model)})
    ours, theirs = DinoJob(config).task.student.backbone.state_dict(), runs.weights(run.model)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for changes, message in (
        ({"model.name": "xcit_small_12_p16_224"}, "which means weights; name the architecture xcit_small_12_p16"),
        ({"model.name": "timm:resnet18"}, "DINO trains XCiTs here"),
        (
            {"model.name": "xcit_small_12_p16", "model.pretrained": "released"},
            "name the weights, such as --pretrained dino_xcit_small_12_p16_pretrain",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            DinoJob(override(TINY, changes))


def test_the_plan_tells_what_would_happen():
    facts = dict(DinoJob(TINY).plan())
    assert facts["steps"] == "3 epochs x 5 = 15"
    assert facts["views"] == "2 of 16 px and 2 of 8 px an image"
    assert facts["compute"].endswith(": 9.5 forward passes an image")
    assert "0 MiB for activations" not in facts["memory"]
