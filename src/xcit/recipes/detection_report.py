"""What a run of detection leaves to look at: its curves, its figures by class, and what it finds in some images."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xcit.data.coco import CocoSet
from xcit.errors import DataError
from xcit.evaluate.coco_ap import FIGURES
from xcit.files import write_atomic
from xcit.inference.detector import Detector
from xcit.models.mask_rcnn import MaskRCNN
from xcit.recipes.detection_config import DetectionConfig
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.run_report import MAX_FOLDED, picture, saved
from xcit.recipes.settings import to_yaml
from xcit.report.detection_curves import detection_figure
from xcit.report.detections import draw_detections
from xcit.report.html import Block, Code, Gallery, KeyFigure, Prose, Section, Table, Thumbnail, html_page

if TYPE_CHECKING:
    from xcit.recipes.detection_job import DetectionResult

NUM_SHOWN = 12
"""Images that are drawn, spread evenly through the set."""
SHOWN_SCORE = 0.5
"""Detections from this score on are drawn."""
MAX_SIDE = 640
"""Of a drawn image, in pixels."""
WORDS = {
    "ap": "AP",
    "ap50": "AP at an overlap of 0.50",
    "ap75": "AP at 0.75",
    "ap_small": "AP, small (up to 32 x 32 px)",
    "ap_medium": "AP, medium",
    "ap_large": "AP, large (from 96 x 96 px)",
    "ar1": "recall, 1 detection an image",
    "ar10": "recall, 10 detections",
    "ar100": "recall, 100 detections",
    "ar_small": "recall, small",
    "ar_medium": "recall, medium",
    "ar_large": "recall, large",
}
NBSP = "\u00a0"


@dataclass(frozen=True)
class DetectionRecord:
    """All that is known of a run at its end.

    Attributes:
        config: its settings.
        history: a row an epoch.
        result: the figures that it concludes with.
        images: that were judged.
        skipped: part, name and reason of each image that could not be decoded.
    """

    config: DetectionConfig
    history: Sequence[Mapping[str, float]]
    result: DetectionResult
    images: CocoSet
    skipped: Sequence[tuple[str, str, str]] = ()


def write_detection_report(record: DetectionRecord, run: RunFolder, model: MaskRCNN) -> None:
    """Write the pictures and the page.

    Raises:
        ExportError: a file cannot be written.
    """
    config, result = record.config, record.result
    sections = [
        Section("Training", _training(record, run)),
        Section("Figures", list(_figures(record))),
        Section("What it finds", _pictures(record, run, model)),
        Section("Use the model", _use(run)),
        Section("Method", list(_method(record))),
    ]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    subtitle = (
        f"Recipe {config.recipe}, seed {config.seed}, {len(record.history)} epochs. {parameters:.2f} M parameters."
    )
    figures = list(_key_figures(record))
    page = html_page(
        f"Mask R-CNN on {config.model.name}: {len(result.class_names)} classes", subtitle, figures, sections
    )
    write_atomic(run.report, page.encode())


def percent(share: float) -> str:
    """Return a figure in percent; a dash where there was nothing to find."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}{NBSP}%"


def _key_figures(record: DetectionRecord) -> Iterator[KeyFigure]:
    result = record.result
    for kind, words in (("bbox", "boxes"), ("segm", "masks")):
        if kind in result.figures:
            found = result.figures[kind]  # type: ignore[index]
            yield KeyFigure(percent(found.ap), f"AP of {words} on {result.num_images:,} {result.part} images")
            yield KeyFigure(percent(found.ap50), f"AP50 of {words}")
    minutes = sum(row["seconds"] for row in record.history) / 60
    time = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
    yield KeyFigure(time, f"of training on {result.environment['device']}")


def _training(record: DetectionRecord, run: RunFolder) -> list[Block]:
    best = max(record.history, key=lambda row: (row.get("mask_ap", 0.0), row["box_ap"]))
    figure = detection_figure(record.history, int(best["epoch"]))
    caption = "Losses of the distorted training images, and average precision on the validation images."
    return [picture(saved(run.curves, figure), "losses and average precision by epoch", caption)]


def _figures(record: DetectionRecord) -> Iterator[Block]:
    result = record.result
    kinds = list(result.figures)
    titles = {"bbox": "boxes", "segm": "masks"}
    yield Table(
        ("figure", *(titles[kind] for kind in kinds)),
        [(WORDS[name], *(percent(getattr(result.figures[kind], name)) for kind in kinds)) for name in FIGURES],
    )
    rows = [
        (name, *(percent(result.figures[kind].per_class_ap.get(id, math.nan)) for kind in kinds))
        for id, name in result.class_names.items()
    ]
    yield Table(("class", *(f"AP of {titles[kind]}" for kind in kinds)), rows, summary=f"By class: {len(rows)}")
    if result.part == "validation":
        yield Prose(
            "The data has no test part. These figures are of the images that the epoch was chosen by, and hence "
            "somewhat better than on new ones."
        )


def _pictures(record: DetectionRecord, run: RunFolder, model: MaskRCNN) -> list[Block]:
    detector = Detector(model, score_threshold=SHOWN_SCORE)
    shown = np.unique(np.linspace(0, len(record.images) - 1, NUM_SHOWN).round().astype(int))
    thumbnails = []
    for index in shown.tolist():
        try:
            image = record.images.open(index)
        except DataError:
            continue  # listed as skipped
        (found,) = detector(image)
        drawn = draw_detections(image, found, max_side=MAX_SIDE)
        buffer = io.BytesIO()
        drawn.save(buffer, format="JPEG", quality=88)
        name = record.images.file_names[index]
        write_atomic(run.detections / f"{index:06d}.jpg", buffer.getvalue())
        truth = int((~record.images.instances(index, masks=False).crowd).sum())
        caption = f"{name}: {len(found)} found, {truth} annotated"
        thumbnails.append(Thumbnail([buffer.getvalue()], f"detections in {name}", caption))
    words = f"Images spread through the {record.result.part} part, detections with a score of {SHOWN_SCORE:g} or more."
    return [Prose(words), Gallery(thumbnails)]


def _use(run: RunFolder) -> list[Block]:
    return [Code(f"xcit detect IMAGE --model {shlex.quote(str(run.model))} --out found/")]


def _method(record: DetectionRecord) -> Iterator[Block]:
    if record.skipped:
        title = f"Skipped images: {len(record.skipped):,}"
        title += f", of which the first {MAX_FOLDED:,}" if len(record.skipped) > MAX_FOLDED else ""
        header = ("part", "image that could not be decoded", "reason")
        yield Table(header, list(record.skipped[:MAX_FOLDED]), summary=title)
    yield Table((), list(record.result.environment.items()))
    yield Code(to_yaml(record.config), summary="All settings (config.yaml)")
