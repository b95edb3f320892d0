"""A user's own images, small and untidy, through the commands as they are typed: train, eval, predict."""

import csv
import json
import unicodedata

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.models.factory import create_model
from xcit.recipes.peers import is_peer

OPTIONS = {"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2}
MODEL = ["--model", "xcit_nano_12_p8", "--image-size", "16"]
SMALL = [f"model.options.{name}={value}" for name, value in OPTIONS.items()]
CHEAP = ["optim.warmup_epochs=0", "data.num_workers=0", "augment.degrees=0"]
UNMIXED = ["augment.mixup=0", "augment.cutmix=0"]
CLASSES = ("Bär", "café au lait", "赤")
ENDINGS = (".png", ".JPG", ".webp", ".bmp", ".tiff", ".jpeg", ".gif")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_report(monkeypatch):
    """The page takes seconds to draw; one test below is about it."""
    monkeypatch.setattr("xcit.recipes.classification_job.write_report", lambda *_: None)


def picture(label, number):
    """A picture of 20 x 20 px whose colour tells its class."""
    noise = np.random.default_rng(1000 * label + number).normal(0, 25, (20, 20, 3))
    return Image.fromarray((noise + 60 + 130 * np.eye(3)[label]).clip(0, 255).astype(np.uint8))


def save(folder, label, number, ending=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:02}{ending}"
    picture(label, number).save(path)
    return path


@pytest.fixture(scope="module")
def tidy(tmp_path_factory):
    """Three classes of colours in train/, val/ and test/."""
    root = tmp_path_factory.mktemp("tidy")
    first = 0
    for part, count in (("train", 12), ("val", 4), ("test", 4)):
        for label, name in enumerate(("blue", "green", "red")):
            for number in range(first, first + count):
                save(root / part / name, (2, 1, 0)[label], number)
        first += count
    return root


def train(data, out, *arguments, settings=(), model=MODEL, recipe="scratch", small=SMALL, epochs=2, batch=12):
    return main(
        ["train", recipe, "--data", str(data), "--out", str(out), "--epochs", str(epochs), "--device", "cpu",
         "--batch-size", str(batch), *model, *arguments, "--set", *CHEAP, *small, *settings]
    )  # fmt: skip


def tensors(path):
    return safetensors.torch.load_file(path)


def figures(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


# --- untidy ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untidy(tmp_path_factory):
    """100 images to train on, 20 to choose by, 20 held out; one in twenty of each part is broken.

    Classes in several alphabets, one without an image; images of many formats, some in folders below; other files.

    Returns:
        The folder, and the broken images by part.
    """
    root = tmp_path_factory.mktemp("untidy images")
    broken = {}
    for part, count in (("train", 100), ("val", 20), ("test", 20)):
        paths = []
        for number in range(count):
            label = number % 3
            folder = root / part / CLASSES[label]
            if number % 5 == 0:
                folder = folder / "von unterwegs" / "2. Tag"
            paths.append(save(folder, label, number, ENDINGS[number % len(ENDINGS)]))
        (root / part / "leer").mkdir()
        (root / part / CLASSES[0] / "Thumbs.db").write_bytes(b"no image")
        (root / part / CLASSES[1] / "notes.txt").write_text("no image", encoding="utf-8")
        ways = (b"", b"this is text", b"\x89PNG\r\n\x1a\n", None, b"\xff\xd8\xff\xe0 no jpeg")
        broken[part] = paths[3::20]
        for path, way in zip(broken[part], ways, strict=False):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if way is None else way)
    assert {part: len(paths) for part, paths in broken.items()} == {"train": 5, "val": 1, "test": 1}
    return root, broken


@pytest.fixture(scope="module")
def from_untidy(untidy, tmp_path_factory):
    """The run on them, report included, and what it said."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    run = tmp_path_factory.mktemp("runs") / "ein Lauf"
    said, wrong = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(wrong):
        status = train(untidy[0], run, settings=["optim.ema_decay=0.5", "optim.lr=1e-2"], batch=10, epochs=4)
    return run, status, said.getvalue(), wrong.getvalue()


def test_an_untidy_folder_trains_to_the_end_and_reports_what_it_skipped(untidy, from_untidy):
    root, broken = untidy
    run, status, said, wrong = from_untidy
    assert status == 0, wrong
    assert "Traceback" not in said + wrong
    assert "3 classes: 100 images to train on, 20 to choose by, 20 held out" in said
    assert "without an image: 'leer'" in said
    assert ".db" in said
    assert ".txt" in said
    assert f"some images could not be decoded: {run / 'skipped.csv'}" in said.replace("\n", "")

    with (run / "skipped.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = {(row["part"], unicodedata.normalize("NFC", row["image"])): row["reason"] for row in rows}
    expected = {
        (part, unicodedata.normalize("NFC", path.relative_to(root).as_posix()))
        for part in ("train", "val")
        for path in broken[part]
    }
    assert {key for key in listed if key[0] != "test"} == expected
    for (_, name), reason in listed.items():
        assert len(reason) > 10
        assert "another time" not in reason, name

    content = figures(run)
    assert content["skipped"]["train"] == 5
    assert content["skipped"]["val"] == 1
    assert content["test"]["num_images"] == 19
    assert content["val"]["val_accuracy"] > 0.6
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Skipped images" in page
    for path in (*broken["train"], *broken["val"]):
        assert path.name in page
    for name in CLASSES:
        assert name in page


def test_held_out_images_that_are_broken_are_listed_too(from_untidy, untidy):
    root, broken = untidy
    run = from_untidy[0]
    (path,) = broken["test"]
    with (run / "skipped.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows if row["part"] == "test"] == [path.relative_to(root).as_posix()]
    assert figures(run)["skipped"]["test"] == 1


def test_what_came_out_is_evaluated_and_predicts(untidy, from_untidy, tmp_path, capsys):
    root, broken = untidy
    run = from_untidy[0]
    capsys.readouterr()
    model = str(run / "model.safetensors")
    arguments = [
        "eval",
        "--model",
        model,
        "--data",
        str(root),
        "--split",
        "test",
        "--device",
        "cpu",
        "--format",
        "json",
    ]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["num_images"] == 19
    assert json.loads(out)["accuracy"] == pytest.approx(figures(run)["test"]["accuracy"])

    good = sorted(p for p in (root / "test" / "赤").rglob("*") if p.is_file() and p not in broken["test"])
    assert main(["predict", *map(str, good), "--model", model, "--device", "cpu", "--format", "json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == len(good)
    assert {answer["predictions"][0]["name"] for answer in answers} <= set(CLASSES)


def test_too_much_that_is_broken_stops_the_run(untidy, tmp_path, capsys, no_report):
    assert train(untidy[0], tmp_path / "run", settings=["data.max_bad_fraction=0.02"], batch=10) == 2
    message = capsys.readouterr().err
    assert "max_bad_fraction" in message
    assert "xcit data check" in message
    assert not (tmp_path / "run" / "metrics.json").exists()


# --- other layouts ---------------------------------------------------------------------------------------------------


def test_a_table_of_several_labels(tmp_path, capsys, no_report):
    """Red, green and blue on and off, each a class of its own."""
    lines = ["path,labels"]
    for number in range(40):
        on = [name for k, name in enumerate(("red", "green", "blue")) if number >> k & 1]
        pixels = np.zeros((16, 16, 3), dtype=np.uint8) + 30
        for k in range(3):
            pixels[..., k] += 150 * (number >> k & 1)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'|'.join(on)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    settings = [*UNMIXED, "optim.lr=1e-2", "data.val_fraction=0.3", "augment.color_jitter=0"]
    assert train(tmp_path / "labels.csv", run, settings=settings, epochs=8, batch=7) == 0
    out, err = capsys.readouterr()
    assert "mean average precision" in out
    assert err == ""
    content = figures(run)
    assert content["val"]["val_map"] > 0.8
    assert content["validation"]["mean_average_precision"] == pytest.approx(content["val"]["val_map"], abs=1e-4)

    assert train(tmp_path / "labels.csv", tmp_path / "mixed", batch=8) == 2
    assert "mixup and cutmix are for images of one class each" in capsys.readouterr().err


def test_shards(tmp_path, capsys, no_report):
    assert main(["data", "digits", "--out", str(tmp_path / "d"), "--layout", "shards"]) == 0
    capsys.readouterr()
    settings = ["data.in_chans=1", "data.normalize=data", "augment.color_jitter=0"]
    status = train(tmp_path / "d", tmp_path / "run", settings=settings, epochs=1, batch=300)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "images are classified right" in out
    assert figures(tmp_path / "run")["test"]["num_images"] == 360


# --- teachers, other weights, rare classes ---------------------------------------------------------------------------


def test_a_teacher_trained_here_teaches(tidy, tmp_path, capsys, no_report):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    peer = ["--model", "timm:resnet10t", "--image-size", "32"]
    assert train(tidy, teacher, model=peer, small=[], settings=UNMIXED) == 0
    assert is_peer(teacher / "model.safetensors")
    assert train(tidy, student, "--teacher", str(teacher / "model.safetensors")) == 0
    plain = tmp_path / "plain"
    assert train(tidy, plain) == 0
    ours, theirs = tensors(student / "model.safetensors"), tensors(plain / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert not torch.equal(ours["head.weight"], theirs["head.weight"])  # it was listened to
    text = (student / "config.yaml").read_text(encoding="utf-8")
    assert "kind: hard" in text
    losses = [[row["train_loss"] for row in figures(run)["epochs"]] for run in (student, plain)]
    assert losses[0] != losses[1]

    # the teacher is used up: the student's file stands alone, and teaches the next one softly
    (teacher / "model.safetensors").unlink()
    assert train(tidy, tmp_path / "third", "--teacher", str(student / "model.safetensors"),
                 settings=["distill.kind=soft", "distill.tau=3"]) == 0  # fmt: skip
    assert create_model(str(tmp_path / "third" / "model.safetensors")).num_classes == 3


def test_a_teacher_of_other_classes_is_refused(tidy, from_untidy, tmp_path, capsys):
    capsys.readouterr()
    assert train(tidy, tmp_path / "run", "--teacher", str(from_untidy[0] / "model.safetensors")) == 2
    message = capsys.readouterr().err
    assert "it knows 3 classes (Bär, café au lait, 赤), the data has 3 classes (blue, green, red)" in message
    assert not any((tmp_path / "run").glob("*"))


def test_weights_of_a_file_are_begun_with(tidy, from_untidy, tmp_path, capsys, no_report):
    """At a learning rate of nothing the body stays the file's; the classes are the data's."""
    begin = from_untidy[0] / "model.safetensors"
    still = ["optim.lr=0", "optim.min_lr=0", "optim.warmup_lr=0", "optim.weight_decay=0"]
    assert train(tidy, tmp_path / "run", "--pretrained", str(begin), recipe="finetune", settings=still) == 0
    ours, theirs = tensors(tmp_path / "run" / "model.safetensors"), tensors(begin)
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert [name for name in moved if not name.startswith("head") and "running_" not in name
            and "num_batches" not in name] == []  # fmt: skip
    assert any("running_mean" in name for name in moved)  # it was trained
    capsys.readouterr()
    assert create_model(str(tmp_path / "run" / "model.safetensors")).pretrained_cfg["class_names"] == [
        "blue", "green", "red"
    ]  # fmt: skip


def test_the_stem_of_another_model_stays_as_it_is(tidy, from_untidy, tmp_path, no_report):
    donor = from_untidy[0] / "model.safetensors"
    run = tmp_path / "run"
    assert train(tidy, run, settings=[f"model.surgery={donor}", "optim.lr=1e-2"]) == 0
    ours, theirs = tensors(run / "model_last.safetensors"), tensors(donor)
    stem = [name for name in ours if name.startswith("patch_embed")]
    assert any(name.endswith("running_var") for name in stem)
    assert [name for name in stem if not torch.equal(ours[name], theirs[name])] == []
    assert not torch.equal(ours["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])


def test_rare_classes_weigh_more(tmp_path, capsys, no_report):
    for label, count in enumerate((30, 6)):
        for number in range(count):
            save(tmp_path / "d" / ("common", "rare")[label], label, number)
    settings = [*UNMIXED, "data.val_fraction=0.2"]
    for weights in ("none", "balanced"):
        assert train(tmp_path / "d", tmp_path / weights, settings=[*settings, f"data.class_weights={weights}"]) == 0
    first = [figures(tmp_path / weights)["epochs"][0]["train_loss"] for weights in ("none", "balanced")]
    assert first[0] != first[1]
    capsys.readouterr()
    assert train(tmp_path / "d", tmp_path / "run", settings=["data.class_weights=balanced"]) == 2
    assert "data.class_weights needs hard targets, but mixup" in capsys.readouterr().err


# --- ways to compute -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(tidy, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xcit.recipes.classification_job.write_report", lambda *_: None)
        assert train(tidy, run) == 0
    return run


def losses(run):
    return [row["train_loss"] for row in figures(run)["epochs"]]


def test_computing_activations_again_changes_nothing(tidy, plain_run, tmp_path, no_report):
    assert train(tidy, tmp_path / "run", settings=["model.grad_checkpointing=true"]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=1e-5)


def test_bfloat16_learns_nearly_the_same(tidy, plain_run, tmp_path, no_report):
    assert train(tidy, tmp_path / "run", "--precision", "bf16") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=2e-2)
    assert losses(tmp_path / "run") != losses(plain_run)
    assert all(value.dtype != torch.bfloat16 for value in tensors(tmp_path / "run" / "model.safetensors").values())


def test_gradients_in_parts_learn_nearly_the_same(tidy, plain_run, tmp_path, no_report):
    """Batch norm sees other parts, so that they differ a little."""
    assert train(tidy, tmp_path / "run", settings=["optim.accumulate=3"]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_model_learns_the_same(tidy, plain_run, tmp_path, no_report):
    assert train(tidy, tmp_path / "run", settings=["compute.compile=true"]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain_run), rel=1e-4)
    assert tensors(tmp_path / "run" / "model.safetensors").keys() == tensors(plain_run / "model.safetensors").keys()
