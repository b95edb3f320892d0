"""`xcit export` from checkpoint to file, and `xcit predict` on what it wrote."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli import main as command
from xcit.deploy import proof
from xcit.deploy.export_source import load_model
from xcit.errors import UnknownNameError
from xcit.inference.runtimes import open_session
from xcit.models.detectors import create_detector, save_detector
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.segmenters import create_segmenter, save_segmenter
from xcit.models.semantic_fpn import SemanticFPN
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild", "dog"]
CFG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, a segmenter, a detector and photos."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, cls_attn_layers=1, num_classes=4)
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint(model, folder / "m.safetensors", class_names=NAMES, preprocessing=CFG)
    small = {"depth": 3, "image_size": 64, "max_size": 64}
    segmenter = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=3, channels=16, **small)
    save_segmenter(segmenter, folder / "s.safetensors", class_names=NAMES[:3])
    detector = create_detector("xcit_nano_12_p16", num_classes=2, depth=3, min_size=64, max_size=64, out_channels=16)
    save_detector(detector, folder / "d.safetensors")
    torch.save(segmenter.state_dict(), folder / "s.pth")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = command.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(text):
    return [(row["file"], row["rank"], row["name"]) for row in csv.DictReader(text.splitlines())]


def test_export_and_predict(capsys, place):
    status, out, err = run(
        capsys, "export", "m.safetensors", "--out", "m.onnx", "--size", "dynamic", "--batch", "dynamic"
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "m.onnx"
    assert any(line.split()[:2] == ["files", "m.onnx"] for line in lines)
    assert any("onnxruntime" in line and "fp32" in line for line in lines)
    assert any(line.split()[:4] == ["takes", "images", "of", "any"] for line in lines)
    assert any("multiply-adds" in line for line in lines)  # what folding saved
    written = json.loads((place / "m.onnx.proof.json").read_text(encoding="utf-8"))
    head = next(i for i, line in enumerate(lines) if line.startswith("images "))
    table = lines[head + 1 : head + 1 + len(written["cases"])]
    for line, case in zip(table, written["cases"], strict=True):
        assert line.startswith(" x ".join(map(str, case["shape"])))
        assert f"{case['max_relative_error']:.1e}" in line
        assert line.endswith(f"{case['top1_agreeing']} of {case['top1_compared']}")

    status, out, _ = run(capsys, "predict", "photos", "--model", "m.onnx", "--format", "csv", "--top-k", "4")
    assert status == 0
    status, want, _ = run(capsys, "predict", "photos", "--model", "m.safetensors", "--format", "csv", "--top-k", "4")
    assert rows(out) == rows(want)
    assert len(rows(out)) == 16


def test_the_format_can_be_named(capsys, place):
    options = [
        "--format",
        "openvino",
        "--dtype",
        "bf16",
        "--size",
        "48x32",
        "--batch",
        "2",
        "--no-fold",
        "--attn-form",
        "tokens",
    ]
    status, out, _ = run(capsys, "export", "m.safetensors", "--out", "o/m.xml", *options)
    assert status == 0
    assert "multiply-adds" not in out
    assert sorted(file.name for file in (place / "o").iterdir()) == ["m.bin", "m.xml", "m.xml.proof.json"]
    session = open_session(place / "o" / "m.xml")
    assert session(np.zeros((2, 3, 48, 32), np.float32))[0].shape == (2, 4)


def test_segmenters_and_what_detectors_see(capsys, place):
    status, out, _ = run(capsys, "export", "s.safetensors", "--out", "s.pt2")
    assert status == 0
    assert "pixels" in out or "same class" in out
    session = open_session(place / "s.pt2")
    assert session.description["pretrained_cfg"]["class_names"] == NAMES[:3]
    assert session(np.zeros((1, 3, 64, 64), np.float32))[0].shape == (1, 3, 64, 64)
    status, _, err = run(capsys, "predict", "photos", "--model", "s.pt2")
    assert status == 2
    assert "holds segmentation, not a classifier" in err
    status, out, err = run(capsys, "export", "d.safetensors", "--out", "d.pt2")
    assert (status, out) == (2, "")
    assert "add --features" in err
    assert not (place / "d.pt2").exists()


def test_models_by_name(place):
    assert isinstance(load_model("m.safetensors"), XCiT)
    assert isinstance(load_model("s.safetensors"), SemanticFPN)
    assert isinstance(load_model("s.pth"), SemanticFPN)
    assert isinstance(load_model("d.safetensors"), MaskRCNN)
    assert not load_model("m.safetensors").training
    with pytest.raises(UnknownNameError, match="xcit_nano_12_p16"):
        load_model("xcit_nano_12_p61")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.safetensors", "--out", "m"], "--out is m; name a file that ends in .onnx, .xml, .pt2, .pte"),
        (["m.safetensors", "--out", "x.onnx", "--format", "openvino"], "x.onnx does not end in .xml"),
        (["m.safetensors", "--out", "x.onnx", "--dtype", "bf16"], "onnxruntime has no bfloat16 matrix product"),
        (["m.safetensors", "--out", "x.onnx", "--dtype", "int8"], "with --calibration"),
        (["m.safetensors", "--out", "x.onnx", "--calibration", "photos"], "leave them out for fp32"),
        (["m.safetensors", "--out", "x.onnx", "--dtype", "int8", "--calibration", "nowhere"], "nowhere"),
        (["m.safetensors", "--out", "x.onnx", "--size", "big"], "--size is 'big'"),
        (["m.safetensors", "--out", "x.onnx", "--size", "1x2x3"], "--size is '1x2x3'"),
        (["m.safetensors", "--out", "x.onnx", "--size", "0"], "--size is '0'"),
        (["m.safetensors", "--out", "x.onnx", "--size", "8"], "it must be 16 px or more"),
        (["m.safetensors", "--out", "x.onnx", "--batch", "-1"], "--batch is '-1'"),
        (["m.safetensors", "--out", "x.pte", "--size", "dynamic"], "ExecuTorch plans its memory for one shape"),
        (["missing.safetensors", "--out", "x.onnx"], "missing.safetensors"),
        (["xcit_nano_12_p61", "--out", "x.onnx"], "Did you mean 'xcit_nano_12_p16'"),
        (["already.onnx", "--out", "x.onnx"], "already.onnx is exported already"),
        (["m.safetensors", "--out", "photos/0.png/x.onnx"], "could not be written"),
    ],
)
def test_mistakes(capsys, place, arguments, message):
    before = sorted(place.rglob("*"))
    status, out, err = run(capsys, "export", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(place.rglob("*")) == before


def test_a_file_that_fails_its_proof_is_not_kept(capsys, place, monkeypatch):
    monkeypatch.setattr(proof, "TOLERANCE_FP32", 1e-12)
    status, out, err = run(capsys, "export", "m.safetensors", "--out", "bad.onnx")
    assert (status, out) == (2, "")
    assert "bad.onnx does not reproduce the model" in err
    assert not list(place.glob("*bad*"))
    assert not list(place.glob(".bad*"))


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from xcit.cli.main import main; main(['export', '--help']); "
        "print([m for m in ('torch', 'onnx', 'openvino') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--attn-form" in done.stdout
