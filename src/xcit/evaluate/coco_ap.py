"""COCO average precision of boxes and masks: the twelve figures, as pycocotools gives them.

faster-coco-eval counts; the figures equal pycocotools' (the tests hold them to 1e-6). Where pycocotools has a trap,
this is what happens here:

* masks are sorted into small, medium and large by their own area, also if the results carry boxes: pycocotools would
  take the boxes', which is why those who use it remove them first;
* annotations are numbered anew: pycocotools takes a match with an annotation whose id is 0 for none, and annotations
  with one id for one;
* an annotation without ``area`` has that of its mask, or else of its box.

Source: Lin et al., ECCV 2014, and the COCO detection evaluation, of which pycocotools is the reference.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xcit.data.coco_masks import mask_rle, usable_segmentation
from xcit.errors import BackendError, ConfigError, DataError

FIGURES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
"""In the order in which COCO lists them."""
AREAS = ("all", "small", "medium", "large")
MAX_DETECTIONS = (1, 10, 100)

Kind = Literal["bbox", "segm"]


@dataclass(frozen=True)
class CocoFigures:
    """Average precision and recall, 0 to 1; NaN where the truth holds nothing to find (pycocotools says -1).

    Attributes:
        ap: mean over the classes and over IoU thresholds of 0.50, 0.55, ..., 0.95, of up to 100 objects an image.
        ap50: at an IoU of 0.50.
        ap75: at an IoU of 0.75.
        ap_small: of objects up to 32 x 32 pixels in area.
        ap_medium: of those between.
        ap_large: of objects from 96 x 96 pixels.
        ar1: recall, mean over classes and thresholds, of the best object of each class an image.
        ar10: of the best 10.
        ar100: of the best 100.
        ar_small: of small objects among the best 100.
        ar_medium: of medium ones.
        ar_large: of large ones.
        per_class_ap: ``ap`` of each category id; NaN of one without an object.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class_ap: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON has them: null where there is nothing to measure, category ids as texts."""
        return {
            **{name: _or_none(getattr(self, name)) for name in FIGURES},
            "per_class_ap": {str(category): _or_none(ap) for category, ap in self.per_class_ap.items()},
        }


def coco_figures(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind = "bbox") -> CocoFigures:
    """Judge detections against a data set in COCO's format. Neither is changed.

    Args:
        truth: ``images`` (``id``; for masks ``height`` and ``width`` in pixels), ``annotations`` (``image_id``,
            ``category_id``, ``bbox``, ``segmentation`` as polygons or RLE, ``area`` in pixels, ``iscrowd``) and
            ``categories`` (``id``).
        results: each with ``image_id``, ``category_id``, ``score`` and, by the kind, ``bbox`` (x, y, width, height in
            pixels) or ``segmentation`` (RLE). Of equal scores in an image, the first counts first.
        kind: "bbox" judges boxes, "segm" masks.

    Returns:
        The figures; all recall and precision that can be measured is 0 if there are no results.

    Raises:
        ConfigError: the kind is another.
        DataError: the truth or the results cannot be judged; everything that is wrong is named at once.
        BackendError: faster-coco-eval is not installed.
    """
    if kind not in ("bbox", "segm"):
        raise ConfigError(f"kind is {kind!r}; it must be 'bbox' for boxes or 'segm' for masks.")
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError:
        raise BackendError(
            'COCO average precision needs faster-coco-eval, which is not installed: pip install "xcit[detection]"'
        ) from None
    missing = [key for key in ("images", "annotations", "categories") if key not in truth]
    if missing:
        raise DataError(f"The truth has no {' and no '.join(missing)}; it must be a data set in COCO's format.")
    try:
        images = {operator.index(image.get("id")): image for image in truth["images"]}
        categories = {operator.index(category.get("id")) for category in truth["categories"]}
    except TypeError:
        raise DataError(
            "The truth has images or categories whose id is no integer; COCO's format demands one."
        ) from None
    wanted = [
        _judged(list(annotations), images, categories, kind, is_truth)
        for annotations, is_truth in ((truth["annotations"], True), (results, False))
    ]
    if not images or not categories:  # of which the evaluation makes no figures at all
        return CocoFigures(**dict.fromkeys(FIGURES, math.nan), per_class_ap=dict.fromkeys(sorted(categories), math.nan))
    evaluation = COCOeval_faster(
        *(
            COCO(
                {
                    "images": [dict(image) for image in images.values()],
                    "annotations": annotations,
                    "categories": [{"id": category, "name": str(category)} for category in categories],
                },
                print_function=_silent,
            )
            for annotations in wanted
        ),
        iouType=kind,
        print_function=_silent,
    )
    evaluation.evaluate()
    evaluation.accumulate()
    return _figures(evaluation.eval["precision"], evaluation.eval["recall"], sorted(categories))


def _figures(precision: np.ndarray, recall: np.ndarray, categories: list[int]) -> CocoFigures:
    """Sum up ``precision`` (threshold, recall, class, area, detections) and ``recall`` (the same less its second)."""
    every, most = AREAS.index("all"), len(MAX_DETECTIONS) - 1
    whole = precision[:, :, :, every, most]
    values = (
        _mean(whole),
        _mean(whole[0]),  # the thresholds are 0.50, 0.55, ...
        _mean(whole[5]),
        *(_mean(precision[:, :, :, area, most]) for area in range(1, len(AREAS))),
        *(_mean(recall[:, :, every, m]) for m in range(len(MAX_DETECTIONS))),
        *(_mean(recall[:, :, area, most]) for area in range(1, len(AREAS))),
    )
    per_class = {category: _mean(whole[:, :, k]) for k, category in enumerate(categories)}
    return CocoFigures(**dict(zip(FIGURES, values, strict=True)), per_class_ap=per_class)


def _mean(values: np.ndarray) -> float:
    """Return the mean of what was measured: -1 marks a class without an object."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _silent(*texts: object) -> None:
    """Print nothing."""


class _Problems:
    """What is wrong with annotations or results: of each kind how many, and one of them."""

    def __init__(self) -> None:
        self.found: dict[str, list[object]] = {}

    def add(self, kind: str, example: object) -> None:
        self.found.setdefault(kind, []).append(example)

    def refuse(self, what: str, total: int, advice: str) -> None:
        """Raise a DataError if anything was found."""
        if self.found:
            listed = "; ".join(
                f"{kind} ({len(examples):,} of {total:,}, such as {examples[0]})"
                for kind, examples in self.found.items()
            )
            raise DataError(f"The {what} cannot be judged: {listed}; {advice}.")


def _judged(
    records: Sequence[Any], images: Mapping[int, Any], categories: set[int], kind: Kind, is_truth: bool
) -> list[dict[str, Any]]:
    """Check annotations or results; return copies with what the evaluation needs, and nothing else."""
    problems = _Problems()
    judged = []
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            problems.add("they are no objects with keys", f"{record!r:.40}")
            continue
        name = f"annotation {record.get('id', f'at position {number}')}" if is_truth else f"the one at {number}"
        image, category = record.get("image_id"), record.get("category_id")
        known = True
        for key, value, those in (("image", image, images), ("category", category, categories)):
            if not _among(value, those):
                problems.add(f"their {key} is not listed in the truth", f"{key}_id {value!r} of {name}")
                known = False
        if not known:
            continue
        found: dict[str, Any] = {
            "id": number + 1,  # 0 would mean "not matched"
            "image_id": int(record["image_id"]),
            "category_id": int(record["category_id"]),
            "iscrowd": int(record.get("iscrowd") or 0) if is_truth else 0,
        }
        if not is_truth:
            score = record.get("score")
            if not _finite([score]):
                problems.add("their score is not a finite number", f"{score!r} of {name}")
                continue
            found["score"] = float(record["score"])
        # An annotation's area counts for both kinds; that of a result is of what is judged.
        try:
            area = record.get("area") if is_truth else None
            segmentation = record.get("segmentation")
            if kind == "segm" or (is_truth and area is None and segmentation):
                found["segmentation"] = _rle(segmentation, images[found["image_id"]])
            if kind == "bbox":
                found["bbox"] = _box(record.get("bbox"))
            if area is not None and not _finite([area]):
                raise _UnfitError("their area is not a finite number")
            found["area"] = _area(found) if area is None else float(area)
        except _UnfitError as reason:
            problems.add(str(reason), f"{name}{reason.detail}")
            continue
        judged.append(found)
    what, advice = (
        ("annotations", "xcit data check-coco lists every fault of a file")
        if is_truth
        else ("results", "check that they belong to this data set and come from a sound model")
    )
    problems.refuse(what, len(records), advice)
    return judged


class _UnfitError(Exception):
    """A box or a mask that cannot be judged: what is wrong, and what about this one."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(what)
        self.detail = detail


def _among(value: Any, known: Container[int]) -> bool:
    try:
        return value in known
    except TypeError:  # lists and the like
        return False


def _finite(numbers: Any) -> bool:
    try:
        return all(math.isfinite(number) for number in numbers)
    except TypeError:
        return False


def _box(box: Any) -> list[float]:
    if box is None:
        raise _UnfitError("they have no bbox")
    if not _finite(box) or len(box) != 4 or box[2] < 0 or box[3] < 0:
        raise _UnfitError("their bbox is not x, y, width and height, finite and not negative in size")
    return [float(number) for number in box]


def _rle(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mask as compressed RLE, of whatever form it was.

    The evaluation trusts what it is given: it would look for ever for the pixels that an RLE lacks.
    """
    if not segmentation:
        raise _UnfitError("they have no segmentation")
    height, width = image.get("height"), image.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        raise _UnfitError("their image has no height and width")
    _, faults = usable_segmentation(segmentation, height, width)
    if faults:
        what, fault = faults[0]
        raise _UnfitError("their segmentation cannot be drawn", f", whose {what.removesuffix('-size')} {fault}")
    return mask_rle(segmentation, height, width)


def _area(found: Mapping[str, Any]) -> float:
    """Return the area of a mask or, if there is none, of a box, in pixels."""
    from faster_coco_eval.core import mask as masks

    if "segmentation" in found:
        return float(masks.area([found["segmentation"]])[0])
    return float(found["bbox"][2] * found["bbox"][3])
