"""`xcit predict` on real files: what is printed, what is written, how it ends."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.inference.predictor import Prediction, Predictor
from xcit.models.folded_copy import folded_copy
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild", "dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint and photos: 0.png to 5.png, of which 2.png is no image."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=4)
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    save_checkpoint(model, folder / "m.safetensors", class_names=NAMES, preprocessing=cfg)
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "2.png").write_bytes(b"nothing of the kind")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = main(["predict", "--model", "m.safetensors", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected(**options):
    """Return what the Python API says, path by path."""
    predictions = Predictor("m.safetensors", device="cpu")("photos", **options)
    return {str(p.path): p for p in predictions}


# --- formats ----------------------------------------------------------------------------------------------------------


def test_table(capsys):
    status, out, err = run(capsys, "photos", "--top-k", "2")
    assert status == 1
    head, *lines = out.splitlines()
    assert head.split() == ["file", "rank", "probability", "index", "class"]
    assert len(lines) == 5 * 2
    want = expected(top_k=2)
    first, second = want["photos/0.png"].labels
    assert lines[0].split()[:5] == ["photos/0.png", "1", f"{100 * first.probability:.1f}", "%", str(first.index)]
    assert lines[0].endswith(f"  {first.name}")
    assert lines[1].split()[:3] == ["2", f"{100 * second.probability:.1f}", "%"]
    assert len({line.index(" %") for line in lines}) == 1  # aligned
    assert err.splitlines() == [
        f"xcit: {want['photos/2.png'].error}",
        "xcit: 1 of 6 images could not be predicted.",
    ]


def check_csv(text):
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["file", "rank", "index", "name", "probability", "error"]
    for path, prediction in expected(top_k=3).items():
        mine = [row for row in rows if row["file"] == path]
        if prediction.error:
            assert [(row["rank"], row["index"], row["error"]) for row in mine] == [("", "", prediction.error)]
            continue
        assert [int(row["rank"]) for row in mine] == [1, 2, 3]
        assert [(int(row["index"]), row["name"], row["error"]) for row in mine] == [
            (label.index, NAMES[label.index], "") for label in prediction.labels
        ]
        probabilities = [label.probability for label in prediction.labels]
        np.testing.assert_allclose([float(row["probability"]) for row in mine], probabilities, rtol=1e-5)


def check_objects(objects):
    want = expected(top_k=3)
    assert [each["file"] for each in objects] == list(want)
    for each in objects:
        prediction = want[each["file"]]
        assert each["error"] == prediction.error
        assert [(p["index"], p["name"]) for p in each["predictions"]] == [x[:2] for x in prediction.labels]
        np.testing.assert_allclose(
            [p["probability"] for p in each["predictions"]], [x.probability for x in prediction.labels], rtol=1e-5
        )


def test_csv_on_stdout_is_csv_alone(capsys):
    status, out, _ = run(capsys, "photos", "--top-k", "3", "--format", "csv")
    assert status == 1
    check_csv(out)


def test_json_on_stdout_is_json_alone(capsys):
    check_objects(json.loads(run(capsys, "photos", "--top-k", "3", "--format", "json")[1]))


def test_jsonl_on_stdout_is_one_object_a_line(capsys):
    check_objects(list(map(json.loads, run(capsys, "photos", "--top-k", "3", "--format", "jsonl")[1].splitlines())))


@pytest.mark.parametrize("batch_size", ["1", "2", "100"])
def test_batches_change_nothing(capsys, batch_size):
    check_objects(json.loads(run(capsys, "photos", "--top-k", "3", "--format", "json", "--batch-size", batch_size)[1]))


def test_folded_the_classes_are_the_same(capsys, monkeypatch):
    from xcit.inference import stream

    folded = []
    monkeypatch.setattr(stream, "folded_copy", lambda model: folded.append(model) or folded_copy(model))
    check_objects(json.loads(run(capsys, "photos", "--top-k", "3", "--format", "json", "--fold")[1]))
    assert len(folded) == 1


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_output_takes_its_format_from_its_ending(capsys, tmp_path, ending):
    status, out, _ = run(capsys, "photos", "--top-k", "3", "--output", str(tmp_path / f"o.{ending}"))
    assert (status, out) == (1, "")
    text = (tmp_path / f"o.{ending}").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == [f"o.{ending}"]
    if ending == "csv":
        check_csv(text)
    else:
        check_objects(json.loads(text) if ending == "json" else list(map(json.loads, text.splitlines())))


def test_a_format_that_is_named_wins_over_the_ending(capsys, tmp_path):
    run(capsys, "photos/0.png", "--output", str(tmp_path / "o.csv"), "--format", "json")
    assert len(json.loads((tmp_path / "o.csv").read_text())) == 1


def test_output_is_replaced_only_when_there_is_something(capsys, tmp_path, monkeypatch):
    (tmp_path / "o.csv").write_text("former")
    monkeypatch.setattr(Predictor, "stream", lambda *args: iter(()))
    run(capsys, "photos/0.png", "--output", str(tmp_path / "o.csv"))
    assert (tmp_path / "o.csv").read_text() == "former"
    assert [p.name for p in tmp_path.iterdir()] == ["o.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
@pytest.mark.parametrize("format", ["table", "csv", "json", "jsonl"])
def test_file_names_of_any_bytes(capsys, tmp_path, place, format):
    odd = tmp_path / os.fsdecode(b"\xff\n\xc3\xa9.png")
    odd.write_bytes((place / "photos" / "0.png").read_bytes())
    output = tmp_path / "o.txt"
    assert run(capsys, str(tmp_path), "--output", str(output), "--format", format, "--top-k", "1")[0] == 0
    written = output.read_bytes()
    if format == "csv":
        assert b"\xff\n\xc3\xa9.png" in written
    elif format == "table":
        assert len(written.splitlines()) == 2
    else:
        (each,) = json.loads(written) if format == "json" else [json.loads(written)]
        assert each["file"] == str(odd)


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_status_0_when_all_is_well(capsys):
    status, out, err = run(capsys, "photos/0.png", "photos/1.p*")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 1 + 2 * 4


def test_status_2_when_nothing_could_be_predicted(capsys):
    status, out, err = run(capsys, "photos/2.png", "missing.png")
    assert (status, out) == (2, "")
    assert "missing.png: there is no such file" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; it must be 1 or more."),
        (["--batch-size", "-4"], "--batch-size is -4; it must be 1 or more."),
        (["--top-k", "0"], "--top-k is 0; it must be 1 or more."),
        (["--image-size", "-1"], "--image-size is -1; it must be 1 or more"),
        (["--image-size", "8"], "image_size is 8 x 8; it must be at least one patch of 16 x 16."),
        (["--device", "gpu"], "The device is 'gpu'"),
        (["--output", "."], "--output is ., which is a folder"),
        (
            ["--output", "nowhere/o.csv"],
            "--output nowhere/o.csv cannot be written: No such file or directory (nowhere).",
        ),
        (["--model", "xcit_nano_12_p61"], "Unknown model 'xcit_nano_12_p61'. Did you mean 'xcit_nano_12_p16'"),
        (["--model", "missing.safetensors"], "missing.safetensors"),
        (["*.nothing"], "The pattern '*.nothing' matches nothing"),
    ],
)
def test_mistakes_cost_one_line_and_status_2(capsys, place, arguments, message):
    status, out, err = run(capsys, "photos/0.png", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(place.glob(".*.part"))


def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run(capsys, "photos/0.png", "--device", "cuda")
    assert status == 2
    assert err.startswith("xcit: The device 'cuda' is not available")
    assert len(err.splitlines()) == 1


def stopping(monkeypatch, error):
    """Let the third image bring an error."""
    stream = Predictor.stream

    def stopped(self, images, top_k):
        for number, prediction in enumerate(stream(self, images, top_k)):
            if number == 2:
                raise error
            yield prediction

    monkeypatch.setattr(Predictor, "stream", stopped)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_ctrl_c_keeps_what_there_is(capsys, tmp_path, monkeypatch, ending):
    stopping(monkeypatch, KeyboardInterrupt())
    status, out, err = run(capsys, "photos", "--output", str(tmp_path / f"o.{ending}"))
    assert (status, out) == (130, "")
    assert err == "xcit: interrupted; 2 of 6 images were done and are kept.\n"
    text = (tmp_path / f"o.{ending}").read_text()
    if ending == "json":
        assert [each["file"] for each in json.loads(text)] == ["photos/0.png", "photos/1.png"]
    elif ending == "jsonl":
        assert len(text.splitlines()) == 2
    else:
        assert {row["file"] for row in csv.DictReader(io.StringIO(text))} == {"photos/0.png", "photos/1.png"}


def test_an_error_on_the_way_keeps_what_there_is(capsys, monkeypatch):
    from xcit.errors import ConfigError

    stopping(monkeypatch, ConfigError("Out of memory."))
    status, out, err = run(capsys, "photos", "--format", "json")
    assert (status, err) == (2, "xcit: Out of memory.\n")
    assert len(json.loads(out)) == 2


def test_a_large_photo_brings_no_warning(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")  # more than the limit, less than twice as much
    assert run(capsys, str(tmp_path))[0] == 0


# --- in a process of its own ------------------------------------------------------------------------------------------


def test_the_command_itself(place):
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "xcit.cli.main",
        "predict",
        "photos",
        "--model",
        "m.safetensors",
    ]
    done = subprocess.run(
        [*command, "--format", "json", "--device", "cpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(json.loads(done.stdout)) == 6
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "torch" in imported
    assert not imported & {"timm", "lightning", "pytorch_lightning"}
    assert "Traceback" not in done.stderr


# --- the table on a terminal ------------------------------------------------------------------------------------------


def test_a_table_fits_its_terminal():
    from pathlib import Path

    from rich.cells import cell_len

    from xcit.cli.formats import TableWriter
    from xcit.inference.predictor import Label

    paths = [Path("folder" * 20, "0.png"), Path("写真" * 30 + ".png"), Path("b.png")]
    for width in (60, 80, 200):
        out = io.StringIO()
        writer = TableWriter(out, paths, width)
        for path in paths:
            writer.write(Prediction(path, [Label(3, "a class with quite a long name " * 3, 1.0)]))
        lines = out.getvalue().splitlines()
        assert all(cell_len(line) <= width for line in lines)
        assert ["0.png" in lines[1], ".png" in lines[2], lines[3].startswith("b.png ")] == [True] * 3
        assert all("100.0 %" in line for line in lines[1:])
