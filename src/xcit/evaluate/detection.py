"""From annotated images and what a detector finds in them to the dictionaries that COCO's evaluation compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from xcit.data.coco import CocoSet
from xcit.inference.detections import Detections


def coco_truth(images: CocoSet, positions: Sequence[int] | None = None) -> dict[str, Any]:
    """Return annotations as a COCO file holds them, masks as RLE.

    Args:
        images: the set.
        positions: of the images that count; None for all.

    Raises:
        BackendError: the set has masks, and faster-coco-eval is not installed.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(images)) if positions is None else positions:
        image_id = int(images.image_ids[index])
        entries.append({
            "id": image_id,
            "file_name": images.file_names[index],
            "width": int(images.widths[index]),
            "height": int(images.heights[index]),
        })  # fmt: skip
        found = images.instances(index, masks=False)
        masks = images.rles(index) if images.has_masks else [None] * len(found.boxes)
        for box, label, crowd, area, mask in zip(
            found.boxes.tolist(), found.labels, found.crowd, found.areas, masks, strict=True
        ):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": int(images.category_ids[label]),
                "bbox": _xywh(box),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            annotations.append(annotation if mask is None else annotation | {"segmentation": mask})
    categories = [
        {"id": int(id), "name": name} for id, name in zip(images.category_ids, images.class_names, strict=True)
    ]
    return {"images": entries, "annotations": annotations, "categories": categories}


def coco_results(
    found: Mapping[str, Tensor], image_id: int, size: tuple[int, int], category_ids: Sequence[int] | np.ndarray
) -> list[dict[str, Any]]:
    """Return an image's detections as a COCO results file holds them.

    Args:
        found: what ``MaskRCNN.detect`` returns for an image.
        image_id: of it.
        size: its H and W.
        category_ids: of class 1, 2, ...

    Raises:
        BackendError: there are masks, and faster-coco-eval is not installed.
    """
    labels = found["labels"].cpu().numpy() - 1
    detections = Detections(
        None,
        size,
        found["boxes"].float().cpu().numpy(),
        labels,
        [str(label) for label in labels],
        found["scores"].float().cpu().numpy(),
        found["masks"][:, 0].float().cpu().numpy() if "masks" in found else None,
    )
    return detections.to_coco(image_id, [int(id) for id in category_ids])


def _xywh(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
