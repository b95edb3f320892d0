"""`xcit segment` on real files: what is printed and written, what the label maps hold, how it ends."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli import main as command
from xcit.cli.segmentation_files import label_png
from xcit.data.mask_files import read_classes, read_mask
from xcit.errors import ConfigError
from xcit.inference import segmenter as inference
from xcit.inference.segmenter import Segmenter
from xcit.models.segmenters import create_segmenter, save_segmenter
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT
from xcit.report.segmentations import draw_segmentation

NAMES = ["ant", "bee", "cat, wild"]
COLOURS = [[10, 20, 30], [200, 40, 40], [40, 200, 40]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a segmenter and photos: 0.png to 4.png, of which 2.png is no image."""
    folder = tmp_path_factory.mktemp("segment")
    torch.manual_seed(0)
    model = create_segmenter(
        "xcit_nano_12_p16", head="sem_fpn", num_classes=3, depth=4, channels=16, image_size=64, max_size=128
    )
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    save_segmenter(model, folder / "s.safetensors", class_names=NAMES, palette=COLOURS)
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        noise.resize((100 + 20 * i, 80)).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "2.png").write_bytes(b"nothing of the kind")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = command.main(["segment", "--model", "s.safetensors", "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def expected(place):
    """What the Python API says, by path."""
    seen = Segmenter(place / "s.safetensors", device="cpu")([place / "photos"])
    return {f"photos/{each.path.name}": each for each in seen}


def expected_error(expected):
    (error,) = [seen.error for seen in expected.values() if seen.error]
    return "photos/2.png" + error.rpartition("photos/2.png")[2]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_table(capsys, expected):
    status, out, err = run(capsys, "photos")
    assert status == 1
    head, *lines = out.splitlines()
    assert head.split() == ["file", "area", "pixels", "class"]
    want = [(path, area, i) for path, seen in expected.items() for i, area in enumerate(seen.areas())]
    assert len(lines) == len(want) > 5
    for line, (path, area, i) in zip(lines, want, strict=True):
        cells = line.split()
        if i == 0:
            assert cells.pop(0) == path
        assert cells[:3] == [f"{100 * area.share:.1f}", "%", f"{area.num_pixels:,}"]
        assert line.endswith(f"  {area.name}")
    assert err.splitlines() == [f"xcit: {expected_error(expected)}", "xcit: 1 of 5 images could not be looked at."]


def test_json_on_stdout_is_json_alone(capsys, expected):
    status, out, _ = run(capsys, "photos", "--format", "json")
    objects = json.loads(out)
    assert status == 1
    assert [each["file"] for each in objects] == list(expected)
    for each, seen in zip(objects, expected.values(), strict=True):
        assert each["areas"] == seen.to_dict()["areas"]
        assert (each["height"], each["width"]) == (seen.size if seen.error is None else (None, None))
        assert (each["error"] is None) == (seen.error is None)


# --- files ------------------------------------------------------------------------------------------------------------


def check_areas(path, expected):
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert list(rows[0]) == ["file", "label", "name", "pixels", "share", "error"]
    for name, seen in expected.items():
        mine = [row for row in rows if row["file"] == name]
        if seen.error:
            assert [(row["label"], row["error"]) for row in mine] == [("", expected_error(expected))]
            continue
        assert [(int(row["label"]), row["name"], int(row["pixels"])) for row in mine] == [
            area[:3] for area in seen.areas()
        ]
        assert sum(float(row["share"]) for row in mine) == pytest.approx(1, abs=1e-5)


def test_maps_overlays_and_areas(capsys, tmp_path, expected):
    status, _, _ = run(capsys, "photos", "--out", tmp_path / "o")
    assert status == 1
    names = [f"{i}_{kind}.png" for i in (0, 1, 3, 4) for kind in ("classes", "overlay")]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == sorted([*names, "areas.csv"])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    coding = read_classes(tmp_path / "classes.txt").coding
    for i in (0, 1, 3, 4):
        seen = expected[f"photos/{i}.png"]
        with Image.open(tmp_path / "o" / f"{i}_classes.png") as image:
            assert image.mode == "P"
            assert (np.asarray(image) == seen.labels).all()
            assert image.getpalette()[:9] == np.ravel(COLOURS).tolist()
            assert {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()} <= set(
                map(tuple, COLOURS)
            )
        assert (read_mask(tmp_path / "o" / f"{i}_classes.png", coding) == seen.labels).all()
        with Image.open(f"photos/{i}.png") as image, Image.open(tmp_path / "o" / f"{i}_overlay.png") as drawn:
            want = draw_segmentation(image.convert("RGB"), seen.labels, NAMES, np.array(COLOURS))
            assert (np.asarray(drawn) == np.asarray(want)).all()
    check_areas(tmp_path / "o" / "areas.csv", expected)
    status, out, err = run(capsys, "photos", "--out", tmp_path / "o")
    assert (status, out) == (2, "")
    assert "0_classes.png is there already; name another --out, or replace it with --overwrite." in err
    assert run(capsys, "photos", "--out", tmp_path / "o", "--overwrite")[0] == 1


def test_areas_elsewhere(capsys, tmp_path, expected):
    assert run(capsys, "photos", "--csv", tmp_path / "new" / "a.csv")[0] == 1
    check_areas(tmp_path / "new" / "a.csv", expected)
    assert run(capsys, "photos", "--csv", tmp_path / "b.csv", "--out", tmp_path / "o")[0] == 1
    check_areas(tmp_path / "b.csv", expected)
    assert not (tmp_path / "o" / "areas.csv").exists()


def test_a_former_table_is_not_replaced_unasked(capsys, tmp_path):
    (tmp_path / "areas.csv").write_text("mine")
    status, _, err = run(capsys, "photos/0.png", "--out", tmp_path)
    assert status == 2
    assert "areas.csv is there already" in err
    assert [p.name for p in tmp_path.iterdir()] == ["areas.csv"]


def test_inputs_are_never_replaced(capsys, tmp_path, place):
    for name in ("x.png", "x_overlay.png"):
        (tmp_path / name).write_bytes((place / "photos" / "0.png").read_bytes())
    status, _, err = run(capsys, tmp_path, "--out", tmp_path, "--overwrite")
    assert status == 2
    assert "x_overlay.png would be replaced, and is an input; name another --out." in err


def test_files_of_several_folders_keep_them(capsys, tmp_path, place):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes((place / "photos" / "0.png").read_bytes())
    assert run(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o", "--batch-size", 2)[0] == 0
    assert (tmp_path / "o" / "a" / "x_classes.png").exists()
    assert (tmp_path / "o" / "b" / "x_overlay.png").exists()


def test_maps_of_many_classes_have_16_bits(tmp_path):
    labels = np.arange(300, dtype=np.uint16).reshape(15, 20)
    (tmp_path / "m.png").write_bytes(label_png(labels, np.zeros((300, 3), np.uint8)))
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "I;16"
        assert (np.asarray(image) == labels).all()


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_reach_the_segmenter(capsys, monkeypatch):
    given = {}

    class Told(Segmenter):
        def __init__(self, model, **options):
            given.update(options)
            super().__init__(model, **options)

    monkeypatch.setattr(inference, "Segmenter", Told)
    options = ("--scales", "0.5, 1", "--flip", "--mode", "slide", "--window", 64, "--stride", 32, "--max-size", 256)
    assert run(capsys, "photos/0.png", *options, "--batch-size", 2)[0] == 0
    assert given == {
        "device": "cpu",
        "mode": "slide",
        "window": 64,
        "stride": 32,
        "scales": (0.5, 1.0),
        "flip": True,
        "image_size": None,
        "max_size": 256,
        "native": False,
        "batch_size": 2,
    }


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_status_2_when_no_image_could_be_looked_at(capsys, tmp_path):
    status, out, err = run(capsys, "photos/2.png", "missing.png", "--out", tmp_path / "o")
    assert (status, out) == (2, "")
    assert "missing.png: there is no such file" in err
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["areas.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size is 0; it must be 1 or more."),
        (["--image-size", "8"], "image_size is 8; it must be 32 or more."),
        (["--scales", "1,x"], "--scales is '1,x'; it must be numbers with commas, such as 0.5,1,1.5."),
        (["--scales", "0"], "scales has 0.0; each must be above 0 and at most 8."),
        (["--window", "100"], "window is 100; it must be a multiple of 32 px, such as 96."),
        (["--mode", "whole", "--window", "64"], "window and stride are for the modes 'slide' and 'auto'"),
        (["--native", "--image-size", "64"], "native keeps each image's own size"),
        (["--device", "gpu"], "The device is 'gpu'"),
        (["--csv", "r.txt"], "--csv is r.txt; its name must end in .csv."),
        (["--overwrite"], "--overwrite is for --out only"),
        (["--out", "photos/0.png"], "--out is photos/0.png, which is a file; name a folder."),
        (["--model", "c.safetensors"], "c.safetensors is a classifier or a backbone, not a segmenter"),
        (["--model", "missing.safetensors"], "missing.safetensors"),
        (["--model", "upernet_xcit_smal_12_p16"], "Unknown model 'upernet_xcit_smal_12_p16'. Did you mean"),
        (["*.nothing"], "The pattern '*.nothing' matches nothing"),
        (["empty"], "The folder 'empty' holds no image"),
    ],
)
def test_mistakes_cost_one_line_and_status_2(capsys, place, arguments, message):
    (place / "empty").mkdir(exist_ok=True)
    if not (place / "c.safetensors").exists():
        save_checkpoint(XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3), place / "c.safetensors")
    status, out, err = run(capsys, "photos/0.png", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(place.glob(".*partial*"))


def stopping(monkeypatch, error, after=2):
    """Let an image bring an error."""
    stream = Segmenter.stream

    def stopped(self, images, **options):
        for number, seen in enumerate(stream(self, images, **options)):
            if number == after:
                raise error
            yield seen

    monkeypatch.setattr(Segmenter, "stream", stopped)


@pytest.mark.parametrize(("error", "ends"), [(KeyboardInterrupt(), 130), (ConfigError("Out of memory."), 2)])
def test_what_was_done_is_kept(capsys, tmp_path, monkeypatch, error, ends):
    stopping(monkeypatch, error)
    status, out, err = run(capsys, "photos", "--out", tmp_path / "o", "--format", "json")
    assert status == ends
    assert "2 of 5 images were done and are kept." in err
    assert ("interrupted" in err) == (ends == 130)
    assert [each["file"] for each in json.loads(out)] == ["photos/0.png", "photos/1.png"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "o" / "areas.csv").read_text())))
    assert {row["file"] for row in rows} == {"photos/0.png", "photos/1.png"}
    assert len(list((tmp_path / "o").iterdir())) == 5


def test_nothing_done_leaves_former_files(capsys, tmp_path, monkeypatch):
    stopping(monkeypatch, KeyboardInterrupt(), after=0)
    (tmp_path / "a.csv").write_text("former")
    assert run(capsys, "photos", "--csv", tmp_path / "a.csv")[0] == 130
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.csv", "former")]


def test_a_picture_that_is_gone_meanwhile(capsys, tmp_path, monkeypatch, place):
    (tmp_path / "a.png").write_bytes((place / "photos" / "0.png").read_bytes())
    stream = Segmenter.stream

    def gone(self, images, **options):
        for seen in stream(self, images, **options):
            (tmp_path / "a.png").unlink()
            yield seen

    monkeypatch.setattr(Segmenter, "stream", gone)
    status, _, err = run(capsys, tmp_path / "a.png", "--out", tmp_path / "o")
    assert status == 2
    assert "a.png: there is no such file" in err


def test_a_large_photo_brings_no_warning(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")  # more than the limit, less than twice as much
    assert run(capsys, tmp_path)[0] == 0


def test_importing_the_verb_is_light():
    code = "import sys, xcit.cli.segment; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
