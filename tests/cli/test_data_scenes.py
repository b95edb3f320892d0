"""`xcit data scenes`: the files it writes, the line it prints, and what it refuses."""

import io
import json
import sys

import pytest
import tyro

from xcit.cli.data_scenes import scenes
from xcit.errors import ConfigError, DataError

SMALL = ("--size", 64, 80, "--height", 12, 40, "--num-digits", 2, 3, "--max-overlap", 0.2, "--max-degrees", 0)


def run(*arguments):
    return tyro.cli(scenes, prog="xcit data scenes", args=list(map(str, arguments)))


def test_one_line_says_what_was_written(tmp_path, capsys):
    out = tmp_path / "s"
    assert run("--out", out, "--num", 5, "--num-test", 2, "--seed", 3, *SMALL) == 0
    written, errors = capsys.readouterr()
    numbers = {}
    for part, num in (("train", 5), ("test", 2)):
        content = json.loads((out / part / "annotations.json").read_text())
        assert [(image["width"], image["height"]) for image in content["images"]] == [(80, 64)] * num
        numbers[part] = len(content["annotations"])
        assert 2 * num <= numbers[part] <= 3 * num
    assert (
        written
        == f"{out}: 5 train scenes with {numbers['train']} digits, 2 test scenes with {numbers['test']} digits\n"
    )
    assert errors == ""


def test_defaults_are_those_of_the_task(tmp_path, capsys):
    assert run("--out", tmp_path / "s", "--num", 2, "--num-test", 1) == 0
    content = json.loads((tmp_path / "s" / "train" / "annotations.json").read_text())
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (320, 240)
    before = (tmp_path / "s" / "train" / "annotations.json").read_bytes()
    assert run("--out", tmp_path / "s", "--num", 2, "--num-test", 1, "--overwrite", "--seed", 0) == 0
    assert (tmp_path / "s" / "train" / "annotations.json").read_bytes() == before
    assert run("--out", tmp_path / "s", "--num", 2, "--num-test", 1, "--overwrite", "--seed", 1) == 0
    assert (tmp_path / "s" / "train" / "annotations.json").read_bytes() != before


def test_a_bar_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    run("--out", tmp_path / "s", "--num", 3, "--num-test", 0, *SMALL)
    assert "writing" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "writing" not in capsys.readouterr().out


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"1,000,000 scenes to train on, not -1.*test scenes, not -2"):
        run("--out", tmp_path / "s", "--num", -1, "--num-test", -2)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="with --overwrite"):
        run("--out", tmp_path, "--num", 1, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
