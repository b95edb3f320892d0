"""What a run of segmentation leaves to look at: its curves, its figures by class, and what it sees in some images."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from xcit.data.mask_set import MaskSet
from xcit.errors import DataError
from xcit.files import write_atomic
from xcit.inference.segmenter import Segmenter
from xcit.models.segmentation import SegmentationModel
from xcit.recipes.detection_report import percent
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.run_report import MAX_FOLDED, picture, saved
from xcit.recipes.segmentation_config import SegmentationConfig
from xcit.recipes.settings import to_yaml
from xcit.report.confusion import confusion_figure
from xcit.report.html import Block, Code, Gallery, KeyFigure, Prose, Section, Table, Thumbnail, html_page
from xcit.report.segmentation_curves import segmentation_figure
from xcit.report.segmentations import draw_segmentation

if TYPE_CHECKING:
    from xcit.recipes.segmentation_job import SegmentationResult

NUM_SHOWN = 8
"""Images that are drawn, spread evenly through the set."""
MAX_SIDE = 640
"""Of a drawn image, in pixels."""
MAX_CONFUSED = 40
"""With more classes the confusion matrix is no picture that anybody reads."""


@dataclass(frozen=True)
class SegmentationRecord:
    """All that is known of a run at its end.

    Attributes:
        config: its settings.
        history: a row an epoch.
        result: the figures that it concludes with.
        images: that were judged.
        skipped: part, name and reason of each image that could not be used.
    """

    config: SegmentationConfig
    history: Sequence[Mapping[str, float]]
    result: SegmentationResult
    images: MaskSet
    skipped: Sequence[tuple[str, str, str]] = ()


def write_segmentation_report(record: SegmentationRecord, run: RunFolder, model: SegmentationModel) -> None:
    """Write the pictures and the page.

    Raises:
        ExportError: a file cannot be written.
    """
    config, result = record.config, record.result
    sections = [
        Section("Training", _training(record, run)),
        Section("Figures", list(_figures(record, run))),
        Section("What it sees", _pictures(record, run, model)),
        Section("Use the model", [Code(f"xcit segment IMAGE --model {shlex.quote(str(run.model))} --out seen/")]),
        Section("Method", list(_method(record))),
    ]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    subtitle = (
        f"Recipe {config.recipe}, seed {config.seed}, {len(record.history)} epochs. {parameters:.2f} M parameters."
    )
    title = f"{type(model).__name__} on {config.model.name}: {len(result.class_names)} classes"
    write_atomic(run.report, html_page(title, subtitle, list(_key_figures(record)), sections).encode())


def _key_figures(record: SegmentationRecord) -> Iterator[KeyFigure]:
    result, found = record.result, record.result.overlap
    yield KeyFigure(percent(found.miou), f"mIoU on {result.num_images:,} {result.part} images")
    yield KeyFigure(percent(found.macc), "mean accuracy of the classes")
    yield KeyFigure(percent(found.aacc), "of the pixels right")
    minutes = sum(row["seconds"] for row in record.history) / 60
    time = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
    yield KeyFigure(time, f"of training on {result.environment['device']}")


def _training(record: SegmentationRecord, run: RunFolder) -> list[Block]:
    best = max(record.history, key=lambda row: (row["miou"], row["aacc"]))
    figure = segmentation_figure(record.history, int(best["epoch"]))
    caption = "Losses of the distorted training images, and the figures of the validation images."
    return [picture(saved(run.curves, figure), "losses and overlap by epoch", caption)]


def _figures(record: SegmentationRecord, run: RunFolder) -> Iterator[Block]:
    result, found = record.result, record.result.overlap
    totals = found.matrix.sum(1)
    rows = [
        (name, percent(float(found.iou[i])), percent(float(found.acc[i])), f"{int(totals[i]):,}")
        for i, name in enumerate(result.class_names)
    ]
    summary = f"By class: {len(rows)}" if len(rows) > MAX_CONFUSED else ""
    yield Table(("class", "IoU", "accuracy", "pixels"), rows, summary=summary)
    if len(rows) <= MAX_CONFUSED:
        figure = confusion_figure(found.matrix.numpy(), result.class_names)
        words = "Pixels of each class (rows) and what they were taken for (columns); mistakes are red."
        yield picture(saved(run.confusion, figure), "confusion matrix", words)
    if result.part == "validation":
        yield Prose(
            "The data has no test part. These figures are of the images that the epoch was chosen by, and hence "
            "somewhat better than on new ones."
        )


def _pictures(record: SegmentationRecord, run: RunFolder, model: SegmentationModel) -> list[Block]:
    segmenter, images = Segmenter(model), record.images
    shown = np.unique(np.linspace(0, len(images) - 1, NUM_SHOWN).round().astype(int))
    thumbnails = []
    for index in shown.tolist():
        try:
            image, truth = images.open_pair(index)
        except DataError:
            continue  # listed as skipped
        (seen,) = segmenter(image)
        counted = truth >= 0
        right = float((seen.labels == truth)[counted].mean()) if counted.any() else math.nan
        files = [
            _jpeg(draw_segmentation(image, labels, images.class_names, images.palette, max_side=MAX_SIDE))
            for labels in (seen.labels, truth)
        ]
        write_atomic(run.segmentations / f"{index:06d}.jpg", files[0])
        write_atomic(run.segmentations / f"{index:06d}_truth.jpg", files[1])
        name = images.names[index]
        thumbnails += [
            Thumbnail([files[0]], f"classes seen in {name}", f"{name}: {percent(right)} of the pixels right"),
            Thumbnail([files[1]], f"mask of {name}", "its mask"),
        ]
    words = f"Images spread through the {record.result.part} part: what the model sees, and the mask."
    return [Prose(words), Gallery(thumbnails)]


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _method(record: SegmentationRecord) -> Iterator[Block]:
    if record.skipped:
        title = f"Skipped images: {len(record.skipped):,}"
        title += f", of which the first {MAX_FOLDED:,}" if len(record.skipped) > MAX_FOLDED else ""
        header = ("part", "image that could not be used", "reason")
        yield Table(header, list(record.skipped[:MAX_FOLDED]), summary=title)
    yield Table((), list(record.result.environment.items()))
    yield Code(to_yaml(record.config), summary="All settings (config.yaml)")
