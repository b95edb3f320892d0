"""Image folders as users have them: nested, mixed, broken, in odd scripts; and what is said of those that are not."""

import logging
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from xcit.data.sources import open_data
from xcit.errors import DataError


def put(path, value=0, size=(6, 5), **options):
    """Write a small grey image whose every pixel is the value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)
    return path


def fill(folder, classes=("cat", "dog"), count=4):
    """Write so many images of each class; their values differ."""
    for label, name in enumerate(classes):
        for i in range(count):
            put(folder / name / f"{i}.png", 10 * label + i)
    return folder


def names_of(images):
    return list(images.names)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_train_and_val_folders(tmp_path):
    fill(tmp_path / "train", ["dog", "cat", "Ant"], 3)
    fill(tmp_path / "val", ["dog", "cat", "Ant"], 2)
    train, val, test, notes = open_data(tmp_path)
    assert train.class_names == val.class_names == ("Ant", "cat", "dog")
    assert train.class_counts.tolist() == [3, 3, 3]
    assert val.class_counts.tolist() == [2, 2, 2]
    assert test is None
    assert notes == ()
    assert names_of(val) == [f"val/{c}/{i}.png" for c in ("Ant", "cat", "dog") for i in range(2)]
    assert val.labels.dtype == np.int64
    image = val.open(3)  # the second cat: class 1 was written second
    assert image.mode == "RGB"
    assert image.size == (6, 5)
    assert image.getpixel((0, 0)) == (11, 11, 11)
    assert open_data(tmp_path, in_chans=1).val.open(3).mode == "L"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_val_by_any_of_its_names_and_test(tmp_path, name):
    for part in ("train", name, "test"):
        fill(tmp_path / part)
    train, val, test, _ = open_data(tmp_path)
    assert len(train) == len(val) == len(test) == 8
    assert names_of(val)[0] == f"{name}/cat/0.png"
    assert names_of(test)[0] == "test/cat/0.png"


def test_train_alone_is_split(tmp_path):
    fill(tmp_path / "train", count=10)
    fill(tmp_path / "test", count=3)
    train, val, test, notes = open_data(tmp_path, val_fraction=0.2)
    assert (train.class_counts.tolist(), val.class_counts.tolist()) == ([8, 8], [2, 2])
    assert len(test) == 6
    assert notes == ("4 of 20 images (20.0%) were split off for validation: by class, with seed 0.",)


def test_imagenets_layout(tmp_path):
    wnids = [f"n{i:08d}" for i in range(1000)]
    pixels = put(tmp_path / "one.png").read_bytes()
    for part in ("train", "val"):
        for wnid in wnids:
            path = tmp_path / "data" / part / wnid / f"{wnid}_1.JPEG"
            path.parent.mkdir(parents=True)
            path.write_bytes(pixels)
    train, val, _, notes = open_data(tmp_path / "data")
    assert train.class_names == val.class_names == tuple(wnids)
    assert train.labels.tolist() == list(range(1000))
    assert notes == ()


def test_nested_mixed_unicode_linked_and_hidden(tmp_path):
    data = tmp_path / "data"
    for kind in ("Käfer", "蝶"):
        put(data / kind / "a.JPG", 1)
        put(data / kind / "2024" / "deep" / "b.WebP", 2, lossless=True)
        put(data / kind / "2024" / "ç d.TIFF", 3)
        put(data / kind / ".hidden" / "c.png")
        put(data / kind / ".c.png")
    put(tmp_path / "elsewhere" / "linked.png", 4)
    (data / "Käfer" / "more").symlink_to(tmp_path / "elsewhere")
    (data / "Käfer" / "loop").symlink_to(data / "Käfer")
    (data / "蝶" / "linked.png").symlink_to(tmp_path / "elsewhere" / "linked.png")
    put(data / ".thumbs" / "d.png")
    train, val, _, _ = open_data(data, val_fraction=0.25)
    assert train.class_names == ("Käfer", "蝶")
    assert sorted([*train.names, *val.names]) == sorted(
        f"{kind}/{name}"
        for kind, names in {
            "Käfer": ["a.JPG", "2024/deep/b.WebP", "2024/ç d.TIFF", "more/linked.png"],
            "蝶": ["a.JPG", "2024/deep/b.WebP", "2024/ç d.TIFF", "linked.png"],
        }.items()
        for name in names
    )
    for part in (train, val):
        for i in range(len(part)):
            part.open(i)


def test_names_that_are_not_utf8(tmp_path):
    fill(tmp_path)
    try:
        (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    train, val, _, _ = open_data(tmp_path)
    images = {name: part.open(i) for part in (train, val) for i, name in enumerate(part.names)}
    assert images[os.fsdecode(b"cat/\xff.png")].getpixel((0, 0)) == (0, 0, 0)


def test_accents_in_two_spellings_are_one_class(tmp_path):
    """macOS writes é as two characters, others as one: a set that was copied part by part has both."""
    fill(tmp_path / "train", [unicodedata.normalize("NFD", "café"), "thé"])
    fill(tmp_path / "val", [unicodedata.normalize("NFC", "café"), "thé"])
    train, val, _, notes = open_data(tmp_path)
    assert train.class_names == val.class_names == ("café", "thé")
    assert notes == ()
    if len(list((tmp_path / "train").iterdir())) == 2:
        fill(tmp_path / "train", [unicodedata.normalize("NFC", "café")])
        if len(list((tmp_path / "train").iterdir())) == 3:
            with pytest.raises(DataError, match="two folders are called 'café', in two spellings"):
                open_data(tmp_path)


def test_classes_that_are_called_like_parts(tmp_path):
    fill(tmp_path, ["car", "plane", "train"])
    assert open_data(tmp_path).train.class_names == ("car", "plane", "train")
    put(tmp_path / "ship" / "a.png")
    for i in range(4):
        (tmp_path / "train" / f"{i}.png").rename(put(tmp_path / "train" / f"steam{i}" / "x.png"))
    with pytest.raises(DataError, match=r"'train' may be a part or a class, next to 'car', 'plane', 'ship'"):
        open_data(tmp_path)


def test_a_warty_folder_opens_and_says_what_is_left_out(tmp_path):
    """The acceptance: 5 % broken, an empty class, nested folders, mixed endings, unicode names."""
    for c, name in enumerate(["été", "hiver", "春"]):
        for i in range(40):
            ending = ["png", "jpg", "BMP", "webp"][i % 4]
            put(tmp_path / name / f"set {i % 3}" / f"{i}.{ending}", c * 40 + i)
        (tmp_path / name / "set 0" / "0.png").write_bytes(b"")
        (tmp_path / name / "set 1" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hiver" / "notes.txt").write_text("cold")
    put(tmp_path / "loose.png")
    train, val, _, notes = open_data(tmp_path, val_fraction=0.1)
    assert train.class_names == ("hiver", "été", "春")
    assert len(train) + len(val) == 120
    assert notes == (
        f"1 class folder of {tmp_path} without an image: 'empty'. It is left out.",
        f"1 image beside the class folders of {tmp_path} left out: 'loose.png'.",
        f"1 file below {tmp_path} left out, being no images by their ending: '.txt'.",
        "12 of 120 images (10.0%) were split off for validation: by class, with seed 0.",
    )
    bad = []
    for part in (train, val):
        for i, name in enumerate(part.names):
            try:
                part.open(i)
            except DataError as error:
                bad.append((name, str(error).startswith(f"{tmp_path / name}: ")))
    expected = [f"{c}/{f}" for c in train.class_names for f in ("set 0/0.png", "set 1/1.jpg")]
    assert sorted(bad) == sorted((name, True) for name in expected)


def test_folders_beside_the_parts_are_noted(tmp_path):
    for part in ("train", "val", "old"):
        fill(tmp_path / part)
    assert open_data(tmp_path).notes == (f"1 folder of {tmp_path} beside its parts stay unused: 'old'.",)


# --- classes that differ ----------------------------------------------------------------------------------------------


def test_val_with_a_class_that_train_lacks(tmp_path):
    fill(tmp_path / "train", ["cat", "dog"])
    fill(tmp_path / "val", ["cat", "Dog"])
    with pytest.raises(DataError, match=r"val has 1 class without an image in train: 'Dog' \(train has 'cat', 'dog'\)"):
        open_data(tmp_path)


def test_val_with_a_class_that_is_empty_in_train(tmp_path):
    fill(tmp_path / "train", ["cat", "dog"])
    (tmp_path / "train" / "eel").mkdir()
    fill(tmp_path / "val", ["cat", "dog", "eel"])
    with pytest.raises(DataError, match="val has 1 class without an image in train: 'eel'"):
        open_data(tmp_path)


def test_val_may_lack_classes(tmp_path):
    fill(tmp_path / "train", ["ant", "bee", "cat"])
    fill(tmp_path / "val", ["cat"])
    _, val, _, notes = open_data(tmp_path)
    assert val.labels.tolist() == [2] * 4
    assert notes == ("val has no image of 2 classes: 'ant', 'bee'.",)


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(root, **options):
    with pytest.raises(DataError) as caught:
        open_data(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refusals(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty) == f"{empty}: is empty; it must hold one folder of images a class."

    flat = tmp_path / "flat"
    put(flat / "a.png")
    assert refusal(flat).startswith(f"{flat}: holds 1 image but no folder of a class. Sort them")

    hollow = tmp_path / "hollow"
    (hollow / "cat").mkdir(parents=True)
    assert refusal(hollow) == f"{hollow}: holds no image; its class folders are empty ('cat')."

    heic = tmp_path / "heic"
    (heic / "cat").mkdir(parents=True)
    (heic / "cat" / "a.heic").write_bytes(b"x")
    assert refusal(heic).startswith(f"{heic}: holds no image; its files end in '.heic', and images in .apng, ")

    one = fill(tmp_path / "one", ["cat"])
    assert refusal(one) == f"{one}: all images are of one class ('cat'); there is nothing to learn."

    lonely = fill(tmp_path / "lonely", count=1)
    assert "2 images in 2 classes cannot be divided for training and validation" in refusal(lonely)

    untrained = tmp_path / "untrained"
    fill(untrained / "val")
    assert "has val but no train part; name the folder above" in refusal(untrained)

    raw = tmp_path / "raw"
    fill(raw / "train")
    put(raw / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert refusal(raw).startswith(f"{raw / 'val'}: holds 1 image but no folder of a class.")

    twice = tmp_path / "twice"
    for part in ("train", "val", "valid"):
        fill(twice / part)
    assert refusal(twice) == f"{twice}: 'val', 'valid' would all be the val part; leave one of them."

    file = put(tmp_path / "a.png")
    assert refusal(file, format="folder") == f"{file}: is not a folder of images."
    assert refusal(file) == f"{file}: is a file, but neither a list (.csv, .tsv) nor a shard (.tar)."
    assert refusal(tmp_path / "emty") == f"{tmp_path / 'emty'}: is not there; did you mean {str(empty)!r}?"
    assert refusal(tmp_path / "no" / "such").endswith(f"nor is the folder {str(tmp_path / 'no')!r}.")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="here everything may be read")
def test_a_folder_that_may_not_be_read(tmp_path):
    fill(tmp_path)
    (tmp_path / "cat").chmod(0)
    try:
        assert refusal(tmp_path) == f"{tmp_path / 'cat'}: cannot be read: Permission denied."
    finally:
        (tmp_path / "cat").chmod(0o700)


def test_the_layout_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="xcit"):
        open_data(fill(tmp_path))
    assert caplog.messages == [f"{tmp_path} is read as an image folder."]
