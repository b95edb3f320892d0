"""A look at a whole COCO file: each thing that can be wrong is planted, found, and mended if it can be."""

import copy
import json
import random

import numpy as np
import pytest
from PIL import Image

from xcit.data.coco import open_coco, read_coco
from xcit.data.coco_check import TITLES, check_coco, fixed_coco
from xcit.data.coco_masks import decode_mask, encode_mask
from xcit.errors import ConfigError, DataError

H, W = 40, 60
NAN = float("nan")


def content():
    """Three images, two categories, an instance of each form; nothing is wrong."""
    ring = np.zeros((H, W), dtype=np.uint8)
    ring[5:25, 10:30] = 1
    ring[10:20, 15:25] = 0
    return {
        "info": {"year": 2024},
        "images": [{"id": i, "file_name": f"{i}.png", "width": W, "height": H} for i in (7, 3, 5)],
        "categories": [{"id": 2, "name": "ant"}, {"id": 90, "name": "zebra"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [10, 5, 20, 20], "area": 300, "iscrowd": 0,
             "segmentation": encode_mask(ring)},
            {"id": 2, "image_id": 3, "category_id": 90, "bbox": [30, 10, 10, 10], "area": 100.0, "iscrowd": 0,
             "segmentation": [[30, 10, 40, 10, 40, 20, 30, 20]]},
            {"id": 3, "image_id": 5, "category_id": 2, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 1,
             "segmentation": {"size": [H, W], "counts": [0, H * W]}},
            {"id": 4, "image_id": 5, "category_id": 2, "bbox": [59, 39, 1, 1], "area": 1, "iscrowd": 0},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three images, and two that are none."""
    root = tmp_path_factory.mktemp("coco")
    for i in (3, 5, 7):
        pixels = np.random.default_rng(i).integers(0, 256, (H, W, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    (root / "text.png").write_bytes(b"no image")
    (root / "cut.png").write_bytes((root / "3.png").read_bytes()[:300])
    Image.new("RGB", (H, W)).save(root / "turned.png")
    return root


@pytest.fixture
def check(folder, tmp_path):
    def checked(data, **options):
        file = tmp_path / "set.json"
        file.write_text(json.dumps(data))
        return check_coco(file, options.pop("images_root", folder), **options)

    return checked


def kinds(report):
    return [(finding.kind, finding.fixable) for finding in report.findings]


def test_a_clean_set(check):
    seen, totals = [], []
    report = check(content(), on_image=lambda: seen.append(1), on_total=totals.append)
    assert report.findings == ()
    assert report.clean
    assert (len(seen), totals) == (3, [3])
    assert (report.num_images, report.num_annotations, report.num_fixable) == (3, 4, 0)
    assert report.class_counts == {"ant": 3, "zebra": 1}
    assert report.notes == ("1 annotation without a segmentation, of 4.",)
    assert json.loads(json.dumps(report.to_dict()))["clean"] is True
    assert fixed_coco(content(), report) == content()


def change(key, position, **values):
    """Change some values of an entry; None removes one."""

    def changed(data):
        entry = data[key][position]
        for name, value in values.items():
            if value is None:
                del entry[name]
            else:
                entry[name] = value

    return changed


def add(key, **entry):
    return lambda data: data[key].append(entry)


def box(*numbers):
    return change("annotations", 1, bbox=list(numbers), segmentation=None)


def drawn(segmentation):
    return change("annotations", 1, segmentation=segmentation)


def rle(**values):
    return drawn({"size": [H, W], "counts": [0, H * W]} | values)


SECOND = {"image_id": 3, "category_id": 90, "bbox": [1, 1, 5, 5], "area": 25}
NO_ZEBRA = ("category-empty", False)

FAULTS = {
    "an image that is missing": (
        change("images", 1, file_name="no.png"),
        [("image-missing", True), NO_ZEBRA], "no.png: there is no such file.",
    ),
    "no image": (
        change("images", 1, file_name="text.png"),
        [("image-unreadable", True), NO_ZEBRA], "text.png: is not an image",
    ),
    "half an image": (
        change("images", 1, file_name="cut.png"),
        [("image-unreadable", True), NO_ZEBRA], "cut.png: is damaged or incomplete",
    ),
    "another width": (
        change("images", 1, width=61), [("image-size", False)], "is 60 x 40 px, but its annotations are for 61 x 40 px",
    ),
    "width and height exchanged": (
        change("images", 1, file_name="turned.png"), [("image-size", False)], "turned.png: is 40 x 60 px",
    ),
    "no width": (
        change("images", 1, width=None), [("image-entry", True)], "Image 2 (3.png) has the height 40 and the width mi",
    ),
    "no id of an image": (
        change("images", 1, id=None),
        [("image-entry", True), NO_ZEBRA, ("image-unknown", True)], "Image 2 has the id missing, not a whole number.",
    ),
    "no file name": (
        change("images", 1, file_name=None), [("image-entry", True), NO_ZEBRA], "Image 2 has the file name missing",
    ),
    "an image that is none": (
        lambda data: data["images"].append(17), [("image-entry", True)], "Image 4 is 17, not an object.",
    ),
    "an image twice": (
        lambda data: data["images"].append(dict(data["images"][0])),
        [("image-id", True)], "Image 4 (7.png) has the id 7 of another, with the same file.",
    ),
    "two images with one id": (
        add("images", id=7, file_name="5.png", width=W, height=H),
        [("image-id", False)], "Image 4 (5.png) has the id 7 of another, with the file '7.png'.",
    ),
    "a file twice": (
        add("images", id=8, file_name="./5.png", width=W, height=H),
        [("image-twice", False)], "./5.png: is listed as image 5 and as image 8.",
    ),
    "no name of a category": (
        change("categories", 1, name=None), [("category-entry", False)], "Category 2 has the name missing, not a text.",
    ),
    "no id of a category": (
        add("categories", name="cow"), [("category-entry", True)], "Category 3 has the id missing, not a whole number.",
    ),
    "a category twice": (
        add("categories", id=2, name="ant"),
        [("category-id", True)], "Category 3 (ant) has the id 2 of another of the same name.",
    ),
    "two categories with one id": (
        add("categories", id=2, name="bee"), [("category-id", False)], "Category 3 (bee) has the id 2 of 'ant'.",
    ),
    "two categories with one name": (
        change("categories", 1, name="ant"), [("category-name", False)], "The categories 2 and 90 are both 'ant'.",
    ),
    "a category without instances": (
        add("categories", id=5, name="cow"), [("category-empty", False)], "The category 'cow' (id 5) has no instance.",
    ),
    "an annotation that is none": (
        lambda data: data["annotations"].append([1]),
        [("annotation-entry", True)], "Annotation 5 is [1], not an object.",
    ),
    "an id twice": (
        add("annotations", id=2, **SECOND), [("annotation-id", True)], "Annotation 5 has the id 2 of another.",
    ),
    "no id": (
        add("annotations", **SECOND), [("annotation-id", True)], "Annotation 5 has the id missing, not a whole number.",
    ),
    "an unknown image": (
        add("annotations", **(SECOND | {"id": 9, "image_id": 4})),
        [("image-unknown", True)], "Annotation 9 is of image 4, which is not listed.",
    ),
    "an unknown category": (
        add("annotations", **(SECOND | {"id": 9, "category_id": "2"})),
        [("category-unknown", True)], "Annotation 9 is of category '2', which is not listed.",
    ),
    "no box": (
        change("annotations", 1, bbox=None), [("box", True)], "Annotation 2 (image 3) has the box missing, not four",
    ),
    "a box of three": (box(1, 2, 3), [NO_ZEBRA, ("box", True)], "has the box [1, 2, 3], not four finite numbers."),
    "NaN in a box": (box(1, 2, NAN, 4), [NO_ZEBRA, ("box", True)], "has the box [1, 2, nan, 4], not four"),
    "infinity in a box": (box(1, 2, 3, float("inf")), [NO_ZEBRA, ("box", True)], "inf], not four finite numbers."),
    "text in a box": (box(1, 2, "3", 4), [NO_ZEBRA, ("box", True)], "has the box [1, 2, '3', 4], not four"),
    "an empty box": (box(1, 2, 0, 4), [NO_ZEBRA, ("box-empty", True)], "has the box [1, 2, 0, 4], of no width or"),
    "a negative box": (box(9, 9, 4, -4), [NO_ZEBRA, ("box-empty", True)], "has the box [9, 9, 4, -4], of no width or"),
    "a box outside": (
        box(60, 2, 5, 4), [NO_ZEBRA, ("box-outside", True)], "[60, 2, 5, 4], which has no part in the image of 60 x 40",
    ),
    "a box partly outside": (
        box(50, -2, 12, 12),
        [("box-partly-outside", True)], "[50, -2, 12, 12], which reaches out of the image of 60 x 40 px.",
    ),
    "a segmentation that is none": (
        drawn("x"), [("segmentation", True)], "Annotation 2 (image 3) has a segmentation that is 'x', neither",
    ),
    "one flat polygon": (drawn([1, 2, 3, 4, 5, 6]), [("segmentation", True)], "that is one list of numbers, not"),
    "two points": (drawn([[1, 2, 3, 4]]), [("polygon", True)], "has a polygon that has 2 points, fewer than 3."),
    "an odd number": (
        drawn([[30, 10, 40, 10, 40, 20, 30, 20], [1, 2, 3, 4, 5, 6, 7]]),
        [("polygon", True)], "has a polygon that has 7 numbers, which are not pairs.",
    ),
    "no area within": (drawn([[30, 10, 35, 15, 40, 20]]), [("polygon", True)], "has a polygon that has no area."),
    "NaN in a polygon": (drawn([[1, 2, 3, 4, 5, NAN]]), [("polygon", True)], "that is not a list of finite numbers."),
    "RLE of another size": (
        rle(size=[W, H]), [("rle-size", True)], "has RLE that is for 40 x 60 px, the image has 60 x 40 px.",
    ),
    "RLE that is too short": (rle(counts=[0, 99]), [("rle", True)], "has RLE that counts 99 pixels, the image has"),
    "broken RLE": (rle(counts="~"), [("rle", True)], "has RLE that has counts that are no run lengths."),
    "an empty mask": (rle(counts=[H * W]), [("mask-empty", True)], "has a mask that covers no pixel."),
    "a mask elsewhere": (
        drawn([[3, 10, 13, 10, 13, 20, 3, 20]]), [("mask-outside", False)], "has 100% of its mask outside of its box",
    ),
    "a mask that is half elsewhere": (
        change("annotations", 1, segmentation=[[30, 10, 50, 10, 50, 20, 30, 20]], area=200),
        [("mask-outside", False)], "has 40% of its mask outside of its box [30, 10, 10, 10].",
    ),
    "no area": (
        change("annotations", 1, area=None), [("area", True)], "has the area missing; that of its mask is 100.",
    ),
    "another area": (change("annotations", 1, area=140), [("area", True)], "has the area 140; that of its mask is"),
    "the area of the box": (
        change("annotations", 0, area=400), [("area", True)], "has the area 400; that of its mask is 300.",
    ),
    "NaN as area": (change("annotations", 3, area=NAN), [("area", True)], "has the area nan; that of its box is 1."),
    "text as area": (change("annotations", 3, area="1"), [("area", True)], "has the area '1'; that of its box is 1."),
    "no area at all": (change("annotations", 3, area=0), [("area", True)], "has the area 0; that of its box is 1."),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_mended(check, name):
    spoil, expected, text = FAULTS[name]
    data = content()
    spoil(data)
    before = copy.deepcopy(data)
    report = check(data)
    assert sorted(kinds(report)) == sorted(expected)
    assert any(text in finding.text for finding in report.findings)
    assert all(finding.text.endswith(".") for finding in report.findings)
    assert not report.clean
    fixed = fixed_coco(data, report)
    assert repr(data) == repr(before)  # NaN is not equal to itself
    again = check(fixed)
    assert again.num_fixable == 0
    assert set(kinds(again)) == {finding for finding in expected if not finding[1]}
    assert fixed_coco(fixed, again) == fixed
    assert fixed["info"] == {"year": 2024}


def test_every_kind_is_planted():
    assert {kind for _, expected, _ in FAULTS.values() for kind, _ in expected} == set(TITLES)


def mended(check, name):
    data = content()
    FAULTS[name][0](data)
    return fixed_coco(data, check(data))


def test_what_becomes_of_what_is_mended(check):
    same = content()
    clipped = dict(same["annotations"][1], bbox=[50, 0, 10, 10])
    del clipped["segmentation"]
    assert mended(check, "a box partly outside")["annotations"][1] == clipped
    gone = mended(check, "an image that is missing")
    assert [one["id"] for one in gone["images"]] == [7, 5]
    assert [one["id"] for one in gone["annotations"]] == [1, 3, 4]
    assert len(gone["categories"]) == 2  # or all classes after it would have another number
    assert mended(check, "no width") == same
    assert mended(check, "an image twice") == same
    assert mended(check, "a category twice") == same
    assert mended(check, "an unknown image") == same
    assert mended(check, "another area") == same
    assert mended(check, "an odd number") == same
    assert [one["id"] for one in mended(check, "an id twice")["annotations"]] == [1, 2, 3, 4, 5]
    assert mended(check, "no id")["annotations"][4] == SECOND | {"id": 5}
    assert mended(check, "no box") == same  # its mask gives it
    assert len(mended(check, "an empty box")["annotations"]) == 3
    kept = mended(check, "RLE of another size")["annotations"][1]
    assert "segmentation" not in kept
    assert (kept["bbox"], kept["area"]) == ([30, 10, 10, 10], 100)


@pytest.mark.parametrize(("files", "fixable"), [(("7.png", "no.png"), True), (("no.png", "7.png"), False)])
def test_of_two_images_with_one_id_the_one_that_is_there_stays(check, files, fixable):
    data = content()
    data["images"] = [data["images"][0] | {"file_name": name} for name in files] + data["images"][1:]
    report = check(data)
    assert kinds(report) == [("image-missing", True), ("image-id", fixable)]
    fixed = fixed_coco(data, report)
    assert fixed == content()
    assert check(fixed).clean


def test_what_is_no_fault(check):
    data = content()
    data["images"].append({"id": 9, "file_name": "3.png", "width": W, "height": H})
    data["images"][3]["file_name"] = "./7.png"
    data["annotations"] += [
        {"id": 20, "image_id": 3, "category_id": 90, "bbox": [30.004, 20, 30.001, 20.0], "area": 600.5},
        {"id": 21, "image_id": 3.0, "category_id": 90.0, "bbox": [5, 5, 1, 1], "area": 2.5, "segmentation": []},
        # partly hidden: a mask that fills half of its box; one that reaches over by a pixel
        {"id": 22, "image_id": 3, "category_id": 90, "bbox": [0, 0, 20, 10], "area": 104, "segmentation":
            [[0, 0, 10, 0, 10, 10, 0, 10]]},
        {"id": 23, "image_id": 3, "category_id": 90, "bbox": [1, 1, 8, 8], "area": 100, "segmentation":
            [[0, 0, 10, 0, 10, 10, 0, 10]]},
    ]  # fmt: skip
    report = check(data)
    assert kinds(report) == [("image-twice", False)]
    assert report.notes[0] == "1 image without annotations: './7.png'."


def test_without_decoding(check, folder):
    data = content()
    data["images"][0]["file_name"] = "text.png"
    data["images"][1]["file_name"] = "gone.png"
    assert kinds(check(data, decode_images=False)) == [("image-missing", True), NO_ZEBRA]
    # there are no images at all: only the file is looked at
    report = check(content(), images_root=None, decode_images=False)
    assert report.clean
    assert report.root == ""
    assert report.notes[0].startswith("The images were not looked at. ")
    with pytest.raises(DataError, match="none of its images"):
        check(content(), images_root=None)
    with pytest.raises(DataError, match="is not a folder"):
        check(content(), images_root=folder / "no", decode_images=False)
    data["images"][2]["width"] = None
    assert ("image-entry", False) in kinds(check(data, decode_images=False))


def test_nothing_left_and_another_report(check, folder):
    data = content()
    for one in data["images"]:
        one["file_name"] = f"no{one['id']}.png"
    report = check(data)
    assert kinds(report) == [("image-missing", True)] * 3 + [("category-empty", False)] * 2
    with pytest.raises(DataError, match="nothing would be left of it: no image can be used"):
        fixed_coco(data, report)
    data["annotations"].pop()
    with pytest.raises(ConfigError, match="3 images and 4 annotations, the content has 3 and 3"):
        fixed_coco(data, report)


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "set.json").write_text("[]")
    with pytest.raises(DataError, match="is a list of values"):
        check_coco(tmp_path / "set.json")
    with pytest.raises(DataError, match="there is no such file"):
        check_coco(tmp_path / "no.json")


WRONG = [None, True, "x", "", -1, 0, 3, 2.5, NAN, 10**400, 2**63, [], {}, [1, 2], [[1, 2, 3]], "\0", "\ud800", 1e308,
         [0, 0, 1e308, 1e308], [58, 30, 9, 20], [1e9, 1e9, 1, 1], [-5, -5, 20, 20], [10, 10, 1e-9, 4],
         [[0, 0, 50, 0, 50, 30]], [[0, 0, 1e-3, 0, 0, 1e-3]], [[-9, -9, -1, -9, -1, -1]],
         {"size": [H, W], "counts": "0"}, {"size": [H, W], "counts": [2000, 10, 390]}]  # fmt: skip


def spoilt(rng):
    """The clean content after a handful of random changes anywhere."""
    data = content()
    for _ in range(rng.randint(1, 8)):
        key = rng.choice(["images", "categories", "annotations", "annotations", "annotations"])
        entries = data[key]
        position = rng.randrange(len(entries))
        entry = entries[position]
        action = rng.random()
        if action < 0.1:
            entries[position] = copy.deepcopy(rng.choice(WRONG))
        elif action < 0.3:
            entries.append(copy.deepcopy(entry))
        elif isinstance(entry, dict) and entry:
            name = rng.choice(sorted(entry))
            others = [one[name] for one in entries if isinstance(one, dict) and name in one]
            entry[name] = copy.deepcopy(rng.choice([*WRONG, *others, "no.png", "text.png", "turned.png", "5.png"]))
    return data


def look_at(coco):
    """Everything in a set, which must be within its images."""
    seen = [coco.instances(i) for i in range(len(coco))]
    for i, instances in enumerate(seen):
        assert instances.boxes.min(initial=0) >= 0
        assert (instances.boxes <= np.tile([coco.widths[i], coco.heights[i]], 2)).all()
        assert (instances.boxes[:, 2:] > instances.boxes[:, :2]).all()
        assert np.isfinite(instances.areas).all()
    return seen


def attempt(function, *arguments):
    """What it returns, or else the sentence with which it refuses."""
    try:
        return function(*arguments), ""
    except DataError as error:
        return None, str(error)


def test_whatever_is_wrong_it_is_mended_once_and_then_read(check, folder, tmp_path):
    found, read, refused = set(), 0, 0
    for seed in range(300):
        rng = random.Random(seed)
        data = spoilt(rng)
        decode = rng.random() < 0.5
        report = check(data, decode_images=decode)
        data = read_coco(report.file)  # as JSON has it
        found |= set(kinds(report))
        # not mended, it is refused in a sentence, or what can be used of it is used
        coco, message = attempt(open_coco, report.file, folder)
        refused += coco is None
        assert message.startswith(report.file) if coco is None else look_at(coco)
        fixed, message = attempt(fixed_coco, data, report)
        if fixed is None:
            assert "nothing would be left" in message
            continue
        assert json.dumps(fixed) == json.dumps(fixed_coco(data, report))
        again = check(fixed, decode_images=decode)
        assert not [finding for finding in again.findings if finding.fixable], seed
        assert json.dumps(fixed_coco(fixed, again)) == json.dumps(fixed)
        if again.clean:
            coco = open_coco(report.file, folder)
            assert (coco.left_out, len(coco.ids)) == ({}, len(fixed["annotations"]))
            for instances in look_at(coco):
                for number, mask in zip(instances.ids, instances.masks if coco.has_masks else (), strict=False):
                    one = next(one for one in fixed["annotations"] if one["id"] == number)
                    if one.get("segmentation"):
                        np.testing.assert_array_equal(mask, decode_mask(one["segmentation"], H, W))
            read += 1
    assert read > 80
    assert refused > 30
    assert len(found) > 20
