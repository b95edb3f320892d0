"""COCO figures: those of pycocotools on generated predictions, and what is refused."""

import copy
import json
import logging
import math
import sys

import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from xcit.errors import BackendError, ConfigError, DataError
from xcit.evaluate.coco_ap import FIGURES, CocoFigures, coco_figures

# pycocotools' own, of NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CATEGORIES = (90, 1, 17, 3, 44)
"""In no order; the last is never seen in the truth."""

# --- the reference ----------------------------------------------------------------------------------------------------


def reference(truth, results, kind):
    """Return pycocotools' twelve figures and the AP of each class, -1 being NaN."""
    gt = COCO()
    gt.dataset = copy.deepcopy(truth)
    gt.createIndex()
    evaluation = COCOeval(gt, gt.loadRes(copy.deepcopy(results)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    classes = [p[p > -1].mean() if (p > -1).any() else -1 for p in np.moveaxis(precision, 2, 0)]
    figures = np.array([*evaluation.stats, *classes], dtype=float)
    return np.where(figures == -1, np.nan, figures)


def flat(figures):
    assert list(figures.per_class_ap) == sorted(figures.per_class_ap)
    return np.array([*(getattr(figures, name) for name in FIGURES), *figures.per_class_ap.values()])


def assert_equal_to_reference(truth, results, kind):
    expected = reference(truth, results, kind)
    np.testing.assert_allclose(flat(coco_figures(truth, results, kind)), expected, rtol=0, atol=1e-6, equal_nan=True)
    return expected


# --- generated data ---------------------------------------------------------------------------------------------------


def blob(rng, size, box):
    """Draw an ellipse in a box, bitten into: (H, W) uint8."""
    ys, xs = np.mgrid[: size[0], : size[1]] + 0.5
    x, y, w, h = box
    inside = ((xs - x - w / 2) / (w / 2)) ** 2 + ((ys - y - h / 2) / (h / 2)) ** 2 <= 1
    bite = rng.uniform(0, 1, 2) * (w, h) + (x, y)
    inside &= (xs - bite[0]) ** 2 + (ys - bite[1]) ** 2 > (0.3 * min(w, h)) ** 2
    return np.asfortranarray(inside.astype(np.uint8))


def compressed(mask):
    rle = reference_masks.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask):
    pixels = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *ends, pixels.size]).tolist()}


def some_box(rng, size):
    w, h = rng.uniform(110, 180, 2) if rng.random() < 0.15 else np.exp(rng.uniform(np.log(6), np.log(130), 2))
    w, h = min(w, size[1] - 1), min(h, size[0] - 1)
    return [float(rng.uniform(0, size[1] - w)), float(rng.uniform(0, size[0] - h)), float(w), float(h)]


def generated(seed, kind):
    """Return a truth and results with crowds, ties, empty images, all sizes and one image crowded with results."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": int(number), "height": int(rng.integers(140, 260)), "width": int(rng.integers(140, 260))}
        for number in rng.permutation(1000)[:14] * 7919
    ]
    annotations, results = [], []

    def detect(image, category, box, mask):
        found = {"image_id": image["id"], "category_id": category, "score": float(rng.integers(1, 21) / 20)}
        return found | ({"bbox": box} if kind == "bbox" else {"segmentation": compressed(mask)})

    for i, image in enumerate(images):
        size = image["height"], image["width"]
        for _ in range(0 if i in (0, 5) else rng.integers(1, 12)):
            category = int(rng.choice(CATEGORIES[:4]))
            box = some_box(rng, size)
            crowd = int(rng.random() < 0.15)
            mask = blob(rng, size, box)
            form = rng.integers(3)
            x, y, w, h = box
            corners = [[x, y, x + w, y, x + w / 2, y + h], [x, y + h / 2, x + w / 2, y + h / 3, x + w / 3, y + h]]
            segmentation = uncompressed(mask) if crowd or form == 0 else compressed(mask) if form == 1 else corners
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "segmentation": segmentation,
                    "area": float(mask.sum()) * float(rng.uniform(0.8, 1.2)),
                    "iscrowd": crowd,
                }
            )
            for _ in range(0 if i == 2 else rng.integers(0, 4)):
                near = [side + float(rng.normal(0, 0.04) * box[2 + k % 2]) for k, side in enumerate(box)]
                if form == 2 and not crowd and kind == "segm":
                    rles = reference_masks.frPyObjects(corners, *size)
                    near_mask = np.roll(reference_masks.decode(reference_masks.merge(rles)), int(rng.integers(3)), 0)
                else:
                    near_mask = blob(rng, size, near)
                seen = category if rng.random() < 0.9 else int(rng.choice(CATEGORIES))
                results.append(detect(image, seen, near, np.asfortranarray(near_mask)))
        for _ in range(0 if i in (2, 5) else 130 if i == 3 else rng.integers(0, 6)):
            box = some_box(rng, size)
            category = CATEGORIES[1] if i == 3 else int(rng.choice(CATEGORIES))
            results.append(detect(image, category, box, blob(rng, size, box)))
    order = rng.permutation(len(results))
    truth = {
        "images": images,
        "annotations": [annotations[k] for k in rng.permutation(len(annotations))],
        "categories": [{"id": category, "name": f"class {category}"} for category in CATEGORIES],
    }
    return truth, [results[k] for k in order]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_pycocotools(seed, kind):
    truth, results = generated(seed, kind)
    crowds = [annotation["iscrowd"] for annotation in truth["annotations"]]
    assert 0 < sum(crowds) < len(crowds)
    per_image = [sum(r["image_id"] == image["id"] for r in results) for image in truth["images"]]
    assert max(per_image) > 100
    assert min(per_image) == 0
    assert len({r["score"] for r in results}) <= 20
    expected = assert_equal_to_reference(truth, results, kind)
    # the data are neither trivial nor hopeless, and one class has nothing to find
    assert 0.02 < expected[0] < expected[1] < 0.98
    assert np.isnan(expected).sum() == 1
    assert np.isnan(expected[12:][sorted(CATEGORIES).index(44)])


def test_equal_at_the_very_thresholds():
    """Boxes whose IoU is 0.50, 0.55, ... exactly, areas of 32² and 96² exactly, and scores that all tie."""
    images = [{"id": i, "height": 300, "width": 300} for i in range(1, 31)]
    annotations, results = [], []
    for i in range(30):
        side = (32, 96, 100)[i % 3]
        annotations.append(
            {"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [0, 0, side, side], "iscrowd": 0}
            | {"area": side**2}
        )
        share = (10 + i // 3) / 20
        results.append({"image_id": i + 1, "category_id": 1, "bbox": [0, 0, side, side * share], "score": 0.5})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    expected = assert_equal_to_reference(truth, results, "bbox")
    assert 0.3 < expected[0] < 0.8


def test_ties_across_images_follow_the_images_ids():
    """All results score alike: their order is that of the images' numbers, whatever order they were listed in."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        images = [{"id": int(i), "height": 50, "width": 50} for i in rng.permutation(40)]
        box = [5.0, 5.0, 20.0, 20.0]
        annotations = [
            {"id": k + 1, "image_id": image["id"], "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0}
            for k, image in enumerate(images)
        ]
        results = [
            {"image_id": int(rng.integers(40)), "category_id": 1, "score": 0.3}
            | {"bbox": box if rng.random() < 0.5 else [20.0, 20.0, 9.0, 9.0]}
            for _ in range(60)
        ]
        truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
        assert_equal_to_reference(truth, results, "bbox")


# --- what is known without a reference --------------------------------------------------------------------------------


def tiny():
    """Return one small object of class 1 among two images and two classes, as a truth and a perfect result."""
    mask = np.zeros((40, 60), dtype=np.uint8, order="F")
    mask[10:20, 10:30] = 1
    truth = {
        "images": [{"id": 4, "height": 40, "width": 60}, {"id": 9, "height": 40, "width": 60}],
        "annotations": [
            {"id": 7, "image_id": 4, "category_id": 1, "bbox": [10, 10, 20, 10], "area": 200, "iscrowd": 0}
            | {"segmentation": compressed(mask)}
        ],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    result = {"image_id": 4, "category_id": 1, "bbox": [10, 10, 20, 10], "score": 0.9}
    return truth, result | {"segmentation": compressed(mask)}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_perfect_result(kind):
    truth, result = tiny()
    figures = coco_figures(truth, [result], kind)
    measured = ("ap", "ap50", "ap75", "ap_small", "ar1", "ar10", "ar100", "ar_small")
    assert [getattr(figures, name) for name in measured] == [1.0] * 8
    assert all(math.isnan(getattr(figures, name)) for name in FIGURES if name not in measured)
    assert figures.per_class_ap[1] == 1.0
    assert math.isnan(figures.per_class_ap[2])
    written = figures.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert list(written) == [*FIGURES, "per_class_ap"]
    assert written["ap_large"] is None
    assert written["per_class_ap"] == {"1": 1.0, "2": None}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_no_results_are_zeros_and_no_objects_are_nan(kind):
    truth, result = tiny()
    figures = coco_figures(truth, [], kind)
    assert (figures.ap, figures.ap50, figures.ar100, figures.ar_small, figures.per_class_ap[1]) == (0, 0, 0, 0, 0)
    assert math.isnan(figures.ap_large)
    for empty in (truth | {"annotations": []}, truth | {"annotations": [], "categories": [], "images": []}):
        for results in ([result], []) if empty["images"] else ([],):
            figures = coco_figures(empty, results, kind)
            assert all(math.isnan(getattr(figures, name)) for name in FIGURES)
            assert list(figures.per_class_ap) == [category["id"] for category in empty["categories"]]


@pytest.mark.parametrize("ids", [[0, 1], [5, 5]])
def test_annotations_may_be_numbered_from_0_or_alike(ids):
    """The figures are those that pycocotools has for sound numbers."""
    truth, result = tiny()
    first = truth["annotations"][0]
    truth["annotations"] = [first | {"id": 1}, first | {"id": 2, "image_id": 9}]
    results = [result, result | {"image_id": 9, "score": 0.5}, result | {"image_id": 9, "bbox": [0, 0, 5, 5]}]
    expected = reference(truth, results, "bbox")
    assert expected[0] > 0.5
    for annotation, number in zip(truth["annotations"], ids, strict=True):
        annotation["id"] = number
    np.testing.assert_allclose(flat(coco_figures(truth, results, "bbox")), expected, atol=1e-6)


def test_masks_are_sized_by_their_own_area():
    """Results that carry boxes too are judged as those without."""
    truth, results = generated(11, "segm")
    expected = reference(truth, results, "segm")
    with_boxes = [r | {"bbox": reference_masks.toBbox(r["segmentation"]).tolist()} for r in results]
    np.testing.assert_allclose(flat(coco_figures(truth, with_boxes, "segm")), expected, atol=1e-6)
    assert not np.allclose(reference(truth, with_boxes, "segm"), expected, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_without_area_that_of_the_mask_or_else_of_the_box(kind):
    truth, results = generated(3, kind)
    for annotation in truth["annotations"]:
        size = next((i["height"], i["width"]) for i in truth["images"] if i["id"] == annotation["image_id"])
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = reference_masks.merge(reference_masks.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            segmentation = reference_masks.frPyObjects(segmentation, *size)
        annotation["area"] = float(reference_masks.area(segmentation))
    expected = reference(truth, results, kind)
    for annotation in truth["annotations"]:
        del annotation["area"]
    np.testing.assert_allclose(flat(coco_figures(truth, results, kind)), expected, atol=1e-6)
    if kind == "bbox":
        for annotation in truth["annotations"]:
            del annotation["segmentation"]
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        expected = reference(truth, results, kind)
        for annotation in truth["annotations"]:
            del annotation["area"]
            if not annotation["iscrowd"]:
                del annotation["iscrowd"]
        np.testing.assert_allclose(flat(coco_figures(truth, results, kind)), expected, atol=1e-6)


def test_uncompressed_and_binary_counts_of_results_are_read():
    truth, result = tiny()
    mask = reference_masks.decode(result["segmentation"])
    for segmentation in (uncompressed(mask), reference_masks.encode(mask)):
        assert coco_figures(truth, [result | {"segmentation": segmentation}], "segm").ap == 1.0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nothing_is_printed_logged_or_changed(kind, capfd, caplog):
    truth, results = generated(1, kind)
    before = copy.deepcopy((truth, results))
    state, modules = np.random.get_state()[1].copy(), sys.modules["pycocotools"]
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        figures = coco_figures(truth, results, kind)
    assert isinstance(figures, CocoFigures)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert (truth, results) == before
    assert (np.random.get_state()[1] == state).all()
    assert sys.modules["pycocotools"] is modules
    assert coco_figures(truth, results, kind).to_dict() == figures.to_dict()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, r"image is not listed in the truth \(1 of 2, such as image_id 5"),
        ({"image_id": [4]}, r"image is not listed in the truth \(1 of 2, such as image_id \[4\]"),
        ({"category_id": 0}, r"category is not listed in the truth \(1 of 2, such as category_id 0"),
        ({"score": math.nan}, "score is not a finite number"),
        ({"score": math.inf}, "score is not a finite number"),
        ({"score": None}, "score is not a finite number"),
        ({"bbox": None}, "no bbox"),
        ({"bbox": [1, 2, math.nan, 3]}, "bbox is not x, y, width and height"),
        ({"bbox": [1, 2, 3]}, "bbox is not x, y, width and height"),
        ({"bbox": [1, 2, -3, 4]}, "bbox is not x, y, width and height"),
        ({"segmentation": None}, "no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "cannot be drawn .*polygon has 2 points, fewer than 3"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "cannot be drawn .*one list of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, math.nan]]}, "cannot be drawn .*not a list of finite numbers"),
        ({"segmentation": {"size": [60, 40], "counts": "0"}}, "cannot be drawn .*rle is for 40 x 60 px"),
        ({"segmentation": {"size": [40, 60], "counts": [3, 9]}}, "cannot be drawn .*rle counts 12 pixels"),
        # the evaluation of this one would never end
        ({"segmentation": {"size": [40, 60], "counts": "8:"}}, "cannot be drawn .*rle counts 18 pixels"),
        ({"segmentation": {"size": [40, 60], "counts": "ä"}}, "cannot be drawn .*no run lengths"),
        ({"segmentation": {"size": [40, 60]}}, "cannot be drawn .*no run lengths"),
    ],
)
def test_bad_results_and_bad_annotations_are_refused(change, message):
    truth, result = tiny()
    kind = "segm" if "segmentation" in change else "bbox"
    with pytest.raises(DataError, match=rf"The results cannot be judged: .*{message}.*; check that they belong"):
        coco_figures(truth, [result, result | change], kind)
    if "score" not in change:
        first = truth["annotations"][0]
        truth["annotations"] = [first, first | {"id": 8} | change]
        with pytest.raises(DataError, match=rf"The annotations cannot be judged: .*{message}") as refused:
            coco_figures(truth, [result], kind)
        assert "annotation 8" in str(refused.value)


def test_all_faults_are_named_at_once():
    truth, result = tiny()
    bad = [result | {"image_id": 77}, result | {"score": math.nan}, result | {"image_id": 78, "category_id": 5}]
    with pytest.raises(DataError) as refused:
        coco_figures(truth, bad, "bbox")
    assert str(refused.value) == (
        "The results cannot be judged: their image is not listed in the truth (2 of 3, such as image_id 77 of the one "
        "at 0); their score is not a finite number (1 of 3, such as nan of the one at 1); their category is not listed "
        "in the truth (1 of 3, such as category_id 5 of the one at 2); check that they belong to this data set and "
        "come from a sound model."
    )


def test_other_refusals(monkeypatch):
    truth, result = tiny()
    with pytest.raises(ConfigError, match="kind is 'keypoints'"):
        coco_figures(truth, [result], "keypoints")
    with pytest.raises(DataError, match="has no annotations and no categories"):
        coco_figures({"images": []}, [result])
    with pytest.raises(DataError, match="whose id is no integer"):
        coco_figures(truth | {"categories": [{"id": "1", "name": "one"}]}, [result])
    with pytest.raises(DataError, match="whose id is no integer"):
        coco_figures(truth | {"images": [{"height": 40, "width": 60}]}, [result])
    with pytest.raises(DataError, match="their area is not a finite number"):
        coco_figures(truth | {"annotations": [truth["annotations"][0] | {"area": "large"}]}, [result])
    with pytest.raises(DataError, match=r"no objects with keys \(1 of 2, such as 'text'\)"):
        coco_figures(truth, [result, "text"])
    without_size = truth | {"images": [{"id": 4}, {"id": 9}]}
    assert coco_figures(without_size, [result], "bbox").ap == 1.0
    with pytest.raises(DataError, match="their image has no height and width"):
        coco_figures(without_size, [result], "segm")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(BackendError, match=r'pip install "xcit\[detection\]"'):
        coco_figures(truth, [result])
