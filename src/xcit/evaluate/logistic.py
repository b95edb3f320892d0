"""The quick probe: logistic regression on frozen features, by scikit-learn.

Features are standardised: each dimension gets mean 0 and variance 1 over the training images. How strongly the weights
are held back is chosen on validation images; whatever is reported is of others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcit.errors import BackendError, ConfigError, DataError
from xcit.evaluate.accuracy import Accuracy, accuracy_of, ranks

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""scikit-learn's C: the inverse of the L2 penalty's weight, of all images together."""

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LogisticResult:
    """What logistic regression reached.

    Attributes:
        accuracy: of the test features.
        strength: the C that was chosen.
        val_by_strength: top-1 accuracy of the validation features for each.
        converged: whether the fit with that C came to its end within 1000 iterations.
    """

    accuracy: Accuracy
    strength: float
    val_by_strength: dict[float, float]
    converged: bool


def logistic_probe(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    on_progress: Callable[[int], None] | None = None,
) -> LogisticResult:
    """Fit on the training features with each strength, choose one by the validation features, judge by the test's.

    Of strengths that do equally well the smallest C, the strongest penalty, is taken. There is no chance in it.

    Args:
        train: features (n, D) and classes (n,) that are learnt from.
        val: those that choose.
        test: those that are reported.
        num_classes: of which classes there are; those without a training image are never predicted.
        strengths: values of C to try.
        on_progress: called after each with the number tried.

    Raises:
        ConfigError: no strengths, or one that is not more than 0.
        DataError: training features of one class only, or features that are not finite.
        BackendError: scikit-learn is not installed.
    """
    if not strengths or not all(0 < strength < float("inf") for strength in strengths):
        raise ConfigError(f"Strengths are {tuple(strengths)}; there must be one or more, each more than 0.")
    if len(np.unique(train[1])) < 2:
        raise DataError("All training images are of one class; there is nothing to learn.")
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise BackendError(
            'Logistic regression comes with scikit-learn, which is not installed: pip install "xcit[train]".'
        ) from None
    for name, (features, _) in {"training": train, "validation": val, "test": test}.items():
        if not len(features):
            raise DataError(f"There are no {name} images.")
        if not np.isfinite(features).all():
            raise DataError(f"The features of the {name} images are not finite.")

    mean = train[0].mean(axis=0, dtype=np.float64)
    std = train[0].std(axis=0, dtype=np.float64)
    std[std < 1e-12 * np.maximum(np.abs(mean), 1)] = 1.0  # a dimension that says nothing stays 0

    def standardised(features: np.ndarray) -> np.ndarray:
        return (features.astype(np.float64) - mean) / std

    inputs, chooser = standardised(train[0]), standardised(val[0])
    by_strength: dict[float, float] = {}
    best: tuple[float, float, Any, bool] | None = None
    for tried, strength in enumerate(sorted(strengths), start=1):
        model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(inputs, train[1])
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        accuracy = _judge(model, chooser, val[1], num_classes).top1
        by_strength[strength] = accuracy
        if best is None or accuracy > best[1]:
            best = (strength, accuracy, model, converged)
        if on_progress is not None:
            on_progress(tried)
    assert best is not None
    strength, _, model, converged = best
    return LogisticResult(_judge(model, standardised(test[0]), test[1], num_classes), strength, by_strength, converged)


def _judge(model: Any, features: np.ndarray, labels: np.ndarray, num_classes: int) -> Accuracy:
    scores = torch.full((len(labels), num_classes), -torch.inf, dtype=torch.float64)
    scores[:, torch.from_numpy(model.classes_.astype(np.int64))] = torch.from_numpy(model.predict_log_proba(features))
    places = ranks(scores, torch.from_numpy(np.asarray(labels, dtype=np.int64)), floor=-torch.inf)
    return accuracy_of(places, num_classes)
