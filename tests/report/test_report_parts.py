"""Pictures and pages: what stands in them, not how they look."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from xcit.report.confusion import confusion_figure, most_confused
from xcit.report.curves import curves_figure, pace_figure
from xcit.report.html import (
    Code,
    Gallery,
    KeyFigure,
    Picture,
    Prose,
    Section,
    Table,
    Thumbnail,
    html_page,
)
from xcit.report.overlays import Example, examples_figure
from xcit.report.style import drawable, png, shorten


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


def test_averaged_weights_stand_beside_the_raw_ones_and_map_instead_of_accuracy():
    rows = [
        {"epoch": i + 1, "train_loss": 1.0, "val_loss": 0.5, "val_map": 0.1 * i, "ema_val_map": 0.2 * i}
        | {"ema_val_loss": 0.25}
        for i in range(4)
    ]
    left, right = curves_figure(rows, best_epoch=4).axes
    assert left.lines[3].get_ydata().tolist() == [0.25] * 4
    assert right.get_title(loc="left") == "validation mAP"
    assert right.lines[1].get_ydata().tolist() == [0.1 * i for i in range(4)]
    assert right.lines[2].get_ydata().tolist() == [0.2 * i for i in range(4)]
    assert right.get_ylim()[1] > 0.6


@pytest.mark.parametrize(("lowest", "scale"), [(0.1, "log"), (0.7, "linear")])
def test_losses_of_many_sizes_are_drawn_logarithmically(lowest, scale):
    rows = [row | {"train_loss": 20.0, "val_loss": lowest} for row in history(3)]
    left = curves_figure(rows, best_epoch=1).axes[0]
    assert left.get_yscale() == scale
    assert ("logarithmic" in left.get_title(loc="left")) == (scale == "log")


def test_an_infinite_loss_leaves_a_gap():
    rows = history(4)
    rows[1]["val_loss"], rows[2]["train_loss"] = float("inf"), float("nan")
    figure = curves_figure(rows, best_epoch=4)
    assert np.isnan(figure.axes[0].lines[2].get_ydata()).tolist() == [False, True, False, False]
    assert pixels(figure).std() > 10


def test_pace():
    rows = [{"epoch": i + 1, "lr": 0.1 * i, "images_per_second": 100.0 + i, "data_wait": 0.5} for i in range(3)]
    figure = pace_figure(rows)
    assert [axes.lines[0].get_ydata().tolist() for axes in figure.axes] == [
        [0.1 * i for i in range(3)], [100.0, 101.0, 102.0], [0.5] * 3
    ]  # fmt: skip
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes)
    assert pixels(figure).std() > 5


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


def test_a_part_of_a_matrix_has_the_shares_of_the_whole():
    figure = confusion_figure([[5, 1], [0, 10]], ["a", "b"], totals=[100, 10])
    picture = figure.axes[0].images[0].get_array()
    assert picture[0, 0, 0] > 0.9  # 5 of 100 are hardly blue
    assert picture[1, 1, 0] < 0.4


def test_any_name_can_stand_beside_a_matrix():
    names = ["price $5 bill $ \\frac{1", "\u51ac\u306e\u82b1", "a" * 100, "b", "line\nbreak"]
    figure = confusion_figure(np.eye(5, dtype=int), names)
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert shown == [names[0][:21].rstrip() + "\u2026", "class 1", "a" * 21 + "\u2026", "b", "class 4"]
    assert pixels(figure).std() > 10  # and drawing them neither fails nor warns


def test_most_confused_classes():
    mistakes = [(7, 3, 20), (3, 9, 10), (1, 2, 5), (9, 7, 4)]
    assert most_confused(mistakes, 3) == [3, 7, 9]
    assert most_confused(mistakes, 25) == [1, 2, 3, 7, 9]
    assert most_confused([], 25) == []


def test_drawable_and_shorten():
    assert drawable("\u0432\u0435\u043b\u0438\u043a\u00e9", "no") == "\u0432\u0435\u043b\u0438\u043a\u00e9"
    assert drawable("\u51ac", "class 3") == "class 3"
    assert shorten("hello", 5) == "hello"
    assert shorten("hello you", 7) == "hello\u2026"


def test_captions_of_any_length_and_two_lines():
    picture = Image.new("RGB", (8, 8), "red")
    one = Example([picture, picture], "a very long name that needs room\ntaken for $x$ another, 97 %", right=False)
    figure = examples_figure([one, Example([picture, picture], "b", right=True)], ["image", "attention"])
    assert figure.axes[0].get_title(loc="left").endswith("taken for $x$ another, 97 %")
    figure.draw_without_rendering()
    caption, title = figure.axes[0]._left_title.get_window_extent(), figure.axes[1].title.get_window_extent()
    assert not caption.overlaps(title)
    assert title.y1 <= figure.bbox.y1 + 1  # and neither leaves the sheet


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
        Table(("h",), [("cell & more",)], summary="a <folded> table"),
        Gallery([Thumbnail([b"\xff\xd8\xff-jpeg", b"\x89PNG-2"], "an <alt>", "<i>cat</i> taken for dog", wrong=True)]),
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
        "cell & more",
        "a <folded> table",
        "<i>cat</i> taken for dog",
    ):
        assert text in parser.text
    assert "script" not in [tag for tag, _ in parser.tags]
    image, first, second = (attrs for tag, attrs in parser.tags if tag == "img")
    assert image["alt"] == 'a "quoted" alt'
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == b"\x89PNG-data"
    assert first["alt"] == "an <alt>"
    assert base64.b64decode(first["src"].removeprefix("data:image/jpeg;base64,")) == b"\xff\xd8\xff-jpeg"
    assert second["src"].startswith("data:image/png;base64,")
    assert ("figcaption", {"class": "wrong"}) in parser.tags
    assert sum(tag == "details" for tag, _ in parser.tags) == 2


def test_a_page_fetches_nothing():
    page = sample_page()
    for tag, attrs in read(page).tags:
        assert tag not in ("script", "link", "iframe")
        assert attrs.get("src", "data:").startswith("data:")
        assert "href" not in attrs
    assert "default-src 'none'" in page  # and the browser is told to hold us to it
    assert "url(" not in page
    assert "@import" not in page
