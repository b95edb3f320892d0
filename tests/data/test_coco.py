"""COCO files of instances: what is read and what is refused."""

import builtins
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from xcit.data.coco import clip_box, open_coco, read_coco
from xcit.errors import BackendError, DataError

H, W = 40, 60


def picture(path, size=(W, H), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def image(number, name=None, size=(W, H)):
    return {"id": number, "file_name": name or f"{number}.png", "width": size[0], "height": size[1]}


def annotation(number, image_id, category_id, bbox, **others):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **others}


SQUARE = [[10, 5, 20, 5, 20, 15, 10, 15]]


def content():
    return {
        "info": {"year": 2024},
        "images": [image(7), image(3), image(5)],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 2, "name": "ant"}, {"id": 17, "name": "cow"}],
        "annotations": [
            annotation(100, 5, 90, [10, 5, 10, 10], area=100.0, iscrowd=0, segmentation=SQUARE),
            annotation(101, 7, 2, [0.5, 1.25, 30, 20], area=12.5, iscrowd=0),
            annotation(102, 5, 17, [0, 0, 60, 40], iscrowd=1, segmentation={"size": [H, W], "counts": [0, H * W]}),
        ],
    }


@pytest.fixture
def save(tmp_path):
    """Write a content and its three images, and return the file."""

    def saved(data, name="set.json"):
        for one in data["images"] if isinstance(data, dict) else []:
            picture(tmp_path / one["file_name"], (one["width"], one["height"]), one["id"])
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return saved


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_a_file_holds(save, tmp_path):
    coco = open_coco(save(content()))
    assert len(coco) == 3
    assert coco.root == str(tmp_path)
    assert coco.class_names == ("ant", "cow", "zebra")
    assert coco.category_ids.tolist() == [2, 17, 90]
    assert coco.image_ids.tolist() == [7, 3, 5]
    assert list(coco.file_names) == ["7.png", "3.png", "5.png"]
    assert coco.class_counts.tolist() == [1, 1, 1]
    assert (coco.left_out, coco.notes, coco.has_masks) == ({}, (), True)
    first, none, last = (coco.instances(i) for i in range(3))
    assert first.boxes.tolist() == [[0.5, 1.25, 30.5, 21.25]]
    assert (first.labels.tolist(), first.areas.tolist(), first.ids.tolist()) == ([0], [12.5], [101])
    assert first.has_mask.tolist() == [False]
    assert first.masks.shape == (1, H, W)
    assert not first.masks.any()
    assert last.labels.tolist() == [2, 1]
    assert last.crowd.tolist() == [False, True]
    assert last.areas.tolist() == [100.0, H * W]  # the second is computed
    assert last.masks.sum(axis=(1, 2)).tolist() == [100, H * W]
    assert last.has_mask.all()
    types = {name: getattr(last, name).dtype.name for name in last._fields}
    assert types == {
        "boxes": "float32", "labels": "int64", "masks": "uint8", "has_mask": "bool", "crowd": "bool",
        "areas": "float64", "ids": "int64",
    }  # fmt: skip
    assert (none.boxes.shape, none.masks.shape, none.ids.shape) == ((0, 4), (0, H, W), (0,))
    assert coco.instances(-1).ids.tolist() == [100, 102]
    assert coco.instances(2, masks=False).masks is None
    with pytest.raises(IndexError):
        coco.instances(3)
    np.testing.assert_array_equal(np.asarray(coco.open(1)), picture(tmp_path / "x.png", seed=3))


def test_a_copy_is_equal_and_the_arrays_are_not_shared(save):
    coco = open_coco(save(content()))
    copy = pickle.loads(pickle.dumps(coco))
    coco.instances(2).boxes[:] = -1  # whoever scales boxes in place must not scale the set's
    for i in range(3):
        for ours, theirs in zip(coco.instances(i), copy.instances(i), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert (coco.boxes >= 0).all()
    assert list(copy.file_names) == list(coco.file_names)


def test_a_million_annotations_weigh_little(save):
    data = content()
    data["annotations"] = [annotation(i, 7, 2, [1, 2, 3, 4], area=12) for i in range(2000)]
    assert len(pickle.dumps(open_coco(save(data)))) < 2000 * 60


def test_boxes_are_clipped_and_empty_ones_left_out(save):
    rng = np.random.default_rng(0)
    boxes = np.round(rng.uniform([-30, -30, -5, -5], [90, 70, 80, 60], (300, 4)), 1).tolist()
    boxes += [[59, 39, 1, 1], [0, 0, 60, 40], [-10, 0, 10, 5], [60, 0, 5, 5], [5, 5, 1, 1], [59.9999999, 0, 1e-9, 5]]
    data = content()
    data["annotations"] = [annotation(i + 1, 3, 2, box) for i, box in enumerate(boxes)]
    coco = open_coco(save(data))
    found = coco.instances(1)
    expected = {}
    for i, (x, y, w, h) in enumerate(boxes):
        x0, x1 = sorted((0, W, x))[1], sorted((0, W, x + w))[1]
        y0, y1 = sorted((0, H, y))[1], sorted((0, H, y + h))[1]
        if w > 0 and h > 0 and x1 - x0 > 1e-6 and y1 - y0 > 1e-6:
            expected[i + 1] = [x0, y0, x1, y1]
    assert found.ids.tolist() == list(expected)
    np.testing.assert_allclose(found.boxes, list(expected.values()), rtol=1e-6)
    assert 100 < len(expected) < 250
    assert coco.left_out == {"whose box has no area inside its image": len(boxes) - len(expected)}
    sides = found.boxes[:, 2:].astype(float) - found.boxes[:, :2]
    np.testing.assert_array_equal(found.areas, sides[:, 0] * sides[:, 1])
    assert not coco.has_masks
    assert found.masks is None
    assert not found.has_mask.any()
    assert clip_box([5, 5, 1, 1], H, W) == (5, 5, 6, 6)


def test_what_cannot_be_used_is_counted(save):
    data = content()
    data["annotations"] += [
        annotation(1, 99, 2, [1, 1, 5, 5]),
        annotation(2, 3, 99, [1, 1, 5, 5]),
        annotation(3, True, 2, [1, 1, 5, 5]),
        annotation(4, 3, 2, [1, 1, 5]),
        annotation(5, 3, 2, [1, 1, float("nan"), 5]),
        annotation(6, 3, 2, [1, 1, "5", 5]),
        annotation(7, 3, 2, None),
        "nothing",
        annotation(8, 3, 2, [1, 1, -5, 5]),
        annotation(9, 3, 2, [1, 1, 5, 5], segmentation=[[1, 2, 3, 4], [1, 1, 6, 1, 6, 6]]),
        annotation(10, 3, 2, [1, 1, 5, 5], segmentation={"size": [W, H], "counts": [H * W]}),
        annotation(11, 3, 2, [1, 1, 5, 5], segmentation=[]),
        annotation(12, 3, 2, [1, 1, 5, 5], area=float("nan")),
        annotation(100, 3.0, 2.0, [1, 1, 5, 5], area=-1),
    ]
    data["categories"].append({"id": 4, "name": "none"})
    coco = open_coco(save(data))
    assert coco.left_out == {
        "of an image that is not listed": 3,
        "of a category that is not listed": 1,
        "without a box of four numbers": 4,
        "whose box has no area inside its image": 1,
    }
    found = coco.instances(1)
    assert found.has_mask.tolist() == [True, False, False, False, False]
    assert found.areas.tolist() == [found.masks[0].sum(), 25, 25, 25, 25]
    assert coco.ids.tolist() == list(range(1, 9))  # two had the id 100
    assert [note.partition(": ")[2] for note in coco.notes] == [
        "left out 3 annotations of an image that is not listed.",
        "left out 1 annotation of a category that is not listed.",
        "left out 4 annotations without a box of four numbers.",
        "left out 1 annotation whose box has no area inside its image.",
        "2 segmentations cannot be used, in part or at all; the boxes are.",
        "annotations without an id of their own; all are numbered anew from 1.",
        "1 class without an instance: 'none'.",
    ]


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("set.json", "."),
        ("set.json", "images"),
        ("set.json", "set"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/instances_val2017.json", "annotations"),
        ("annotations/person_keypoints_a.json", "a"),
        ("annotations/train.json", "train"),
        ("labels/coco.json", "images"),
        ("labels/coco.json", "."),
    ],
)
def test_where_images_are_found(tmp_path, monkeypatch, file, folder):
    data = content()
    for name in ("3.png", "5.png"):  # 7.png is missing
        picture(tmp_path / folder / name)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))
    coco = open_coco(path)
    assert coco.path(1).samefile(tmp_path / folder / "3.png")
    assert coco.missing_images() == ["7.png"]
    with pytest.raises(DataError, match=r"7\.png: there is no such file"):
        coco.open(0)
    monkeypatch.chdir(path.parent)
    assert open_coco(path.name).path(1).samefile(tmp_path / folder / "3.png")


def test_the_place_with_most_images_is_taken(tmp_path, save):
    file = save(content())
    (tmp_path / "3.png").unlink()
    for name in ("7.png", "3.png", "5.png"):
        picture(tmp_path / "images" / name)
    assert open_coco(file).root == str(tmp_path / "images")
    assert open_coco(file, tmp_path).root == str(tmp_path)
    (tmp_path / "other").mkdir()
    assert len(open_coco(file, tmp_path / "other").missing_images()) == 3
    with pytest.raises(DataError, match="is not a folder; name the one that the file names in"):
        open_coco(file, tmp_path / "nowhere")


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_oriented_as_their_annotations(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(tmp_path / "7.png", exif=exif)
    # the EXIF standard: where row 0 and column 0 of the stored pixels lie in the upright image
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.transpose(1, 0, 2), 6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2), 8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]  # fmt: skip
    for pixels, expected in ((upright, upright), (stored, stored if orientation > 4 else upright)):
        size = pixels.shape[1], pixels.shape[0]
        data = content() | {"images": [image(7, size=size)], "annotations": [annotation(1, 7, 2, [1, 1, 5, 5])]}
        (tmp_path / "set.json").write_text(json.dumps(data))
        np.testing.assert_array_equal(np.asarray(open_coco(tmp_path / "set.json").open(0)), expected)


@pytest.mark.parametrize("size", [(H, W), (W, H + 1), (2 * W, 2 * H)])
def test_another_size_is_refused(tmp_path, save, size):
    file = save(content())
    picture(tmp_path / "3.png", size)
    with pytest.raises(
        DataError, match=rf"3\.png: is {size[0]} x {size[1]} px, but its annotations are for 60 x 40 px"
    ):
        open_coco(file).open(1)


def test_without_the_library(save, monkeypatch):
    from xcit.data.coco_masks import mask_api

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("faster_coco_eval"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    mask_api.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    coco = open_coco(save(content()))
    with pytest.raises(BackendError, match=r'pip install "xcit\[detection\]"'):
        coco.instances(2)
    boxes_only = content()
    for one in boxes_only["annotations"]:
        one.pop("segmentation", None)
    assert open_coco(save(boxes_only)).instances(2).ids.tolist() == [100, 102]


# --- refused ----------------------------------------------------------------------------------------------------------


def without(*keys):
    return {key: value for key, value in content().items() if key not in keys}


def changed(key, position, **values):
    data = content()
    data[key][position] = {k: v for k, v in (data[key][position] | values).items() if v is not None}
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "is a list of results"),
        ([], "is a list of values"),
        (5, "holds 5, but annotations of instances are an object"),
        (without("images"), "has no images"),
        (without("images", "categories"), "has no images and no categories"),
        (without("annotations"), "lists images without annotations, as lists of test images do"),
        ({"images": [image(1)], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}, "holds captions, without"),
        (content() | {"annotations": [{"id": 1, "image_id": 7, "keypoints": [1, 2, 2]}]}, "holds keypoints only"),
        (content() | {"annotations": [{"image_id": 7, "segments_info": []}]}, "holds panoptic maps"),
        (content() | {"annotations": {}}, "has no annotations"),
        (content() | {"images": []}, "its list of images is empty"),
        (content() | {"categories": []}, "its list of categories is empty"),
        (content() | {"annotations": []}, "none of its 0 annotations can be used"),
        (content() | {"annotations": [annotation(1, 9, 2, [1, 1, 2, 2])] * 2}, "none of its 2 annotations can be used; "
         "2 of an image that is not listed"),
        (changed("images", 1, id=7), "image 2 of 3 has the id 7 of another. xcit data check-coco FILE"),
        (changed("images", 1, id="3"), "image 2 of 3 has the id '3', not a whole number"),
        (changed("images", 1, file_name=""), "image 2 of 3 has the file name ''"),
        (changed("images", 1, file_name="a\0b"), "image 2 of 3 has the file name"),
        (changed("images", 1, file_name="\ud800"), "image 2 of 3 has the file name"),
        (changed("images", 1, height=None), r"image 2 of 3 \(3.png\) has the height missing and the width 60"),
        (changed("images", 1, width=-1), "has the height 40 and the width -1"),
        (changed("images", 1, width=10**9), "has the height 40 and the width 1000000000"),
        (changed("categories", 0, id=2), "category 2 of 3 has the id 2 of another"),
        (changed("categories", 0, name=None), "category 1 of 3 has the name missing"),
        (content() | {"categories": [5]}, "category 1 of 1 is 5, not an object"),
    ],
)  # fmt: skip
def test_contents_that_are_refused(tmp_path, data, message):
    for name in ("3.png", "5.png", "7.png"):
        picture(tmp_path / name)
    path = tmp_path / "set.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message) as error:
        open_coco(path)
    assert str(error.value).startswith(str(path))


def test_all_problems_are_named_at_once(tmp_path):
    data = content()
    data["images"] = [image(1)] * 10
    data["categories"].append({"id": 2, "name": "x"})
    (tmp_path / "set.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"image 2 of 10 .*; image 6 of 10 has the id 1 of another; and 5 more\. xcit"):
        open_coco(tmp_path / "set.json")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"hello", "is not JSON .line 1, column 1"),
        (b"\x89PNG\r\n", "is not UTF-8"),
        (b'{"images": [1, 2,, 3], "annotations": [], "categories": []}', "is not JSON .line 1, column 18"),
        (b"[" * 200_000, "is not JSON that can be read"),
        (b'{"images": ' + b"1" * 10_000 + b"}", "is not JSON that can be read"),
    ],
)
def test_files_that_are_refused(tmp_path, written, message):
    path = tmp_path / "set.json"
    path.write_bytes(written)
    with pytest.raises(DataError, match=message):
        read_coco(path)


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    text = json.dumps(content() | {"flag": True, "text": '\u00e9\\ " '}, ensure_ascii=True)
    path = tmp_path / "set.json"
    for end in (*range(1, len(text), 7), *range(len(text) - 60, len(text))):
        path.write_text(text[:end])
        with pytest.raises(DataError, match=r"is cut off after [\d,]+ characters"):
            read_coco(path)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte order mark is none of the content
    assert len(read_coco(path)["images"]) == 3


def test_no_file(tmp_path, save):
    save(content(), "instances_val.json")
    with pytest.raises(DataError, match=r"there is no such file; did you mean 'instances_val\.json'\?"):
        open_coco(tmp_path / "instance_val.json")
    with pytest.raises(DataError, match=r"there is no such file\.$"):
        open_coco(tmp_path / "no" / "x.json")
    with pytest.raises(DataError, match="is a folder; name the JSON file"):
        open_coco(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a").mkdir()
    path = tmp_path / "alone" / "a" / "x.json"
    path.write_text(json.dumps(content()))
    with pytest.raises(DataError, match=r"none of its images, such as '7\.png', is in"):
        open_coco(path)
