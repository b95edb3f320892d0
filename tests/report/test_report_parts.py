"""Pictures and pages: what stands in them, not how they look."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from xcit.report.confusion import confusion_figure
from xcit.report.curves import curves_figure
from xcit.report.html import Code, KeyFigure, Picture, Prose, Section, Table, html_page
from xcit.report.overlays import Example, examples_figure
from xcit.report.style import png


def pixels(figure):
    image = Image.open(io.BytesIO(png(figure)))
    image.load()
    return np.asarray(image.convert("RGB"))


def history(n):
    return [
        {"epoch": i + 1, "train_loss": 2 / (i + 1), "val_loss": 1.5 / (i + 1), "val_accuracy": 1 - 0.5 / (i + 1)}
        for i in range(n)
    ]


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_curves(epochs):
    figure = curves_figure(history(epochs), best_epoch=epochs)
    left, right = figure.axes
    train, val = (line.get_xydata() for line in left.lines[1:])  # the first line marks the epoch that is kept
    assert train[:, 1].tolist() == [row["train_loss"] for row in history(epochs)]
    assert val[:, 1].tolist() == [row["val_loss"] for row in history(epochs)]
    assert right.lines[1].get_ydata()[-1] == 1 - 0.5 / epochs
    assert f"epoch {epochs}, kept" in right.texts[0].get_text()
    assert pixels(figure).std() > 10


def test_confusion_numbers_and_colours():
    counts = [[35, 1, 0], [0, 36, 0], [0, 0, 36]]
    figure = confusion_figure(counts, ["a", "b", "c"])
    (axes,) = figure.axes
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "35"), ((1, 0), "1"), ((1, 1), "36"), ((2, 2), "36")
    }  # fmt: skip
    picture = axes.images[0].get_array()
    red, blue = picture[0, 1], picture[1, 1]
    assert red[0] > red[2] + 0.3  # one mistake among 36 is plainly red
    assert blue[2] > blue[0] + 0.3
    assert np.ptp(picture[0, 2, :3]) < 0.05  # nothing there: neither


def test_a_large_confusion_matrix_has_no_numbers():
    figure = confusion_figure(np.eye(30, dtype=int), [str(i) for i in range(30)])
    assert not figure.axes[0].texts


def test_examples_stand_where_they_belong():
    def plain(value):
        return Image.new("L", (8, 8), value)

    examples = [Example([plain(10 * i), plain(10 * i + 5)], f"number {i}", right=i != 2) for i in range(3)]
    figure = examples_figure(examples, ["picture", "other"], columns=2)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_array().flat[0] for axes in shown] == [0, 5, 10, 15, 20, 25]
    assert [axes.get_title(loc="left") for axes in shown[::2]] == ["number 0", "number 1", "number 2"]
    assert [axes.get_title() for axes in shown[1::2]] == ["other", "other", ""]
    assert pixels(figure).std() > 10


def test_figures_come_out_the_same():
    assert png(curves_figure(history(3), 2)) == png(curves_figure(history(3), 2))


class Collector(HTMLParser):
    """Notes every tag with its attributes, checks that tags close, and collects the text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page):
    parser = Collector()
    parser.feed(page)
    assert parser.open == []
    return parser


def sample_page():
    blocks = [
        Prose("1 < 2 & <script>alert(1)</script>"),
        Picture(b"\x89PNG-data", 'a "quoted" alt', "caption", width=800),
        Table(("name", "value"), [("a", "<b>")]),
        Code("x = '<y>'"),
        Code("folded", summary="open me"),
    ]
    return html_page("Title <&>", "subtitle", [KeyFigure("99 %", "right")], [Section("Part", blocks)])


def test_a_page_holds_everything_escaped():
    parser = read(sample_page())
    for text in (
        "1 < 2 & <script>alert(1)</script>",
        "Title <&>",
        "subtitle",
        "99 %",
        "Part",
        "caption",
        "<b>",
        "x = '<y>'",
    ):
        assert text in parser.text
    assert "script" not in [tag for tag, _ in parser.tags]
    (image,) = [attrs for tag, attrs in parser.tags if tag == "img"]
    assert image["alt"] == 'a "quoted" alt'
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == b"\x89PNG-data"


def test_a_page_fetches_nothing():
    page = sample_page()
    for tag, attrs in read(page).tags:
        assert tag not in ("script", "link", "iframe")
        assert attrs.get("src", "data:").startswith("data:")
        assert "href" not in attrs
    assert "default-src 'none'" in page  # and the browser is told to hold us to it
    assert "url(" not in page
    assert "@import" not in page
