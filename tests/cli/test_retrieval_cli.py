"""`xcit retrieval` on tiny data in the published layouts; the figures themselves are tested in tests/evaluate."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    cfg = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    torch.manual_seed(0)
    model = XCiT(embed_dim=16, depth=1, num_heads=2, patch_size=8, num_classes=0)
    save_checkpoint(model, folder / "m.safetensors", preprocessing=cfg)
    for name in ("ox/jpg", "copy/original", "copy/jpegqual/10"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 32))
        picture.save(folder / "ox" / "jpg" / f"im_{i}.jpg")
        picture.save(folder / "copy" / "original" / f"200{i}00.jpg")
        picture.save(folder / "copy" / "jpegqual" / "10" / f"200{i}00.jpg", quality=10)
    gnd = [{"bbx": [0, 0, 40, 32], "easy": [0], "hard": [], "junk": [1]}]
    truth = {"imlist": ["im_0", "im_1", "im_2"], "qimlist": ["im_3"], "gnd": gnd}
    (folder / "ox" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    return folder


def run(capsys, monkeypatch, place, *arguments):
    monkeypatch.chdir(place)
    status = main(["retrieval", "--model", "m.safetensors", "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_revisited(capsys, monkeypatch, place, tmp_path):
    out = tmp_path / "o.json"
    status, shown, _ = run(capsys, monkeypatch, place, "--dataset", "roxford5k", "--data", "ox", "--output", out)
    assert status == 0
    record = json.loads(out.read_text())
    assert record["levels"]["hard"] == {"mean_average_precision": None, "num_queries": 0,
                                        "precision_at": {"1": None, "5": None, "10": None}}  # fmt: skip
    easy = record["levels"]["easy"]["mean_average_precision"]
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()[2:] if line}
    assert lines["easy"][0] == f"{100 * easy:.2f}"
    assert lines["hard"] == ["-", "-", "-", "-", "0"]
    assert record["cropped_queries"] is True


def test_copydays(capsys, monkeypatch, place):
    status, shown, err = run(
        capsys, monkeypatch, place, "--dataset", "copydays", "--data", "copy", "--format", "json", "--image-size", 32
    )
    assert status == 0
    record = json.loads(shown)
    assert record["pool"] == "token+gem"
    assert record["attacks"]["jpegqual/10"]["num_queries"] == 4
    assert "not there, so not judged: strong" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "rparis6k", "--data", "ox"], "has no gnd_rparis6k.pkl"),
        (["--dataset", "copydays", "--data", "ox"], "has no images in original/"),
        (["--dataset", "copydays", "--data", "copy", "--whole-queries"], "Copydays' queries have no boxes"),
        (["--dataset", "roxford5k", "--data", "ox", "--distractors", "ox"], "are for copydays"),
        (["--dataset", "roxford5k", "--data", "ox", "--image-size", "4"], "image_size is 4"),
        (["--dataset", "roxford5k", "--data", "ox", "--gem-p", "3"], "--gem-p is for --pool gem, and --pool is token"),
    ],
)
def test_mistakes(capsys, monkeypatch, place, arguments, message):
    status, out, err = run(capsys, monkeypatch, place, *arguments)
    assert (status, out) == (2, "")
    assert message in err
