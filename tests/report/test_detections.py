"""Drawn detections: where the colours are, what stays as it was, and images of odd sizes."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from xcit.errors import ConfigError, ShapeError
from xcit.inference.detections import Detections
from xcit.report import detections as report
from xcit.report.detections import colour_of, draw_detections


def disc():
    y, x = (np.mgrid[:28, :28] + 0.5) / 28 - 0.5
    return (1 / (1 + np.exp(-(0.35 - np.hypot(y, x)) * 40))).astype(np.float32)


def made_up(size, *instances, masks=True):
    """Detections of (box, label, score, name)."""
    boxes, labels, scores, names = zip(*instances, strict=True) if instances else ([], [], [], [])
    return Detections(
        None,
        size,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        list(names),
        np.array(scores, np.float32),
        np.stack([disc()] * len(labels)) if masks and labels else np.zeros((0, 28, 28), np.float32) if masks else None,
    )


def grey(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


def pixel(picture, x, y):
    return np.array(picture.getpixel((x, y)), float)


def test_where_the_colours_are():
    found = made_up((600, 800), ([200, 150, 600, 550], 1, 0.9, "b"))
    before = np.asarray(grey(800, 600)).copy()
    image = grey(800, 600)
    picture = draw_detections(image, found)
    assert (np.asarray(image) == before).all()
    assert picture.size == (800, 600)
    assert picture.mode == "RGB"
    colour = np.array(colour_of(1))
    # the box's corners and sides, the middle of the mask, its outline 0.35 x 400 px from the middle
    for x, y in [(200, 549), (599, 300), (201, 400), (400, 549)]:
        assert (pixel(picture, x, y) == colour).all()
    np.testing.assert_allclose(pixel(picture, 400, 350), 128 + report.OPACITY * (colour - 128), atol=1)
    outline = [pixel(picture, x, 350) for x in range(250, 280)]
    assert min(np.abs(value - colour).max() for value in outline) < 16
    # everything else is as it was
    for x, y in [(100, 100), (210, 540), (230, 350), (700, 580), (599, 560)]:
        assert (pixel(picture, x, y) == 128).all()
    # the words stand on the box, in its colour
    assert (pixel(picture, 201, 149) == colour).all()


def test_boxes_without_masks():
    found = made_up((600, 800), ([200, 150, 600, 550], 0, 0.9, "b"), masks=False)
    picture = draw_detections(grey(800, 600), found)
    assert (pixel(picture, 400, 350) == 128).all()
    assert (pixel(picture, 200, 549) == colour_of(0)).all()


def test_nothing_found_is_the_image_itself():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8))
    for masks in (True, False):
        assert (np.asarray(draw_detections(image, made_up((700, 900), masks=masks))) == np.asarray(image)).all()


def test_small_ones_lie_above_large_ones():
    large, small = ([0, 0, 800, 600], 0, 0.99, "l"), ([350, 250, 450, 350], 1, 0.6, "s")
    for order in ((large, small), (small, large)):
        picture = draw_detections(grey(800, 600), made_up((600, 800), *order))
        below = 128 + report.OPACITY * (np.array(colour_of(0)) - 128)
        want = below + report.OPACITY * (np.array(colour_of(1)) - below)
        np.testing.assert_allclose(pixel(picture, 400, 300), want, atol=1)


def test_colours_by_class_or_by_instance():
    twins = made_up((600, 800), ([10, 100, 300, 500], 4, 0.9, "a"), ([400, 100, 700, 500], 4, 0.8, "a"))
    corners = [(10, 499), (400, 499)]
    by_class, by_instance = (draw_detections(grey(800, 600), twins, colours=kind) for kind in ("class", "instance"))
    assert [tuple(pixel(by_class, *at)) for at in corners] == [colour_of(4)] * 2
    assert [tuple(pixel(by_instance, *at)) for at in corners] == [colour_of(0), colour_of(1)]


def test_colours_differ():
    colours = [np.array(colour_of(i), float) for i in range(100)]
    assert all(((c >= 0) & (c <= 255)).all() for c in colours)
    assert len({tuple(c) for c in colours}) == 100
    for i, j in itertools.combinations(range(12), 2):
        assert np.abs(colours[i] - colours[j]).sum() > 60
    for i in range(99):
        assert np.abs(colours[i] - colours[i + 1]).sum() > 60


def test_letters_are_readable_on_every_colour():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
        return np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05

    for i in range(80):
        low, high = sorted((luminance(colour_of(i)), luminance(report._readable_on(colour_of(i)))))
        assert high / low > 2.6


@pytest.mark.parametrize(
    ("size", "max_side", "drawn"),
    [
        ((12_000, 9_000), 2000, (2000, 1500)),
        ((3000, 1500), 1000, (1000, 500)),
        ((3000, 1500), None, (3000, 1500)),
        ((32, 24), 2000, (640, 480)),
        ((32, 24), 320, (320, 240)),
        ((64, 48), None, (64, 64)),
        ((1, 1), 2000, (640, 640)),
        ((3000, 3), 2000, (2000, 120)),
        ((3, 3000), 2000, (120, 2000)),
    ],
)
def test_sizes(size, max_side, drawn):
    W, H = size
    found = made_up((H, W), ([0, 0, W, H], 0, 0.9, "all of it"), ([W / 2, H / 2, W, H], 1, 0.8, "a quarter"))
    picture = draw_detections(grey(W, H), found, max_side=max_side)
    assert picture.size == drawn
    assert len(picture.getcolors(1 << 24)) > 5


def test_words_stay_within_the_picture_and_apart(monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(40):
        n = int(rng.integers(1, 12))
        corner = rng.uniform(-0.05, 0.9, (n, 2)) * [800, 600]
        boxes = np.clip(np.hstack([corner, corner + rng.uniform(2, 300, (n, 2))]), 0, [800, 600, 800, 600])
        name = "x" * (200 if number % 5 == 0 else int(rng.integers(1, 20)))
        found = made_up((600, 800), *((box, 0, 0.9 - 0.01 * i, name) for i, box in enumerate(boxes.tolist())))
        places = []
        place = report._place
        monkeypatch.setattr(report, "_place", lambda *args, to=places, do=place: to.append(do(*args)) or to[-1])
        draw_detections(grey(800, 600), found)
        monkeypatch.setattr(report, "_place", place)
        assert len(places) == n
        for x0, y0, x1, y1 in places:
            assert 0 <= x0 < x1 <= 800
            assert 0 <= y0 < y1 <= 600


def test_words_of_neighbours_do_not_cover_each_other():
    taken = [report._place((100, 100, 300, 300), 80, 20, (800, 600), [])]
    assert taken[0] == (100, 80, 180, 100)  # above the box, from its left side on
    for _ in range(3):  # the same box once more, and again
        place = report._place((100, 100, 300, 300), 80, 20, (800, 600), taken)
        assert all(report._shared(place, other) == 0 for other in taken)
        taken.append(place)


def test_other_modes_and_names_of_any_script():
    found = made_up((480, 640), ([10, 50, 200, 200], 0, 0.9, "été\n写真"))
    for mode in ("L", "RGBA", "P"):
        assert draw_detections(grey(640, 480).convert(mode), found).mode == "RGB"


def test_refusals():
    found = made_up((48, 64), ([1, 5, 20, 20], 0, 0.9, "a"))
    with pytest.raises(ShapeError, match="is 64 x 48, the detections are for one of 48 x 64"):
        draw_detections(grey(48, 64), found)
    with pytest.raises(ConfigError, match="colours is 'score'"):
        draw_detections(grey(64, 48), found, colours="score")
    with pytest.raises(ConfigError, match="max_side is 10"):
        draw_detections(grey(64, 48), found, max_side=10)
    with pytest.raises(ConfigError, match=r"nothing to draw: a\.png: is empty"):
        draw_detections(grey(64, 48), dataclasses.replace(found, error="a.png: is empty (0 bytes)."))
