"""A look at a whole data set: each thing that can be wrong is planted, and found, and nothing else is."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from xcit.data.check import Spread, check_data
from xcit.data.digits_folder import write_digits
from xcit.errors import DataError


def put(path, seed, size=(7, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """Two parts of two classes, all images different."""
    for p, part in enumerate(("train", "val")):
        for c, name in enumerate(("cat", "dog")):
            for i in range(3):
                put(tmp_path / part / name / f"{i}.png", 100 * p + 10 * c + i, (10 + i, 20 * (i + 1)))
    return tmp_path


def test_a_clean_set(data):
    seen, totals = [], []
    report = check_data(data, on_image=lambda: seen.append(1), on_total=totals.append)
    assert report.clean
    assert report.to_dict()["clean"]
    assert (len(seen), totals) == (12, [12])
    assert [part.part for part in report.parts] == ["train", "val"]
    train = report.parts[0]
    assert (train.num_images, train.num_unreadable, train.class_counts) == (6, 0, {"cat": 3, "dog": 3})
    assert (train.width, train.height) == (Spread(10, 11.0, 12), Spread(20, 40.0, 60))


def test_unreadable_images(data):
    (data / "train" / "cat" / "0.png").write_bytes(b"no image")
    cut = data / "val" / "dog" / "2.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (data / "val" / "dog" / "1.png").unlink()
    (data / "val" / "dog" / "1.png").symlink_to(data / "nowhere.png")
    report = check_data(data)
    assert not report.clean
    assert [(bad.part, bad.name) for bad in report.unreadable] == [
        ("train", "train/cat/0.png"), ("val", "val/dog/1.png"), ("val", "val/dog/2.png"),
    ]  # fmt: skip
    reasons = [bad.reason for bad in report.unreadable]
    assert "is not an image in a format that can be read" in reasons[0]
    assert "there is no such file" in reasons[1]
    assert "is damaged or incomplete" in reasons[2]
    assert [part.num_unreadable for part in report.parts] == [1, 2]
    assert (report.duplicates, report.mismatches, report.notes) == ((), (), ())


def test_all_images_unreadable(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"?")
    report = check_data(tmp_path)
    assert report.parts[0].width is None
    assert len(report.unreadable) == 2


def test_duplicates(data):
    def copy(source, target):
        shutil.copy(data / source, data / target)

    copy("train/cat/0.png", "train/cat/same.png")
    copy("train/cat/1.png", "val/cat/leak.png")
    copy("train/dog/0.png", "train/cat/which.png")
    with Image.open(data / "train" / "dog" / "1.png") as image:
        image.save(data / "val" / "cat" / "again.bmp")
    report = check_data(data)
    found = {
        tuple(place.name for place in group.places): (group.same_file, group.across_parts, group.labels_differ)
        for group in report.duplicates
    }
    assert found == {
        ("train/cat/0.png", "train/cat/same.png"): (True, False, False),
        ("train/cat/1.png", "val/cat/leak.png"): (True, True, False),
        ("train/cat/which.png", "train/dog/0.png"): (True, False, True),
        ("train/dog/1.png", "val/cat/again.bmp"): (False, True, True),
    }
    assert [group.across_parts for group in report.duplicates] == [True, True, False, False]
    worst = report.duplicates[0]
    assert [(place.part, place.labels) for place in worst.places] == [("train", ("dog",)), ("val", ("cat",))]
    assert (report.unreadable, report.mismatches, report.notes) == ((), (), ())


def test_the_same_pixels_in_another_shape_are_no_duplicate(tmp_path):
    for name, size in (("a", (4, 6)), ("b", (6, 4))):
        (tmp_path / name).mkdir()
        Image.new("L", size, 7).save(tmp_path / name / "x.png")
    assert check_data(tmp_path).clean


def test_classes_that_differ(data):
    put(data / "val" / "Dog" / "0.png", 999)
    shutil.rmtree(data / "val" / "dog")
    report = check_data(data)
    assert report.mismatches == (
        "1 class in val but not in train: 'Dog'.",
        "1 class in train but not in val: 'dog'.",
    )
    assert not report.clean


def test_a_set_without_train(data):
    shutil.rmtree(data / "train")
    assert check_data(data).mismatches == ("There is no train part.",)


def test_what_is_left_out_is_a_finding(data):
    (data / "train" / "eel").mkdir()
    report = check_data(data)
    assert not report.clean
    assert report.notes == (f"1 class folder of {data / 'train'} without an image: 'eel'. It is left out.",)


def test_lists_and_several_labels(data):
    rows = "train/cat/0.png,a|b,train\ntrain/cat/1.png,b,train\nval/cat/0.png,a,val\nval/cat/1.png,,val\n"
    (data / "list.csv").write_text(f"path,labels,split\n{rows}")
    shutil.copy(data / "train" / "cat" / "0.png", data / "val" / "cat" / "1.png")
    report = check_data(data / "list.csv")
    assert [part.class_counts for part in report.parts] == [{"a": 1, "b": 2}, {"a": 1, "b": 0}]
    [group] = report.duplicates
    assert [place.labels for place in group.places] == [("a", "b"), ()]
    assert group.labels_differ
    assert report.mismatches == ("1 class in train but not in val: 'b'.",)


def test_shards(tmp_path):
    write_digits(tmp_path / "d", layout="shards", image_size=8)
    report = check_data(tmp_path / "d")
    assert report.clean
    assert {part.part: part.num_images for part in report.parts} == {"train": 1149, "val": 288, "test": 360}
    assert json.loads(json.dumps(report.to_dict()))["parts"][0]["class_counts"]["3"] == 117


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="is empty; it must hold one folder"):
        check_data(tmp_path)
