"""Checking images and masks: each fault is found, named and counted, and what is sound is counted exactly."""

import json

import numpy as np
import pytest
from PIL import Image

from xcit.data.mask_check import TITLES, check_masks
from xcit.errors import DataError


def write(root, part, name, values, image=None):
    for folder in ("images", "masks"):
        (root / part / folder).mkdir(parents=True, exist_ok=True)
    values = np.array(values, dtype=np.uint8)
    size = values.shape[1::-1] if image is None else image
    Image.new("RGB", size, "red").save(root / part / "images" / f"{name}.png")
    Image.fromarray(values).save(root / part / "masks" / f"{name}.png")


@pytest.fixture
def clean(tmp_path):
    (tmp_path / "classes.txt").write_text("ground\nroad\ntree\n")
    write(tmp_path, "train", "a", [[0, 0, 1, 255], [0, 0, 2, 255]])
    write(tmp_path, "train", "b", [[0, 0, 0, 0, 1]])
    write(tmp_path, "val", "a", [[2, 2], [1, 255], [0, 0]])
    return tmp_path


def test_counts(clean):
    seen = []
    report = check_masks(clean, on_total=seen.append, on_image=lambda: seen.append("."))
    assert seen == [3, ".", ".", "."]
    assert report.clean
    assert report.label_set is None
    train, val = report.parts
    assert (train.part, train.num_images, train.num_usable, train.num_pixels, train.ignored_pixels) == (
        "train", 2, 2, 13, 2,
    )  # fmt: skip
    assert train.class_pixels == {"ground": 8, "road": 2, "tree": 1}
    assert train.class_images == {"ground": 2, "road": 2, "tree": 1}
    assert train.share("ground") == 8 / 11
    assert (val.ignored_pixels, val.class_pixels) == (1, {"ground": 2, "road": 1, "tree": 2})
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["parts"][0]["class_shares"]["tree"] == 1 / 11
    assert plain["findings"] == []
    assert plain["counts"] == {}


def faults(root):
    return {(finding.kind, finding.part): finding.text for finding in check_masks(root).findings}


def test_each_fault(clean):
    train = clean / "train"
    Image.new("RGB", (2, 2)).save(train / "images" / "bare.png")
    Image.new("L", (2, 2)).save(train / "masks" / "orphan.png")
    write(clean, "train", "both", [[0]])
    Image.new("L", (1, 1)).save(train / "masks" / "both.tif")
    write(clean, "train", "image", [[0]])
    (train / "images" / "image.png").write_bytes(b"nothing")
    write(clean, "train", "mask", [[0]])
    (train / "masks" / "mask.png").write_bytes(b"")
    write(clean, "train", "lossy", [[0]])
    (train / "masks" / "lossy.png").unlink()
    Image.new("L", (1, 1)).save(train / "masks" / "lossy.jpg")
    write(clean, "train", "float", [[0]])
    Image.new("F", (1, 1)).save(train / "masks" / "float.png", format="TIFF")
    write(clean, "train", "size", [[0, 1]], image=(3, 4))
    write(clean, "train", "values", [[0, 3], [4, 255]])
    write(clean, "val", "empty", [[255, 255]])
    found = faults(clean)
    expected = {
        ("mask-missing", "train"): "train/images/bare.png: there is no mask",
        ("image-missing", "train"): "train/masks/orphan.png: there is no image",
        ("ambiguous", "train"): "train/masks/both.png, train/masks/both.tif differ",
        ("image-unreadable", "train"): "train/images/image.png: is not an image",
        ("mask-unreadable", "train"): "train/masks/mask.png: is empty",
        ("mask-lossy", "train"): "train/masks/lossy.jpg: is a JPEG",
        ("mask-kind", "train"): "train/masks/float.png: has floating-point",
        ("mask-values", "train"): "train/masks/values.png: has the values 3, 4 in 2 pixels",
        ("mask-size", "train"): "train/masks/size.png: is 2 x 1 px, but its image train/images/size.png is 3 x 4 px",
        ("mask-ignored", "val"): "val/masks/empty.png: every pixel is ignored",
    }
    assert list(found) == list(expected)  # in the order of their titles
    assert {kind for kind, _ in found} == set(TITLES) - {"class-empty", "class-untrained"}
    for key, text in expected.items():
        assert text in found[key]
    report = check_masks(clean)
    assert not report.clean
    assert report.counts() == {kind: 1 for kind, _ in expected}
    assert (report.parts[0].num_images, report.parts[0].num_usable) == (8, 2)
    assert report.parts[0].num_pixels == 13  # what cannot be used is not counted
    assert report.parts[1].ignored_pixels == 3


def test_classes(clean):
    (clean / "classes.txt").write_text("ground\nroad\ntree\nsky\nsea\n")
    write(clean, "val", "b", [[3, 3]])
    assert faults(clean) == {
        ("class-empty", "all"): "'sea': no pixel is of this class.",
        ("class-untrained", "val"): "'sky': is in 1 of the val images, but cannot be learnt from train.",
    }


def test_a_set_that_is_not_divided(tmp_path):
    (tmp_path / "classes.txt").write_text("ground\nroad\n")
    write(tmp_path, ".", "a", [[0, 1]])
    (part,) = check_masks(tmp_path).parts
    assert (part.part, part.num_images) == ("all", 1)
    (tmp_path / "masks" / "a.png").write_bytes(b"x")
    assert [finding.kind for finding in check_masks(tmp_path).findings] == ["mask-unreadable"]


def test_ade20k(tmp_path):
    for part in ("training", "validation"):
        write(tmp_path, ".", part, [[0, 1], [150, 2]])
        for folder, other in (("images", "images"), ("masks", "annotations")):
            (tmp_path / other / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"{part}.png").rename(tmp_path / other / part / "a.png")
    report = check_masks(tmp_path)
    assert report.label_set == "ade20k"
    assert report.counts() == {"class-empty": 147}
    assert report.parts[1].class_images["flag"] == 1


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        check_masks(tmp_path / "x")
    (tmp_path / "classes.txt").write_text("ground\nroad\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        check_masks(tmp_path)
