"""`xcit giant` on real files: what is written and printed, how it ends, and that a stopped run is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli import main as command
from xcit.inference.segment_image import segment_image
from xcit.models.segmenters import create_segmenter, save_segmenter
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild"]
SCALING = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, a segmenter and an image."""
    folder = tmp_path_factory.mktemp("giant")
    torch.manual_seed(0)
    model = XCiT(patch_size=8, num_classes=3, embed_dim=32, depth=3, num_heads=4)
    model.pretrained_cfg = SCALING
    save_checkpoint(model, folder / "c.safetensors", class_names=NAMES)
    segmenter = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=3, depth=4, channels=16)
    torch.nn.init.normal_(segmenter.decode_head.conv_seg.weight, std=1.0)
    save_segmenter(segmenter, folder / "s.safetensors", class_names=NAMES)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (120, 205, 3), dtype=np.uint8)).save(folder / "a.png")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = command.main(["giant", *map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def prepared(mean=0.5, std=0.25):
    x = torch.from_numpy(np.array(Image.open("a.png"))).float().div(255).permute(2, 0, 1)
    return ((x - mean) / std).unsqueeze(0)


def test_classify(capsys):
    import xcit

    with torch.no_grad():
        shares = xcit.create_model("c.safetensors").eval()(prepared()).softmax(dim=1)[0]
    status, out, _ = run(capsys, "a.png", "--model", "c.safetensors", "--format", "json")
    assert status == 0
    labels = json.loads(out)["labels"]
    assert [label["index"] for label in labels] == shares.argsort(descending=True).tolist()
    assert labels[0]["probability"] == pytest.approx(float(shares.max()), rel=1e-5)
    assert labels[0]["name"] == NAMES[labels[0]["index"]]
    status, out, err = run(capsys, "a.png", "--model", "c.safetensors", "--top-k", 1)
    assert status == 0
    assert labels[0]["name"] in out
    assert " s." in err


@pytest.mark.parametrize("ending", [".npy", ".zarr", ".tif"])
def test_features(ending, capsys, tmp_path):
    import xcit
    from xcit.data.large_image import open_large_image

    out = tmp_path / f"f{ending}"
    status, said, _ = run(capsys, "a.png", "--model", "c.safetensors", "--task", "features", "-o", out)
    assert status == 0
    assert f"{out}: written." in said
    with torch.no_grad():
        expected = xcit.create_model("c.safetensors").eval().forward_features(prepared())[0, 1:].view(15, 26, 32)
    with open_large_image(out, axes="YXC" if ending == ".npy" else None) as found:
        np.testing.assert_allclose(found.read(0, 0, 15, 26), expected.numpy(), rtol=1e-3, atol=1e-4)


def test_attend_and_pyramid(capsys, tmp_path):
    out = tmp_path / "a.npy"
    status, said, _ = run(
        capsys, "a.png", "--model", "c.safetensors", "--task", "attend", "-o", out, "--format", "json"
    )
    assert status == 0
    maps = np.load(out)
    assert maps.shape == (15, 26, 4)
    np.testing.assert_allclose(maps.sum(axis=(0, 1)), 1, rtol=1e-5)
    assert len(json.loads(said)["own"]) == 4
    status, said, _ = run(
        capsys, "a.png", "--model", "s.safetensors", "--task", "pyramid", "-o", tmp_path / "p.npy", "--dtype", "float16"
    )
    assert status == 0
    shapes = [np.load(tmp_path / f"p_{stride}.npy").shape for stride in (4, 8, 16, 32)]
    assert shapes == [(32, 52, 128), (16, 26, 128), (8, 13, 128), (4, 6, 128)]


def test_segment(capsys, tmp_path):
    out, scores = tmp_path / "s.tif", tmp_path / "scores.npy"
    status, said, _ = run(
        capsys, "a.png", "--model", "s.safetensors", "--task", "segment", "-o", out, "--scores", scores
    )
    assert status == 0
    assert said.count("written.") == 2
    model = create_segmenter("s.safetensors").eval()
    image = torch.from_numpy(np.array(Image.open("a.png"))).permute(2, 0, 1).contiguous()
    expected = segment_image(model, image, native=True)
    assert (np.array(Image.open(out)) != expected.labels).mean() < 1e-3
    assert np.load(scores).dtype == np.float16


@pytest.mark.parametrize("task", ["classify", "features", "segment"])
def test_tiles(task, capsys, tmp_path):
    out = tmp_path / "t.npy"
    model = "s.safetensors" if task == "segment" else "c.safetensors"
    more = [] if task == "classify" else ["-o", out]
    status, _, _ = run(capsys, "a.png", "--model", model, "--task", task, "--tiles", 64, *more)
    assert status == 0
    if task == "segment":
        assert np.load(out).shape == (120, 205)
    elif task == "features":
        import xcit

        with torch.no_grad():
            tile = xcit.create_model("c.safetensors").eval().forward_features(prepared()[:, :, :64, 64:128])[0, 1:]
        np.testing.assert_allclose(np.load(out)[:8, 8:16], tile.view(8, 8, 32).numpy(), rtol=1e-3, atol=1e-4)


def test_what_it_will_take(capsys):
    status, out, _ = run(capsys, "a.png", "--model", "c.safetensors", "--dry-run")
    assert status == 0
    assert "390 (15 x 26)" in out
    status, out, _ = run(
        capsys, "a.png", "--model", "s.safetensors", "--task", "segment", "--dry-run", "--format", "json"
    )
    assert status == 0
    assert json.loads(out)["grid"] == [8, 13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--task", "features"], "features needs --out"),
        (["a.png", "-o", "x.npy"], "--out is for the other tasks"),
        (["a.png", "--task", "features", "-o", "x.png"], "must end in .npy"),
        (["a.png", "--scores", "x.npy"], "--scores is for --task segment"),
        (["a.png", "--block", "1"], "--block is for --task features"),
        (["a.png", "--layer", "0"], "--layer is for --task attend"),
        (["a.png", "--top-k", "0"], "must be 1 or more"),
        (["a.png", "--memory", "much"], "4GiB"),
        (["a.png", "--memory", "1MiB"], "the least that works"),
        (["a.png", "--mean", "a,b"], "--mean is 'a,b'"),
        (["a.png", "--mean", "0.5"], "takes 3 bands"),
        (["a.png", "--bands", "1,2"], "has 2 bands and the model takes 3"),
        (["a.png", "--bands", "1,2,9"], "9"),
        (["a.png", "--level", "1"], "one resolution"),
        (["a.png", "--tiles", "50"], "multiple of 32"),
        (["a.png", "--tiles", "64", "--dry-run"], "--tiles is for"),
        (["b.png"], "no such file"),
        (["c.safetensors"], "not an image"),
        (["a.png", "--task", "segment", "-o", "x.npy"], "no UperNet or Semantic FPN"),
    ],
)
def test_mistakes(arguments, message, capsys):
    status, out, err = run(capsys, *arguments, "--model", "c.safetensors")
    assert status == 2
    assert message in err
    assert err.startswith("xcit: ") or "xcit: " in err
    assert "Traceback" not in err
    assert out == ""


def test_a_stopped_command_is_gone_on_with(tmp_path):
    """A real Ctrl-C, in a process of its own."""
    big = tmp_path / "big.npy"
    np.save(big, np.random.default_rng(0).integers(0, 256, (6000, 4000, 3), dtype=np.uint8))
    out = tmp_path / "out" / "f.npy"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["giant", str(big), "--model", "c.safetensors", "--task", "features", "--device", "cpu"]
    command_line = [sys.executable, "-m", "xcit.cli.main", *arguments]
    dry = [*command_line, "--dry-run", "--format", "json"]
    plan = json.loads(subprocess.run(dry, capture_output=True, text=True, env=environment, check=True).stdout)
    # a process may hold some MiB less than the one that was asked; with more, the tokens would fit into memory
    command_line += ["-o", str(out), "--memory", f"{(plan['least'] >> 20) + 2}MiB"]
    process = subprocess.Popen(
        command_line,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # heard in background jobs too
    )
    for _ in range(1200):
        if list(out.parent.glob(".*tokens/done.npz")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "goes on with it" in err
    assert not out.exists()
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, check=True)
    assert "Going on after layer" in done.stderr
    assert list(out.parent.iterdir()) == [out]
    assert np.load(out).shape == (750, 500, 32)
