"""`xcit info` against figures that are known from elsewhere."""

import re

import pytest
import torch

from xcit.cli.main import main
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT


def facts(capsys, *arguments):
    assert main(["info", *arguments]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    pairs = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if line.strip()]
    return title, {pair[0]: pair[-1] for pair in pairs}


def test_an_architecture(capsys):
    title, said = facts(capsys, "xcit_nano_12_p16", "--no-timing")
    assert title == "xcit_nano_12_p16"
    assert said["parameters"].startswith("3,053,224 (11.6 MiB of float32)")
    assert said["image"] == "224 x 224 px, 14 x 14 = 196 tokens"
    assert said["classes"] == "1000"
    assert "0.55 G token form" in said["multiply-adds"]
    assert "one forward" not in said


def test_released_weights_are_described_without_a_download(capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was used"))
    _, said = facts(capsys, "xcit_nano_12_p8_384_dist", "--no-timing")
    assert said["image"] == "384 x 384 px, 48 x 48 = 2,304 tokens"
    assert said["weights"].endswith("/xcit_nano_12_p8_384_dist.pth")
    assert said["trained"] == "ImageNet-1k, distilled from RegNetY-16GF"
    assert said["published"] == "ImageNet top-1 77.8 % (xcit README)"


def test_another_size(capsys):
    _, said = facts(capsys, "xcit_nano_12_p16", "--size", "250", "--no-timing")
    assert said["image"] == "250 x 250 px, 16 x 16 = 256 tokens"  # the stem rounds up


def test_a_file_and_its_time(capsys, tmp_path):
    path = tmp_path / "m.safetensors"
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=7, in_chans=1)
    cfg = {"input_size": [1, 48, 64], "mean": [0.5], "std": [0.5]}
    save_checkpoint(model, path, class_names=list("abcdefg"), preprocessing=cfg)
    _, said = facts(capsys, str(path), "--device", "cpu")
    assert said["architecture"] == "1 blocks, width 32, 4 heads, patches of 16 px"
    assert said["classes"] == "7 (a, b, c, d, e, ...)"
    assert said["channels"] == "1"
    assert said["image"] == "48 x 64 px, 3 x 4 = 12 tokens"
    assert re.fullmatch(r"\d+\.\d ms on cpu \(\d+ threads\), float32, chosen form: \w+", said["one forward"])


def test_a_time_that_does_not_fit_in_memory(capsys, monkeypatch):
    monkeypatch.setattr(
        "xcit.inference.costs.time_forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    _, said = facts(capsys, "xcit_nano_12_p16", "--size", "32", "--device", "cpu")
    assert said["one forward"].startswith("out of memory on cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xcit_nano_12_p61"], "Did you mean 'xcit_nano_12_p16'"),
        (["xcit_nano_12_p16", "--size", "15"], "--size is 15; it must be at least one patch of 16 px."),
        (["xcit_nano_12_p16", "--size", "0"], "--size is 0"),
        (["missing.safetensors"], "missing.safetensors"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["info", *arguments, "--no-timing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
