"""The embedded scenes as files: a COCO data set for detection, and the same images with semantic masks.

=================================  ====================================================================================
``classes.txt``                    the eleven classes of the semantic masks, a line each: background, 0, ..., 9
``train/images/000000.png``        RGB
``train/masks/000000.png``         semantic mask: palette PNG, value 0 the background, d + 1 the digit d
``train/annotations.json``         COCO: categories 1 to 10 named "0" to "9", file names relative to ``train/images``
``test/...``                       likewise, of other digits and other halves of the photographs
=================================  ====================================================================================

An annotation's box and mask are exact and cover what is visible, its ``area`` is the mask's pixels; ``visible``, which
COCO does not have, is the share of the digit's ink that no other digit hides. Later annotations of an image lie over
earlier ones.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from xcit.data.coco_masks import encode_mask
from xcit.data.digits import CLASS_NAMES
from xcit.data.scenes import PARTS, Scene, compose_scene, scene_seed
from xcit.data.written_folder import make_room, write_manifest
from xcit.errors import ConfigError
from xcit.files import write_atomic

COMMAND = "xcit data scenes"
MANIFEST = ".xcit-scenes.json"
"""Lists what was written, so that it, and nothing else, can be replaced. Hidden, so that no reader takes notice."""
SEMANTIC_CLASSES = ("background", *CLASS_NAMES)
PALETTE = (
    *((0, 0, 0), (230, 60, 60), (60, 180, 75), (70, 110, 230), (250, 200, 30), (240, 130, 40)),
    *((150, 60, 190), (70, 210, 230), (240, 90, 210), (170, 230, 60), (190, 150, 110)),
)
"""Red, green and blue of each value of a semantic mask: for people, the values alone count."""
MAX_SCENES = 1_000_000
"""Of a part: the names of the files have six digits."""


class WrittenScenes(NamedTuple):
    """What was written."""

    root: Path
    num_images: dict[str, int]
    """Of each part."""
    num_digits: dict[str, int]
    """Annotations of each part."""


def write_scenes(
    out: str | Path,
    num_train: int,
    num_test: int,
    seed: int,
    *,
    overwrite: bool = False,
    on_scene: Callable[[], None] | None = None,
    **options: Any,
) -> WrittenScenes:
    """Write scenes as a COCO data set and as semantic masks; the same bytes for the same arguments.

    Scene i of a part is ``compose_scene(scene_seed(seed, i), part, **options)``: more scenes of a seed begin with the
    same ones.

    Args:
        out: where to; made if need be.
        num_train: scenes to train on, 1 to ``MAX_SCENES``.
        num_test: held-out scenes, 0 to ``MAX_SCENES``; with 0 there is no part ``test``.
        seed: 0 or more.
        overwrite: replace what an earlier call wrote there.
        on_scene: called after each scene.
        **options: further ones of ``compose_scene``, such as ``size`` and ``num_digits``.

    Raises:
        ConfigError: an argument is out of its range, or digits find no place.
        DataError: the folder holds something already that must not, or may not, be replaced.
        ExportError: it cannot be written.
        BackendError: faster-coco-eval, which encodes the masks, is not installed.
    """
    _check(num_train, num_test, seed, options)
    counts = {part: num for part, num in zip(PARTS, (num_train, num_test), strict=True) if num}
    out = Path(out).expanduser()
    encode_mask(np.ones((1, 1)))  # is refused before anything is touched, if it must be
    make_room(out, MANIFEST, COMMAND, overwrite=overwrite)
    names = ["classes.txt"]
    for part, num in counts.items():
        names += [f"{part}/{folder}/{_name(i)}" for i in range(num) for folder in ("images", "masks")]
        names.append(f"{part}/annotations.json")
    write_manifest(out, MANIFEST, names)
    write_atomic(out / "classes.txt", "".join(f"{name}\n" for name in SEMANTIC_CLASSES).encode())
    num_digits = {part: _write_part(out, part, num, seed, options, on_scene) for part, num in counts.items()}
    return WrittenScenes(out, counts, num_digits)


def semantic_mask(scene: Scene) -> np.ndarray:
    """Return what each pixel shows, (H, W) uint8: 0 background, d + 1 the digit d."""
    values = np.zeros(scene.image.shape[:2], dtype=np.uint8)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        values[mask] = label + 1
    return values


def scene_annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    """Yield a scene's digits as COCO has them, but for the ids of annotation and image.

    Raises:
        BackendError: faster-coco-eval, which encodes the masks, is not installed.
    """
    for label, box, mask, visible in zip(scene.labels, scene.boxes, scene.masks, scene.visible, strict=True):
        x0, y0, x1, y1 = map(int, box)
        yield {
            "category_id": label + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(mask.sum()),
            "segmentation": encode_mask(mask),
            "iscrowd": 0,
            "visible": float(visible),
        }


def _write_part(
    out: Path, part: str, num: int, seed: int, options: dict[str, Any], on_scene: Callable[[], None] | None
) -> int:
    """Write one part; return how many digits its scenes have."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(num):
        scene = _compose(seed, i, part, options)
        height, width = scene.image.shape[:2]
        write_atomic(out / part / "images" / _name(i), _png(Image.fromarray(scene.image)))
        mask = Image.fromarray(semantic_mask(scene))
        mask.putpalette([value for colour in PALETTE for value in colour])
        write_atomic(out / part / "masks" / _name(i), _png(mask))
        images.append({"id": i + 1, "file_name": _name(i), "width": width, "height": height})
        # Ids from 1: pycocotools takes 0 for "no match".
        for annotation in scene_annotations(scene):
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **annotation})
        if on_scene is not None:
            on_scene()
    content = {
        "info": {"description": f"Handwritten digits over photographs: xcit data scenes, seed {seed}, part {part}."},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": d + 1, "name": name, "supercategory": "digit"} for d, name in enumerate(CLASS_NAMES)],
    }
    write_atomic(out / part / "annotations.json", json.dumps(content).encode())
    return len(annotations)


def _compose(seed: int, index: int, part: str, options: dict[str, Any]) -> Scene:
    of: Literal["train", "test"] = "train" if part == "train" else "test"
    return compose_scene(scene_seed(seed, index), of, **options)


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _check(num_train: int, num_test: int, seed: int, options: dict[str, Any]) -> None:
    problems = []
    if not 1 <= num_train <= MAX_SCENES:
        problems.append(f"there must be 1 to {MAX_SCENES:,} scenes to train on, not {num_train:,}")
    if not 0 <= num_test <= MAX_SCENES:
        problems.append(f"there must be 0 to {MAX_SCENES:,} test scenes, not {num_test:,}")
    if seed < 0:
        problems.append(f"seed is {seed}; it must be 0 or more")
    try:
        _compose(max(seed, 0), 0, "train", options)
    except ConfigError as error:
        problems.append(str(error).removesuffix("."))
    if problems:
        raise ConfigError("; ".join(problems) + ".")
