"""The picture of accuracy and cost against test resolution: what stands in it."""

import io

import numpy as np
import pytest
from PIL import Image

from xcit.report.style import png
from xcit.report.sweep import SweepPoint, sweep_figure


def points(timed=True, interval=True, scale=10**9):
    return [
        SweepPoint(s, a, (a - 0.01, a + 0.008) if interval else None, int(g * scale), t if timed else None)
        for s, a, g, t in [(160, 0.77, 2.4, 2400.0), (224, 0.82, 4.9, 1127.0), (384, 0.81, 14.3, 425.0)]
    ]


def drawn(axes):
    return np.asarray(next(line.get_xydata() for line in axes.lines if line.get_marker() == "o"))


def test_what_is_drawn():
    figure = sweep_figure(points(), score="top-1 accuracy", trained_size=224)
    left, middle, right = figure.axes
    assert drawn(left).tolist() == [[160, 77], [224, 82], [384, 81]]
    np.testing.assert_allclose(drawn(middle)[:, 1], [2.4, 4.9, 14.3])
    np.testing.assert_allclose(drawn(right)[:, 1], [2400, 1127, 425])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "top-1 accuracy", "multiply-adds an image (G)", "images per second",
    ]  # fmt: skip
    (band,) = left.collections
    edges = band.get_paths()[0].vertices
    assert {(160, 76), (160, 77.8)} <= {(x, round(y, 6)) for x, y in edges}
    assert [t.get_text() for t in left.texts] == ["77.0", "82.0", "81.0"]
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["95 % interval", "the weights' own size, 224"]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low <= drawn(axes)[:, 1].min()
        assert drawn(axes)[:, 1].max() < high


def test_without_speed_interval_or_own_size():
    figure = sweep_figure(points(timed=False, interval=False, scale=10**6), score="mAP", trained_size=512)
    left, middle = figure.axes
    assert middle.get_title(loc="left") == "multiply-adds an image (M)"
    np.testing.assert_allclose(drawn(middle)[:, 1], [2.4, 4.9, 14.3])
    assert left.get_legend() is None
    assert not left.collections


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_the_ends_of_the_scale(score):
    ends = [SweepPoint(s, score, (score, score), 10**9, None) for s in (16, 32)]
    low, high = sweep_figure(ends, score="top-1 accuracy").axes[0].get_ylim()
    assert low <= 100 * score < high


def test_one_point_that_an_interruption_left():
    picture = Image.open(io.BytesIO(png(sweep_figure(points()[:1], score="top-1 accuracy", trained_size=160))))
    assert np.asarray(picture).std() > 5


def test_the_same_figure_gives_the_same_file():
    once, again = (png(sweep_figure(points(), score="top-1 accuracy", trained_size=224)) for _ in range(2))
    assert once == again
