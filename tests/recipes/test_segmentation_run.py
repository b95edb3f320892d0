"""Runs of segmentation as a user starts them: what they leave, how they are gone on with, what is refused."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import xcit
from xcit.cli.main import main
from xcit.data.mask_parts import open_mask_parts
from xcit.errors import ConfigError, DataError
from xcit.models.zoo import CHECKPOINTS
from xcit.recipes.config_file import read_config
from xcit.recipes.job import Share
from xcit.recipes.registry import RECIPES
from xcit.recipes.run_folder import RunFolder, new_run, open_run
from xcit.recipes.segmentation import ade20k, segment_own
from xcit.recipes.segmentation_job import SegmentationJob, augment_of, schedule_of
from xcit.recipes.settings import check_config, override, write_config
from xcit.recipes.train import train
from xcit.tasks.segmentation import PolySchedule, SegmentationTask
from xcit.tasks.task import DivergedError

sys.path.insert(0, str(Path(__file__).parent))
import detection_runs
import runs
import segmentation_runs


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with runs.one_thread():
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return detection_runs.scenes(tmp_path_factory.mktemp("scenes") / "set")


@pytest.fixture(scope="module")
def tiny(scenes):
    return segmentation_runs.tiny(scenes)


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
        "metrics.csv", "metrics.json", "metrics.jsonl", "report.html", "curves.png", "confusion_matrix.png",
        "provenance.json",
    }  # fmt: skip
    assert len([name for name in names if name.startswith("segmentations/")]) == 2 * 3
    assert read_config(run.config) == tiny
    assert "11 classes: 10 images to train on, 2 to choose by, 3 held out" in said
    assert "UperNet on xcit_nano_12_p16" in said
    content = json.loads(run.metrics.read_text())
    assert set(content["test"]) == {"num_pixels", "miou", "macc", "aacc", "classes", "num_images"}
    assert content["test"]["num_pixels"] == 3 * 64 * 96
    row = content["epochs"][0]
    assert row["train_loss"] == pytest.approx(row["train_loss_decode"] + 0.4 * row["train_loss_auxiliary"], rel=1e-5)
    assert {"miou", "macc", "aacc", "ema_miou"} <= set(row)
    assert result.part == "test"


def test_the_file_is_a_segmenter_with_its_classes(finished, scenes):
    run, _, _ = finished
    model = xcit.create_segmenter(run.model).eval()
    assert model.pretrained_cfg["class_names"] == ["background", *"0123456789"]
    assert model.pretrained_cfg["palette"] == open_mask_parts(scenes).train.palette.tolist()
    assert (model.image_size, model.max_size) == (64, 128)


def test_the_figures_are_those_of_the_kept_weights(finished, scenes):
    """Segmented anew, each image as a user would, and counted a pixel at a time."""
    run, result, _ = finished
    segmenter = xcit.Segmenter(run.model)
    test = open_mask_parts(scenes).test
    both, either = np.zeros(11), np.zeros(11)
    for i in range(len(test)):
        image, mask = test.open_pair(i)
        (seen,) = segmenter(image)
        for k in range(11):
            both[k] += ((seen.labels == k) & (mask == k)).sum()
            either[k] += ((seen.labels == k) | (mask == k)).sum()
    overlaps = [b / e for b, e in zip(both, either, strict=True) if e]
    assert result.overlap.miou == pytest.approx(np.mean(overlaps), abs=1e-12)


class Killed(BaseException):
    """Ends a run as a kill does: nobody catches it, nothing is saved."""


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_run_ends_bitwise_the_same(finished, tiny, tmp_path, monkeypatch, step):
    monkeypatch.setattr("xcit.recipes.segmentation_job.write_segmentation_report", lambda *_: None)
    config = replace(tiny, compute=replace(tiny.compute, checkpoint_minutes=1e-9))
    run, training_step = new_run(tmp_path / "run"), SegmentationTask.training_step

    def wrapped(task, batch, batch_idx):
        if task.global_step == step:
            raise Killed
        return training_step(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", wrapped)
        with pytest.raises(Killed):
            train(config, run)
    run = open_run(run.root)
    train(config, run)
    runs.assert_same_run(run, finished[0])


def test_broken_images_and_masks_are_skipped_and_listed(tiny, scenes, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    (root / "train" / "images" / "000003.png").write_bytes(b"not an image")
    (root / "train" / "masks" / "000004.png").write_bytes(b"")
    Image.new("L", (10, 10)).save(root / "test" / "masks" / "000001.png")
    config = replace(tiny, data=replace(tiny.data, root=str(root), max_bad_fraction=0.5), epochs=1)
    config = replace(config, optim=replace(config.optim, steps_per_epoch=6))
    run = new_run(tmp_path / "run")
    result = train(config, run)
    assert result.num_images == 2
    listed = run.skipped.read_text()
    assert "000003.png: is not an image" in listed
    assert "masks/000004.png: is empty" in listed
    assert "masks/000001.png: is 10 x 10 px, but its image" in listed


def test_too_many_broken_masks_stop_the_run(tiny, scenes, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    for i in range(4, 12):
        Image.fromarray(np.full((64, 96), 77, np.uint8)).save(root / "train" / "masks" / f"{i:06d}.png")
    config = replace(tiny, data=replace(tiny.data, root=str(root)))
    with pytest.raises(DataError, match="check-masks"):
        train(config, new_run(tmp_path / "run"))


@pytest.mark.parametrize("head", ["upernet", "sem_fpn"])
def test_training_begins_with_what_is_asked_for(tiny, finished, tmp_path, head):
    model = xcit.create_model("xcit_nano_12_p16", num_classes=4)
    xcit.save_checkpoint(model, tmp_path / "c.safetensors")
    wanted = replace(tiny.model, head=head, options={}, pretrained=str(tmp_path / "c.safetensors"))
    wanted = replace(wanted, auxiliary_channels=8 if head == "upernet" else 256)
    begun = SegmentationJob(replace(tiny, model=wanted)).task.model
    assert begun.head == head
    assert torch.equal(begun.backbone.blocks[11].mlp.fc1.weight, model.blocks[11].mlp.fc1.weight)
    assert begun.decode_head.conv_seg.in_channels == 8


def test_training_goes_on_from_a_runs_own_file(tiny, finished):
    run, _, _ = finished
    wanted, trained = replace(tiny.model, pretrained=str(run.model)), xcit.create_segmenter(run.model)
    for channels in (0, tiny.model.channels):  # the file's, or the recipe's own, which are the same
        begun = SegmentationJob(replace(tiny, model=replace(wanted, channels=channels))).task.model
        assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), trained.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"model\.channels is 4, but the heads that .* brings have 8; take 0"):
        SegmentationJob(replace(tiny, model=replace(wanted, channels=4)))
    with pytest.raises(xcit.XCiTError, match="xcit_nano_12_p16"):  # which has another depth and width
        SegmentationJob(replace(tiny, model=replace(wanted, options={})))


@pytest.mark.parametrize("name", ["num_classes", "backbone", "channels", "head", "pool_scales"])
def test_options_are_the_backbones(tiny, name):
    with pytest.raises(ConfigError, match=rf"model\.options\.{name} is no argument of the backbone's class"):
        SegmentationJob(replace(tiny, model=replace(tiny.model, options=tiny.model.options | {name: 3})))


def test_a_test_part_that_cannot_be_used_is_refused_before_training(tiny, scenes, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(scenes, root)
    for mask in (root / "test" / "masks").iterdir():
        Image.fromarray(np.full((64, 96), 77, np.uint8)).save(mask)
    with pytest.raises(DataError, match="None of 3 masks that were tried can be used"):
        SegmentationJob(replace(tiny, data=replace(tiny.data, root=str(root))))


def test_fewer_validation_images_than_processes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("xcit.recipes.train.own_share", lambda config: Share(1, 2))
    config = replace(tiny, data=replace(tiny.data, val_fraction=0.05), compute=replace(tiny.compute, devices=2))
    with pytest.raises(ConfigError, match="The images to validate on are 1, fewer than the run's 2 processes"):
        train(config, new_run(tmp_path / "run"))


def test_statistics_that_are_no_numbers_end_the_run(tiny, tmp_path, monkeypatch):
    """Before they are saved: what was last saved stays good."""
    step = SegmentationTask.optimizer_step

    def broken(task, *arguments, **options):
        step(task, *arguments, **options)
        if task.global_step == 3:  # in the second epoch
            task.model.decode_head.bottleneck.bn.running_var.fill_(torch.inf)

    monkeypatch.setattr(SegmentationTask, "optimizer_step", broken)
    run = new_run(tmp_path / "run")
    with pytest.raises(DivergedError, match=r"optim\.warmup_steps"):
        train(tiny, run)
    state = torch.load(run.last, weights_only=False)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_the_command_line(scenes, tmp_path, capsys, tiny):
    write_config(tiny, tmp_path / "tiny.yaml")
    assert main(["train", str(tmp_path / "tiny.yaml"), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "mIoU " in said
    assert "held-out images" in said
    assert "xcit segment IMAGE" in said
    command = ["train", "segment_scenes", "--data", str(scenes), "--dry-run", "--batch-size", "4"]
    assert main(command) == 0
    assert "Semantic FPN on xcit_nano_12_p8" in capsys.readouterr().out
    assert main(["train", "segment_scenes", "--data", str(tmp_path / "no")]) == 2
    assert "no such" in capsys.readouterr().err
    assert main(["train", "segment_scenes", "--teacher", "x"]) == 2
    assert "--teacher is not for this recipe" in capsys.readouterr().err


def test_weights_of_classes(tiny, capsys, tmp_path):
    """They go by name, a name that is none is refused, and the settings survive their file."""
    config = override(tiny, {"data.class_weights": "{background: 0.5, 3: 2}", "data.class_weights.7": "1e-1"})
    assert config.data.class_weights == {"background": 0.5, "3": 2.0, "7": 0.1}
    write_config(config, tmp_path / "weights.yaml")
    assert read_config(tmp_path / "weights.yaml") == config
    weights = SegmentationJob(config).task.class_weights
    want = torch.ones(11)
    want[0], want[4], want[8] = 0.5, 2, 0.1
    assert torch.equal(weights, want)
    assert SegmentationJob(override(tiny, {"data.class_weights.7": 1})).task.class_weights is None
    for name, problem in (
        ("backgruond", "a class that the data does not have (did you mean background?)."),
        ("sky", "a class that the data does not have; its classes are background, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9."),
    ):
        with pytest.raises(ConfigError) as caught:
            SegmentationJob(override(tiny, {f"data.class_weights.{name}": 0.5}))
        assert str(caught.value) == f"data.class_weights names {name!r}, {problem}"
    command = ["train", "segment_scenes", "--data", tiny.data.root, "--out", str(tmp_path / "run")]
    assert main([*command, "--set", "data.class_weights=0.5"]) == 2
    assert "data.class_weights is 0.5; it must be numbers by name" in capsys.readouterr().err
    assert main([*command, "--set", "data.class_weights={sky: blue}"]) == 2
    assert "data.class_weights.sky is 'blue'; it must be a number" in capsys.readouterr().err
    assert main([*command, "--set", "data.class_weights.background=-1"]) == 2
    assert "data.class_weights.background is -1; it must be from 0 to 1e+06" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_replaced_whole(tiny, tmp_path):
    """Pictures of a former run do not stay among those of the new one."""
    run = new_run(tmp_path / "run")
    train(replace(tiny, epochs=1), run)
    assert len(list(run.segmentations.iterdir())) == 6
    new_run(run.root, overwrite=True).clear()
    assert not list(run.segmentations.iterdir())


RECORD = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from xcit.recipes import segmentation_job, train as training
from xcit.recipes.config_file import read_config
from xcit.recipes.run_folder import RunFolder
from xcit.tasks.segmentation import SegmentationTask
segmentation_job.write_segmentation_report = lambda *_: None
folder, weights, pixels = Path(sys.argv[1]), [], []
step, validate = SegmentationTask.optimizer_step, SegmentationTask.validation_step
def recording(task, *arguments, **options):
    step(task, *arguments, **options)
    weights.append({name: p.detach().clone() for name, p in task.model.named_parameters()})
def noting(task, batch, batch_idx):
    pixels.append((task.current_epoch, int(batch.indices[0]), int((batch.masks[0] >= 0).sum())))
    validate(task, batch, batch_idx)
SegmentationTask.optimizer_step, SegmentationTask.validation_step = recording, noting
training.train(read_config(folder / "config.yaml"), RunFolder(folder))
torch.save({"weights": weights, "pixels": pixels}, folder / f"record{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(tiny, tmp_path):
    """They have the same weights after each step, and count every validation pixel once, as one process does."""
    from xcit.recipes.launch import launch

    config = replace(tiny, compute=replace(tiny.compute, devices=2), data=replace(tiny.data, val_fraction=0.4))
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    write_config(config, run.config)
    assert launch(["-c", RECORD, str(run.root)], 2) == 0
    ours, theirs = (torch.load(run.root / f"record{rank}.pt") for rank in range(2))
    assert len(ours["weights"]) == 4
    for mine, other in zip(ours["weights"], theirs["weights"], strict=True):
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    for epoch in range(2):
        counted = [(i, n) for e, i, n in ours["pixels"] + theirs["pixels"] if e == epoch]
        assert sorted(counted) == [(i, 64 * 96) for i in range(5)]


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_released_schedules():
    """80,000 and 160,000 steps of 16 crops; 6e-5 falling in a straight line after 1,500 steps of rise from 1e-6."""
    count = 0
    for stem, checkpoint in CHECKPOINTS.items():
        if checkpoint.task == "segmentation":
            head, steps = ("sem_fpn", 80_000) if stem.startswith("sem_fpn") else ("upernet", 160_000)
            config = RECIPES[f"{stem}_{steps // 1000}k"].make()
            assert (config.model.name, config.model.head) == (checkpoint.architecture, head)
            assert config.model.pretrained == f"{checkpoint.architecture}_384_dist"
            assert schedule_of(config, config.optim.steps_per_epoch) == PolySchedule(6e-5, 0, 1, 1e-6, 1500, steps)
            count += 1
    assert count == 16
    assert [ade20k(head, "xcit_medium_24_p16").model.drop_path_rate for head in ("sem_fpn", "upernet")] == [0.2, 0.15]
    config = ade20k("upernet", "xcit_small_12_p8")
    assert (config.optim.batch_size, config.optim.weight_decay, config.optim.auxiliary_weight) == (16, 0.01, 0.4)
    model = xcit.create_segmenter("xcit_nano_12_p16", num_classes=2, depth=4)
    augment = augment_of(config, model)
    assert (augment.crop_size, augment.short_side, augment.max_size) == ((512, 512), 512, 2048)
    assert (augment.ratio_range, augment.cat_max_ratio, augment.hflip) == ((0.5, 2.0), 0.75, 0.5)
    assert augment.brightness == pytest.approx(32 / 255, abs=1e-5)
    assert (augment.distort, augment.contrast, augment.saturation, augment.hue) == (0.5, 0.5, 0.5, 0.1)
    with pytest.raises(ConfigError, match=r"data\.root is empty"):
        check_config(config)
    assert segment_own().model.pretrained == "ade20k"


def test_settings_that_contradict_each_other(tiny):
    wrong = replace(
        tiny,
        model=replace(tiny.model, fpn_channels=8, auxiliary_channels=0),
        augment=replace(tiny.augment, min_ratio=3.0, crop_size=600),
        data=replace(tiny.data, image_size=256),
        optim=replace(tiny.optim, batch_size=1, auxiliary_weight=1.0),
        compute=replace(tiny.compute, compile=True, channels_last=False),
    )
    with pytest.raises(ConfigError) as error:
        check_config(wrong)
    said = "augment.min_ratio is 3", "data.image_size is 256", "model.fpn_channels", "computes one image at once"
    said += "augment.crop_size is 600, more than the 512 px", "optim.auxiliary_weight is 1, but there is no"
    for part in (*said, "compute.compile", "compute.channels_last"):
        assert part in str(error.value)
