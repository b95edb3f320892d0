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


@pytest.fixture(scope="module")
def many(place):
    """A folder in which most images are there several times."""
    (place / "many").mkdir()
    for i in range(30):
        picture(i).save(place / "many" / f"{i:02d}.png")
        shutil.copy(place / "many" / f"{i:02d}.png", place / "many" / f"{i:02d} (1).png")
        if i < 20:
            picture(i).save(place / "many" / f"{i:02d} near.jpg", quality=90)
    for i in range(40):
        shutil.copy(place / "many" / "29.png", place / "many" / f"29 ({i + 2}).png")
    return "many"


def test_a_folder_full_of_copies_is_no_fault_of_the_model(capsys, many):
    _, out, err = run(capsys, many, *MODEL, "--format", "json")
    (line,) = err.splitlines()
    assert " of copies made of 50 images are found" in line
    assert "80 % of these images are joined with another of all 120, 80 % with a likely copy" in line
    clusters = json.loads(out)["clusters"]
    assert sorted(map(len, clusters)) == [2] * 9 + [3] * 20 + [42]
    kept = {member["file"] for cluster in clusters for member in cluster if member["keep"]}
    assert kept == {f"many/{i:02d}.png" for i in range(30)}  # not "00 (1).png", which comes first


def test_a_long_table_is_cut_and_says_so(capsys, many, tmp_path):
    _, out, _ = run(capsys, many, *MODEL, "--output", tmp_path / "o.csv")
    lines = out.splitlines()
    assert lines[0].startswith("30 clusters of 120 images, among 120 (")
    rows = [line for line in lines if line.split()[:1] and line.split()[0].isdecimal() and "clusters" not in line]
    assert len([row for row in rows if "many/" in row]) + 1 == len(rows) <= 60
    assert sum("... 37 more" in row for row in rows) == 1
    shown = len(rows) - 1
    whole = 30 - len({row.split()[0] for row in rows})
    assert lines[-1].startswith(f"{120 - shown} of the 120 images, {whole} whole clusters of them, are not shown; ")
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 121


def test_copies_of_one_image_only(capsys, place):
    (place / "one").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        picture(0).save(place / "one" / name)
    status, out, _ = run(capsys, "one", *MODEL)
    assert status == 0
    assert out.startswith("1 cluster of 2 images, among 2 (")
    (place / "one" / "b.png").unlink()
    assert run(capsys, "one", *MODEL)[1] == "No copies among 1 image (threshold 1.0000).\n"


def test_a_weak_model_is_told_with_a_way_on(capsys, place):
    (place / "alike").mkdir()
    for i in range(20):
        pixels = np.full((40, 40, 3), 120, np.uint8)
        pixels[20, 20] = i
        Image.fromarray(pixels).save(place / "alike" / f"{i}.png")
    _, _, err = run(capsys, "alike", *MODEL, "--format", "csv")
    assert "Either this model does not tell copies" in err
    assert "or most images have many near copies" in err
    assert "--threshold 0.9" in err or "--threshold 1.0" in err


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
        (["nowhere", "--model", "gone.safetensors"], "xcit: nowhere: there is no such file."),
    ],
)
def test_mistakes(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
