"""Parts of a set with masks: found where people put them, refused where they do not fit together."""

import numpy as np
import pytest
from PIL import Image

from xcit.data.mask_parts import open_mask_parts
from xcit.data.mask_set import IGNORE
from xcit.data.scene_sets import PALETTE, SEMANTIC_CLASSES, semantic_mask, write_scenes
from xcit.data.scenes import compose_scene, scene_seed
from xcit.errors import DataError


def write(images, masks, num=4, value=1, suffix=".png"):
    """Pairs whose masks hold 0 above and a value below."""
    for i in range(num):
        for folder, pixels, ending in (
            (images, np.full((6, 8, 3), 10 * i), suffix),
            (masks, np.repeat([[0], [value]], [2, 4], axis=0).repeat(8, axis=1), ".png"),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}{ending}")


def classes(root, text="ground\nroad\n"):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text(text)


@pytest.mark.parametrize(
    "places",
    [
        ("train/images train/masks", "val/images val/masks", "test/images test/masks"),
        ("train/images train/masks", "valid/images valid/masks", None),
        ("images/training masks/training", "images/validation masks/validation", "images/testing masks/testing"),
        ("train/images train/masks", "images/val masks/val", None),
    ],
)
def test_layouts(tmp_path, places):
    classes(tmp_path)
    for number, place in enumerate(places):
        if place:
            write(*(tmp_path / folder for folder in place.split()), num=4 + number, suffix=".jpg")
    train, val, test, notes = open_mask_parts(tmp_path)
    assert (len(train), len(val)) == (4, 5)
    assert (len(test) if test else None) == (6 if places[2] else None)
    assert notes == ()
    assert val.class_names == ("ground", "road")
    assert val.label_set is None
    assert np.unique(val.open_mask(0), return_counts=True)[1].tolist() == [16, 32]
    assert val.open(3).size == (8, 6)
    assert str(val.path(0)).startswith(str(tmp_path / places[1].split()[0]))


@pytest.mark.parametrize("folder", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, folder):
    root = tmp_path / folder
    write(root / "images" / "training", root / "annotations" / "training", value=150, suffix=".jpg")
    write(root / "images" / "validation", root / "annotations" / "validation", num=2, suffix=".jpg")
    train, val, test, notes = open_mask_parts(tmp_path)
    assert (len(train), len(val), test, notes) == (4, 2, None, ())
    assert (train.label_set, len(train.class_names), train.palette.shape) == ("ade20k", 150, (150, 3))
    assert np.unique(train.open_mask(0)).tolist() == [IGNORE, 149]  # flag
    assert np.unique(val.open_mask(0)).tolist() == [IGNORE, 0]  # wall
    Image.fromarray(np.full((6, 8), 151, np.uint8)).save(root / "annotations" / "validation" / "0.png")
    with pytest.raises(
        DataError, match=r"has the value 151 in 48 pixels, but ADE20k has the values 0 \(ignored\) to 150"
    ):
        val.open_mask(0)


def test_ade20k_without_validation(tmp_path):
    write(tmp_path / "images" / "training", tmp_path / "annotations" / "training", num=10)
    assert [len(part) for part in open_mask_parts(tmp_path)[:2]] == [9, 1]


def test_a_list_of_classes_makes_it_the_users_own(tmp_path):
    write(tmp_path / "images" / "training", tmp_path / "annotations" / "training")
    classes(tmp_path)
    with pytest.raises(DataError, match="masks/training: there is no such folder"):
        open_mask_parts(tmp_path)


def test_images_are_set_aside_where_there_is_no_part(tmp_path):
    classes(tmp_path)
    write(tmp_path / "images" / "a", tmp_path / "masks" / "a", num=20)
    a, b, c = (open_mask_parts(tmp_path, val_fraction=0.25, split_seed=seed) for seed in (0, 0, 1))
    assert (len(a.train), len(a.val), a.test) == (15, 5, None)
    assert not set(a.train.names) & set(a.val.names)
    assert list(a.val.names) == list(b.val.names) != list(c.val.names)
    assert "5 training images were set aside" in " ".join(a.notes)
    for images in (a.train, a.val):  # masks go with their images
        assert [name[-5:] for name in images.names] == [name[-5:] for name in images.mask_names]
    assert len(open_mask_parts(tmp_path).val) == 2


def test_the_scenes_open_as_they_are_written(tmp_path):
    write_scenes(tmp_path / "s", 10, 3, seed=5)
    train, val, test, _ = open_mask_parts(tmp_path / "s")
    assert (len(train), len(val), len(test)) == (9, 1, 3)
    assert train.class_names == SEMANTIC_CLASSES
    scene = compose_scene(scene_seed(5, 2), "test")
    image, mask = test.open_pair(2)
    np.testing.assert_array_equal(np.asarray(image), scene.image)
    np.testing.assert_array_equal(mask, semantic_mask(scene))
    text = "".join(
        "{} {} {} {}\n".format(*pair) for pair in zip("abcdefghijk", *zip(*PALETTE, strict=True), strict=True)
    )
    (tmp_path / "s" / "classes.txt").write_text(text)  # the colours of their palette: read by these, to the same
    np.testing.assert_array_equal(open_mask_parts(tmp_path / "s").test.open_mask(2), mask)


def test_files_without_their_other(tmp_path):
    classes(tmp_path)
    write(tmp_path / "images", tmp_path / "masks", num=20)
    (tmp_path / "masks" / "7.png").unlink()
    (tmp_path / "images" / "9.png").unlink()
    splits = open_mask_parts(tmp_path)
    assert len(splits.train) + len(splits.val) == 18
    assert "images: 1 of 19 images have no mask of that name: 'images/7.png'. They are left out." in splits.notes[0]
    assert "masks: 1 of 19 masks have no image of that name: 'masks/9.png'." in splits.notes[1]
    for i in (10, 11):
        (tmp_path / "masks" / f"{i}.png").rename(tmp_path / "masks" / f"{i}_mask.png")
    with pytest.raises(DataError, match=r"3 of 19 images have no mask .*called the same but for the ending"):
        open_mask_parts(tmp_path)


def test_two_files_of_one_name(tmp_path):
    classes(tmp_path)
    write(tmp_path / "images", tmp_path / "masks")
    write(tmp_path / "images", tmp_path / "masks", num=1, suffix=".jpg")
    with pytest.raises(DataError, match=r"images/0\.jpg, images/0\.png differ in their ending alone"):
        open_mask_parts(tmp_path)


def test_a_part_without_masks(tmp_path):
    classes(tmp_path)
    write(tmp_path / "train" / "images", tmp_path / "train" / "masks")
    write(tmp_path / "test" / "images", tmp_path / "other")
    splits = open_mask_parts(tmp_path)
    assert splits.test is None
    assert "test is left out: there is" in splits.notes[0]


@pytest.mark.parametrize(
    ("folders", "match"),
    [
        ((), "neither images and masks, nor train/images"),
        (("images",), "neither images and masks"),
        (("val/images", "val/masks"), "has val, but no part to train on"),
        (("train/images",), "train/masks: there is no such folder, but"),
        (("train/images", "train/masks", "images/train", "masks/train"), "are both there for train; leave one"),
        (("val/images", "valid/images", "train/images", "train/masks"), "are both there for val"),
        (("images", "masks"), "images' holds no image"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, folders, match):
    classes(tmp_path)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=match):
        open_mask_parts(tmp_path)


def test_no_set_at_all(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        open_mask_parts(tmp_path / "nowhere")
    write(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(DataError, match=r"holds no classes\.txt, which names the classes .*nor is it ADE20k"):
        open_mask_parts(tmp_path)
    classes(tmp_path)
    with pytest.raises(DataError, match=r"classes\.txt: is a file; name the folder"):
        open_mask_parts(tmp_path / "classes.txt")
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="masks' holds no image"):
        open_mask_parts(tmp_path)


def test_too_few(tmp_path):
    classes(tmp_path)
    write(tmp_path / "images", tmp_path / "masks", num=1)
    with pytest.raises(DataError, match="has 1 image with a mask, of which none would be left"):
        open_mask_parts(tmp_path)


def test_masks_that_say_nothing(tmp_path):
    classes(tmp_path)
    write(tmp_path / "images", tmp_path / "masks", value=2)
    with pytest.raises(
        DataError, match=r"None of 4 masks that were tried can be used\. The first: .*0\.png: has the v"
    ):
        open_mask_parts(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.full((6, 8), 255, np.uint8)).save(path)
    with pytest.raises(DataError, match="in the 4 masks that were tried every pixel is ignored"):
        open_mask_parts(tmp_path)


def test_white_that_may_be_a_class(tmp_path):
    classes(tmp_path)
    write(tmp_path / "images", tmp_path / "masks", value=255)
    (note, _) = open_mask_parts(tmp_path).notes
    assert "there is 'ground' alone, and all else is ignored. If white stands for a class" in note
    classes(tmp_path, "ground 0 0 0\nroad 255 255 255\n")
    splits = open_mask_parts(tmp_path)
    assert len(splits.notes) == 1
    assert np.unique(splits.val.open_mask(0)).tolist() == [0, 1]
