"""`xcit eval`: how good a classifier is on a set of labelled images; segmenters are judged in ``eval_segmentation``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from xcit.cli.result_files import writable, write_files
from xcit.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from xcit.cli.eval_inputs import Judged
    from xcit.data.image_set import ImageSet
    from xcit.data.preprocess import Preprocessing
    from xcit.evaluate.reassessed import ReassessedAccuracy
    from xcit.evaluate.resolution import ResolutionPoint
    from xcit.evaluate.run import Evaluation, Skipped

Layout = Literal[
    "auto",
    "folder",
    "csv",
    "shards",
    "cifar10",
    "cifar100",
    "flowers102",
    "stanford_cars",
    "inat18",
    "inat19",
    "digits",
]
WORST = 5
"""Classes that the table shows where --per-class does not say otherwise."""
LISTED = 5
"""Broken images that are named on stderr; JSON has them all."""
INTERRUPTED = 130


def eval(
    *,
    model: Annotated[str, arg(metavar="MODEL")],
    data: Annotated[str, arg(metavar="DIR", help_behavior_hint="(required, but for --layout digits)")] = "",
    layout: Annotated[Layout, arg(metavar="auto|folder|csv|shards|NAME|digits")] = "auto",
    split: Annotated[
        str | None, arg(metavar="train|val|test", help_behavior_hint="(default: test, else val, else all)")
    ] = None,
    real: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    image_size: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: what the model expects)")] = None,
    sizes: Annotated[str | None, arg(metavar="PX,PX,...", help_behavior_hint="")] = None,
    crop_pct: Annotated[
        float | None, arg(metavar="SHARE", help_behavior_hint="(default: what the model expects, or 1)")
    ] = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
    precision: Annotated[Literal["32", "bf16", "16"], arg(metavar="32|bf16|16")] = "32",
    batch_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 32 at 224 px, 128 on CUDA, fewer of larger images)")
    ] = None,
    num_workers: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: as many as there are cores to spare)")
    ] = None,
    max_bad_fraction: Annotated[float, arg(metavar="SHARE")] = 0.1,
    per_class: Annotated[int | None, arg(metavar="N", help_behavior_hint=f"(default: {WORST})")] = None,
    format: Annotated[Literal["table", "json"], arg(metavar="table|json")] = "table",
    output: Annotated[str | None, arg(metavar="FILE.json", help_behavior_hint="")] = None,
    plot: Annotated[
        str | None, arg(metavar="FILE.png", help_behavior_hint="(default: beside --output, where --sizes is given)")
    ] = None,
) -> int:
    """Measure a classifier on labelled images: top-1, top-5, each class, loss, calibration, throughput; or a segmenter.

    Examples: `xcit eval --model xcit_small_12_p16 --data imagenet/val`, or
    `xcit eval --model runs/flowers/model.safetensors --data flowers --sizes 160,224,288 --output sizes.json`, or
    `xcit eval --model upernet_xcit_small_12_p16 --data ade`.

    MODEL is a released model's name (an architecture means its distilled weights at 224 px; downloaded once), a
    checkpoint that xcit wrote (also of a model of timm), or hf-hub:owner/name. DIR holds a folder of images for each
    class, or val/ and test/ with these; a CSV file and a pattern of tar shards are taken as well. Classes are matched
    by name; ImageNet's also by their WordNet ids (n01440764) and, as in ImageNet-V2, by their numbers (0 to 999). Where
    an image may have several classes, mean average precision takes the place of top-1.

    Images are resized to S px (their shorter side, bicubic) and cropped to the S x S px in the centre, S being the size
    that the weights expect: ImageNet's protocol, as the paper has it. Broken images are skipped, counted and listed.

    Throughput is measured from the second batch on and includes loading and decoding; the share of the time that the
    model waited for images stands beside it.

    A segmenter, by its released name or its file, is judged by mIoU, mean accuracy and share of right pixels, and IoU
    and accuracy of each class, on the masks of a DIR as `xcit data check-masks` takes it. Images are scaled as the
    segmenter says (--image-size: their shorter side) and looked at whole, as published; figures are at each image's
    own size. Windows, several scales and mirrored images: evaluate_segmenter in Python. --layout, --real, --sizes,
    --crop-pct, --precision, --num-workers and --plot are for classifiers.

    Exit status: 0 when the set was judged, 2 for a mistake in the command or too many broken images, 130 after Ctrl-C.
    An interrupted sweep still gives the sizes that were done.

    Args:
        model: Who is judged; see above.
        data: The images and their classes; see above.
        layout: What lies there. auto finds out a folder, a CSV or shards; NAME is cifar10, cifar100, flowers102,
            stanford_cars, inat18 or inat19, of which DIR is the local copy. digits are embedded and need no DIR.
        split: Which part of the data: train, val or test.
        real: ReaL labels for ImageNet's validation images: the published real.json. Accuracy by them is given beside
            the other.
        image_size: Side S of the images in pixels.
        sizes: Judge at each of these sizes, and draw accuracy and cost against them.
        crop_pct: Side of the crop as a share of the resized image's; with 0.875, 224 px are cropped out of 256.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
        precision: float32, or mixed with bfloat16 or float16.
        batch_size: Images that go through the model at once.
        num_workers: Processes that decode images; 0 decodes in the main one.
        max_bad_fraction: Give up if more than this share of the images is broken.
        per_class: How many classes the table shows, the worst first. JSON always has all.
        format: What is printed: a table for people, JSON for programs.
        output: Write JSON to this file as well.
        plot: Draw the picture of --sizes into this file.
    """
    _check(image_size, sizes, crop_pct, batch_size, num_workers, max_bad_fraction, per_class, plot)
    json_file = writable(output, (".json",), "--output")

    from xcit.cli.eval_segmentation import eval_segmenter, is_segmenter

    if is_segmenter(model):
        for_classifiers = {
            "--layout": layout != "auto",
            "--real": real is not None,
            "--sizes": sizes is not None,
            "--crop-pct": crop_pct is not None,
            "--precision": precision != "32",
            "--num-workers": num_workers is not None,
            "--plot": plot is not None,
        }
        return eval_segmenter(
            model,
            data,
            split,
            misplaced=[flag for flag, given in for_classifiers.items() if given],
            image_size=image_size,
            device=device,
            batch_size=batch_size,
            max_bad_fraction=max_bad_fraction,
            per_class=WORST if per_class is None else per_class,
            format=format,
            json_file=json_file,
        )
    if plot is None and sizes is not None and json_file is not None:
        plot = str(json_file.with_suffix(".png"))
    png_file = writable(plot, (".png",), "--plot")
    if png_file is not None and find_spec("matplotlib") is None:
        raise BackendError('The picture needs matplotlib, which is not installed: pip install "xcit[train]".')

    from xcit.cli.eval_inputs import load_judged, open_images
    from xcit.cli.eval_tables import resized
    from xcit.data.published_labels import NUM_CLASSES, match_real_labels, read_real_labels
    from xcit.evaluate.resolution import parse_sizes
    from xcit.inference.devices import describe_device

    real_labels = read_real_labels(real) if real is not None else None
    judged = load_judged(model, device, image_size, sizes)
    if real_labels is not None and len(judged.class_names) != NUM_CLASSES:
        raise ConfigError(
            f"--real has labels for ImageNet's {NUM_CLASSES:,} classes; the model has {len(judged.class_names)}."
        )
    sides = parse_sizes(sizes, judged.patch_size) if sizes is not None else None
    preprocessing = judged.preprocessing
    if crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=crop_pct)
    images = open_images(data, layout, split, judged)
    if real_labels is not None and images.multi_label:
        raise ConfigError("--real is for images with one class each; these may have several.")
    real_targets = match_real_labels(real_labels, images.names) if real_labels is not None else None

    options: dict[str, Any] = {
        "device": judged.device,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "precision": precision,
        "max_bad_fraction": max_bad_fraction,
    }
    about: dict[str, Any] = {
        "model": model,
        "data": data or layout,
        "split": split,
        "protocol": {**preprocessing.to_cfg(), "resized_to": resized(preprocessing)},
        "precision": precision,
        "device": describe_device(judged.device),
        "versions": _versions(),
    }
    if sides is None:
        return _single(judged, images, preprocessing, options, about, real_targets, per_class, format, json_file)
    return _sweep(judged, images, preprocessing, sides, options, about, real_targets, format, json_file, png_file)


# --- what was asked for -----------------------------------------------------------------------------------------------


def _check(
    image_size: int | None,
    sizes: str | None,
    crop_pct: float | None,
    batch_size: int | None,
    num_workers: int | None,
    max_bad_fraction: float,
    per_class: int | None,
    plot: str | None,
) -> None:
    """Refuse, all at once, what cannot be honoured, before anything slow."""
    problems = []
    if image_size is not None and image_size < 1:
        problems.append(f"--image-size is {image_size}; it must be 1 or more, and at least one patch of the model")
    if image_size is not None and sizes is not None:
        problems.append("--image-size is one size and --sizes are several; leave one of them out")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        problems.append(f"--crop-pct is {crop_pct}; it must be more than 0 and at most 1")
    if batch_size is not None and batch_size < 1:
        problems.append(f"--batch-size is {batch_size}; it must be 1 or more")
    if num_workers is not None and not 0 <= num_workers <= 256:
        problems.append(f"--num-workers is {num_workers}; it must be from 0 to 256")
    if not 0 <= max_bad_fraction <= 1:
        problems.append(f"--max-bad-fraction is {max_bad_fraction}; it must be from 0 to 1")
    if per_class is not None and per_class < 0:
        problems.append(f"--per-class is {per_class}; it must be 0 or more")
    if per_class is not None and sizes is not None:
        problems.append("--per-class is for a single size; with --sizes, the classes of each size are in the JSON")
    if plot is not None and sizes is None:
        problems.append("--plot draws the figures of several sizes; name them by --sizes")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from xcit import __version__

    return {"xcit": __version__, "torch": version("torch"), "pillow": version("pillow")}


# --- running ----------------------------------------------------------------------------------------------------------


def _single(
    judged: Judged,
    images: ImageSet,
    preprocessing: Preprocessing,
    options: dict[str, Any],
    about: dict[str, Any],
    real_targets: list[tuple[int, ...]] | None,
    per_class: int | None,
    format: str,
    json_file: Path | None,
) -> int:
    from xcit.cli.eval_tables import print_evaluation
    from xcit.evaluate.record import evaluation_record
    from xcit.evaluate.run import evaluate_classifier

    seen = 0

    def note(done: int) -> None:
        nonlocal seen
        seen = done
        advance(done)

    try:
        with _progress(len(images)) as advance:
            evaluation = evaluate_classifier(judged.model, images, preprocessing, on_progress=note, **options)
    except KeyboardInterrupt:
        print(f"xcit: interrupted after {seen:,} of {len(images):,} images; there is no result.", file=sys.stderr)
        return INTERRUPTED
    real = _by_real_labels(evaluation, real_targets)
    _tell_skipped(evaluation.skipped, len(images))
    record = {**about, **evaluation_record(evaluation, real)}
    if format == "json":
        print(json.dumps(record, indent=2))
    else:
        print_evaluation(about, preprocessing, evaluation, real, WORST if per_class is None else per_class)
    write_files((json_file, _json(record)))
    return 0


def _sweep(
    judged: Judged,
    images: ImageSet,
    preprocessing: Preprocessing,
    sizes: tuple[int, ...],
    options: dict[str, Any],
    about: dict[str, Any],
    real_targets: list[tuple[int, ...]] | None,
    format: str,
    json_file: Path | None,
    png_file: Path | None,
) -> int:
    from xcit.cli.eval_tables import print_sweep
    from xcit.evaluate.record import evaluation_record
    from xcit.evaluate.resolution import sweep_resolution
    from xcit.models.weights import bare

    points: list[ResolutionPoint] = []
    interrupted = False
    try:
        with _progress(len(images) * len(sizes)) as advance:

            def progress(size: int, done: int) -> None:
                advance(sizes.index(size) * len(images) + done)

            for point in sweep_resolution(
                bare(judged.model), images, preprocessing, sizes, on_progress=progress, **options
            ):
                points.append(point)
    except KeyboardInterrupt:
        interrupted = True
        kept = f"the {len(points)} that were done follow" if points else "there is no result"
        print(f"xcit: interrupted after {len(points)} of {len(sizes)} sizes; {kept}.", file=sys.stderr)
        if not points:
            return INTERRUPTED
    _tell_skipped(points[0].evaluation.skipped, len(images))
    reals = [_by_real_labels(point.evaluation, real_targets) for point in points]
    own_size = judged.preprocessing.image_size
    about["protocol"] = {key: about["protocol"][key] for key in ("mean", "std", "interpolation", "crop_pct")}
    record = {
        **about,
        "complete": not interrupted,
        "sizes": [
            {
                "image_size": point.image_size,
                "multiply_adds": point.costs.multiply_adds,
                "activation_bytes": point.costs.inference_bytes,
                **evaluation_record(point.evaluation, real),
            }
            for point, real in zip(points, reals, strict=True)
        ],
    }
    if format == "json":
        print(json.dumps(record, indent=2))
    else:
        print_sweep(about, points, reals)
    picture = b"" if png_file is None else _picture(points, own_size[0] if own_size[0] == own_size[1] else None)
    write_files((json_file, _json(record)), (png_file, picture))
    return INTERRUPTED if interrupted else 0


def _by_real_labels(evaluation: Evaluation, real_targets: list[tuple[int, ...]] | None) -> ReassessedAccuracy | None:
    if real_targets is None:
        return None
    from xcit.evaluate.reassessed import reassessed_accuracy

    return reassessed_accuracy(evaluation.predicted, [real_targets[index] for index in evaluation.indices])


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if that is a terminal; yield what sets it to a number of images."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("evaluating", total=total)
        yield lambda done: progress.update(task, completed=done)


# --- telling ----------------------------------------------------------------------------------------------------------


def _tell_skipped(skipped: Sequence[Skipped], total: int) -> None:
    for each in skipped[:LISTED]:
        print(f"xcit: {each.reason}", file=sys.stderr)
    if skipped:
        more = "" if len(skipped) <= LISTED else f" The first {LISTED} are above; JSON (--output) lists all."
        print(f"xcit: {len(skipped):,} of {total:,} images are broken and were skipped.{more}", file=sys.stderr)


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=2).encode() + b"\n"


def _picture(points: list[ResolutionPoint], trained_size: int | None) -> bytes:
    from xcit.evaluate.classification import ClassificationMetrics
    from xcit.report.style import png
    from xcit.report.sweep import SweepPoint, sweep_figure

    drawn = []
    for point in points:
        metrics: Any = point.evaluation.metrics
        speed = point.evaluation.speed
        single = isinstance(metrics, ClassificationMetrics)
        score = metrics.accuracy if single else metrics.mean_average_precision
        interval = metrics.accuracy_interval if single else None
        rate = speed.images_per_second if speed else None
        drawn.append(SweepPoint(point.image_size, score, interval, point.costs.multiply_adds, rate))
    word = "top-1 accuracy" if single else "mean average precision"
    return png(sweep_figure(drawn, score=word, trained_size=trained_size))
