"""The way of a user, at full size: digits as files, a model from random weights, fine-tuned, judged, predicted."""

import json
import shlex

import pytest

from xcit.cli.main import main

pytestmark = pytest.mark.slow


def xcit(command):
    assert main(shlex.split(command)) == 0


@pytest.mark.timeout(1500)
def test_from_files_to_a_model_that_reads_digits(tmp_path, monkeypatch):
    """A shorter run than the one in docs/training.md, on the same digits; the bounds leave room for other machines."""
    monkeypatch.chdir(tmp_path)
    xcit("data digits --out d")
    common = "--data d --model xcit_nano_12_p8 --image-size 32"
    xcit(f"train scratch {common} --epochs 25 --set augment.hflip=0 --out scratch")
    scratch = json.loads((tmp_path / "scratch/metrics.json").read_text())["test"]
    assert scratch["num_images"] == 360
    assert scratch["accuracy"] >= 0.97
    xcit(f"train finetune {common} --pretrained scratch/model.safetensors --epochs 4 --set augment.hflip=0 --out tuned")
    tuned = json.loads((tmp_path / "tuned/metrics.json").read_text())["test"]
    assert tuned["accuracy"] >= 0.97
    xcit("eval --model tuned/model.safetensors --data d --split test --output eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["num_correct"] == tuned["num_correct"]
    xcit("predict d/test --model tuned/model.safetensors --output classes.csv")
    assert len((tmp_path / "classes.csv").read_text().splitlines()) > 360
