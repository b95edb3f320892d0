"""`xcit duplicates` on real files."""

import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, sixteen photos with an exact and a near copy, and a test folder with one leak."""
    folder = tmp_path_factory.mktemp("twice")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, patch_size=8, num_classes=0, use_pos=False)
    save_checkpoint(model, folder / "m.safetensors", preprocessing=cfg)
    for name in ("photos", "test"):
        (folder / name).mkdir()
    for i in range(16):
        picture(i).save(folder / "photos" / f"{i:02d}.png")
        picture(100 + i).save(folder / "test" / f"{i:02d}.png")
    shutil.copy(folder / "photos" / "03.png", folder / "photos" / "again.png")
    picture(5).save(folder / "photos" / "near.jpg", quality=60)
    picture(9).save(folder / "test" / "leak.jpg", quality=60)
    return folder


def picture(seed):
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((60, 48), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = main(["duplicates", *map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


MODEL = ("--model", "m.safetensors", "--pool", "gem")


def test_exact_and_near_copies(capsys, tmp_path):
    sheet, output = tmp_path / "s.png", tmp_path / "o.json"
    status, out, err = run(capsys, "photos", *MODEL, "--format", "csv", "--sheet", sheet, "--output", output)
    assert status == 0
    assert err.startswith("xcit: threshold 0.")
    rows = list(csv.DictReader(io.StringIO(out)))
    clusters = {}
    for row in rows:
        clusters.setdefault(row["cluster"], []).append(row)
    found = {frozenset(row["file"] for row in members): members for members in clusters.values()}
    exact = found[frozenset({"photos/03.png", "photos/again.png"})]
    assert [row["copy"] for row in exact] == ["exact", "exact"]
    assert [float(row["similarity"]) for row in exact] == [1.0, 1.0]
    near = found[frozenset({"photos/05.png", "photos/near.jpg"})]
    assert [row["copy"] for row in near] == ["near", "near"]
    assert all([row["keep"] for row in members].count("yes") == 1 for members in found.values())
    data = json.loads(output.read_text())
    assert data["num_images"] == 18
    assert [[member["file"] for member in cluster] for cluster in data["clusters"]] == [
        [row["file"] for row in members] for members in clusters.values()
    ]
    with Image.open(sheet) as image:
        assert len(image.getcolors(1 << 24)) > 500


def test_what_could_go_is_listed_and_stays(capsys, place):
    before = sorted(os.listdir("photos"))  # noqa: PTH208
    _, out, _ = run(capsys, "photos", *MODEL, "--threshold", "1", "--list-removable")
    larger = max(("03.png", "again.png"), key=lambda name: (place / "photos" / name).stat().st_size)
    assert larger == "03.png"  # equal sizes: the first is kept
    assert out.splitlines() == ["photos/again.png"]
    assert sorted(os.listdir("photos")) == before  # noqa: PTH208


def test_leaks_between_two_folders(capsys):
    _, out, _ = run(capsys, "photos", *MODEL, "--against", "test", "--format", "csv", "--threshold", "0.995")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["in"], row["file"]) for row in sorted(rows, key=lambda row: row["in"])] == [
        ("other", "test/leak.jpg"),
        ("this", "photos/09.png"),
    ]  # the copies within photos are no leaks
    _, out, _ = run(capsys, "photos", *MODEL, "--against", "test", "--threshold", "0.995", "--list-removable")
    assert out == "photos/09.png\n"


def test_features_of_a_file_give_the_same(capsys, tmp_path):
    file = tmp_path / "f.parquet"
    assert main(["embed", "photos", "-o", str(file), *MODEL, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert run(capsys, file, "--format", "json")[1] == run(capsys, "photos", *MODEL, "--format", "json")[1]


def test_no_copies(capsys, tmp_path):
    status, out, err = run(capsys, "test", *MODEL, "--threshold", "1", "--sheet", tmp_path / "s.png")
    assert (status, out) == (0, "No copies among 17 images (threshold 1.0000).\n")
    assert "there is nothing to draw" in err
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos"], "--model is missing"),
        (["photos", *MODEL, "--threshold", "2"], "--threshold is 2; it must be auto, or more than -1"),
        (["photos", *MODEL, "--threshold", "high"], "--threshold is high"),
        (["photos", *MODEL, "--against", "photos"], "18 files are in photos as well as in photos"),
        (["gone", *MODEL], "None of the 1 images can be read"),
    ],
)
def test_mistakes(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
