"""Contact sheets: every picture in its place, whatever its shape, and names that fit."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from xcit.report import contact_sheet as sheets
from xcit.report import lettering
from xcit.report.contact_sheet import BOX, FOLD, GAP, LINE, MARGIN, Cell, Row, contact_sheet, sheet_png

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
STEP, HEIGHT, TOP = BOX + GAP, BOX + 3 * LINE + GAP, MARGIN + 2 * LINE


@pytest.fixture
def colours(tmp_path):
    for name in COLOURS:
        Image.new("RGB", (60, 60), name).save(tmp_path / f"{name}.png")
    return tmp_path


def cell(folder, name, caption="1   0.900"):
    return Cell(folder / f"{name}.png", caption, name)


def centre(sheet, line, column, leads=True):
    x = MARGIN + (STEP + GAP if leads and column else 0) + max(0, column - leads) * STEP
    return sheet.getpixel((x + BOX // 2, TOP + line * HEIGHT + BOX // 2))


def test_pictures_stand_where_they_belong(colours):
    row = Row(cell(colours, "red", "query"), [cell(colours, "lime"), cell(colours, "blue")])
    sheet = contact_sheet([row, Row(cell(colours, "blue", "query"), [cell(colours, "red")])], "two queries")
    assert [centre(sheet, 0, i) for i in range(3)] == list(COLOURS.values())
    assert [centre(sheet, 1, i) for i in range(2)] == [COLOURS["blue"], COLOURS["red"]]
    assert centre(sheet, 1, 2) == (255, 255, 255)


def test_pictures_in_memory_and_the_colour_of_names(colours):
    """The same as from a file; a name says by its colour whether it is right."""
    picture = Image.new("RGB", (60, 60), "red")
    cells = [Cell(picture, "1", "####", right) for right in (True, False, None)]
    sheet = contact_sheet([Row(cell(colours, "red"), cells)], "")
    assert [centre(sheet, 0, i) for i in range(4)] == [COLOURS["red"]] * 4
    inks = []
    for i in range(3):
        x, y = MARGIN + GAP + (i + 1) * STEP, TOP + BOX + 5 + LINE - 2
        pixels = np.array(sheet.crop((x, y, x + BOX, y + LINE)))
        inks.append(pixels.reshape(-1, 3)[pixels.sum(axis=2).argmin()].argmax())
        if i == 2:
            assert np.ptp(pixels.reshape(-1, 3)[pixels.sum(axis=2).argmin()].astype(int)) < 40  # grey
    assert inks[:2] == [1, 0]


def test_long_rows_go_on_below(colours):
    sheet = contact_sheet([Row(cell(colours, "red"), [cell(colours, "lime")] * (FOLD + 1))], "")
    assert sheet.height == 2 * MARGIN + 2 * LINE + 2 * HEIGHT
    assert centre(sheet, 1, 1) == COLOURS["lime"]
    assert centre(sheet, 1, 2) == (255, 255, 255)


def test_rows_without_a_lead(colours):
    sheet = contact_sheet([Row(None, [cell(colours, "lime"), cell(colours, "blue")])], "")
    assert [centre(sheet, 0, i, leads=False) for i in range(2)] == [COLOURS["lime"], COLOURS["blue"]]


@pytest.mark.parametrize("size", [(8, 8), (4000, 10), (10, 4000), (1, 1), (3, 500), (185, 60), (900, 700)])
def test_any_shape_fits_its_box(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    sheet = np.array(contact_sheet([Row(None, [cell(tmp_path, "a")])], ""))
    red = (sheet == (255, 0, 0)).all(axis=2)
    assert red.any()
    ys, xs = np.nonzero(red)
    assert xs.min() >= MARGIN
    assert xs.max() < MARGIN + BOX
    assert ys.min() >= TOP
    assert ys.max() < TOP + BOX
    if min(size) > 20:  # and keeps its proportions; the frame takes a pixel on each side
        assert (np.ptp(xs) + 3) / (np.ptp(ys) + 3) == pytest.approx(size[0] / size[1], rel=0.05)


def test_tiny_pictures_keep_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    fitted = np.array(sheets._fitted(Image.fromarray(pixels)))
    assert fitted.shape == (184, 184)
    np.testing.assert_array_equal(fitted[::23, ::23], pixels)


def test_missing_and_broken_files_are_told_apart_from_pictures(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    sheet = contact_sheet([Row(None, [cell(tmp_path, "broken"), cell(tmp_path, "gone")])], "")
    assert centre(sheet, 0, 0, leads=False) != (255, 255, 255)
    one, two = (np.array(sheet.crop((MARGIN + i * STEP, TOP, MARGIN + i * STEP + BOX, TOP + BOX))) for i in (0, 1))
    assert (one != two).any()


NAMES = [
    "a",
    "x" * 400,
    "a_b" * 100,
    "日本語の写真.png",
    "line\nbreak",
    "été Ω.jpg",
    "\x00\x1b[31m",
    "\udcff.png",
    "",
    "W" * 30,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_within_their_column(tmp_path, name):
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    lines = sheets._two_lines(name)
    assert len(lines) <= 2
    font = lettering.font(sheets.TEXT - 1)
    assert all(font.getlength(line) <= BOX for line in lines)
    sheet = np.array(contact_sheet([Row(None, [Cell(tmp_path / "a.png", "1", name)])], name))
    assert (sheet[:, MARGIN + BOX + 2 : MARGIN + STEP][TOP:] == 255).all()


def test_a_long_name_keeps_its_beginning_and_its_end():
    first, second = sheets._two_lines("holiday_" + "x" * 200 + "_0042.jpg")
    assert first.startswith("holiday_")
    assert second.endswith("_0042.jpg")
    assert "..." in second


def test_letters_that_the_font_lacks_are_question_marks():
    assert lettering.drawable("a\nb") == "a?b"
    assert lettering.drawable("plain (1).jpg") == "plain (1).jpg"
    assert lettering.drawable("\U0010fffd") == "?"


def test_a_sheet_has_an_end(colours, monkeypatch):
    monkeypatch.setattr(sheets, "MAX_ROWS", 3)
    written = []
    original = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, **k: (written.append(text), original(self, at, text, **k))
    )
    sheet = contact_sheet([Row(None, [cell(colours, "red")]) for _ in range(5)], "")
    assert sheet.height == 2 * MARGIN + 2 * LINE + 3 * HEIGHT + LINE
    assert "... and 2 more rows, which do not fit here." in written


def test_the_png_is_the_sheet_and_always_the_same(colours):
    sheet = contact_sheet([Row(None, [cell(colours, "red")])], "title")
    with Image.open(io.BytesIO(sheet_png(sheet))) as image:
        np.testing.assert_array_equal(np.array(image), np.array(sheet))
    assert sheet_png(sheet) == sheet_png(contact_sheet([Row(None, [cell(colours, "red")])], "title"))
