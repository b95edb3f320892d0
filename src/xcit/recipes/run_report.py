"""What a training run leaves to look at: pictures, sample images, and the page that holds them together."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from xcit.data.image_set import DataSplits, ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.evaluate.classification import ClassificationMetrics, wilson_interval
from xcit.evaluate.multi_label import MultiLabelMetrics
from xcit.files import write_atomic
from xcit.models.xcit import XCiT
from xcit.recipes.config import TrainConfig
from xcit.recipes.report_pictures import Judged, jpeg
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import to_yaml
from xcit.report.confusion import MAX_NUMBERED, confusion_figure, most_confused
from xcit.report.curves import curves_figure, figure_name, pace_figure
from xcit.report.html import Block, Code, Gallery, KeyFigure, Picture, Prose, Section, Table, html_page
from xcit.report.overlays import examples_figure
from xcit.report.style import DPI, png

MAX_MISTAKES = 24
"""Mistakes on the page."""
MAX_IN_SHEET = 6
"""Mistakes in the sheet of attention."""
MAX_OF_HEADS = 4
"""Images of which each head is shown."""
MAX_HEADS = 8
"""Heads that are shown of each."""
MAX_PAIRS = 20
"""Kinds of mistakes that are listed."""
MAX_ROWS = 50
"""Rows of a table that are not folded away."""
MAX_FOLDED = 1000
"""Rows that are folded away; what is beyond them stands in the run's files."""
MAX_PNG = 200_000
"""Bytes above which the page has a picture as JPEG."""

NBSP = "\u00a0"

ABOUT_DIGITS = (
    "Scikit-learn's handwritten digits of 8 x 8 pixels, enlarged. All parts hold digits of the same 13 writers, so the "
    "accuracy is that on new digits of known hands."
)
DIGITS_WANTED = (
    "The model expects a digit in white on black that fills the picture, as in {samples}/; invert dark ink on white "
    "paper first."
)

Part = Literal["test", "validation"]


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run at its end.

    Attributes:
        config: its settings.
        history: a row an epoch.
        best: the row of the epoch whose weights are kept.
        metrics: of those weights.
        part: what the metrics are of: the test part, which no choice was made on, or where the data has none the
            validation part, which the epoch was chosen by.
        environment: versions and machine; ``device`` among them.
        splits: the images.
        preprocessing: how they are prepared.
        skipped: part, name and reason of each image that could not be decoded.
    """

    config: TrainConfig
    history: Sequence[Mapping[str, float]]
    best: Mapping[str, float]
    metrics: ClassificationMetrics | MultiLabelMetrics
    part: Part
    environment: Mapping[str, str]
    splits: DataSplits
    preprocessing: Preprocessing
    skipped: Sequence[tuple[str, str, str]] = ()

    @property
    def minutes(self) -> float:
        """Time that the epochs took together."""
        return sum(row["seconds"] for row in self.history) / 60

    @property
    def judged_by(self) -> str:
        """What the images of the metrics are called on the page."""
        return "held-out" if self.part == "test" else "validation"

    @property
    def title(self) -> str:
        """Which model learned what."""
        data = self.config.data
        named = data.format not in ("auto", "folder", "csv", "shards")
        what = "handwritten digits" if data.format == "digits" else data.format if named else Path(data.root).stem
        name = self.config.model.name
        if name.startswith("timm:"):
            name = f"{name.removeprefix('timm:')} (timm)"
        elif self.config.model.options:  # it is no longer what the name stands for
            name = "XCiT"
        return f"{name} on {what}"

    @property
    def model(self) -> str:
        """The model in words: its name, and how it differs from what that stands for."""
        model = self.config.model
        changes = [f"{name} {value}" for name, value in model.options.items()]
        changes += [f"variant {model.variant}"] if model.variant != "none" else []
        return model.name.removeprefix("timm:") + (f" with {', '.join(changes)}" if changes else "")


def predict_command(run: RunFolder) -> str:
    """Return the command that uses the trained model."""
    return f"xcit predict {shlex.quote(str(run.samples))} --model {shlex.quote(str(run.model))}"


def write_report(
    record: RunRecord,
    run: RunFolder,
    model: nn.Module,
    images: ImageSet,
    logits: Float[Tensor, "images classes"],
) -> None:
    """Write the pictures, the samples and the page.

    Args:
        record: of the run.
        run: where to.
        model: the trained model; the attention of an XCiT is shown.
        images: what the metrics are of, without those that could not be decoded.
        logits: of these images, in their order, on the CPU.

    Raises:
        ExportError: a file cannot be written.
    """
    judged = Judged(images, record.preprocessing, model, logits)
    prefix = "digit_" if record.config.data.format == "digits" else ""
    for name, data in judged.samples().items():
        write_atomic(run.samples / f"{prefix}{name}", data)

    sections = [
        Section("Training", _training(record, run)),
        *_confusion(record, run, judged),
        Section("Classes", list(_classes(record))),
        Section("Mistakes", _mistakes(record, judged)),
        *_attention(record, run, judged),
        Section("Use the model", _use(record, run, model)),
        Section("Data and method", list(_method(record))),
    ]
    parameters = sum(p.numel() for p in model.parameters())
    epochs = f"{len(record.history)} epochs" if len(record.history) > 1 else "one epoch"
    subtitle = (
        f"Recipe {record.config.recipe}, seed {record.config.seed}, {epochs}. Model {record.model}: "
        f"{parameters / 1e6:.2f} M parameters."
    )
    write_atomic(run.report, html_page(record.title, subtitle, _key_figures(record), sections).encode())


def _key_figures(record: RunRecord) -> list[KeyFigure]:
    metrics, best = record.metrics, record.best
    chosen = record.part == "validation"
    honest = "; the epoch was chosen on these very images, so it flatters" if chosen else ""
    epoch = f"epoch {best['epoch']:.0f} of {len(record.history)}, the one that is kept"
    figures = []
    if isinstance(metrics, MultiLabelMetrics):
        what = f"mean average precision on {metrics.num_images:,} {record.judged_by} images{honest}"
        figures.append(KeyFigure(_percentage(metrics.mean_average_precision), what))
    else:
        low, high = metrics.accuracy_interval
        interval = f"95{NBSP}% interval {100 * low:.1f} to {100 * high:.1f}{NBSP}%"
        what = f"{metrics.num_correct:,} of {metrics.num_images:,} images right ({interval}){honest}"
        figures.append(KeyFigure(_percentage(metrics.accuracy), f"{record.judged_by} accuracy: {what}"))
    if not chosen:
        name = figure_name(best)
        what = {"val_accuracy": "validation accuracy", "val_map": "validation mAP"}[name]
        figures.append(KeyFigure(_percentage(best[name]), f"{what} at {epoch}"))
    else:
        figures.append(KeyFigure(f"{best['epoch']:.0f}", f"{epoch}"))
    if isinstance(metrics, ClassificationMetrics):
        if metrics.top5_accuracy is not None:
            what = "top-5 accuracy: the right class is among the five most probable"
            figures.append(KeyFigure(_percentage(metrics.top5_accuracy), what))
        what = "calibration error: mean distance of the stated probability from the share that is right"
        figures.append(KeyFigure(f"{metrics.calibration_error:.3f}", what))
    elif metrics.loss is not None:
        figures.append(KeyFigure(f"{metrics.loss:.3f}", "binary cross-entropy, mean over images and classes"))
    minutes = record.minutes
    time = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
    figures.append(KeyFigure(time, f"of training on {record.environment['device']}"))
    return figures


# --- training ---------------------------------------------------------------------------------------------------------


def _training(record: RunRecord, run: RunFolder) -> list[Block]:
    name = figure_name(record.best)
    figure = "accuracy" if name == "val_accuracy" else "mean average precision"
    caption = f"The dotted line marks the epoch with the highest validation {figure}, whose weights are kept. "
    if record.config.distill.kind != "none":
        caption += "The training loss is another quantity than the validation loss: it counts the teacher's answers. "
    elif record.config.augment.mixup or record.config.augment.cutmix or record.config.optim.label_smoothing:
        caption += "The training loss is higher since its images are distorted and its labels smoothed or mixed. "
    if f"ema_{name}" in record.best:
        best = max(record.history, key=lambda row: row[f"ema_{name}"])
        caption += (
            f"The averaged weights reach {100 * best[f'ema_{name}']:.1f} % at epoch {best['epoch']:.0f}; "
            f"they are in {run.ema_model.name}."
        )
    curves = saved(run.curves, curves_figure(record.history, int(record.best["epoch"])))
    blocks: list[Block] = [picture(curves, f"Loss and validation {figure} over the epochs", caption.strip())]
    if all(key in record.best for key in ("lr", "images_per_second", "data_wait")):
        waiting = sum(row["data_wait"] * row["seconds"] for row in record.history) / max(1e-9, 60 * record.minutes)
        fastest = max(row["images_per_second"] for row in record.history)
        advice = "; decoding holds the model up, more data.num_workers may help" if waiting > 0.2 else ""
        caption = (
            f"At best {fastest:,.0f} images a second; {100 * waiting:.0f} % of the time was spent waiting for "
            f"images{advice}. The learning rate is that at each epoch's end."
        )
        blocks.append(picture(png(pace_figure(record.history)), "Learning rate and pace over the epochs", caption))
    return blocks


# --- what is right and what is wrong ----------------------------------------------------------------------------------


def _confusion(record: RunRecord, run: RunFolder, judged: Judged) -> Iterator[Section]:
    """The whole matrix, or of many classes those that are most often taken for each other."""
    metrics = record.metrics
    if isinstance(metrics, MultiLabelMetrics):
        return
    names, mistakes = judged.names, metrics.mistakes()
    whole = len(names) <= MAX_NUMBERED
    shown = list(range(len(names))) if whole else most_confused(mistakes, MAX_NUMBERED)
    blocks: list[Block] = []
    if shown:
        matrix = [[metrics.confusion[i][j] for j in shown] for i in shown]
        totals = [metrics.class_counts[i] for i in shown]
        figure = confusion_figure(matrix, [names[i] for i in shown], totals)
        caption = f"{record.judged_by.capitalize()} images by their true class (rows) and the predicted one (columns)"
        caption += "." if whole else f"; of {len(names):,} classes the {len(shown)} that are most often mixed up."
        blocks.append(picture(saved(run.confusion, figure), f"Confusion matrix of {record.judged_by} images", caption))
    if mistakes and len(names) > 2:
        counts, words = metrics.class_counts, metrics.class_names
        rows = [(words[i], words[j], f"{count:,}", _cell(count / counts[i])) for i, j, count in mistakes[:MAX_PAIRS]]
        fold = (
            f"The {len(rows)} most frequent of {len(mistakes)} kinds of mistakes" if len(mistakes) > MAX_PAIRS else ""
        )
        folded = fold or "All kinds of mistakes"
        blocks.append(Table(("class", "taken for", "images", "of the class"), rows, summary=folded if whole else ""))
        if not whole and fold:
            blocks.append(Prose(f"{fold}."))
    if blocks:
        yield Section("What is taken for what", blocks)


def _classes(record: RunRecord) -> Iterator[Block]:
    """Each class's figure, the worst first."""
    metrics = record.metrics
    training = record.splits.train.class_counts.tolist()
    if isinstance(metrics, MultiLabelMetrics):
        header: tuple[str, ...] = ("class", "average precision", "images that have it", "in training")
        values = metrics.average_precisions
    else:
        header = ("class", "right", f"95{NBSP}% interval", "images", "most often taken for", "in training")
        values = metrics.class_accuracies
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i], metrics.class_names[i]))
    rows = [_class_row(metrics, i, training[i]) for i in order[: MAX_ROWS + MAX_FOLDED]]
    yield Table(header, rows[:MAX_ROWS])
    rest = rows[MAX_ROWS:]
    if rest:
        yield Table(header, rest, summary=f"The next {len(rest):,} of {len(order):,} classes")
    if len(order) > len(rows):
        yield Prose(f"All {len(order):,} classes are in metrics.json.")
    unseen = sum(1 for count in metrics.class_counts if not count)
    if unseen:
        have = "class has" if unseen == 1 else "classes have"
        yield Prose(
            f"{unseen:,} {have} no {record.judged_by} image; nothing is known of {'it' if unseen == 1 else 'them'}."
        )


def _class_row(metrics: ClassificationMetrics | MultiLabelMetrics, i: int, training: int) -> tuple[str, ...]:
    name, count = metrics.class_names[i], metrics.class_counts[i]
    if isinstance(metrics, MultiLabelMetrics):
        return name, _cell(metrics.average_precisions[i]), f"{count:,}", f"{training:,}"
    if not count:
        return name, "", "", "0", "", f"{training:,}"
    row = metrics.confusion[i]
    low, high = wilson_interval(row[i], count)
    others = [(images, -j) for j, images in enumerate(row) if images and j != i]
    taken_for = f"{metrics.class_names[-max(others)[1]]} ({max(others)[0]:,})" if others else ""
    interval = f"{100 * low:.0f} to {100 * high:.0f} %".replace(" ", NBSP)
    return name, _cell(row[i] / count), interval, f"{count:,}", taken_for, f"{training:,}"


def _mistakes(record: RunRecord, judged: Judged) -> list[Block]:
    wrong = judged.mistakes()
    kind, several = record.judged_by, judged.images.multi_label
    if not len(wrong):
        return [Prose(f"Not one of the {kind} images was {'labelled wrongly' if several else 'taken for another'}.")]
    which = f"The {MAX_MISTAKES} surest of {len(wrong):,} mistakes" if len(wrong) > MAX_MISTAKES else "All mistakes"
    how = "the probability of the class that the model is most wrong about" if several else (
        "the probability that the model gave to its answer"
    )  # fmt: skip
    looked = " Beside each image, where the model looked." if judged.shows_attention else ""
    return [
        Prose(f"{which} on the {kind} images, with {how}.{looked} A sure mistake is often a wrong label: look twice."),
        Gallery(judged.thumbnails([int(i) for i in wrong[:MAX_MISTAKES]])),
    ]


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(record: RunRecord, run: RunFolder, judged: Judged) -> Iterator[Section]:
    if not judged.shows_attention:
        return
    assert isinstance(judged.model, XCiT)
    right = list(judged.one_of_each_class(right=True).values())
    shown = [*right, *(int(i) for i in judged.mistakes()[:MAX_IN_SHEET])]
    examples = judged.examples(shown)
    if not examples:
        return
    patch = judged.model.config["patch_size"]
    rows, columns = (-(-side // patch) for side in record.preprocessing.image_size)
    blocks: list[Block] = [
        picture(
            saved(run.attention, examples_figure(examples, ("image", "attention"), columns=4)),
            f"Attention of the class token over {record.judged_by} images",
            f"Attention of the class token in the last layer, all heads together, over the {rows} x {columns} patches: "
            f"from dark (little) to yellow (most). Green captions: right; red: wrong.",
        )
    ]
    num_heads = judged.model.config["num_heads"]
    heads = min(num_heads, MAX_HEADS)
    by_head = judged.examples((right or shown)[:MAX_OF_HEADS], heads=heads)
    if by_head and num_heads > 1:
        titles = ["image", "all heads", *(f"head {i}" for i in range(heads))]
        few = f"Each of the first {heads} of {num_heads} heads" if heads < num_heads else "Each head"
        sheet = saved(run.heads, examples_figure(by_head, titles, columns=1))
        blocks.append(
            picture(sheet, "The same for each head", f"{few} by itself, counted from 0, as by xcit attend --head.")
        )
    yield Section("Where the model looks", blocks)


# --- use, data, method ------------------------------------------------------------------------------------------------


def _use(record: RunRecord, run: RunFolder, model: nn.Module) -> list[Block]:
    said = f"The weights with the names of the classes and the preparation of images are in {run.model.name}."
    path, samples = str(run.model), str(run.samples)
    if not isinstance(model, XCiT):
        use = (
            f"from xcit.recipes.peers import load_peer\n"
            f"from xcit.data.images import open_image\n\n"
            f'model, class_names, preprocessing = load_peer("{path}")\n'
            f'logits = model(preprocessing(open_image("FILE"))[None])'
        )
        return [Prose(f"{said} It is a model of timm, which Python code loads."), Code(use)]
    if isinstance(record.metrics, MultiLabelMetrics):
        use = (
            f"import torch, xcit\n"
            f"from xcit.data.images import open_image\n"
            f"from xcit.data.preprocess import Preprocessing\n\n"
            f'model = xcit.create_model("{path}").eval()\n'
            f"prepare = Preprocessing.from_cfg(model.pretrained_cfg)\n"
            f"with torch.inference_mode():\n"
            f'    probabilities = model(prepare(open_image("FILE"))[None]).sigmoid()[0]\n'
            f'for name, probability in zip(model.pretrained_cfg["class_names"], probabilities.tolist()):\n'
            f"    print(name, round(probability, 3))"
        )
        return [Prose(f"{said} Each class has a probability of its own, a sigmoid of its logit."), Code(use)]
    if record.config.data.format == "digits":
        said += " " + DIGITS_WANTED.format(samples=run.samples.name)
    use = (
        f"{predict_command(run)}\n\n"
        f"# the same in Python\n"
        f"import xcit\n"
        f'predictor = xcit.Predictor("{path}")\n'
        f'for prediction in predictor("{samples}", top_k=1):\n'
        f"    print(prediction.path, prediction.labels[0].name, prediction.labels[0].probability)"
    )
    return [Prose(said), Code(use)]


def _method(record: RunRecord) -> Iterator[Block]:
    train, val, test, notes = record.splits
    if record.config.data.format == "digits":
        yield Prose(ABOUT_DIGITS)
    parts = [("training", train, "to fit the weights"), ("validation", val, "to choose the epoch")]
    if test is not None:
        parts.append(("test", test, "held out: evaluated once, after all choices"))
    else:
        yield Prose(
            "The data has no test part. The figures above are of the images that the epoch was chosen by, and hence "
            "somewhat better than on new ones."
        )
    rows = []
    for name, images, purpose in parts:
        counts = images.class_counts
        spread = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        rows.append((name, f"{len(images):,}", spread, purpose))
    yield Table(("part", "images", "a class", "what for"), rows)
    yield Prose(" ".join((f"There are {len(train.class_names):,} classes.", *notes)))
    if record.skipped:
        header = ("part", "image that could not be decoded", "reason")
        title = f"Skipped images: {len(record.skipped):,}"
        title += f", of which the first {MAX_FOLDED:,}" if len(record.skipped) > MAX_FOLDED else ""
        yield Table(header, list(record.skipped[:MAX_FOLDED]), summary=title)
    H, W = record.preprocessing.image_size
    mean, std = (
        ", ".join(f"{v:.4g}" for v in values) for values in (record.preprocessing.mean, record.preprocessing.std)
    )
    crop = f"the middle {100 * record.preprocessing.crop_pct:.0f} % of" if record.preprocessing.crop_pct < 1 else ""
    prepared = (
        f"{record.preprocessing.interpolation} to {H} x {W} px{f', {crop} the resized image' if crop else ''}; "
        f"mean {mean}, standard deviation {std}"
    )
    yield Table((), [("images are prepared", prepared), *record.environment.items()])
    yield Code(to_yaml(record.config), summary="All settings (config.yaml)")


def saved(path: Path, figure: Figure) -> bytes:
    """Write a figure to a file and return it as PNG."""
    data = png(figure)
    write_atomic(path, data)
    return data


def picture(data: bytes, alt: str, caption: str) -> Picture:
    """A picture in the size that its text was set for; photographs are smaller as JPEG."""
    image = Image.open(io.BytesIO(data))
    width = round(image.width * 96 / DPI)
    return Picture(jpeg(image) if len(data) > MAX_PNG else data, alt, caption, width=width)


def _percentage(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def _cell(share: float) -> str:
    """A percentage that is not broken in two lines."""
    return _percentage(share).replace(" ", NBSP)
