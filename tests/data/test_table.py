"""Lists of images as spreadsheets and people write them."""

import numpy as np
import pytest
from PIL import Image

from xcit.data.sources import open_data, open_eval_set
from xcit.errors import DataError


def pictures(folder, *names):
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2), value).save(path)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def table(tmp_path):
    """A list of ten files, five of each class."""
    pictures(tmp_path, *(f"{i}.png" for i in range(10)))
    return write(tmp_path / "list.csv", "path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10)))


def test_path_and_label(table):
    train, val, test, notes = open_data(table, val_fraction=0.2)
    assert train.class_names == ("a", "b")
    assert (train.class_counts.tolist(), val.class_counts.tolist(), test) == ([4, 4], [1, 1], None)
    assert notes == ("2 of 10 images (20.0%) were split off for validation: by class, with seed 0.",)
    for part in (train, val):
        for i, name in enumerate(part.names):
            value = int(name.removesuffix(".png"))
            assert part.open(i).getpixel((0, 0)) == (value,) * 3
            assert part.labels[i] == value % 2


def test_parts(tmp_path):
    pictures(tmp_path, *(f"{name}.png" for name in "abcd"))
    table = write(
        tmp_path / "list.csv",
        "split,path,label,taken by\ntrain,a.png,x,me\ntrain,b.png,y,me\nVAL,c.png,y,you\ntest,d.png,x,me\n",
    )
    train, val, test, notes = open_data(table)
    assert [list(part.names) for part in (train, val, test)] == [["a.png", "b.png"], ["c.png"], ["d.png"]]
    assert [part.labels.tolist() for part in (train, val, test)] == [[0, 1], [1], [0]]
    assert notes == ("val has no image of 1 class: 'x'.", "test has no image of 1 class: 'y'.")
    assert list(open_eval_set(table).names) == ["d.png"]
    assert list(open_eval_set(table, split="val", class_names=["y", "x"]).labels) == [0]


def test_what_spreadsheets_write(tmp_path):
    """A byte order mark, Windows' line ends, quoted fields with commas and quotes, umlauts, blank lines."""
    pictures(tmp_path, "a, b.png", "d/ü.png", "e.png", "f.png")
    big = '"dog, ""big"""'
    text = f'Path,Label\r\n"a, b.png",{big}\r\n\r\nd/ü.png,{big}\r\ne.png,Käfer\r\n f.png ,Ka\u0308fer\r\n'
    train, val, _, _ = open_data(write(tmp_path / "list.csv", text, "utf-8-sig"), val_fraction=0.5)
    assert train.class_names == ("Käfer", 'dog, "big"')
    assert sorted([*train.names, *val.names]) == ["a, b.png", "d/ü.png", "e.png", "f.png"]
    for part in (train, val):
        part.open(0), part.open(1)


@pytest.mark.parametrize(("ending", "mark"), [("csv", ";"), ("tsv", "\t"), ("csv", ",")])
def test_separators(tmp_path, ending, mark):
    pictures(tmp_path, *(f"{i}.png" for i in range(4)))
    lines = [["path", "labels"], ["0.png", "a|b"], ["1.png", "b"], ["2.png", ""], ["3.png", "a | b | a"]]
    table = write(tmp_path / f"list.{ending}", "\n".join(mark.join(line) for line in lines))
    images = open_eval_set(table)
    assert images.class_names == ("a", "b")
    assert images.labels.tolist() == [[True, True], [False, True], [False, False], [True, True]]


def test_several_labels_are_split_for_validation(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(40)))
    lines = [f"{i}.png,{';'.join(['even'] * (i % 2 == 0) + ['three'] * (i % 3 == 0))}" for i in range(40)]
    train, val, _, _ = open_data(write(tmp_path / "list.csv", "path,labels\n" + "\n".join(lines)), val_fraction=0.25)
    assert train.multi_label
    assert train.labels.dtype == bool
    assert train.labels.shape[1] == 2
    assert val.class_names == train.class_names == ("even", "three")
    for part in (train, val):
        for name, row in zip(part.names, part.labels, strict=True):
            number = int(name.removesuffix(".png"))
            assert row.tolist() == [number % 2 == 0, number % 3 == 0]
    assert abs(val.class_counts - np.array([5, 3.5])).max() <= 0.5


def test_numbers_are_ordered_by_value(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(12)))
    table = write(tmp_path / "list.csv", "path,label\n" + "".join(f"{i}.png,{i}\n" for i in range(12)))
    assert open_eval_set(table).class_names == tuple(str(i) for i in range(12))


def test_absolute_paths(tmp_path):
    pictures(tmp_path / "far", "a.png", "b.png")
    (tmp_path / "here").mkdir()
    rows = f"{tmp_path / 'far' / 'a.png'},x\n../far/b.png,y\n"
    images = open_eval_set(write(tmp_path / "here" / "list.csv", f"path,label\n{rows}"))
    assert [images.open(i).getpixel((0, 0))[0] for i in range(2)] == [0, 1]


# --- files that are not there -----------------------------------------------------------------------------------------


def test_few_missing_files_are_noted_and_count_as_broken(tmp_path, table):
    (tmp_path / "4.png").unlink()
    train, val, _, notes = open_data(table)
    assert len(train) + len(val) == 10
    assert notes[0] == (
        f"{table} lists 10 files of which 1 do not exist: '4.png'. They are skipped and counted like images that "
        f"cannot be decoded."
    )
    images = open_eval_set(table)
    with pytest.raises(DataError, match=r"4\.png: there is no such file"):
        images.open(4)


def test_many_missing_files_are_refused(tmp_path, table):
    for i in range(7):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError) as caught:
        open_data(table)
    assert str(caught.value) == (
        f"{table} lists 10 files of which 7 do not exist ('0.png', '1.png', '2.png', '3.png', '4.png' and 2 more). "
        f"Paths are relative to {tmp_path}/."
    )


# --- lists that are refused -------------------------------------------------------------------------------------------

COLUMNS = (
    "it needs a header with the columns path and label (or labels, of which | stands between several), and maybe split."
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"is empty; {COLUMNS.replace('it needs', 'it needs')}"),
        ("a.png,cat\nb.png,dog\n", f"its first line has the columns 'a.png', 'cat'; {COLUMNS}"),
        ("path,split\na.png,train\n", f"its first line has the columns 'path', 'split'; {COLUMNS}"),
        ("path,label,labels\n", f"its first line has the columns 'path', 'label', 'labels'; {COLUMNS}"),
        ("path,label,label\n", f"its first line has the columns 'path', 'label', 'label'; {COLUMNS}"),
        ("path,label\n", "lists no image below its header."),
        ("path,labels\na.png,\n", "no image has a label."),
        (
            "path,label\na.png,x\n,\nb.png\nc.png,\n",
            "line 3 has no path; line 4 has 1 field where the header has 2; line 5 has no label.",
        ),
        (
            "path,label,split\na.png,x,train\nb.png,x,dev\n",
            "line 3 has the split 'dev', which must be train, val or test.",
        ),
        ("path,label,split\na.png,x,train\nb.png,x,\n", "line 3 has the split '', which must be train, val or test."),
        (
            "path,label\na.png,x\nb.png,x\na.png,y\n",
            "line 4 lists 'a.png' again (line 2), with another label; for several, call the column labels and write "
            "a|b.",
        ),
        ("path,labels\na.png,x\na.png,y\n", "line 3 lists 'a.png' again (line 2), with other labels."),
        (
            "path,label,split\na.png,x,train\na.png,x,test\n",
            "line 3 lists 'a.png' again (line 2), in test as well as in train.",
        ),
        ('path,label\n"a.png,x\n', "line 2: is not valid CSV (unexpected end of data)."),
        (
            "path,label\n" + ",x\n" * 9,
            "".join(f"line {i} has no path; " for i in range(2, 7)) + "and 4 more lines.",
        ),
    ],
)
def test_refusals(tmp_path, text, message):
    table = write(tmp_path / "list.csv", text)
    with pytest.raises(DataError) as caught:
        open_data(table)
    assert str(caught.value) == f"{table}: {message}"


def test_other_encodings(tmp_path):
    table = write(tmp_path / "list.csv", "path,label\na.png,Käfer\n", "latin-1")
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte 18 is 0xe4\); save it as UTF-8"):
        open_data(table)
    write(table, "path,label\na.png,x\n", "utf-16-le")
    with pytest.raises(DataError, match="is not a text"):
        open_data(table)


def test_a_path_that_no_file_can_have(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(20)))
    rows = "".join(f"{i}.png,{i % 2}\n" for i in range(20)) + "x" * 5000 + ".png,0\n"
    images = open_eval_set(write(tmp_path / "list.csv", f"path,label\n{rows}"))
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        images.open(20)


def test_repeated_lines_are_noted(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(4)))
    rows = "".join(f"{i}.png,{i % 2}\n" for i in (0, 1, 2, 3, 0))
    notes = open_data(write(tmp_path / "list.csv", f"path,label\n{rows}")).notes
    assert notes[0].endswith("1 line list an image again, which therefore counts more than once.")


def test_classes_that_only_other_parts_have(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    table = write(tmp_path / "list.csv", "path,label,split\na.png,x,train\nb.png,y,train\nc.png,z,val\n")
    with pytest.raises(DataError, match="val has 1 class without an image in train: 'z'"):
        open_data(table)
