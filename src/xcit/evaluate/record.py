"""An evaluation as plain data, for JSON: whole where a table on a screen shows only the worst."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from xcit.evaluate.classification import ClassificationMetrics
from xcit.evaluate.reassessed import ReassessedAccuracy
from xcit.evaluate.run import Evaluation

if TYPE_CHECKING:
    from xcit.evaluate.multi_label import MultiLabelMetrics


def evaluation_record(evaluation: Evaluation, real: ReassessedAccuracy | None = None) -> dict[str, Any]:
    """Return all figures of an evaluation.

    The confusion matrix is given by ``classes`` (its diagonal and row sums) and ``mistakes`` (all else that is not 0).

    Args:
        evaluation: which one.
        real: the accuracy by ReaL labels, if these were given.
    """
    metrics, speed = evaluation.metrics, evaluation.speed
    figures = _one_class(metrics) if isinstance(metrics, ClassificationMetrics) else _several_classes(metrics)
    return {
        "num_images": metrics.num_images,
        "num_skipped": len(evaluation.skipped),
        **figures,
        **({"real": real.to_dict()} if real else {}),
        "speed": {
            "images_per_second": speed.images_per_second if speed else None,
            "data_wait": speed.data_wait if speed else None,
            "seconds": evaluation.seconds,
            "batch_size": evaluation.batch_size,
            "num_workers": evaluation.num_workers,
            "peak_memory_bytes": evaluation.peak_memory_bytes,
        },
        "skipped": [skipped._asdict() for skipped in evaluation.skipped],
    }


def _one_class(metrics: ClassificationMetrics) -> dict[str, Any]:
    names = metrics.class_names
    return {
        "num_correct": metrics.num_correct,
        "accuracy": metrics.accuracy,
        "accuracy_interval_95": list(metrics.accuracy_interval),
        "num_top5_correct": metrics.num_top5_correct,
        "top5_accuracy": metrics.top5_accuracy,
        "loss": metrics.loss,
        "calibration_error": metrics.calibration_error,
        "classes": [
            {
                "index": index,
                "name": name,
                "num_images": count,
                "num_correct": metrics.confusion[index][index],
                "accuracy": _finite(accuracy),
            }
            for index, (name, count, accuracy) in enumerate(
                zip(names, metrics.class_counts, metrics.class_accuracies, strict=True)
            )
        ],
        "mistakes": [
            {"true": i, "predicted": j, "true_name": names[i], "predicted_name": names[j], "num_images": count}
            for i, j, count in metrics.mistakes()
        ],
    }


def _several_classes(metrics: MultiLabelMetrics) -> dict[str, Any]:
    return {
        "mean_average_precision": _finite(metrics.mean_average_precision),
        "loss": metrics.loss,
        "classes": [
            {"index": index, "name": name, "num_images": count, "average_precision": _finite(precision)}
            for index, (name, count, precision) in enumerate(
                zip(metrics.class_names, metrics.class_counts, metrics.average_precisions, strict=True)
            )
        ],
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
