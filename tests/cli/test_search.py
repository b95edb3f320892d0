"""`xcit search` on real files: what is found, what is written, what is refused."""

import csv
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.inference.features import FeatureExtractor
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, twelve photos and their index, and a folder of queries: a copy, another picture, no image."""
    folder = tmp_path_factory.mktemp("search")
    cfg = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    for seed, name in enumerate(("m", "n")):
        torch.manual_seed(seed)
        model = XCiT(embed_dim=16, depth=1, num_heads=2, patch_size=8, num_classes=0)
        save_checkpoint(model, folder / f"{name}.safetensors", preprocessing=cfg)
    for name in ("photos", "queries"):
        (folder / name).mkdir()
    for i in range(12):
        picture(i).save(folder / "photos" / f"{i:02d}.png")
    picture(7).save(folder / "queries" / "copy.jpg", quality=90)
    picture(50).save(folder / "queries" / "other.png")
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    try:
        assert (
            main(["index", "photos", "-o", "a.index", "--model", "m.safetensors", "--pool", "avg", "--device", "cpu"])
            == 0
        )
    finally:
        os.chdir(before)
    return folder


def picture(seed):
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = main(["search", *map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected(query, k):
    extract = FeatureExtractor("m.safetensors", device="cpu", pool="avg")
    x, q = (v.astype(float) for v in (extract("photos"), extract(query)[0]))
    cosines = x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q)
    return [(f"photos/{i:02d}.png", cosines[i]) for i in np.argsort(-cosines)[:k]]


def test_table(capsys):
    status, out, err = run(capsys, "queries/copy.jpg", "--index", "a.index", "--top-k", "3")
    assert (status, err) == (0, "")
    title, head, *lines = out.rstrip("\n").splitlines()
    assert title == "queries/copy.jpg"
    assert head.split() == ["rank", "similarity", "file"]
    assert [line.split() for line in lines if line] == [
        [str(rank), f"{cosine:.4f}", name] for rank, (name, cosine) in enumerate(expected("queries/copy.jpg", 3), 1)
    ]
    assert lines[0].endswith("photos/07.png")


def test_csv_and_json_say_the_same(capsys, tmp_path):
    csv_file, json_file = tmp_path / "o.csv", tmp_path / "o.json"
    status, out, _ = run(capsys, "queries", "--index", "a.index", "--format", "csv", "--output", json_file)
    assert status == 0
    _, json_out, _ = run(capsys, "queries", "--index", "a.index", "--format", "json", "--output", csv_file)
    assert csv_file.read_text() == out
    assert json_file.read_text() == json_out
    rows = list(csv.DictReader(io.StringIO(out)))
    objects = json.loads(json_out)
    assert [each["query"] for each in objects] == ["queries/copy.jpg", "queries/other.png"]
    flat = [
        (each["query"], str(hit["rank"]), hit["file"], hit["similarity"]) for each in objects for hit in each["results"]
    ]
    assert flat == [(row["query"], row["rank"], row["file"], float(row["similarity"])) for row in rows]
    assert len(rows) == 20


def test_a_sheet(capsys, tmp_path):
    sheet = tmp_path / "s.png"
    (tmp_path / "x").mkdir()
    status, _, err = run(capsys, "queries", "--index", "a.index", "--top-k", "3", "--sheet", sheet)
    assert status == 0
    assert err == f"xcit: {sheet} is written.\n"
    with Image.open(sheet) as image:
        assert image.width > 4 * 184
        assert len(image.getcolors(1 << 24)) > 500


def test_the_index_works_from_another_folder(capsys, tmp_path, monkeypatch, place):
    """Neither the model nor the photos have to lie where the command is run."""
    monkeypatch.chdir(tmp_path)
    sheet = tmp_path / "s.png"
    status, out, _ = run(
        capsys, place / "queries/copy.jpg", "--index", place / "a.index", "--top-k", "1", "--sheet", sheet
    )
    assert status == 0
    assert out.splitlines()[2].endswith("photos/07.png")
    with Image.open(sheet) as image:
        colours = {image.getpixel((x, 150)) for x in range(250, 400)}
    assert len(colours) > 20  # a picture, not the grey of a file that is not there


def test_another_model_is_refused(capsys):
    status, out, err = run(capsys, "queries/copy.jpg", "--index", "a.index", "--model", "n.safetensors")
    assert (status, out) == (2, "")
    assert "a.index was made with m.safetensors (pool avg, fingerprint " in err
    assert "not with n.safetensors (pool avg, fingerprint " in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "asked", "pool"),
    [
        ({"in_chans": 1}, ["--pool", "avg"], "avg"),
        ({"variant": "avg_pool"}, ["--pool", "token"], "token"),
        ({"patch_size": 16}, ["--pool", "avg", "--scales", "0.5"], "avg"),  # 8 px, half a patch
    ],
)
def test_a_model_that_the_settings_do_not_fit_is_refused_in_the_same_words(capsys, tmp_path, options, asked, pool):
    """It cannot even be asked as the index's was; still it is another model, which is what matters."""
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    if "in_chans" in options:
        cfg |= {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    model = XCiT(**{"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "num_classes": 0} | options)
    other = save_checkpoint(model, tmp_path / "other.safetensors", preprocessing=cfg)
    index = tmp_path / "b.index"
    assert main(["index", "photos", "-o", str(index), "--model", "m.safetensors", *asked, "--device", "cpu"]) == 0
    capsys.readouterr()
    status, out, err = run(capsys, "queries/copy.jpg", "--index", index, "--model", other)
    assert (status, out) == (2, "")
    assert f"{index} was made with m.safetensors (pool {pool}, fingerprint " in err
    assert f"not with {other} (pool avg, fingerprint " in err
    assert "preprocessing" in err.partition("they differ in")[2]
    assert "Their features cannot be compared" in err
    assert len(err.splitlines()) == 1


def test_a_mistake_that_is_not_the_models_is_told_as_such(capsys):
    status, _, err = run(capsys, "queries/copy.jpg", "--index", "a.index", "--model", "photos")
    assert status == 2
    assert "photos is a folder" in err


def test_the_first_of_exact_copies_comes_first_whatever_top_k_is(capsys, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(40):
        picture(i % 3).save(folder / f"{i:02d}.png")
    index = tmp_path / "c.index"
    assert main(["index", str(folder), "-o", str(index), "--model", "m.safetensors", "--device", "cpu"]) == 0
    capsys.readouterr()
    for k in (1, 2, 5, 14, 40):
        _, out, _ = run(capsys, folder / "07.png", "--index", index, "--top-k", k, "--format", "csv")
        found = [os.path.basename(row["file"]) for row in csv.DictReader(io.StringIO(out))]  # noqa: PTH119
        assert found[:14] == [f"{i:02d}.png" for i in range(1, 40, 3)][: min(k, 14)] + found[13:14] * (k > 13)


def test_the_same_model_elsewhere_is_taken(capsys, tmp_path, place):
    other = tmp_path / "copy.safetensors"
    other.write_bytes((place / "m.safetensors").read_bytes())
    assert run(capsys, "queries/copy.jpg", "--index", "a.index", "--model", other)[0] == 0


def test_a_model_that_was_trained_on_meanwhile_is_refused(capsys, tmp_path, place, monkeypatch):
    for name in ("m.safetensors", "a.index"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.safetensors").write_bytes((place / "n.safetensors").read_bytes())
    status, _, err = run(capsys, place / "queries/copy.jpg", "--index", "a.index")
    assert status == 2
    assert "Their features cannot be compared" in err


def test_broken_queries(capsys, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    status, out, err = run(capsys, "queries/copy.jpg", bad, "--index", "a.index", "--top-k", "1")
    assert status == 1
    assert "photos/07.png" in out
    assert err.splitlines()[0] == f"xcit: {bad}: is empty (0 bytes)."
    status, _, err = run(capsys, bad, "--index", "a.index")
    assert status == 2
    assert err == f"xcit: {bad}: is empty (0 bytes).\n"
    other = tmp_path / "other.png"
    other.write_bytes(b"")
    status, _, err = run(capsys, bad, other, "--index", "a.index")
    assert status == 2
    assert err.splitlines() == [
        f"xcit: {bad}: is empty (0 bytes).",
        f"xcit: {other}: is empty (0 bytes).",
        "xcit: None of the 2 images can be read.",
    ]
    status, _, err = run(capsys, "nosuch.png", "--index", "gone.index")
    assert (status, err) == (2, "xcit: nosuch.png: there is no such file.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "gone.index"], "there is no such index"),
        (["--index", "m.safetensors"], "is not an index of xcit"),
        (["--index", "a.index", "--top-k", "0"], "--top-k is 0"),
        (["--index", "a.index", "--output", "o.xml"], "--output is o.xml; its name must end in .csv or .json"),
        (["--index", "a.index", "--sheet", "s.jpg"], "--sheet is s.jpg; its name must end in .png"),
        (["--index", "a.index", "--sheet", "m.safetensors/s.png"], "is not a folder"),
    ],
)
def test_mistakes(capsys, arguments, message):
    status, out, err = run(capsys, "queries/copy.jpg", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_python_of_the_document_runs(capsys, tmp_path, monkeypatch, place):
    """As it stands there, but for the model, whose weights are not at hand."""
    text = (Path(__file__).parents[2] / "docs" / "retrieval.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert '"dino_xcit_small_12_p16"' in code
    model = str(place / "m.safetensors")
    arguments = ["embed", str(place / "photos"), "-o", str(tmp_path / "features.parquet"), "--model", model]
    assert main([*arguments, "--device", "cpu"]) == 0
    picture(7).save(tmp_path / "query.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names = {}
    exec(compile(code.replace("dino_xcit_small_12_p16", model), "docs/retrieval.md", "exec"), names)
    assert len(names["hits"].positions[0]) == 5
    assert os.path.basename(names["table"].paths[names["hits"].positions[0][0]]) == "07.png"  # noqa: PTH119
    assert "07.png" in capsys.readouterr().out
