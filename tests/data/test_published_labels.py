"""Published test labels for ImageNet's classes: ReaL's file, and ImageNet-V2's numbered folders."""

import json

import pytest

from xcit.data.labels import imagenet_names
from xcit.data.published_labels import match_real_labels, read_real_labels
from xcit.data.sources import open_eval_set
from xcit.errors import DataError


def test_imagenet_v2_goes_by_number_not_by_the_order_of_text(tmp_path):
    """As text, 10 comes before 2: counting sorted folders would get 988 of 1,000 classes wrong."""
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x.jpeg").touch()
    images = open_eval_set(tmp_path, class_names=imagenet_names())
    assert images.class_names == tuple(imagenet_names())
    assert sorted(images.labels.tolist()) == list(range(1000))
    assert all(name.endswith(f"{label}/x.jpeg") for name, label in zip(images.names, images.labels, strict=True))
    assert {name.split("/")[-2] for name in images.names} == {str(label) for label in range(1000)}


# --- ReaL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_file(tmp_path):
    """Image i (from 1) has the label i mod 1000; image 2 has two, image 3 none."""
    labels = [[i % 1000] for i in range(1, 50_001)]
    labels[1], labels[2] = [7, 8], []
    path = tmp_path / "real.json"
    path.write_text(json.dumps(labels))
    return path


def test_labels_go_by_the_number_in_the_name(real_file):
    labels = read_real_labels(real_file)
    names = ["n2/ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00050000.JPEG", "a\\ILSVRC2012_val_00000003_n3.png"]
    assert match_real_labels(labels, names) == [(7, 8), (0,), ()]


@pytest.mark.parametrize(
    "name",
    ["cat.jpg", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00000002/cat.jpg",
     "ILSVRC2012_val_000000021.JPEG"],
)  # fmt: skip
def test_other_images_are_refused(real_file, name):
    with pytest.raises(DataError, match="validation images alone"):
        match_real_labels(read_real_labels(real_file), [name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1], [2]]", "a list of 2; ReaL"),
        ("{}", "a JSON dict"),
        ("no json", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (json.dumps([[1000]] * 50_000), r"image 1 has \[1000\]"),
        (json.dumps([[1]] * 49_999 + [["cat"]]), r"image 50000 has \['cat'\]"),
        (json.dumps([1] * 50_000), "image 1 has 1;"),
        (json.dumps([[True]] * 50_000), r"image 1 has \[True\]"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "real.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_real_labels(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_real_labels(tmp_path / "real.json")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_real_labels(tmp_path)
