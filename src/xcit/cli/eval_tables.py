"""What `xcit eval` prints for people: the figures of one evaluation, or a row for each size of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xcit.cli.output import mib, print_facts, print_table
from xcit.data.preprocess import Preprocessing
from xcit.evaluate.classification import ClassificationMetrics
from xcit.evaluate.reassessed import ReassessedAccuracy
from xcit.evaluate.resolution import ResolutionPoint
from xcit.evaluate.run import Evaluation


def print_evaluation(
    about: dict[str, Any],
    preprocessing: Preprocessing,
    evaluation: Evaluation,
    real: ReassessedAccuracy | None,
    per_class: int,
) -> None:
    """Print the figures of one evaluation and its worst classes.

    Args:
        about: the model, the data, the device and the precision, as JSON has them.
        preprocessing: how the images were prepared.
        evaluation: the figures.
        real: accuracy by ReaL labels, if there are such.
        per_class: classes to show at most.
    """
    metrics = evaluation.metrics
    skipped = f", {len(evaluation.skipped):,} broken ones skipped" if evaluation.skipped else ""
    facts = [("images", f"{metrics.num_images:,}{skipped}")]
    if isinstance(metrics, ClassificationMetrics):
        facts.append(("top-1", _share(metrics.accuracy, metrics.accuracy_interval)))
        if metrics.top5_accuracy is not None:
            facts.append(("top-5", _percent(metrics.top5_accuracy)))
        if real:
            text = _share(real.accuracy, real.accuracy_interval)
            facts.append(("top-1, ReaL", f"{text} of {real.num_images:,} images that have such labels"))
        facts.append(("cross-entropy", f"{metrics.loss:.4f}"))
        facts.append(("calibration error", f"{_percent(metrics.calibration_error)} (ECE, 15 bins)"))
    else:
        facts.append(("mAP", _percent(metrics.mean_average_precision)))
        facts.append(("binary cross-entropy", f"{metrics.loss:.4f}"))
    facts.append(("throughput", _speed(evaluation)))
    if evaluation.peak_memory_bytes is not None:
        facts.append(("peak memory", mib(evaluation.peak_memory_bytes)))
    H, W = preprocessing.image_size
    sides = " x ".join(map(str, dict.fromkeys(resized(preprocessing))))
    facts.append(("protocol", f"resized to {sides} px ({preprocessing.interpolation}), centre crop {H} x {W}"))
    facts.append(("precision", f"{about['precision']}, on {about['device']}"))
    print_facts(f"{about['model']} on {about['data']}", facts)

    rows = sorted(_class_rows(metrics), key=lambda row: (row[0], row[1]))[:per_class]
    if rows:
        single = isinstance(metrics, ClassificationMetrics)
        head = "accuracy" if single else "average precision"
        print_table(
            "The worst classes" if len(rows) < len(metrics.class_names) else "All classes, the worst first",
            (">" + head, ">images", ">index", "class", *(("most often taken for",) if single else ())),
            [
                (_percent(value), f"{count:,}", str(index), name, *((taken,) if single else ()))
                for value, index, count, name, taken in rows
            ],
        )
    unseen = sum(not count for count in metrics.class_counts)
    if rows and unseen:
        print(f"{unseen:,} of {len(metrics.class_names):,} classes have no image in this set.")


def _class_rows(metrics: Any) -> Iterator[tuple[float, int, int, str, str]]:
    """Yield the figure, the number, the images, the name and the most frequent mistake of each class with images."""
    single = isinstance(metrics, ClassificationMetrics)
    taken: dict[int, str] = {}
    if single:
        for true, guess, count in metrics.mistakes():
            taken.setdefault(true, f"{metrics.class_names[guess]} ({count:,})")
    values = metrics.class_accuracies if single else metrics.average_precisions
    for index, (value, count) in enumerate(zip(values, metrics.class_counts, strict=True)):
        if count:
            yield value, index, count, metrics.class_names[index], taken.get(index, "")


def print_sweep(
    about: dict[str, Any], points: Sequence[ResolutionPoint], reals: Sequence[ReassessedAccuracy | None]
) -> None:
    """Print a row for each size of image.

    Args:
        about: the model and the data, as JSON has them.
        points: the sizes, at least one.
        reals: accuracy by ReaL labels at each, or None.
    """
    single = isinstance(points[0].evaluation.metrics, ClassificationMetrics)
    top5 = single and points[0].evaluation.metrics.top5_accuracy is not None  # type: ignore[union-attr]
    measured = points[0].evaluation.peak_memory_bytes is not None
    columns = [
        ">size", ">top-1" if single else ">mAP", *([">95 % interval"] if single else []), *([">top-5"] if top5 else []),
        *([">ReaL"] if reals[0] else []), *([">ECE"] if single else []), ">multiply-adds", ">memory, one image",
        *([">peak memory"] if measured else []), ">images/s", ">data wait",
    ]  # fmt: skip
    scale, unit = (1e9, "G") if points[-1].costs.multiply_adds >= 1e9 else (1e6, "M")
    rows = []
    for point, real in zip(points, reals, strict=True):
        evaluation = point.evaluation
        metrics: Any = evaluation.metrics
        low, high = metrics.accuracy_interval if single else (0.0, 0.0)
        rows.append([
            str(point.image_size),
            _percent(metrics.accuracy if single else metrics.mean_average_precision),
            *([f"{100 * low:.1f} to {100 * high:.1f} %"] if single else []),
            *([_percent(metrics.top5_accuracy)] if top5 else []),
            *([_percent(real.accuracy)] if real else []),
            *([_percent(metrics.calibration_error)] if single else []),
            f"{point.costs.multiply_adds / scale:,.2f} {unit}",
            _memory(point.costs.inference_bytes),
            *([mib(evaluation.peak_memory_bytes or 0)] if measured else []),
            f"{evaluation.speed.images_per_second:,.1f}" if evaluation.speed else "-",
            f"{100 * evaluation.speed.data_wait:.0f} %" if evaluation.speed else "-",
        ])  # fmt: skip
    count = points[0].evaluation.metrics.num_images
    print_table(f"{about['model']} on {about['data']}, {count:,} images", columns, rows)
    if any(point.evaluation.speed is None for point in points):
        print("Throughput is measured from the second batch on, and there was one only; see --batch-size.")


def _memory(num_bytes: int) -> str:
    return mib(num_bytes) if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.0f} KiB"


def _speed(evaluation: Evaluation) -> str:
    if evaluation.speed is None:
        return "not measured: the first batch, which warms up, was the only one; see --batch-size"
    rate, wait = evaluation.speed
    workers = {0: "no worker processes", 1: "1 worker process"}.get(
        evaluation.num_workers, f"{evaluation.num_workers} worker processes"
    )
    return (
        f"{rate:,.1f} images/s with loading, {100 * wait:.0f} % of the time waiting for images "
        f"(batches of {evaluation.batch_size}, {workers})"
    )


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{_percent(value)} (95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f} %)"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def resized(preprocessing: Preprocessing) -> list[int]:
    """Return height and width that an image's shorter side is resized to, before the crop."""
    return [int(side / preprocessing.crop_pct) for side in preprocessing.image_size]
