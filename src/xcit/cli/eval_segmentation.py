"""What `xcit eval` does with a segmenter: figures of label maps on images with masks."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcit.cli.result_files import write_files
from xcit.errors import CheckpointError, ConfigError, DataError, UnknownNameError

if TYPE_CHECKING:
    from xcit.data.mask_set import MaskSet
    from xcit.evaluate.segmenter_run import SegmentationEvaluation

_log = logging.getLogger("xcit")


def is_segmenter(model: str) -> bool:
    """Return whether a model is a segmenter, by its name or by what its file says of itself, without reading weights.

    Args:
        model: as on the command line. What cannot be read is none; the reader of classifiers says why. A file behind an
            address is one if it has a released segmenter's name.
    """
    from xcit.models.download import is_url
    from xcit.models.segmenters import TASK
    from xcit.models.zoo import CHECKPOINTS, find

    try:
        released = find(model)[1]
        return released is not None and released.task == TASK
    except UnknownNameError:
        pass
    named = CHECKPOINTS.get(Path(model).stem)
    path = Path(model).expanduser()
    if is_url(model):
        return named is not None and named.task == TASK
    return path.is_file() and _holds_segmenter(path)


def _holds_segmenter(path: Path) -> bool:
    import safetensors

    from xcit.models.mmseg_files import from_mmseg
    from xcit.models.segmenters import TASK
    from xcit.models.storage import read_file
    from xcit.models.weights import read_description

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config, _ = read_description(file.metadata() or {}, str(path))
            keys = list(file.keys())
        if config is not None:
            return isinstance(config, dict) and config.get("task") == TASK
    except (OSError, safetensors.SafetensorError):  # then a file of torch.save, whose tensors are mapped, not read
        try:
            keys = list(from_mmseg(read_file(path).content, str(path))[0])
        except CheckpointError:
            return False
    except CheckpointError:  # a damaged description
        return False
    return any(key.removeprefix("module.").startswith("decode_head.") for key in keys)


def eval_segmenter(
    model: str,
    data: str,
    split: str | None,
    *,
    misplaced: Sequence[str],
    image_size: int | None,
    device: str,
    batch_size: int | None,
    max_bad_fraction: float,
    per_class: int,
    format: str,
    json_file: Path | None,
) -> int:
    """Judge a segmenter, print and write its figures; return the exit status.

    Args:
        model: as on the command line, like all that follows.
        data: its folder.
        split: which part; None for test, else val, else the whole of what is not divided.
        misplaced: the flags that were given and are for classifiers.
        image_size: shorter side of the images, in pixels.
        device: where to run.
        batch_size: images at once.
        max_bad_fraction: share of the images that may be of no use.
        per_class: classes to show at most.
        format: "table" or "json".
        json_file: where JSON goes too.

    Raises:
        XCiTError: flags that do nothing here, a model or data that cannot be had, or classes that the model lacks.
    """
    if misplaced:
        what = f"{misplaced[0]} is" if len(misplaced) == 1 else f"{', '.join(misplaced)} are"
        raise ConfigError(f"{what} for classifiers, and {model} is a segmenter; leave {_it(misplaced)} out.")
    if not data:
        raise ConfigError("--data is missing; name a folder of images and masks, as xcit data check-masks takes it.")

    import warnings

    from PIL import Image

    from xcit.cli.eval import INTERRUPTED, _json, _progress, _tell_skipped, _versions
    from xcit.evaluate.segmenter_run import evaluate_segmenter
    from xcit.inference.devices import describe_device
    from xcit.inference.segmenter import Segmenter

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    images, part = open_part(data, split)
    segmenter = Segmenter(model, device=device, mode="whole", image_size=image_size, batch_size=batch_size)
    done = 0
    try:
        with _progress(len(images)) as advance:

            def note() -> None:
                nonlocal done
                done += 1
                advance(done)

            evaluation = evaluate_segmenter(segmenter, images, max_bad_fraction=max_bad_fraction, on_image=note)
    except KeyboardInterrupt:
        print(f"xcit: interrupted after {done:,} of {len(images):,} images; there is no result.", file=sys.stderr)
        return INTERRUPTED
    except ConfigError as error:
        # What does not fit in memory: one of the ways out is a flag of xcit segment alone.
        raise ConfigError(str(error).replace(" (--mode slide)", " with evaluate_segmenter in Python")) from None
    _tell_skipped(evaluation.bad, len(images))
    record: dict[str, Any] = {
        "model": model,
        "data": data,
        "split": split,
        "part": part,
        "protocol": {
            "mode": segmenter.mode,
            "image_size": segmenter.image_size,
            "max_size": segmenter.max_size,
            "scales": list(segmenter.scales),
            "flip": segmenter.flip,
        },
        "device": describe_device(segmenter.device),
        "versions": _versions(),
        "num_images": evaluation.num_images,
        "num_skipped": len(evaluation.bad),
        **evaluation.figures.to_dict(evaluation.class_names),
        "skipped": [each._asdict() for each in evaluation.bad],
    }
    if format == "json":
        print(json.dumps(record, indent=2))
    else:
        _print(record, evaluation, per_class)
    write_files((json_file, _json(record)))
    return 0


def _it(flags: Sequence[str]) -> str:
    return "it" if len(flags) == 1 else "them"


def open_part(data: str, split: str | None) -> tuple[MaskSet, str]:
    """Open one part of a data set with masks, as ``open_eval_set`` does of one with classes.

    Args:
        data: the folder.
        split: train, val or test, or another word for it. None takes test, or else val, or else what is not divided.

    Returns:
        The part, and which it is: "train", "val", "test" or "all".

    Raises:
        UnknownNameError: no such word.
        DataError: no such folder or part, or files that do not pair.
    """
    from xcit.data.mask_parts import find_mask_layout, unpaired
    from xcit.data.parts import PART_OF_WORD, WHOLE, WORDS_OF_PART

    if split is not None and split not in PART_OF_WORD:
        raise UnknownNameError("part", split, WORDS_OF_PART, "There are train, val and test.")
    layout = find_mask_layout(data)
    there = " and ".join(sorted(layout.folders))
    part = PART_OF_WORD[split] if split else next((p for p in ("test", "val", WHOLE) if p in layout.folders), None)
    if part is None:
        raise DataError(f"{data}: has {there}, but neither test nor val; say which part: --split train.")
    if part not in layout.folders:
        has = "is not divided" if WHOLE in layout.folders else f"has {there}"
        raise DataError(f"{data}: {has}; it has no {part} part.")
    if split is None and part != WHOLE:
        _log.info("%s has %s; %s is taken.", data, there, part)
    pairs = layout.pairs(part)
    for text in (*layout.notes, *unpaired(pairs, layout.folders[part])):
        _log.warning("%s", text)
    return layout.mask_set(pairs), part


def _print(record: dict[str, Any], evaluation: SegmentationEvaluation, per_class: int) -> None:
    """Print the figures and the worst classes."""
    from xcit.cli.output import print_facts, print_table

    figures, protocol = evaluation.figures, record["protocol"]
    skipped = f", {len(evaluation.bad):,} broken ones skipped" if evaluation.bad else ""
    print_facts(
        f"{record['model']} on {record['data']}",
        [
            ("images", f"{evaluation.num_images:,} of {record['part']}{skipped}"),
            ("pixels", f"{figures.num_pixels:,} that are not ignored"),
            ("mIoU", _percent(figures.miou)),
            ("mAcc", _percent(figures.macc)),
            ("aAcc", _percent(figures.aacc)),
            ("protocol", f"shorter side {protocol['image_size']:,} px, longer at most {protocol['max_size']:,} px, "
                         f"looked at whole"),
            ("device", record["device"]),
        ],
    )  # fmt: skip
    rows = [
        (iou, acc, count, index, name)
        for index, (iou, acc, count, name) in enumerate(
            zip(
                figures.iou.tolist(),
                figures.acc.tolist(),
                figures.matrix.sum(1).tolist(),
                evaluation.class_names,
                strict=True,
            )
        )
        if not math.isnan(iou)
    ]
    shown = sorted(rows, key=lambda row: (row[0], row[3]))[:per_class]
    if shown:
        print_table(
            "The worst classes" if len(shown) < len(evaluation.class_names) else "All classes, the worst first",
            (">IoU", ">accuracy", ">pixels", ">index", "class"),
            [(_percent(iou), _percent(acc), f"{count:,}", str(index), name) for iou, acc, count, index, name in shown],
        )
    absent = int((figures.matrix.sum(1) == 0).sum())
    if shown and absent:
        has = "has" if absent == 1 else "have"
        print(f"{absent:,} of {len(evaluation.class_names):,} classes {has} no pixel in this set.")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f} %"
