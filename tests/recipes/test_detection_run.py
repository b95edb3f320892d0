"""Runs of detection as a user starts them: what they leave, how they are gone on with, what is refused."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import xcit
from xcit.cli.main import main
from xcit.errors import ConfigError, DataError
from xcit.evaluate.coco_ap import coco_figures
from xcit.models.zoo import CHECKPOINTS
from xcit.recipes.config_file import read_config
from xcit.recipes.detection import detect_own, maskrcnn
from xcit.recipes.detection_job import DetectionJob, augment_of, schedule_of
from xcit.recipes.registry import RECIPES
from xcit.recipes.run_folder import RunFolder, new_run, open_run
from xcit.recipes.settings import check_config, write_config
from xcit.recipes.train import train
from xcit.tasks.detection import DetectionTask, StepSchedule

sys.path.insert(0, str(Path(__file__).parent))
import detection_runs
import runs


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with runs.one_thread():
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return detection_runs.scenes(tmp_path_factory.mktemp("scenes") / "set")


@pytest.fixture(scope="module")
def tiny(scenes):
    return detection_runs.tiny(scenes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    console = Console(file=io.StringIO(), width=120)
    run = new_run(tmp_path_factory.mktemp("runs") / "whole")
    return run, train(tiny, run, console=console), console.file.getvalue()


def test_everything_is_there(finished, tiny):
    run, result, said = finished
    names = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}
    assert names >= {
        "model.safetensors", "model_last.safetensors", "model_ema.safetensors", "last.ckpt", "config.yaml",
        "metrics.csv", "metrics.json", "metrics.jsonl", "report.html", "curves.png", "results.json", "provenance.json",
    }  # fmt: skip
    assert len([name for name in names if name.startswith("detections/")]) == 3
    assert read_config(run.config) == tiny
    assert "10 classes" in said
    assert "2 training images were set aside" in said
    content = json.loads(run.metrics.read_text())
    assert set(content["test"]) == {"bbox", "segm", "num_images"}
    assert set(content["epochs"][0]) >= {"train_loss", "train_loss_mask", "box_ap", "mask_ap50", "ema_box_ap"}
    row = content["epochs"][0]
    assert row["train_loss"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("train_loss_")), rel=1e-5)
    assert result.part == "test"
    assert result.num_images == 3


def test_the_file_is_a_detector_with_its_classes(finished):
    run, _, _ = finished
    model = xcit.create_detector(run.model).eval()
    assert model.pretrained_cfg["class_names"] == list("0123456789")
    assert (model.transform.min_size, model.transform.max_size) == (64, 128)
    with torch.no_grad():
        assert model([torch.rand(3, 50, 80)])[0]["masks"].shape[2:] == (50, 80)


def test_the_figures_are_of_the_results_that_stand_beside_them(finished, scenes):
    run, result, _ = finished
    truth = json.loads((scenes / "test" / "annotations.json").read_text())
    rows = json.loads((run.root / "results.json").read_text())
    for kind in ("bbox", "segm"):
        assert coco_figures(truth, rows, kind).ap == pytest.approx(result.figures[kind].ap, abs=1e-9)


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it, nothing is saved."""


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_run_ends_bitwise_the_same(finished, tiny, tmp_path, monkeypatch, step):
    monkeypatch.setattr("xcit.recipes.detection_job.write_detection_report", lambda *_: None)
    config = replace(tiny, compute=replace(tiny.compute, checkpoint_minutes=1e-9))
    run, training_step = new_run(tmp_path / "run"), DetectionTask.training_step

    def wrapped(task, batch, batch_idx):
        if task.global_step == step:
            raise Killed
        return training_step(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", wrapped)
        with pytest.raises(Killed):
            train(config, run)
    run = open_run(run.root)
    train(config, run)
    runs.assert_same_run(run, finished[0])


def test_broken_images_are_skipped_and_listed(tiny, scenes, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    (root / "train" / "images" / "000003.png").write_bytes(b"not an image")
    (root / "test" / "images" / "000001.png").write_bytes(b"")
    config = replace(tiny, data=replace(tiny.data, root=str(root), max_bad_fraction=0.5), epochs=1)
    run = new_run(tmp_path / "run")
    result = train(config, run)
    assert result.num_images == 2
    listed = run.skipped.read_text()
    assert "000003.png" in listed
    assert "test,000001.png" in listed


def test_missing_images_are_refused_before_anything_is_computed(tiny, scenes, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    for i in range(6):
        (root / "train" / "images" / f"{i:06d}.png").unlink()
    with pytest.raises(DataError, match=r"train images are not in .*images .*max_bad_fraction=0.1 allows.*check-coco"):
        DetectionJob(replace(tiny, data=replace(tiny.data, root=str(root))))


def test_boxes_alone(tiny, tmp_path):
    config = replace(tiny, data=replace(tiny.data, masks="none"), epochs=1)
    result = train(config, new_run(tmp_path / "run"))
    assert set(result.figures) == {"bbox"}


def test_training_begins_with_what_is_asked_for(tiny, finished, tmp_path):
    run, _, _ = finished
    trained = xcit.create_detector(run.model)
    job = DetectionJob(replace(tiny, model=replace(tiny.model, options={}, pretrained="none")))
    assert job.task.model.num_classes == 10
    model = xcit.create_model("xcit_nano_12_p16", num_classes=4)
    xcit.save_checkpoint(model, tmp_path / "c.safetensors")
    wanted = replace(tiny.model, options={}, pretrained=str(tmp_path / "c.safetensors"))
    begun = DetectionJob(replace(tiny, model=wanted)).task.model
    assert torch.equal(begun.backbone.body.blocks[11].mlp.fc1.weight, model.blocks[11].mlp.fc1.weight)
    assert trained.num_classes == 10


def test_the_command_line(scenes, tmp_path, capsys, tiny):
    write_config(tiny, tmp_path / "tiny.yaml")
    assert main(["train", str(tmp_path / "tiny.yaml"), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "boxes: AP" in said
    assert "held-out images" in said
    assert main(["train", "detect_scenes", "--data", str(scenes), "--dry-run", "--batch-size", "4"]) == 0
    assert "Mask R-CNN on xcit_nano_12_p8" in capsys.readouterr().out
    assert main(["train", "detect_scenes", "--data", str(tmp_path / "no")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["train", "detect_scenes", "--teacher", "x"]) == 2
    assert "--teacher is not for this recipe" in capsys.readouterr().err


RECORD = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from xcit.recipes import detection_job, train as training
from xcit.recipes.config_file import read_config
from xcit.recipes.run_folder import RunFolder
from xcit.evaluate.detection import coco_truth
from xcit.tasks import detection
from xcit.tasks.detection import DetectionTask
def perfect(model, images, indices, annotated):
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{key: row[key] for key in keys} | {"score": 0.9} for row in coco_truth(annotated, indices)["annotations"]]
detection.detected = perfect
detection_job.write_detection_report = lambda *_: None
folder, weights, seen = Path(sys.argv[1]), [], []
step, end = DetectionTask.optimizer_step, DetectionTask.on_validation_epoch_end
def recording(task, *arguments, **options):
    step(task, *arguments, **options)
    weights.append({name: p.detach().clone() for name, p in task.model.named_parameters()})
def noting(task):
    seen.append(list(task._seen))
    end(task)
DetectionTask.optimizer_step, DetectionTask.on_validation_epoch_end = recording, noting
training.train(read_config(folder / "config.yaml"), RunFolder(folder))
torch.save({"weights": weights, "seen": seen}, folder / f"record{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(tiny, tmp_path):
    """They have the same weights after each step, and judge every validation image once, as one process does."""
    from xcit.recipes.launch import launch

    config = replace(tiny, compute=replace(tiny.compute, devices=2), data=replace(tiny.data, val_fraction=0.4))
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    write_config(config, run.config)
    assert launch(["-c", RECORD, str(run.root)], 2) == 0
    ours, theirs = (torch.load(run.root / f"record{rank}.pt") for rank in range(2))
    assert len(ours["weights"]) == 2 * (7 // 4)
    for mine, other in zip(ours["weights"], theirs["weights"], strict=True):
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    for mine, other in zip(ours["seen"], theirs["seen"], strict=True):
        assert sorted(mine + other) == [0, 1, 2, 3, 4]
    # The truth, found by both processes in their shares, is all there was to find.
    row = json.loads(run.metrics.read_text())["epochs"][-1]
    assert row["box_ap"] == row["mask_ap"] == pytest.approx(1)


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_released_schedule():
    """36 epochs of 117,266 images in steps of 16; a tenth after 27 and 33, 500 steps of rise from a thousandth."""
    for stem, checkpoint in CHECKPOINTS.items():
        if checkpoint.task == "detection":
            config = RECIPES[f"{stem}_3x"].make()
            assert config.model.name == checkpoint.architecture
            assert config.model.pretrained == f"{checkpoint.architecture}_384_dist"
    config = maskrcnn("xcit_medium_24_p16")
    assert config.model.drop_path_rate == 0.15
    assert (config.optim.batch_size, config.optim.lr, config.optim.weight_decay) == (16, 1e-4, 0.05)
    schedule = schedule_of(config, 7330)
    assert schedule.warmup_lr == pytest.approx(1e-7)
    assert schedule._replace(warmup_lr=0) == StepSchedule(1e-4, 0, 500, (27 * 7330, 33 * 7330), 36 * 7330)
    augment = augment_of(config)
    assert augment.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert augment.crop_short_sides == (400, 500, 600)
    assert (augment.crop_range, augment.max_size, augment.hflip, augment.crop_prob) == ((384, 600), 1333, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"data\.root is empty"):
        check_config(config)
    assert detect_own().model.pretrained == "coco"


def test_settings_that_contradict_each_other(tiny):
    wrong = replace(
        tiny,
        augment=replace(tiny.augment, min_short=96),
        data=replace(tiny.data, image_size=256),
        optim=replace(tiny.optim, first_decay=3.0),
        compute=replace(tiny.compute, compile=True, channels_last=False),
    )
    with pytest.raises(ConfigError) as error:
        check_config(wrong)
    settings = "augment.min_short is 96", "data.image_size is 256", "optim.first_decay is 3"
    for part in (*settings, "compute.compile", "channels_last=false"):
        assert part in str(error.value)


def write_odd(root, scenes, *, size=(96, 64)):
    """Write a set in which nothing is as it should be, and return its annotation file."""
    shutil.copytree(scenes / "train", root / "train")
    file = root / "train" / "annotations.json"
    content = json.loads(file.read_text())
    width, height = size
    Image.new("RGB", size, (90, 120, 60)).save(root / "train" / "images" / "large.png", compress_level=1)
    content["images"] += [
        {"id": 100, "file_name": "large.png", "width": width, "height": height},
        {"id": 101, "file_name": "gone.png", "width": 96, "height": 64},
    ]
    content["categories"].append({"id": 77, "name": "never seen"})
    corner = {"segmentation": [[width - 1, height - 1, width, height - 1, width, height, width - 1, height]]}
    for number, box, shape in (
        (900, [width - 1, height - 1, 1, 1], corner),  # one pixel
        (901, [0, 0, width, height], {"segmentation": [[0, 0, width, 0, width, height, 0, height]]}),
    ):
        one = {"id": number, "image_id": 100, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        content["annotations"].append(one | shape)
    content["annotations"].append(content["annotations"][0] | {"id": 902, "image_id": 101})
    file.write_text(json.dumps(content))
    return file


def odd(tiny, root, **data):
    return replace(tiny, epochs=1, data=replace(tiny.data, root=str(root), **data))


@pytest.mark.parametrize("size", [(96, 64), pytest.param((12_000, 9_000), marks=pytest.mark.slow)])
def test_a_set_of_oddities_is_trained_on(tiny, scenes, tmp_path, size):
    """A box of one pixel, a class without instances, an image that is listed and missing, one of 108 megapixels."""
    root = tmp_path / "set"
    write_odd(root, scenes, size=size)
    run, console = new_run(tmp_path / "run"), Console(file=io.StringIO(), width=200)
    train(odd(tiny, root, max_bad_fraction=0.2), run, console=console)
    assert "without an instance to train on, never found: " in console.file.getvalue()
    assert "gone.png" in run.skipped.read_text()
    assert "large.png" not in run.skipped.read_text()
    assert xcit.create_detector(run.model).num_classes == 11


def test_a_set_without_a_valid_annotation_is_refused(tiny, scenes, tmp_path):
    file = write_odd(tmp_path / "set", scenes)
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one["bbox"] = [5, 5, 0, 3]
        del one["segmentation"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"none of its 22 annotations can be used; .* xcit data check-coco"):
        train(odd(tiny, tmp_path / "set"), new_run(tmp_path / "run"))
