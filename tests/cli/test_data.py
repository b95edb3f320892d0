"""`xcit data`: what people and programs read, and the exit status."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from xcit.cli.data import data
from xcit.data.sources import open_data
from xcit.errors import ConfigError, DataError


def run(*arguments):
    return tyro.cli(data, prog="xcit data", args=list(map(str, arguments)))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "d"
    assert run("digits", "--out", out, "--image-size", 8) == 0
    return out


@pytest.fixture
def broken(digits, tmp_path):
    """A part of the digits with one of each fault."""
    root = tmp_path / "d"
    for part in ("train", "val"):
        for label in "012":
            for path in sorted((digits / part / label).iterdir())[:5]:
                target = root / part / label / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    first = sorted((root / "train" / "0").iterdir())
    first[0].write_bytes(b"")
    shutil.copy(first[1], root / "val" / "2" / "leak.png")
    (root / "train" / "ten").mkdir()
    (root / "val" / "3").mkdir()
    shutil.copy(
        digits / "val" / "3" / min(path.name for path in (digits / "val" / "3").iterdir()), root / "val" / "3" / "x.png"
    )
    return root


def test_digits_says_what_to_name_as_data(tmp_path, capsys):
    assert run("digits", "--out", tmp_path / "d", "--layout", "csv", "--image-size", 8) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'd' / 'digits.csv'}: 1,149 train, 288 val, 360 test\n"
    assert len(open_data(tmp_path / "d" / "digits.csv").train) == 1149
    with pytest.raises(DataError, match="is not empty"):
        run("digits", "--out", tmp_path / "d")
    assert run("digits", "--out", tmp_path / "d", "--overwrite", "--image-size", 8) == 0
    with pytest.raises(ConfigError, match="image_size is 3"):
        run("digits", "--out", tmp_path / "e", "--image-size", 3)


def test_a_clean_set(digits, capsys):
    assert run("check", digits) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["part", "images", "classes", "fewest", "most", "unreadable", "width", "height"]
    assert out[2].split() == ["train", "1,149", "10", "111", "117", "0", "8", "8"]
    assert "3        117   29    37" in out
    assert out[-1] == "Nothing is wrong."


def test_faults_are_named(broken, capsys):
    assert run("check", broken) == 1
    out = capsys.readouterr().out
    assert "Images that cannot be read (1)\n" in out
    assert "is empty (0 bytes)." in out
    assert "Images that are there more than once (1)\n  same file, ACROSS PARTS, DIFFERENT LABELS: train/0/" in out
    assert "val/2/leak.png (2)" in out
    assert "Classes that differ (1)\n  1 class in val but not in train: '3'.\n" in out
    assert "Left out, or odd (1)\n" in out
    assert "without an image: 'ten'. It is left out." in out
    assert out.endswith("Found: 1 unreadable image, 1 duplicate, 1 class difference, 1 note.\n")


def test_json(broken, digits, capsys):
    assert run("check", broken, "--format", "json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["clean"] is False
    assert report["parts"][0]["num_unreadable"] == 1
    assert report["duplicates"][0]["places"][1] == {"part": "val", "name": "val/2/leak.png", "labels": ["2"]}
    assert run("check", digits, "--format", "json", "--layout", "folder") == 0
    assert json.loads(capsys.readouterr().out)["clean"] is True


def test_long_lists_are_cut(tmp_path, capsys):
    for i in range(70):
        (tmp_path / f"c{i:02d}").mkdir()
        (tmp_path / f"c{i:02d}" / "x.png").write_bytes(b"?")
    assert run("check", tmp_path) == 1
    out = capsys.readouterr().out
    assert "Images of each class (the first 60 of 70)" in out
    assert "  and 50 more; --format json lists them all" in out


def test_names_that_no_terminal_can_show(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(name.encode())
    try:
        (tmp_path / "a" / "x.png").rename(tmp_path / "a" / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert run("check", tmp_path) == 1
    assert r"\udcff.png: is not an image" in capsys.readouterr().out


def test_the_documented_output_is_real(tmp_path, monkeypatch, capsys):
    """docs/data.md shows a check of the digits after these seven faults."""
    monkeypatch.chdir(tmp_path)
    run("digits", "--out", "digits")
    root = Path("digits")
    first = {label: min((root / "train" / label).iterdir()) for label in "3457"}
    first["3"].write_bytes(b"")
    first["4"].write_bytes(first["4"].read_bytes()[:90])
    shutil.copy(first["5"], root / "test" / "5" / "copy.png")
    shutil.copy(first["7"], root / "train" / "1")
    (root / "train" / "ten").mkdir()
    (root / "val" / "9").rename(root / "val" / "nine")
    (root / "train" / "6" / "notes.txt").write_text("hi")
    capsys.readouterr()
    assert run("check", "digits") == 1
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    block = document.split("```text\ndigits\npart")[1].split("```")[0]
    assert ["digits", *f"part{block}".splitlines()] == shown


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="is empty; it must hold one folder"):
        run("check", tmp_path)
    with pytest.raises(SystemExit):
        run("check")
    with pytest.raises(SystemExit):
        run("chekc", tmp_path)


def test_help_names_every_option(capsys):
    for verb, options in (("check", ["--layout", "--format"]), ("digits", ["--out", "--image-size", "--overwrite"])):
        with pytest.raises(SystemExit) as end:
            run(verb, "--help")
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in options)
        assert "--no-" not in shown
        assert "--status" not in shown


def test_the_verbs_file_imports_nothing_heavy():
    code = "import sys, xcit.cli.data; print([m for m in ('torch', 'numpy', 'PIL', 'rich.table') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_check_needs_no_torch(digits):
    """Looking at a million files should not wait for torch, nor need scikit-learn."""
    code = (
        "import sys, xcit.data.check as c; c.check_data(sys.argv[1]);"
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, digits], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
