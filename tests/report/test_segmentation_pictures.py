"""Drawn label maps: where the colours are, what stays as it was, what the legend says, and images of odd sizes."""

import numpy as np
import pytest
from PIL import Image

from xcit.errors import ConfigError, ShapeError
from xcit.report import segmentations as report
from xcit.report.segmentations import _entries, draw_segmentation

NAMES = ["sky", "tree", "water"]
PALETTE = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)


def grey(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


def halves(width, height):
    """Return 0 on the left, 2 on the right."""
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 2
    return labels


def pixel(picture, x, y):
    return np.array(picture.getpixel((x, y)), float)


def mixed(k, opacity=report.OPACITY):
    return 128 + opacity * (PALETTE[k].astype(float) - 128)


def test_where_the_colours_are():
    image = grey(800, 600)
    before = np.asarray(image).copy()
    picture = draw_segmentation(image, halves(800, 600), NAMES, PALETTE, legend=False)
    assert (np.asarray(image) == before).all()
    assert (picture.size, picture.mode) == ((800, 600), "RGB")
    for x, k in ((10, 0), (380, 0), (420, 2), (799, 2)):
        np.testing.assert_allclose(pixel(picture, x, 300), mixed(k), atol=1)
    # where the classes meet each has a line in its own colour
    for x, k in ((399, 0), (400, 2)):
        np.testing.assert_allclose(pixel(picture, x, 300), mixed(k, report.OUTLINE), atol=1)
    clear = draw_segmentation(image, halves(800, 600), NAMES, PALETTE, legend=False, opacity=0)
    assert (pixel(clear, 10, 300) == 128).all()


def test_ignored_pixels_stay_as_they_are():
    labels = halves(800, 600).astype(np.int32)
    labels[:100] = -1
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8))
    picture = draw_segmentation(image, labels, NAMES, PALETTE, legend=False)
    assert (np.asarray(picture)[:100] == np.asarray(image)[:100]).all()
    assert (np.asarray(picture)[150:] != np.asarray(image)[150:]).any(-1).mean() > 0.9
    nothing = draw_segmentation(image, np.full((600, 800), -1), NAMES, PALETTE, legend=False)
    assert (np.asarray(nothing) == np.asarray(image)).all()
    assert draw_segmentation(image, np.full((600, 800), -1), NAMES, PALETTE).height > 600


def test_strips_meet(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (30, 40)), np.ones((23, 19), int))
    image = Image.fromarray(rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8))
    whole = draw_segmentation(image, labels, NAMES, PALETTE)
    monkeypatch.setattr(report, "STRIP", 5000)
    assert (np.asarray(draw_segmentation(image, labels, NAMES, PALETTE)) == np.asarray(whole)).all()


def test_the_legend_names_what_is_there():
    labels = halves(800, 600)
    labels[:2, :3] = 1
    entries = _entries(labels, NAMES, PALETTE)
    assert entries == [
        ("water", "50.0 %", tuple(PALETTE[2])),
        ("sky", "50.0 %", tuple(PALETTE[0])),
        ("tree", "< 0.1 %", tuple(PALETTE[1])),
    ]
    labels = labels.astype(np.int16)
    labels[:300] = -1
    assert [entry[:2] for entry in _entries(labels, NAMES, PALETTE)] == [
        ("sky", "25.0 %"),
        ("water", "25.0 %"),
        ("(ignored)", "50.0 %"),
    ]
    many = np.arange(100, dtype=np.uint8).repeat(2).reshape(10, 20)
    many[0] = 7
    entries = _entries(many, [str(i) for i in range(100)], np.zeros((100, 3), np.uint8))
    assert len(entries) == report.MOST
    assert entries[0][:2] == ("7", f"{(20 + 0) / 2:.1f} %")
    assert entries[-1] == ("52 more classes", "52.0 %", None)


def test_the_legend_stands_below_the_picture():
    bare = draw_segmentation(grey(800, 600), halves(800, 600), NAMES, PALETTE, legend=False)
    picture = draw_segmentation(grey(800, 600), halves(800, 600), NAMES, PALETTE)
    assert picture.width == 800
    assert picture.height > 600 + 12
    assert (np.asarray(picture)[:600] == np.asarray(bare)).all()
    below = {tuple(colour) for colour in np.asarray(picture)[600:].reshape(-1, 3).tolist()}
    assert {tuple(PALETTE[0]), tuple(PALETTE[2])} < below
    assert tuple(PALETTE[1]) not in below


@pytest.mark.parametrize(
    ("size", "max_side", "drawn"),
    [
        ((6000, 4500), 2000, (2000, 1500)),
        ((3000, 1500), 1000, (1000, 500)),
        ((3000, 1500), None, (3000, 1500)),
        ((32, 24), 2000, (640, 480)),
        ((32, 24), 320, (320, 240)),
        ((1, 1), 2000, (640, 640)),
        ((3000, 3), 2000, (2000, 120)),
        ((3, 3000), 2000, (120, 2000)),
    ],
)
def test_sizes(size, max_side, drawn):
    W, H = size
    bare = draw_segmentation(grey(W, H), halves(W, H), NAMES, PALETTE, max_side=max_side, legend=False)
    assert bare.size == drawn
    with_legend = draw_segmentation(grey(W, H), halves(W, H), NAMES, PALETTE, max_side=max_side)
    assert with_legend.width == max(report.NARROW, drawn[0])
    assert drawn[1] < with_legend.height < drawn[1] + 220


def test_long_names_and_other_modes():
    labels = halves(64, 48)
    names = ["été\n写真", "x", "a very long name " * 30]
    for mode in ("L", "RGBA", "P"):
        picture = draw_segmentation(grey(64, 48).convert(mode), labels, names, PALETTE)
        assert (picture.mode, picture.width) == ("RGB", 640)


def test_refusals():
    labels = halves(64, 48)
    with pytest.raises(ShapeError, match="The image is 64 x 48, the labels are 48 x 64; draw them into the image"):
        draw_segmentation(grey(48, 64), labels, NAMES, PALETTE)
    with pytest.raises(ShapeError, match=r"There are 2 class_names, .* labels up to 2"):
        draw_segmentation(grey(64, 48), labels, NAMES[:2], PALETTE[:2])
    with pytest.raises(ShapeError, match=r"a palette of the shape \(2, 3\)"):
        draw_segmentation(grey(64, 48), labels, NAMES, PALETTE[:2])
    with pytest.raises(ConfigError, match="opacity is 2; it must be between 0 and 1"):
        draw_segmentation(grey(64, 48), labels, NAMES, PALETTE, opacity=2)
    with pytest.raises(ConfigError, match="max_side is 10"):
        draw_segmentation(grey(64, 48), labels, NAMES, PALETTE, max_side=10)


def test_a_colourful_image_is_grey_below_the_colours():
    """So that a class has one colour wherever it is; what is ignored keeps its own."""
    labels = np.zeros((600, 800), np.int16)
    labels[:, 400:] = -1
    image = Image.new("RGB", (800, 600), (200, 30, 90))
    picture = np.asarray(draw_segmentation(image, labels, NAMES, PALETTE, legend=False)).astype(float)
    luma = 0.299 * 200 + 0.587 * 30 + 0.114 * 90
    want = luma + report.OPACITY * (PALETTE[0].astype(float) - luma)
    np.testing.assert_allclose(picture[300, 100], want, atol=1)
    assert picture[300, 700].tolist() == [200, 30, 90]
