"""`xcit eval` on real files: what is printed, what is written, how it ends."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from xcit import files
from xcit.cli.main import main
from xcit.data.images import open_image
from xcit.data.labels import imagenet_names
from xcit.data.preprocess import Preprocessing
from xcit.errors import ExportError
from xcit.evaluate import resolution, run
from xcit.inference.predictor import Predictor
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild", "dog", "eel", "fox", "gnu"]
CFG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints and two parts of data: test has 5 images of each class but gnu, val 1."""
    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=7, patch_size=8)
    with torch.no_grad():
        model.head.weight.normal_(std=3.0)
    save_checkpoint(model, folder / "m.safetensors", class_names=NAMES, preprocessing=CFG)
    save_checkpoint(model, folder / "unnamed.safetensors", preprocessing=CFG)
    features = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=0, patch_size=8)
    save_checkpoint(features, folder / "features.safetensors", preprocessing=CFG)
    for part, count in (("test", 5), ("val", 1)):
        for label, name in enumerate(NAMES[:-1]):
            (folder / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * label + i).save(folder / "data" / part / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def xcit_eval(capsys, *arguments, model="m.safetensors", data="data"):
    status = main([
        "eval", "--model", model, "--data", str(data), "--device", "cpu", "--num-workers", "0", *arguments
    ])  # fmt: skip
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected(part="test", **options):
    """Return truth and prediction of each image, by the Python API."""
    predictor = Predictor("m.safetensors", device="cpu", **options)
    pairs = []
    for label, name in enumerate(NAMES[:-1]):
        pairs += [(label, p.labels[0].index) for p in predictor(f"data/{part}/{name}")]
    return pairs


# --- one size ---------------------------------------------------------------------------------------------------------


def test_json(capsys):
    status, out, err = xcit_eval(capsys, "--format", "json", "--batch-size", "8")
    assert status == 0
    record = json.loads(out)
    pairs = expected()
    right = sum(truth == guess for truth, guess in pairs)
    assert (record["num_images"], record["num_correct"]) == (30, right)
    assert record["accuracy"] == pytest.approx(right / 30)
    assert record["num_top5_correct"] >= right
    assert [row["name"] for row in record["classes"]] == NAMES
    assert [row["num_images"] for row in record["classes"]] == [5] * 6 + [0]
    assert record["classes"][6]["accuracy"] is None
    assert sum(row["num_images"] for row in record["mistakes"]) == 30 - right
    assert record["protocol"] == {**CFG, "resized_to": [32, 32]}
    assert record["speed"]["images_per_second"] > 0
    assert record["speed"]["batch_size"] == 8
    assert (record["skipped"], record["num_skipped"]) == ([], 0)
    assert (record["model"], record["data"], record["split"]) == ("m.safetensors", "data", None)
    assert "real" not in record
    assert "test is taken" in err


def test_table(capsys):
    status, out, _ = xcit_eval(capsys, "--per-class", "3")
    assert status == 0
    pairs = expected()
    right = sum(truth == guess for truth, guess in pairs)
    facts = dict(line.strip().split("  ", 1) for line in out.splitlines() if line.startswith("  "))
    facts = {name: text.strip() for name, text in facts.items()}
    assert facts["images"] == "30"
    assert facts["top-1"].startswith(f"{100 * right / 30:.2f} % (95 % interval ")
    assert facts["top-5"].endswith(" %")
    assert "only one" in facts["throughput"]
    assert facts["protocol"] == "resized to 32 px (bicubic), centre crop 32 x 32"
    shown = out[out.index("The worst classes") :].splitlines()[2:5]
    shares = [float(line.split()[0]) for line in shown]
    by_class = sorted(sum(t == g for t, g in pairs if t == c) / 5 for c in range(6))
    assert shares == pytest.approx([100 * share for share in by_class[:3]], abs=0.01)
    assert "1 of 7 classes have no image in this set." in out


def test_the_table_names_the_commonest_mistake(capsys):
    _, out, _ = xcit_eval(capsys, "--per-class", "7")
    assert "All classes" not in out  # gnu has no image
    pairs = expected()
    for line in out[out.index("The worst classes") :].splitlines()[2:8]:
        label = NAMES.index("cat, wild" if "cat, wild" in line[:45] else line.split()[4])
        wrong = [guess for truth, guess in pairs if truth == label and guess != truth]
        if wrong:
            assert f"({max(wrong.count(guess) for guess in wrong)})" in line


def test_no_classes_in_the_table(capsys):
    assert "classes" not in xcit_eval(capsys, "--per-class", "0")[1]


def test_another_size_and_crop(capsys):
    arguments = ("--format", "json", "--image-size", "24", "--crop-pct", "0.75")
    record = json.loads(xcit_eval(capsys, *arguments)[1])
    assert record["protocol"]["resized_to"] == [32, 32]
    assert record["protocol"]["input_size"] == [3, 24, 24]
    assert record["protocol"]["crop_pct"] == 0.75
    whole = json.loads(xcit_eval(capsys, "--format", "json", "--image-size", "24")[1])
    assert whole["loss"] != record["loss"]


def test_another_part(capsys):
    record = json.loads(xcit_eval(capsys, "--format", "json", "--split", "val")[1])
    assert record["num_images"] == 6
    assert record["num_correct"] == sum(t == g for t, g in expected("val"))


def test_a_folder_of_classes_alone(capsys):
    record = json.loads(xcit_eval(capsys, "--format", "json", data="data/test")[1])
    assert record["num_images"] == 30


def test_output_is_written_whole_and_the_table_printed(capsys, tmp_path):
    status, out, err = xcit_eval(capsys, "--output", str(tmp_path / "new" / "o.json"))
    assert status == 0
    assert "top-1" in out
    assert "o.json" in err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["o.json"]
    assert json.loads((tmp_path / "new" / "o.json").read_text())["num_images"] == 30


def test_a_full_disk_costs_the_file_not_the_figures(capsys, tmp_path, monkeypatch):
    def full(*args):
        raise ExportError("o.json could not be written: No space left on device; 0.1 MiB are needed.")

    monkeypatch.setattr(files, "write_atomic", full)
    status, out, err = xcit_eval(capsys, "--output", str(tmp_path / "o.json"))
    assert status == 2
    assert "top-1" in out
    assert "No space left" in err


def test_worker_processes_change_nothing(capsys):
    arguments = ["eval", "--model", "m.safetensors", "--data", "data", "--device", "cpu", "--format", "json"]
    records = []
    for workers in ("0", "2"):
        assert main([*arguments, "--num-workers", workers, "--batch-size", "7"]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[1]["speed"]["num_workers"] == 2
    for record in records:
        del record["speed"]
    assert records[0] == records[1]


def test_bf16(capsys):
    exact, rounded = (
        json.loads(xcit_eval(capsys, "--format", "json", "--precision", p)[1]) for p in ("32", "bf16")
    )  # fmt: skip
    assert rounded["precision"] == "bf16"
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.1)


def test_a_list_with_several_labels_gives_map(capsys, tmp_path):
    pytest.importorskip("torchmetrics")
    rows = [(f"{i}.png", ";".join(NAMES[j] for j in range(7) if (i + j) % 3 == 0 and NAMES[j] != "cat, wild"))
            for i in range(8)]  # fmt: skip
    for i, (name, _) in enumerate(rows):
        picture(i).save(tmp_path / name)
    text = io.StringIO()
    csv.writer(text).writerows([("path", "labels"), *rows])
    (tmp_path / "list.csv").write_text(text.getvalue())
    status, out, err = xcit_eval(capsys, "--format", "json", data=tmp_path / "list.csv")
    assert status == 0, err
    record = json.loads(out)
    assert 0 < record["mean_average_precision"] <= 1
    assert "accuracy" not in record
    assert "mAP" in xcit_eval(capsys, data=tmp_path / "list.csv")[1]


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name_not_by_order(capsys, tmp_path):
    """Only dog and fox: as numbers of sorted folders they would be 0 and 1."""
    for name in ("dog", "fox"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    record = json.loads(xcit_eval(capsys, "--format", "json", data=tmp_path)[1])
    assert [row["name"] for row in record["classes"] if row["num_images"]] == ["dog", "fox"]


def test_classes_that_the_model_lacks(capsys, tmp_path):
    for name in ("dog", "unicorn"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    status, out, err = xcit_eval(capsys, data=tmp_path)
    assert (status, out) == (2, "")
    assert "unicorn" in err


def test_numbered_folders(capsys, tmp_path):
    for name in ("0", "3"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    for model in ("m.safetensors", "unnamed.safetensors"):
        record = json.loads(xcit_eval(capsys, "--format", "json", data=tmp_path, model=model)[1])
        assert [row["index"] for row in record["classes"] if row["num_images"]] == [0, 3]


def test_a_model_that_does_not_name_its_classes(capsys, tmp_path):
    status, _, err = xcit_eval(capsys, model="unnamed.safetensors")
    assert status == 2
    assert "has 6 classes, and the model has 7, which it does not name" in err
    for name in NAMES:
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    status, out, err = xcit_eval(capsys, "--format", "json", model="unnamed.safetensors", data=tmp_path)
    assert status == 0
    assert "taken, in order" in err
    assert [row["name"] for row in json.loads(out)["classes"]] == NAMES


# --- models of timm ---------------------------------------------------------------------------------------------------


def test_a_model_of_timm_that_was_trained_here(capsys, tmp_path):
    peers = pytest.importorskip("xcit.recipes.peers")
    model = peers.create_peer("test_vit", num_classes=7, options={"img_size": 32})
    path = tmp_path / "model.safetensors"
    peers.save_peer(
        model, path, name="test_vit", options={"img_size": 32}, class_names=NAMES,
        preprocessing=Preprocessing.from_cfg(CFG),
    )  # fmt: skip
    status, out, err = xcit_eval(capsys, "--format", "json", model=str(path))
    assert status == 0, err
    record = json.loads(out)
    assert record["num_images"] == 30
    pictures = [f"data/test/{name}/{i}.png" for name in NAMES[:-1] for i in range(5)]
    pixels = torch.stack([Preprocessing.from_cfg(CFG)(open_image(p)) for p in pictures])
    with torch.no_grad():
        guesses = model.eval()(pixels).argmax(1)
    assert record["num_correct"] == (guesses == torch.arange(6).repeat_interleave(5)).sum()
    status, _, err = xcit_eval(capsys, "--sizes", "32,64", model=str(path))
    assert status == 2
    assert "judged at its own size" in err


# --- ReaL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A small model of ImageNet's classes and three of its validation images, by WordNet's numbers."""
    folder = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=1000, patch_size=8)
    save_checkpoint(model, folder / "m.safetensors", class_names=imagenet_names(), preprocessing=CFG)
    for i, wnid in ((1, "n01440764"), (2, "n01440764"), (3, "n01443537")):
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / "val" / wnid / f"ILSVRC2012_val_{i:08d}.png")
    predictions = Predictor(folder / "m.safetensors", device="cpu")(folder / "val")
    guesses = {int(p.path.stem[-8:]): p.labels[0].index for p in predictions}
    labels = [[] for _ in range(50_000)]
    labels[0] = [guesses[1], 999]  # right by ReaL
    labels[2] = [(guesses[3] + 1) % 1000]  # wrong; the second image has no label
    (folder / "real.json").write_text(json.dumps(labels))
    return folder


def test_real_labels(capsys, imagenet):
    options = {"model": str(imagenet / "m.safetensors"), "data": imagenet / "val"}
    status, out, err = xcit_eval(capsys, "--real", str(imagenet / "real.json"), "--format", "json", **options)
    assert status == 0, err
    record = json.loads(out)
    assert record["real"]["num_images"] == 2
    assert record["real"]["num_correct"] == 1
    assert record["real"]["num_unlabelled"] == 1
    assert [row["index"] for row in record["classes"] if row["num_images"]] == [0, 1]  # tench, goldfish
    _, out, _ = xcit_eval(capsys, "--real", str(imagenet / "real.json"), **options)
    assert "top-1, ReaL" in out
    assert "50.00 %" in out


def test_real_labels_of_something_else(capsys, imagenet, tmp_path):
    status, _, err = xcit_eval(capsys, "--real", str(imagenet / "real.json"))
    assert (status, "the model has 7" in err) == (2, True)
    (tmp_path / "real.json").write_text("{")
    status, _, err = xcit_eval(capsys, "--real", str(tmp_path / "real.json"))
    assert (status, "is not JSON" in err) == (2, True)
    status, _, err = xcit_eval(capsys, "--real", str(tmp_path / "none.json"))
    assert (status, "cannot be read" in err) == (2, True)


# --- broken images ----------------------------------------------------------------------------------------------------


def test_broken_images(capsys, tmp_path):
    (tmp_path / "dog").mkdir()
    for i in range(30):
        picture(i).save(tmp_path / "dog" / f"{i:02d}.png")
    for i in range(3):
        (tmp_path / "dog" / f"{i:02d}.png").write_bytes(b"nothing")
    status, out, err = xcit_eval(capsys, "--format", "json", data=tmp_path)
    assert status == 0
    record = json.loads(out)
    assert (record["num_images"], record["num_skipped"]) == (27, 3)
    assert all("00.png" in record["skipped"][0][key] for key in ("name", "reason"))
    assert "3 of 30 images are broken and were skipped." in err
    status, out, err = xcit_eval(capsys, "--max-bad-fraction", "0.05", data=tmp_path)
    assert (status, out) == (2, "")
    assert "--max-bad-fraction" in err
    assert "Traceback" not in err


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_sweep(capsys, tmp_path):
    status, out, err = xcit_eval(
        capsys, "--sizes", "40,16,32", "--output", str(tmp_path / "s.json"), "--batch-size", "9"
    )
    assert status == 0
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["complete"] is True
    assert [point["image_size"] for point in record["sizes"]] == [16, 32, 40]
    for point in record["sizes"]:
        pairs = expected(image_size=point["image_size"])
        assert point["num_correct"] == sum(t == g for t, g in pairs)
    costs = [point["multiply_adds"] for point in record["sizes"]]
    assert costs == sorted(costs)
    with Image.open(tmp_path / "s.png") as image:
        image.verify()
    assert "s.png" in err
    lines = out.splitlines()
    assert lines[1].split()[:2] == ["size", "top-1"]
    assert [line.split()[0] for line in lines[2:5]] == ["16", "32", "40"]
    assert "only" not in out


def test_sweep_without_files(capsys, tmp_path):
    status, out, _ = xcit_eval(capsys, "--sizes", "16,32", "--format", "json")
    assert status == 0
    assert len(json.loads(out)["sizes"]) == 2
    status, out, _ = xcit_eval(capsys, "--sizes", "16,32", "--plot", str(tmp_path / "p.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
    assert "there was one only" in out  # a single batch, which is the warm-up


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "nothing: is not there"),
        (["--data", "datta"], "did you mean 'data'?"),
        (["--data", ""], "--data is missing"),
        (["--data", "data/test/ant"], "no folder of a class"),
        (["--split", "train"], "has no train part"),
        (["--split", "holdout"], "'holdout'"),
        (["--model", "features.safetensors"], "has no classifier"),
        (["--model", "dino_xcit_small_12_p16_pretrain"], "backbone without classifier"),
        (["--model", "nothing.safetensors"], "no file nothing.safetensors"),
        (["--model", "xcit_smal_12_p16"], "Did you mean"),
        (["--image-size", "4"], "at least one patch of 8"),
        (["--image-size", "0"], "--image-size is 0"),
        (["--sizes", "4,32"], "--sizes has 4; an image must be at least one patch of 8"),
        (["--sizes", "160-512"], "'160-512' is no number"),
        (["--sizes", "16,32", "--image-size", "32"], "leave one of them out"),
        (["--sizes", "16,32", "--per-class", "3"], "--per-class is for a single size"),
        (["--plot", "p.png"], "name them by --sizes"),
        (["--crop-pct", "1.2"], "--crop-pct is 1.2"),
        (["--batch-size", "0", "--num-workers", "-1"], "--batch-size is 0; it must be 1 or more; --num-workers is -1"),
        (["--max-bad-fraction", "2"], "--max-bad-fraction is 2.0"),
        (["--per-class", "-1"], "--per-class is -1"),
        (["--precision", "16"], "take bf16 or 32 on the CPU"),
        (["--output", "o.txt"], "must end in .json"),
        (["--output", "m.safetensors/o.json"], "m.safetensors is not a folder"),
        (["--output", "folder.json"], "which is a folder"),
        (["--sizes", "16,32", "--plot", "p.jpg"], "must end in .png"),
        (["--device", "tpu"], "it must be auto, cpu"),
    ],
)
def test_mistakes_are_a_sentence(capsys, place, arguments, message):
    (place / "folder.json").mkdir(exist_ok=True)
    status, out, err = xcit_eval(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_an_empty_folder(capsys, tmp_path):
    status, _, err = xcit_eval(capsys, data=tmp_path)
    assert status == 2
    assert str(tmp_path) in err


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_has_no_result(capsys, tmp_path, monkeypatch):
    real, calls = run._logits, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run, "_logits", interrupted)
    status, out, err = xcit_eval(capsys, "--batch-size", "4", "--output", str(tmp_path / "o.json"))
    assert (status, out) == (130, "")
    assert "interrupted after 8 of 30 images; there is no result." in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_sweep_keeps_what_was_done(capsys, tmp_path, monkeypatch):
    real = resolution.evaluate_classifier

    def interrupted(model, images, preprocessing, **options):
        if preprocessing.image_size == (40, 40):
            raise KeyboardInterrupt
        return real(model, images, preprocessing, **options)

    monkeypatch.setattr(resolution, "evaluate_classifier", interrupted)
    status, out, err = xcit_eval(capsys, "--sizes", "16,32,40", "--output", str(tmp_path / "s.json"))
    assert status == 130
    assert "interrupted after 2 of 3 sizes; the 2 that were done follow" in err
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["complete"] is False
    assert [point["image_size"] for point in record["sizes"]] == [16, 32]
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["16", "32"]
    assert (tmp_path / "s.png").exists()
    status, out, err = xcit_eval(capsys, "--sizes", "40,48", "--output", str(tmp_path / "t.json"))
    assert (status, out) == (130, "")
    assert "after 0 of 2 sizes; there is no result" in err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.slow
def test_ctrl_c_with_worker_processes_ends_quietly(place):
    """A real signal to the whole group, as a terminal sends it."""
    code = (
        "import sys, xcit.evaluate.run as run; from xcit.cli.main import main; real = run._logits\n"
        "def slow(*args):\n    import time; print('running', file=sys.stderr, flush=True); time.sleep(1)\n"
        "    return real(*args)\n"
        "run._logits = slow\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["eval", "--model", "m.safetensors", "--data", "data", "--device", "cpu", "--num-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--batch-size", "1"],
        cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # heard in background jobs too
    )  # fmt: skip
    try:
        before = ""
        while "running" not in before:
            line = process.stderr.readline()
            assert line, before
            before += line
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert out == ""
    lines = [line for line in err.splitlines() if line != "running"]
    assert len(lines) == 1, err
    assert lines[0].startswith("xcit: interrupted after ")
