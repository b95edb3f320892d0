"""A run's report, for any data set and any classifier: what stands in it is true, and nothing of it is too large."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xcit.data.image_set import DataSplits, ImageSet
from xcit.data.preprocess import Preprocessing
from xcit.errors import DataError
from xcit.evaluate.classification import classification_metrics
from xcit.evaluate.multi_label import multi_label_metrics
from xcit.models.xcit import XCiT
from xcit.recipes import run_report
from xcit.recipes.config import DataConfig, DistillConfig, ModelConfig, TrainConfig
from xcit.recipes.report_pictures import Judged, percent
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.run_report import RunRecord, predict_command, write_report
from xcit.report.confusion import confusion_figure

PREPARE = Preprocessing((16, 16), mean=(0.4,) * 3, std=(0.3,) * 3)


def image_set(labels, class_names, gone=()):
    """Coloured noise, larger than the model takes; reading the images in ``gone`` fails."""

    def read(number):
        if number in gone:
            raise DataError(f"{number}.jpg is damaged")
        return Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8))

    labels = np.asarray(labels)
    return ImageSet(tuple(class_names), [f"{i}.jpg" for i in range(len(labels))], labels, read, np.arange(len(labels)))


def record_of(images, metrics, *, part="test", history=None, **more):
    history = history or [
        {
            "epoch": i + 1, "train_loss": 2 - i / 10, "val_loss": 1.5 - i / 10, "val_accuracy": 0.5 + i / 10,
            "lr": 1e-3, "seconds": 30.0, "images_per_second": 100.0, "data_wait": 0.25,
        }
        for i in range(3)
    ]  # fmt: skip
    values = {
        "config": TrainConfig(recipe="finetune", data=DataConfig(root="pets & co", image_size=16)),
        "history": history,
        "best": history[-1],
        "metrics": metrics,
        "part": part,
        "environment": {"torch": "9.9", "device": "a fine CPU"},
        "splits": DataSplits(images, images, images if part == "test" else None, ("A note on the data.",)),
        "preprocessing": PREPARE,
    }
    return RunRecord(**values | more)


def xcit_for(images, **options):
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": len(images.class_names)}
    return XCiT(**sizes | options).eval()


def logits_for(images, wrong=(), sure=5.0):
    """Right answers, but for the images in ``wrong``, which are taken for the next class."""
    labels, n = images.labels.copy(), len(images.class_names)
    labels[list(wrong)] = (labels[list(wrong)] + 1) % n
    return sure * nn.functional.one_hot(torch.from_numpy(labels), n).float()


class Page(HTMLParser):
    """The text of each section by its title, all images, and the rows of all tables."""

    def __init__(self, run):
        super().__init__()
        self.html = run.report.read_text(encoding="utf-8")
        self.images, self.rows, self.sections, self.tag, self.title = [], [], {}, "", ""
        self.feed(self.html)

    @property
    def text(self):
        return unescape(re.sub(r"<[^>]+>", " ", self.html)).replace("\u00a0", " ")

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "img":
            self.images.append(dict(attrs) | {"section": self.title})
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tag == "h2":
            self.title, self.tag = data, ""
        self.sections[self.title] = self.sections.get(self.title, "") + data.replace("\u00a0", " ")
        if self.tag in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")

    def handle_endtag(self, tag):
        self.tag = ""


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """A run on three classes with three mistakes of different sureness."""
    images = image_set(np.arange(30) % 3, ("cat", "dog", "\u51ac <b>"))
    logits = logits_for(images, wrong=(4, 8, 9))
    logits[8] *= 2
    logits[9] *= 0.4
    run = RunFolder(tmp_path_factory.mktemp("run"))
    metrics = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    skipped = [("train", "bad/one.jpg", "bad/one.jpg is cut off")]
    write_report(record_of(images, metrics, skipped=skipped), run, xcit_for(images), images, logits)
    return run, images, logits, metrics


def test_everything_is_written(three_classes):
    run, *_ = three_classes
    names = {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}
    assert names == {
        "report.html", "curves.png", "confusion_matrix.png", "attention.png", "attention_heads.png",
        "samples/0_cat.png", "samples/1_dog.png", "samples/2_\u51ac_b.png",
    }  # fmt: skip
    for name in names - {"report.html"}:
        with Image.open(run.root / name) as image:
            image.load()


def test_the_figures_are_those_of_the_metrics(three_classes):
    run, _, _, metrics = three_classes
    page = Page(run)
    low, high = metrics.accuracy_interval
    assert "90.0 %" in page.html
    assert (
        f"held-out accuracy: 27 of 30 images right (95 % interval {100 * low:.1f} to {100 * high:.1f} %)" in page.text
    )
    assert "70.0 %" in page.html  # validation accuracy of the epoch that is kept
    assert "epoch 3 of 3, the one that is kept" in page.text
    assert f"{metrics.calibration_error:.3f}" in page.text
    assert "1.5 min" in page.text
    assert "of training on a fine CPU" in page.text
    assert "25 % of the time was spent waiting for images; decoding holds the model up" in page.text
    assert "flatters" not in page.text  # that is for the validation part
    assert "evaluated once, after all choices" in page.text


def test_classes_come_worst_first(three_classes):
    rows = Page(three_classes[0]).rows
    table = rows[rows.index(["class", "right", "95 % interval", "images", "most often taken for", "in training"]) + 1 :]
    assert [row[:2] for row in table[:3]] == [["cat", "90.0 %"], ["dog", "90.0 %"], ["\u51ac <b>", "90.0 %"]]
    assert [row[4] for row in table[:3]] == ["dog (1)", "\u51ac <b> (1)", "cat (1)"]
    assert [row[3] for row in table[:3]] == ["10"] * 3


def test_the_surest_mistakes_come_first_as_thumbnails(three_classes):
    page = Page(three_classes[0])
    found = [image for image in page.images if image["section"] == "Mistakes"]
    assert [image["alt"].partition(":")[0] for image in found[::2]] == ["8.jpg", "4.jpg", "9.jpg"]
    assert all(image["alt"] == "" for image in found[1::2])  # where the model looked, beside each
    text = page.sections["Mistakes"]
    assert text.index("\u51ac <b> taken for cat, over 99 % sure") < text.index("dog taken for \u51ac <b>, 99 % sure")
    assert text.index("99 % sure") < text.index("cat taken for dog, 79 % sure")
    assert "All mistakes on the held-out images" in text


def test_a_sample_is_what_it_was_taken_from(three_classes):
    """Through the preparation a second time it is the very same for the model."""
    run, images, *_ = three_classes
    for number, name in enumerate(("0_cat", "1_dog", "2_\u51ac_b")):
        with Image.open(run.samples / f"{name}.png") as sample:
            assert torch.equal(PREPARE(sample), PREPARE(images.open(number)))


def test_a_page_is_self_contained_and_lists_what_was_skipped(three_classes):
    page = Page(three_classes[0])
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert "<script" not in page.html
    assert "<b>" not in page.html.replace("<b>9", "").replace("<b>7", "").replace("<b>0", "").replace("<b>1", "")
    assert ["train", "bad/one.jpg", "bad/one.jpg is cut off"] in page.rows
    assert "A note on the data." in page.text
    assert "recipe: finetune" in page.text
    assert ["torch", "9.9"] in page.rows
    assert predict_command(three_classes[0]) in page.text


def test_the_same_run_gives_the_same_page(three_classes, tmp_path):
    run, images, logits, metrics = three_classes
    again = RunFolder(tmp_path)
    skipped = [("train", "bad/one.jpg", "bad/one.jpg is cut off")]
    write_report(record_of(images, metrics, skipped=skipped), again, xcit_for(images), images, logits)
    there = run.report.read_text().replace(str(run.root), "")
    assert again.report.read_text().replace(str(again.root), "") == there


def test_figures_of_the_validation_part_are_said_to_flatter(tmp_path):
    images = image_set(np.arange(12) % 2, ("a", "b"))
    logits = logits_for(images)
    metrics = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    run = RunFolder(tmp_path)
    write_report(record_of(images, metrics, part="validation"), run, xcit_for(images), images, logits)
    text = Page(run).text
    assert "validation accuracy: 12 of 12 images right" in text
    assert "the epoch was chosen on these very images, so it flatters" in text
    assert "The data has no test part." in text
    assert "held-out" not in text
    assert "Not one of the validation images was taken for another." in text


def test_a_hundred_classes_give_no_unreadable_matrix(tmp_path, monkeypatch):
    names = [f"a rather long name of a class, number {i}" for i in range(120)]
    labels = np.arange(360) % 120
    labels[labels == 7] = 8  # a class without images
    images = image_set(labels, names)
    logits = logits_for(images, wrong=[i for i in range(360) if labels[i] in (8, 40, 41, 99)])
    metrics = classification_metrics(logits, torch.from_numpy(labels), names)
    shown = []
    monkeypatch.setattr(run_report, "confusion_figure", lambda *args: shown.append(args) or confusion_figure(*args))
    run = RunFolder(tmp_path)
    write_report(record_of(images, metrics), run, xcit_for(images), images, logits)
    ((matrix, drawn, totals),) = shown
    assert drawn == [names[i] for i in (8, 9, 40, 41, 42, 99, 100)]
    assert np.asarray(matrix)[0, 1] == 6
    assert totals == [6, 3, 3, 3, 3, 3, 3]
    page = Page(run)
    assert [names[8], names[9], "6", "100.0 %"] in page.rows
    assert "of 120 classes the 7 that are most often mixed up" in page.text
    assert "The next 70 of 120 classes" in page.text
    assert "1 class has no held-out image" in page.text
    assert "top-5 accuracy" in page.text
    assert run.report.stat().st_size < 3_000_000
    assert len(list(run.samples.iterdir())) == 10


def test_several_labels_have_precisions_instead_of_a_matrix(tmp_path):
    labels = np.random.default_rng(0).random((30, 4)) < 0.4
    labels[3], labels[5] = [True, False, False, False], [False, True, False, False]
    images = image_set(labels, ("sky", "tree", "dog", "car"))
    logits = 8 * (torch.from_numpy(labels).float() - 0.5)
    logits[3, 0], logits[5, 2] = -6.0, 3.0
    metrics = multi_label_metrics(logits, torch.from_numpy(labels), images.class_names)
    history = [
        {
            "epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_map": 0.8, "ema_val_map": 0.85, "ema_val_loss": 0.9,
            "seconds": 1.0, "lr": 0.1, "images_per_second": 9.0, "data_wait": 0.0,
        }
    ]  # fmt: skip
    run = RunFolder(tmp_path)
    write_report(record_of(images, metrics, history=history), run, xcit_for(images), images, logits)
    assert not run.confusion.exists()
    page = Page(run)
    assert f"{100 * metrics.mean_average_precision:.1f} %" in page.text
    assert "mean average precision on 30 held-out images" in page.text
    assert "validation mAP at epoch 1 of 1" in page.text
    assert "The averaged weights reach 85.0 % at epoch 1; they are in model_ema.safetensors." in page.text
    text = page.sections["Mistakes"]
    assert text.index("sky: overlooked, probability 0 %") < text.index("dog: not there, probability 95 %")
    rows = page.rows[page.rows.index(["class", "average precision", "images that have it", "in training"]) + 1 :]
    assert rows[0][0] == metrics.class_names[int(np.argmin(metrics.average_precisions))]
    assert "What is taken for what" not in page.sections
    assert ".sigmoid()" in page.text


class Peer(nn.Module):
    def forward(self, x):
        raise AssertionError("the report needs no forward pass of a model without attention")


def test_heads_are_counted_as_the_command_line_counts_them(tmp_path, monkeypatch):
    titles = []
    draw = run_report.examples_figure
    monkeypatch.setattr(
        run_report, "examples_figure", lambda e, names, **more: titles.append(names) or draw(e, names, **more)
    )
    images = image_set(np.arange(12) % 3, ("a", "b", "c"))
    logits = logits_for(images)
    metrics = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    write_report(record_of(images, metrics), RunFolder(tmp_path), xcit_for(images), images, logits)
    assert titles[-1] == ["image", "all heads", "head 0", "head 1"]


@pytest.mark.parametrize("kind", ["peer", "avg_pool"])
def test_without_class_attention_there_is_none_shown(tmp_path, kind):
    images = image_set(np.arange(12) % 3, ("a", "b", "c"))
    logits = logits_for(images, wrong=(2,))
    metrics = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    model = Peer() if kind == "peer" else xcit_for(images, variant="avg_pool")
    config = TrainConfig(
        recipe="r",
        model=ModelConfig(name="timm:resnet18"),
        distill=DistillConfig(kind="hard"),
        data=DataConfig(root="d"),
    )
    run = RunFolder(tmp_path)
    write_report(record_of(images, metrics, config=config), run, model, images, logits)
    assert not run.attention.exists()
    assert not run.heads.exists()
    page = Page(run)
    assert "Where the model looks" not in page.sections
    assert len([image for image in page.images if image["section"] == "Mistakes"]) == 1
    assert "resnet18 (timm) on d" in page.text
    assert "it counts the teacher's answers" in page.text
    assert ("load_peer" in page.text) == (kind == "peer")


def test_images_that_have_gone_since_are_left_out(tmp_path):
    gone = (0, 4)
    images = image_set(np.arange(12) % 3, ("a", "b", "c"), gone)
    logits = logits_for(images, wrong=(4, 5))
    metrics = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    run = RunFolder(tmp_path)
    write_report(record_of(images, metrics), run, xcit_for(images), images, logits)
    assert {p.name for p in run.samples.iterdir()} == {"1_b.png", "2_c.png"}
    found = [image["alt"] for image in Page(run).images if image["section"] == "Mistakes" and image["alt"]]
    assert found == ["5.jpg: c taken for a, 99 % sure"]


def test_the_digits_keep_their_names_and_their_story(tmp_path):
    images = image_set(np.arange(20) % 10, "0123456789")
    logits = logits_for(images)
    metrics = classification_metrics(logits, torch.from_numpy(images.labels), images.class_names)
    model = ModelConfig(name="xcit_nano_12_p8", options={"depth": 1})
    config = TrainConfig(recipe="digits_quickstart", model=model, data=DataConfig(format="digits", image_size=16))
    run = RunFolder(tmp_path)
    write_report(record_of(images, metrics, config=config), run, xcit_for(images), images, logits)
    assert {p.name for p in run.samples.iterdir()} == {f"digit_{i}.png" for i in range(10)}
    text = Page(run).text
    assert "XCiT on handwritten digits" in text
    assert "Model xcit_nano_12_p8 with depth 1: 0.01 M parameters." in text
    assert "white on black" in text
    assert "13 writers" in text


# --- which images are shown -----------------------------------------------------------------------------------------


def test_one_of_each_class_and_of_many_classes_some():
    images = image_set(np.arange(60) % 30, [str(i) for i in range(30)])
    logits = logits_for(images, wrong=(0, 1, 31))
    judged = Judged(images, PREPARE, Peer(), logits)
    assert list(judged.one_of_each_class(right=False)) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    right = judged.one_of_each_class(right=True)
    assert len(right) == 10
    assert right[0] == 30  # the first image of class 0 is taken for another
    assert 1 not in right  # and so are both of class 1
    assert all(images.labels[position] == number for number, position in right.items())


def test_labels_in_a_sheet_are_short_and_drawable():
    names = ("\u51ac", "an endless name of a kind of bird that nobody knows", "owl")
    images = image_set([0, 1, 2, 1], names)
    logits = logits_for(images, wrong=(0, 3))
    judged = Judged(images, PREPARE, Peer(), logits)
    labels = [judged.answer(i).label for i in range(4)]
    assert labels[2] == "owl, 99 % sure"
    assert labels[0].splitlines()[0] == "class 0"
    assert max(len(line) for label in labels for line in label.splitlines()) <= 34
    assert judged.answer(0).caption == f"\u51ac taken for {names[1]}, 99 % sure"


def test_a_thumbnail_is_the_part_that_the_model_sees():
    images = image_set([0], ("a", "b"))
    half = replace(PREPARE, crop_pct=0.5)
    ((_, (picture,)),) = Judged(images, half, Peer(), torch.tensor([[1.0, 0.0]])).pictures([0])
    assert picture.size == (160, 160)
    whole = images.open(0)  # 24 x 20: of the resized image the middle half, so the middle 10 x 10 pixels
    expected = whole.crop((7, 5, 17, 15)).resize((160, 160), Image.Resampling.BICUBIC)
    inner = (slice(40, 120), slice(40, 120))
    assert np.abs(np.asarray(picture)[inner].astype(int) - np.asarray(expected)[inner].astype(int)).mean() < 4


def test_percent_does_not_round_a_doubt_away():
    assert [percent(v) for v in (0.0, 0.514, 0.99, 0.9951, 1.0)] == ["0 %", "51 %", "99 %", "over 99 %", "over 99 %"]
