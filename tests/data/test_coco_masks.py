"""Masks of COCO files: what is drawn and what is refused; pycocotools and plain loops are the reference."""

import json
import warnings

import numpy as np
import pytest

from xcit.data.coco import open_coco
from xcit.data.coco_masks import decode_mask, encode_mask, mask_rle, polygon_area, usable_segmentation
from xcit.data.coco_masks import run_lengths as parsed_run_lengths
from xcit.errors import DataError, ShapeError

H, W = 40, 60
SQUARE = [[10, 5, 20, 5, 20, 15, 10, 15]]


def reference(segmentation, height, width):
    masks = pytest.importorskip("pycocotools.mask")
    rle = segmentation
    if isinstance(segmentation, list):
        rle = masks.merge(masks.frPyObjects([[float(v) for v in p] for p in segmentation], height, width))
    elif isinstance(segmentation["counts"], list):
        rle = masks.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy 2, by pycocotools
        return masks.decode(rle)


def star(rng, height, width, whole):
    """A polygon of random points, often self-crossing, sometimes out of the image."""
    points = rng.uniform(-0.2, 1.2, (rng.integers(3, 9), 2)) * [width, height]
    return (np.rint(points).astype(int) if whole else np.round(points, 2)).ravel().tolist()


def run_lengths(mask):
    """Uncompressed RLE by a plain loop: columns one after another, 0 first."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(counts):
    """Compressed RLE by a plain loop, after the text of its format."""
    text = ""
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            code, rest = rest & 31, rest >> 5
            more = rest != (-1 if code & 16 else 0)
            text += chr(48 + (code | 32 if more else code))
    return text


@pytest.mark.parametrize("seed", range(60))
def test_polygons_are_drawn_as_by_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 90, 2))
    polygons = [star(rng, height, width, whole=seed % 3 == 0) for _ in range(rng.integers(1, 4))]
    polygons = usable_segmentation(polygons, height, width)[0]
    if polygons:
        mask = decode_mask(polygons, height, width)
        assert (mask.dtype, mask.shape) == (np.uint8, (height, width))
        np.testing.assert_array_equal(mask, reference(polygons, height, width))


@pytest.mark.parametrize("seed", range(40))
def test_all_forms_of_rle_are_one(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 60, 2))
    mask = (rng.random((height, width)) < rng.choice([0, 0.02, 0.5, 0.98, 1])).astype(np.uint8)
    counts = run_lengths(mask)
    size = [height, width]
    text = compressed(counts)
    forms = ({"size": size, "counts": c} for c in (counts, text, text.encode()))
    for form in forms:
        assert usable_segmentation(form, height, width) == (form, [])
        np.testing.assert_array_equal(parsed_run_lengths(form["counts"]), counts)
        np.testing.assert_array_equal(decode_mask(form, height, width), mask)
        np.testing.assert_array_equal(reference(form, height, width), mask)
        assert mask_rle(form, height, width) == {"size": size, "counts": text}
    for array in (mask, mask.astype(bool), mask.astype(np.float32) * 0.2, np.asfortranarray(mask), mask[::-1][::-1]):
        assert encode_mask(array) == {"size": size, "counts": text}
    json.dumps(encode_mask(mask))


def test_a_set_draws_its_masks_as_pycocotools(tmp_path):
    rng = np.random.default_rng(1)
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": W, "height": H} for i in (7, 3, 5)],
        "categories": [{"id": 2, "name": "ant"}],
        "annotations": [],
    }
    for i in range(1, 61):
        mask = np.zeros((H, W), dtype=np.uint8)
        mask[rng.integers(H) :, : rng.integers(1, W)] = 1
        mask[rng.random((H, W)) < 0.1] = 0  # holes
        counts = run_lengths(mask)
        forms = [
            [star(rng, H, W, whole=i % 2 == 0) for _ in range(rng.integers(1, 4))],
            {"size": [H, W], "counts": counts},
            {"size": [H, W], "counts": compressed(counts)},
        ]
        one = {"id": i, "category_id": 2, "bbox": [0, 0, W, H], "segmentation": forms[rng.integers(3)]}
        data["annotations"].append(one | {"image_id": int(rng.choice([3, 5, 7]))})
    (tmp_path / "set.json").write_text(json.dumps(data))
    coco = open_coco(tmp_path / "set.json", tmp_path)
    segmentations = {one["id"]: one["segmentation"] for one in data["annotations"]}
    drawn = 0
    for i in range(3):
        found = coco.instances(i)
        for number, mask, has_mask, rle, area in zip(
            found.ids, found.masks, found.has_mask, coco.rles(i), found.areas, strict=True
        ):
            expected = reference(segmentations[number], H, W)
            np.testing.assert_array_equal(mask, expected)
            np.testing.assert_array_equal(decode_mask(rle, H, W), expected)
            assert has_mask == expected.any()
            assert area == (expected.sum() if expected.any() else H * W)
            drawn += has_mask
    assert drawn > 40


@pytest.mark.parametrize(
    ("segmentation", "kind", "what"),
    [
        ("abc", "segmentation", "is 'abc', neither polygons nor RLE"),
        (5, "segmentation", "is 5, neither"),
        ([1, 2, 3, 4, 5, 6], "segmentation", "is one list of numbers"),
        ([[]], "polygon", "has 0 points, fewer than 3"),
        ([[1, 2, 3, 4]], "polygon", "has 2 points, fewer than 3"),
        ([[1, 2, 3, 4, 5, 6, 7]], "polygon", "has 7 numbers, which are not pairs"),
        ([[1, 2, 3, 4, 5, "6"]], "polygon", "is not a list of finite numbers"),
        ([[1, 2, 3, 4, 5, True]], "polygon", "is not a list of finite numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "polygon", "is not a list of finite numbers"),
        ([[1, 2, 3, 4, 5, 10**400]], "polygon", "is not a list of finite numbers"),
        ([None], "polygon", "is not a list of finite numbers"),
        ([[1.1, 1.1, 2.2, 2.2, 3.3, 3.3]], "polygon", "has no area"),
        ([[0, 0, 1e9, 0, 0, 1e9]], "polygon", "reaches far out of the image"),
        ({"counts": [12]}, "rle", "has the size missing"),
        ({"size": [3, 4, 1], "counts": [12]}, "rle", "has the size [3, 4, 1]"),
        ({"size": [4, 3], "counts": [12]}, "rle-size", "is for 3 x 4 px, the image has 4 x 3 px"),
        ({"size": [3, 4]}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": []}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": ""}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": [-1, 13]}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": [6.5, 5.5]}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": [6, 5]}, "rle", "counts 11 pixels, the image has 12"),
        ({"size": [3, 4], "counts": [10**30]}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": "é~"}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": "P"}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": "ooooooooooooooooo0"}, "rle", "has counts that are no run lengths"),
        ({"size": [3, 4], "counts": "ooo00"}, "rle", "pixels, the image has 12"),
        ({"size": [3, 4], "counts": "N>"}, "rle", "has counts that are no run lengths"),
    ],
)
def test_segmentations_that_cannot_be_drawn(segmentation, kind, what):
    usable, faults = usable_segmentation(segmentation, 3, 4)
    assert usable is None
    assert [fault[0] for fault in faults] == [kind]
    assert what in faults[0][1]
    with pytest.raises(DataError, match=r"A segmentation cannot be drawn: \w+ "):
        mask_rle(segmentation, 3, 4)


def test_the_good_polygons_of_several_stay():
    usable, faults = usable_segmentation([[1, 2, 3, 4], SQUARE[0], [1, 1, 2, 2, 3, 3]], H, W)
    assert usable == SQUARE
    assert [what for _, what in faults] == ["has 2 points, fewer than 3", "has no area"]
    with pytest.raises(DataError, match="cannot be drawn: is empty"):
        mask_rle([], H, W)


def test_polygon_area():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b, c = rng.uniform(-1e4, 1e4, (3, 2))
        half = abs((b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1])) / 2
        assert polygon_area([*a, *b, *c]) == pytest.approx(half)
    assert polygon_area([0, 0, 2, 0, 2, 1, 1, 1, 1, 2, 0, 2]) == 3


def test_masks_that_are_none():
    for shape in ((3,), (2, 3, 4), (0, 5)):
        with pytest.raises(ShapeError, match=r"A mask is \(H, W\)"):
            encode_mask(np.zeros(shape))
