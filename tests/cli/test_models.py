"""`xcit models` against the facts of the released models."""

import pytest

from xcit.cli.main import main


def rows(capsys, *arguments):
    assert main(["models", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_everything(capsys):
    lines = rows(capsys)
    assert "Architectures (14)" in lines
    assert "Released weights (46)" in lines  # 42 classifiers, 4 DINO backbones
    assert sum(line.startswith(("xcit_", "dino_")) for line in lines) == 60


def test_the_figures_of_one(capsys):
    (line,) = [line for line in rows(capsys, "xcit_small_12_p16_384_dist") if line.startswith("xcit_")]
    assert line.split() == ["xcit_small_12_p16_384_dist", "26.3", "M", "14.14", "384", "84.7", "distilled"]
    (line,) = [line for line in rows(capsys, "dino*small_12_p8*") if line.startswith("dino_")]
    assert line.split()[3:6] == ["18.69", "224", "79.2"]


@pytest.mark.parametrize(
    ("pattern", "count"), [("nano", 2 + 6), ("*_384_dist", 14), ("nano*dist", 4), ("xcit_large_24_p8", 1), ("dino", 4)]
)
def test_patterns(capsys, pattern, count):
    lines = rows(capsys, pattern)
    assert sum(line.startswith(("xcit_", "dino_")) for line in lines) == count


def test_no_colours_outside_a_terminal(capsys):
    assert "\x1b" not in "\n".join(rows(capsys, "nano"))


def test_nothing_matches(capsys):
    assert main(["models", "xcit_smal_12_p16"]) == 2
    assert "Did you mean 'xcit_small_12_p16'" in capsys.readouterr().err
