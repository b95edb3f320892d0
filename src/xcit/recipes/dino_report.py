"""What a run of DINO leaves to look at: its curves, what its features hold to be alike, and where it looks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from xcit.data.image_set import ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.data.unlabelled import UnlabelledData
from xcit.evaluate.embedding import SetFeatures, embed_set
from xcit.evaluate.knn import KNNResult
from xcit.files import write_atomic
from xcit.models.xcit import XCiT
from xcit.recipes.dino_config import DinoConfig
from xcit.recipes.report_pictures import Shown
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.run_report import MAX_FOLDED, MAX_HEADS, picture, saved
from xcit.recipes.settings import to_yaml
from xcit.report.contact_sheet import Cell, Row, contact_sheet, sheet_png
from xcit.report.curves import distillation_figure, pace_figure
from xcit.report.html import Block, Code, KeyFigure, Prose, Section, Table, html_page
from xcit.report.overlays import Example, examples_figure
from xcit.report.style import png
from xcit.tasks.dino import TELLING

MAX_EMBEDDED = 5_000
"""Images among which those most alike are looked for, spread evenly through the set."""
NUM_QUERIES = 8
NUM_NEIGHBOURS = 6
NUM_OF_HEADS = 4
"""Images of which each head is shown."""
NBSP = "\u00a0"


@dataclass(frozen=True)
class DinoRecord:
    """All that is known of a run at its end.

    Attributes:
        config: its settings.
        history: a row an epoch.
        knn: the probe; None where the data has no labels.
        collapse: how the teacher's outputs have collapsed; None if they have not.
        environment: versions and machine; ``device`` among them.
        data: the images.
        preprocessing: how they are prepared when the model is used.
        skipped: part, name and reason of each image that could not be decoded.
    """

    config: DinoConfig
    history: Sequence[Mapping[str, float]]
    knn: KNNResult | None
    collapse: str | None
    environment: Mapping[str, str]
    data: UnlabelledData
    preprocessing: Preprocessing
    skipped: Sequence[tuple[str, str, str]] = ()


def write_dino_report(record: DinoRecord, run: RunFolder, model: XCiT) -> None:
    """Write the pictures and the page.

    Args:
        record: of the run.
        run: where to.
        model: the teacher's backbone, in evaluation mode.

    Raises:
        ExportError: a file cannot be written.
    """
    config = record.config
    sections = [
        Section("Training", _training(record, run)),
        *_alike(record, run, model),
        *_attention(record, run, model),
        Section("Use the model", _use(run)),
        Section("Data and method", list(_method(record))),
    ]
    what = "handwritten digits" if config.data.format == "digits" else Path(config.data.root).stem or config.data.format
    name = "XCiT" if config.model.options else config.model.name
    epochs = f"{len(record.history)} epochs" if len(record.history) > 1 else "one epoch"
    parameters = sum(p.numel() for p in model.parameters())
    subtitle = (
        f"Recipe {config.recipe}, seed {config.seed}, {epochs}. {parameters / 1e6:.2f} M parameters, trained without "
        f"labels."
    )
    page = html_page(f"{name} with DINO on {what}", subtitle, list(_key_figures(record)), sections)
    write_atomic(run.report, page.encode())


def _key_figures(record: DinoRecord) -> Iterator[KeyFigure]:
    last = record.history[-1]
    if record.knn is not None:
        k, found = record.knn.of(record.config.probe.k)
        low, high = found.interval
        yield KeyFigure(
            f"{100 * found.top1:.1f} %",
            f"k-NN accuracy, k = {k}: {found.num_correct:,} of {found.num_images:,} images that were not learned from "
            f"(95{NBSP}% interval {100 * low:.1f} to {100 * high:.1f}{NBSP}%)",
        )
    tells = last["teacher_spread"] - last["teacher_entropy"]
    if record.collapse:
        state = f"collapsed: {record.collapse}"
    else:
        state = "not collapsed" if tells >= TELLING else "next to nothing, in too few epochs to call it collapsed"
    yield KeyFigure(f"{tells:.2f} nats", f"what the teacher's output tells about which image it is of; {state}")
    yield KeyFigure(f"{last['train_loss']:.3f}", "loss in the last epoch, nats")
    minutes = sum(row["seconds"] for row in record.history) / 60
    time = f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
    yield KeyFigure(time, f"of training on {record.environment['device']}")


def _training(record: DinoRecord, run: RunFolder) -> list[Block]:
    largest = math.log(record.config.head.out_dim)
    caption = (
        "The teacher tells images apart as long as its mean output (green) is flatter than each output by itself "
        "(blue). Where the two meet, all images get the same output: a flat one near the dotted line, a sharp one "
        "far below it. The k-NN probe uses labels, which training never sees."
    )
    curves = saved(run.curves, distillation_figure(record.history, largest))
    blocks: list[Block] = [picture(curves, "Loss, entropies and k-NN accuracy over the epochs", caption)]
    if record.knn is not None:
        rows = [
            (str(k), f"{100 * found.top1:.1f} %", "" if found.top5 is None else f"{100 * found.top5:.1f} %")
            for k, found in record.knn.accuracies.items()
        ]
        blocks.append(Table(("neighbours k", "top-1", "top-5"), rows))
    blocks.append(picture(png(pace_figure(record.history)), "Learning rate and pace over the epochs", ""))
    return blocks


def _alike(record: DinoRecord, run: RunFolder, model: XCiT) -> Iterator[Section]:
    """Some images, each with the training images whose features are most like its own."""
    train, probe = record.data.train, record.data.probe
    bank = train.subset(_spread(len(train), MAX_EMBEDDED))
    num_workers = None if record.config.data.num_workers < 0 else record.config.data.num_workers

    def embedded(images: ImageSet) -> SetFeatures:
        return embed_set(model, images, record.preprocessing, num_workers=num_workers, max_bad_fraction=1.0)

    known = embedded(bank)
    asked = probe if probe is not None else bank
    queries = asked.subset(_spread(len(asked), NUM_QUERIES))
    found = embedded(queries)
    units = [F.normalize(torch.from_numpy(each.features), dim=1) for each in (found, known)]
    similar = units[0] @ units[1].T
    similar[:, ~torch.from_numpy(known.decoded)] = -math.inf
    labelled = record.data.probe is not None
    rows = []
    for position, name in enumerate(queries.names):
        if not found.decoded[position]:
            continue
        row = similar[position].clone()
        if not labelled:
            row[[i for i, other in enumerate(bank.names) if other == name]] = -math.inf  # itself
        best = row.topk(min(NUM_NEIGHBOURS, int(row.isfinite().sum()))).indices.tolist()
        asked_for = dict(Shown(queries, record.preprocessing, model).pictures([position], attention=False))
        answers = dict(Shown(bank, record.preprocessing, model).pictures(best, attention=False))
        if len(asked_for) + len(answers) != 1 + NUM_NEIGHBOURS:
            continue
        label = queries.labels[position] if labelled else None
        lead = Cell(asked_for[position][0], _class(queries, position) if labelled else "asked about", Path(name).name)
        cells = [
            Cell(
                answers[i][0],
                f"{rank}   {float(row[i]):.3f}",
                _class(bank, i) if labelled else Path(bank.names[i]).name,
                None if label is None else bool(bank.labels[i] == label),
            )
            for rank, i in enumerate(best, 1)
        ]
        rows.append(Row(lead, cells))
    if rows:
        title = "Left: images asked about. Beside each: its nearest neighbours, by rank and cosine similarity"
        sheet = sheet_png(contact_sheet(rows, title + (", with their class" if labelled else "")))
        write_atomic(run.neighbours, sheet)
        whose = "images that were not learned from, with their class" if labelled else "training images"
        caption = (
            f"On the left {whose}; beside each the training images whose features are most like its own: rank and "
            f"cosine similarity."
        )
        if labelled:
            caption += " Below those stands their class, green where it is the same and red where it is another."
        yield Section("What the features hold to be alike", [picture(sheet, "Images and their neighbours", caption)])


def _class(images: ImageSet, position: int) -> str:
    return f"class {images.class_names[images.labels[position]]}"


def _attention(record: DinoRecord, run: RunFolder, model: XCiT) -> Iterator[Section]:
    images = record.data.probe if record.data.probe is not None else record.data.train
    shown = Shown(images, record.preprocessing, model)
    num_heads = model.config["num_heads"]
    heads = min(num_heads, MAX_HEADS)
    chosen = _spread(len(images), NUM_OF_HEADS).tolist()
    examples = [Example(pictures, "") for _, pictures in shown.pictures(chosen, heads=heads)]
    if examples:
        titles = ["image", "all heads", *(f"head {i}" for i in range(heads))]
        sheet = saved(run.heads, examples_figure(examples, titles, columns=1))
        caption = (
            "Attention of the class token in the last layer: from dark (little) to yellow (most). Heads are counted "
            "from 0, as by xcit attend --head."
        )
        yield Section("Where the model looks", [picture(sheet, "Attention of the class token, by head", caption)])


def _use(run: RunFolder) -> list[Block]:
    model = shlex.quote(str(run.model))
    return [
        Prose(
            f"{run.model.name} holds the teacher's backbone with its preparation of images; {run.dino.name} both "
            f"networks with their heads, as DINO's released checkpoints hold them."
        ),
        Code(
            f"xcit probe --model {model} --data LABELLED/       # k-NN, linear and logistic probes\n"
            f"xcit embed IMAGES/ --model {model} -o features.parquet\n"
            f"xcit attend IMAGE --model {model} --out maps/     # where it looks\n"
            f"xcit train finetune --data LABELLED/ --model ARCHITECTURE --pretrained {model}"
        ),
    ]


def _method(record: DinoRecord) -> Iterator[Block]:
    train, probe, notes = record.data
    rows = [("training", f"{len(train):,}", "to learn from, without labels")]
    if probe is not None:
        rows.append(
            ("probe", f"{len(probe):,}", "their class is asked of the nearest training images; nothing is chosen by it")
        )
    yield Table(("part", "images", "what for"), rows)
    if notes:
        yield Prose(" ".join(notes))
    if record.skipped:
        header = ("part", "image that could not be decoded", "reason")
        yield Table(header, list(record.skipped[:MAX_FOLDED]), summary=f"Skipped images: {len(record.skipped):,}")
    yield Prose(
        "The teacher's parameters are the student's moving average; its batch-norm statistics come from its own passes "
        "over the global crops, as in the released training."
    )
    yield Table((), list(record.environment.items()))
    yield Code(to_yaml(record.config), summary="All settings (config.yaml)")


def _spread(total: int, count: int) -> np.ndarray:
    """Return at most so many positions, spread evenly."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(np.int64))
