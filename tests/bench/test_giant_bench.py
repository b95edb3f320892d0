"""The measurements of giant images and of tiles, from start to row, table and picture, at sizes that take seconds."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from xcit.bench import giant, results, tiling
from xcit.bench.giant import GiantCase
from xcit.data.digits import digit_splits
from xcit.data.large_image import open_large_image
from xcit.errors import BackendError

linux = pytest.mark.skipif(sys.platform != "linux", reason="the system's count is read from /proc")


@linux
def test_cases_become_rows_tables_and_a_picture(tmp_path, capsys) -> None:
    assert "Not measured yet" in giant.table(tmp_path)
    cases = [
        GiantCase("acceptance", "xcit_nano_12_p16", 96, 128, 4096),
        GiantCase("area", "xcit_nano_12_p16", 96, 128, 4096),
        GiantCase("area", "xcit_nano_12_p16", 96, 128, 0),
        GiantCase("speed", "xcit_nano_12_p16", 64, 64, 4096),
    ]
    giant.run(cases, results_dir=tmp_path)
    rows = results.read(tmp_path / "giant.csv", giant.COLUMNS)
    assert [row["tokens"] for row in rows] == ["48", "48", "48", "16"]
    assert all(100 < float(row["peak_mib"]) < 4096 for row in rows)
    assert [bool(row["ratio_to_whole"]) for row in rows] == [False, False, False, True]
    assert capsys.readouterr().out.count("us a token") == 4
    text = giant.table(tmp_path)
    assert "| `xcit_nano_12_p16` | 128 × 96 | 48 | 4096 MiB | in memory |" in text
    assert "×" in text.splitlines()[3]
    giant.write_figure(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@linux
def test_a_child_that_fails_says_why(tmp_path) -> None:
    with pytest.raises(BackendError, match=r"could not be measured: .*MiB is the least that works"):
        giant.run([GiantCase("area", "xcit_nano_12_p16", 96, 128, 1)], results_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_pattern_differs_everywhere(tmp_path) -> None:
    giant.write_pattern(tmp_path / "a.tif", 300, 200)
    with open_large_image(tmp_path / "a.tif") as image:
        values = image.read(0, 0, 300, 200)
    assert values.shape == (300, 200, 3)
    assert len(np.unique(values)) == 256
    assert (values[1:] != values[:-1]).mean() > 0.9


def test_the_study_of_tiles(tmp_path) -> None:
    assert "Not measured yet" in tiling.table(tmp_path)
    said: list[str] = []
    tiling.run(steps=2, images=1, results_dir=tmp_path, say=said.append)
    assert len(said) == len(tiling.TESTED_ON)
    text = tiling.table(tmp_path)
    assert text.count(" px | ") == len(tiling.TESTED_ON)
    canvas = tiling.canvas_of(digit_splits().test, 0, 128, np.random.default_rng(0))
    rows, columns = np.nonzero(canvas)
    assert rows.max() - rows.min() < tiling.DIGIT
    assert columns.max() - columns.min() < tiling.DIGIT
