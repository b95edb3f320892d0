"""What a run on the digits leaves to look at: pictures, sample images, and the page that holds them together."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from xcit.data.digits import DigitImages, DigitSplits
from xcit.data.preprocess import Preprocessing
from xcit.evaluate.classification import ClassificationMetrics, predicted
from xcit.inference.attention_maps import attention_maps, overlay
from xcit.models.xcit import XCiT
from xcit.recipes.config import TrainConfig, to_yaml
from xcit.recipes.run_folder import RunFolder, write_atomic
from xcit.report.confusion import confusion_figure
from xcit.report.curves import curves_figure
from xcit.report.html import Code, KeyFigure, Picture, Prose, Section, Table, html_page
from xcit.report.overlays import Example, examples_figure
from xcit.report.style import DPI, png

PICTURE = (160, 160)
"""Pixels of a digit in a sheet."""
MAX_IN_SHEET = 6
"""Mistakes in the sheet of attention."""
MAX_OF_HEADS = 4
"""Digits of which each head is shown."""
MAX_MISTAKES = 12
"""Mistakes on the page."""


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run on the digits at its end.

    Attributes:
        config: its settings.
        history: a row an epoch.
        best: the row of the epoch whose weights are kept.
        metrics: of those weights, on the held-out part.
        environment: versions and machine.
        splits: the digits.
        preprocessing: how they are prepared.
    """

    config: TrainConfig
    history: Sequence[Mapping[str, float]]
    best: Mapping[str, float]
    metrics: ClassificationMetrics
    environment: Mapping[str, str]
    splits: DigitSplits
    preprocessing: Preprocessing

    @property
    def minutes(self) -> float:
        """Time that the epochs took together."""
        return sum(row["seconds"] for row in self.history) / 60


def predict_command(run: RunFolder) -> str:
    """Return the command that uses the trained model."""
    return f"xcit predict {run.samples} --model {run.model}"


def write_report(record: RunRecord, run: RunFolder, model: XCiT, logits: Float[Tensor, "images classes"]) -> None:
    """Write the pictures, the samples and the page.

    Args:
        record: of the run.
        run: where to.
        model: the trained model, for its attention.
        logits: of the held-out digits, in their order.

    Raises:
        ExportError: a file cannot be written.
    """
    test = record.splits.test
    labels, probabilities = predicted(logits)
    wrong = np.flatnonzero(labels.numpy() != test.labels)
    wrong = wrong[np.argsort(-probabilities.numpy()[wrong], kind="stable")]  # the surest mistakes first
    right = np.flatnonzero(labels.numpy() == test.labels)
    firsts = [int(right[test.labels[right] == digit][0]) for digit in range(10) if (test.labels[right] == digit).any()]

    def examples(indices: Sequence[int], *, heads: bool) -> list[Example]:
        maps = attention_maps(model, DigitImages(test.subset(indices), record.preprocessing).images, PICTURE)
        found = []
        for index, attention in zip(indices, maps, strict=True):
            digit = test.picture(index).resize(PICTURE, Image.Resampling.BICUBIC)
            overlays = [overlay(digit, each) for each in (attention.mean(dim=0), *(attention if heads else ()))]
            truth, guess, sure = test.labels[index], int(labels[index]), f"{100 * float(probabilities[index]):.0f} %"
            caption = f"{truth}, {sure} sure" if guess == truth else f"{truth} taken for {guess}, {sure}"
            found.append(Example([digit, *overlays], caption, guess == truth))
        return found

    heads = [f"head {i + 1}" for i in range(record.config.model.num_heads)]
    shown = [*firsts, *(int(i) for i in wrong[:MAX_IN_SHEET])]
    pairs = ("digit", "attention")
    pictures = {
        run.curves: png(curves_figure(record.history, int(record.best["epoch"]))),
        run.confusion: png(confusion_figure(record.metrics.confusion, record.metrics.class_names)),
        run.attention: png(examples_figure(examples(shown, heads=False), pairs, columns=4)),
        run.heads: png(
            examples_figure(examples(firsts[:MAX_OF_HEADS], heads=True), ["digit", "all heads", *heads], columns=1)
        ),
    }
    for path, data in pictures.items():
        write_atomic(path, data)
    for path, data in _samples(record, run).items():
        write_atomic(path, data)
    mistakes = None
    if len(wrong):
        surest = [int(i) for i in wrong[:MAX_MISTAKES]]
        mistakes = png(examples_figure(examples(surest, heads=False), pairs, columns=4))
    write_atomic(run.report, _page(record, run, pictures, mistakes, len(wrong)).encode())


def _samples(record: RunRecord, run: RunFolder) -> dict[Path, bytes]:
    """The first held-out digit of each class, with the very pixels that the model is given."""
    test = record.splits.test
    files = {}
    for digit, name in enumerate(record.metrics.class_names):
        buffer = io.BytesIO()
        picture = test.picture(int(np.flatnonzero(test.labels == digit)[0]))
        record.preprocessing.resize_and_crop(picture).save(buffer, "PNG")
        files[run.samples / f"digit_{name}.png"] = buffer.getvalue()
    return files


def _picture(data: bytes, alt: str, caption: str) -> Picture:
    """A picture in the size that its text was set for."""
    return Picture(data, alt, caption, width=round(Image.open(io.BytesIO(data)).width * 96 / DPI))


def _page(
    record: RunRecord, run: RunFolder, pictures: Mapping[Path, bytes], mistakes: bytes | None, num_mistakes: int
) -> str:
    metrics, (low, high) = record.metrics, record.metrics.accuracy_interval
    train, val, test = record.splits
    size = record.config.data.image_size
    grid = -(-size // record.config.model.patch_size)
    figures = [
        KeyFigure(
            f"{100 * metrics.accuracy:.1f} %",
            f"held-out accuracy: {metrics.num_correct} of {metrics.num_images} digits right "
            f"(95\u00a0% interval {100 * low:.1f} to {100 * high:.1f}\u00a0%)",
        ),
        KeyFigure(
            f"{100 * record.best['val_accuracy']:.1f} %",
            f"validation accuracy at epoch {record.best['epoch']:.0f} of {len(record.history)}, the one that is kept",
        ),
        KeyFigure(
            f"{metrics.calibration_error:.3f}",
            "calibration error: mean distance of the stated probability from the share that is right",
        ),
        KeyFigure(f"{record.minutes:.1f} min", f"of training on {record.environment['device']}"),
    ]
    lowest, name = min(zip(metrics.class_accuracies, metrics.class_names, strict=True))
    use = (
        f"{predict_command(run)}\n\n"
        f"# the same in Python\n"
        f"import xcit\n"
        f'predictor = xcit.Predictor("{run.model}")\n'
        f'for prediction in predictor("{run.samples}", top_k=1):\n'
        f"    print(prediction.path, prediction.labels[0].name, prediction.labels[0].probability)"
    )
    few = f"The {MAX_MISTAKES} surest of {num_mistakes} mistakes" if num_mistakes > MAX_MISTAKES else "All mistakes"
    sections = [
        Section(
            "Training",
            [
                _picture(
                    pictures[run.curves],
                    "Loss and validation accuracy over the epochs",
                    "The dotted line marks the epoch with the highest validation accuracy, whose weights are kept. The "
                    "training loss is higher since its images are distorted and its labels smoothed.",
                )
            ],
        ),
        Section(
            "What is taken for what",
            [
                _picture(
                    pictures[run.confusion],
                    "Confusion matrix of the held-out digits",
                    "Held-out digits by their true class (rows) and the predicted one (columns)."
                    + (f" The hardest class is {name}, with {100 * lowest:.1f} % right." if lowest < 1 else ""),
                )
            ],
        ),
        Section(
            "Mistakes",
            [
                Prose("Not one of the held-out digits was taken for another.")
                if mistakes is None
                else _picture(
                    mistakes,
                    "Held-out digits that were taken for others",
                    f"{few} on the held-out digits, with the probability that the model gave to its answer and where "
                    f"it looked.",
                )
            ],
        ),
        Section(
            "Where the model looks",
            [
                _picture(
                    pictures[run.attention],
                    "Attention of the class token over held-out digits",
                    f"Attention of the class token in the last layer, all heads together, over the {grid} x {grid} "
                    f"patches: from dark (little) to yellow (most). Green captions: right; red: wrong.",
                ),
                _picture(pictures[run.heads], "The same for each head", "Each head by itself."),
            ],
        ),
        Section(
            "Use the model",
            [
                Prose(
                    f"The weights with the names of the classes and the preparation of images are in {run.model.name}. "
                    f"The model expects a digit in white on black that fills the picture, as in {run.samples.name}/; "
                    f"invert dark ink on white paper first."
                ),
                Code(use),
            ],
        ),
        Section(
            "Data and method",
            [
                Prose(
                    f"Scikit-learn's {len(train) + len(val) + len(test):,} digits of 8 x 8 pixels, enlarged "
                    f"to {size} x {size}, in three stratified parts: {len(train):,} to fit the weights, {len(val)} to "
                    f"choose the epoch, and {len(test)} held out, which were evaluated once, after all choices. All "
                    f"parts hold digits of the same 13 writers, so the accuracy is that on new digits of known hands."
                ),
                Table((), [(name, value) for name, value in record.environment.items()]),
                Code(to_yaml(record.config), summary="All settings (config.yaml)"),
            ],
        ),
    ]
    return html_page(
        "XCiT on handwritten digits",
        f"{record.config.recipe}, seed {record.config.seed}, {len(record.history)} epochs",
        figures,
        sections,
    )
