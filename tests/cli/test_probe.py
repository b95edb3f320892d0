"""`xcit probe`: figures against the functions called by hand, what it says, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from xcit.cli import probe as probe_module
from xcit.cli.main import main
from xcit.data.sources import open_data
from xcit.evaluate.embedding import embed_set
from xcit.evaluate.knn import knn_accuracy
from xcit.evaluate.logistic import logistic_probe
from xcit.evaluate.probes import untrained
from xcit.inference.features import FeatureExtractor
from xcit.models.factory import create_model
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

CFG = {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "crop_pct": 0.875}
CLASSES = ("ant", "bee", "cat")


def picture(seed, label):
    pixels = np.random.default_rng(seed).integers(0, 150, (20, 24, 3))
    pixels[..., label] += 25
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, and sets of images: data/ in three parts with a broken file, two/ without test, grey.safetensors."""
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    model = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=0, patch_size=8)
    save_checkpoint(model, folder / "m.safetensors", preprocessing=CFG)
    for root, parts in {
        "data": (("train", 20), ("val", 6), ("test", 10)),
        "two": (("train", 12), ("val", 5)),
        "small": (("train", 4), ("val", 2)),
    }.items():
        for p, (part, count) in enumerate(parts):
            for label, name in enumerate(CLASSES):
                (folder / root / part / name).mkdir(parents=True)
                for i in range(count):
                    picture(1000 * p + 100 * label + i, label).save(folder / root / part / name / f"{i}.png")
    (folder / "data" / "train" / "bee" / "3.png").write_bytes(b"nothing of the kind")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def xcit_probe(capsys, *arguments, model="m.safetensors", data="data"):
    status = main([
        "probe", "--model", model, "--data", data, "--device", "cpu", "--num-workers", "0", *arguments
    ])  # fmt: skip
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def features(root="data", model="m.safetensors", **options):
    """Return features and labels of each part by the Python API."""
    extract = FeatureExtractor(model, device="cpu", **options)
    splits = open_data(root)
    return [embed_set(extract, images, num_workers=0).usable() for images in splits[:3] if images is not None]


def test_knn_as_json(capsys, tmp_path):
    status, out, err = xcit_probe(capsys, "--k", "1,5,59", "--format", "json", "--output", str(tmp_path / "o.json"))
    assert status == 0
    record = json.loads(out)
    train, _, test = features()
    want = knn_accuracy(*test, *train, num_classes=3, ks=(1, 5, 59)).accuracies
    assert [(row["probe"], row["setting"], row["num_correct"]) for row in record["probes"]] == [
        ("k-NN", f"k = {k}", want[k].num_correct) for k in (1, 5, 59)
    ]
    assert record["bank"] == {"part": "train", "num_images": 59}
    assert record["judged"] == {"part": "test", "num_images": 30}
    assert record["complete"] is True
    assert record["features"]["pool"] == "token"
    assert record["features"]["preprocessing"]["crop_pct"] == 0.875
    assert len(record["features"]["fingerprint"]) == 64
    assert [s["name"] for s in record["skipped"]] == ["train/bee/3.png"]
    assert "bee/3.png: is not an image" in err
    assert "xcit: 1 image is broken and was skipped." in err
    assert json.loads((tmp_path / "o.json").read_text()) == record


def test_a_set_without_test_part_and_other_pooling(capsys):
    status, out, err = xcit_probe(capsys, "--pool", "both", "--image-size", "24", "--temperature", "0.5", data="two")
    assert status == 0
    train, val = features("two", pool="both", image_size=24)
    want = knn_accuracy(*val, *train, num_classes=3, ks=(10, 20), temperature=0.5).accuracies
    assert "judged on    15 images, the val part" in out
    assert "features     64 numbers an image (both)" in out
    assert "resized to 27 px (bicubic), centre crop 24 x 24" in out
    for k in (10, 20):
        (line,) = (line for line in out.splitlines() if f"k = {k} " in line)
        assert f"{100 * want[k].top1:.2f} %" in line
    assert "k = 100" not in out
    assert "The training part has 36 images, fewer than some of the usual numbers" in err
    assert "top-5" not in out  # of three classes


def test_a_bank_smaller_than_every_usual_k(capsys):
    status, out, _ = xcit_probe(
        capsys,
        data="small",
    )
    assert status == 0
    assert "k = 10 " in out
    assert "k = 20" not in out


def test_broken_images_that_choose_are_named_too(place, capsys, tmp_path):
    shutil.copytree(place / "data", tmp_path / "d")
    (tmp_path / "d" / "train" / "bee" / "3.png").unlink()
    (tmp_path / "d" / "val" / "ant" / "2.png").write_bytes(b"nothing of the kind")
    for method, skipped in (("logistic", ["ant/2.png"]), ("knn", [])):  # k-NN chooses nothing: they are not opened
        status, out, err = xcit_probe(capsys, "--method", method, "--format", "json", data=str(tmp_path / "d"))
        assert status == 0
        assert [each["name"].removeprefix("val/") for each in json.loads(out)["skipped"]] == skipped
        assert ("1 image is broken" in err) == bool(skipped)


def test_a_bank_that_cannot_be_divided_has_neighbours(place, capsys, tmp_path):
    shutil.copytree(place / "small", tmp_path / "d")
    for image in (tmp_path / "d" / "train").rglob("[1-9].png"):
        image.unlink()
    status, out, _ = xcit_probe(capsys, "--k", "1", data=str(tmp_path / "d"))
    assert status == 0
    assert "learnt from  3 images" in out


def test_logistic_and_baselines(capsys):
    status, out, _ = xcit_probe(
        capsys, "--method", "logistic", "--baselines", "untrained,pixels,pca", "--format", "json"
    )
    assert status == 0
    rows = json.loads(out)["probes"]
    assert [row["features"] for row in rows] == [
        "m.safetensors", "the same, untrained", "pixels, 16 x 16", "pixels, 32 components"
    ]  # fmt: skip
    train, val, test = features()
    assert rows[0]["num_correct"] == logistic_probe(train, val, test, num_classes=3).accuracy.num_correct
    fresh = untrained(create_model("m.safetensors"), seed=0)
    train, val, test = features(model=fresh)
    assert rows[1]["num_correct"] == logistic_probe(train, val, test, num_classes=3).accuracy.num_correct


def test_linear_is_saved_as_a_classifier(capsys, tmp_path):
    file = tmp_path / "linear.safetensors"
    arguments = (
        "--method",
        "linear",
        "--epochs",
        "3",
        "--lr",
        "0.1,1",
        "--sgd-batch",
        "16",
        "--cache",
        "--format",
        "json",
    )
    status, out, err = xcit_probe(capsys, *arguments, "--save", str(file))
    assert status == 0
    record = json.loads(out)
    (row,) = record["probes"]
    assert row["probe"] == "linear"
    assert row["setting"].startswith("3 epochs, lr ")
    assert f"{file} is written" in err
    assert list(tmp_path.iterdir()) == [file]
    status = main(["eval", "--model", str(file), "--data", "data", "--format", "json", "--num-workers", "0"])
    evaluated = json.loads(capsys.readouterr().out)
    assert (status, evaluated["num_images"], evaluated["num_correct"]) == (0, 30, row["num_correct"])
    assert evaluated["protocol"]["crop_pct"] == 0.875
    assert main(["predict", "data/test/ant/0.png", "--model", str(file), "--device", "cpu"]) == 0
    assert any(name in capsys.readouterr().out for name in CLASSES)


def test_all_methods_and_random_parts(capsys):
    status, out, _ = xcit_probe(capsys, "--method", "all", "--epochs", "1", "--k", "3", "--format", "json", data="two")
    assert status == 0
    record = json.loads(out)
    assert [row["probe"] for row in record["probes"]] == ["k-NN", "logistic", "linear"]
    assert record["linear"]["augment"] is True
    assert record["probes"][2]["setting"] == "1 epochs, lr 0.001, random parts"


def test_a_single_rate_learns_from_all_of_the_training_part(capsys, monkeypatch):
    from xcit.cli import probe_run

    learnt = []
    train = probe_run.train_linear

    def noted(extract, images, val, settings, **options):
        learnt.append((len(images), len(val.labels)))
        return train(extract, images, val, settings, **options)

    monkeypatch.setattr(probe_run, "train_linear", noted)
    for rates in ("0.1", "0.1,1"):
        assert xcit_probe(capsys, "--method", "linear", "--epochs", "1", "--cache", "--lr", rates, data="two")[0] == 0
    assert learnt == [(36, 15), (33, 3)]


def test_random_weights_need_no_download(capsys):
    arguments = ("--random", "--image-size", "16", "--k", "3", "--format", "json")
    status, out, _ = xcit_probe(capsys, *arguments, model="xcit_nano_12_p16", data="two")
    assert status == 0
    record = json.loads(out)
    assert record["model"] == "xcit_nano_12_p16, untrained"
    assert record["features"]["architecture"] == "xcit_nano_12_p16"
    again = json.loads(xcit_probe(capsys, *arguments, model="xcit_nano_12_p16", data="two")[1])
    assert again == record
    other = json.loads(xcit_probe(capsys, *arguments, "--seed", "1", model="xcit_nano_12_p16", data="two")[1])
    assert other["features"]["fingerprint"] != record["features"]["fingerprint"]
    status, out, _ = xcit_probe(capsys, "--random", "--k", "3", data="two")
    assert status == 0
    assert "m.safetensors, untrained" in out


def test_ctrl_c_keeps_what_was_done(capsys, monkeypatch, tmp_path):
    from xcit.evaluate import linear_probe

    file = tmp_path / "linear.safetensors"
    arguments = ("--method", "all", "--k", "3", "--epochs", "4", "--cache", "--lr", "0.5", "--save", str(file))
    _, whole, _ = xcit_probe(capsys, *arguments)
    weights = load_file(file)
    file.unlink()
    step = linear_probe._Heads.set_epoch

    def stopping(self, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        step(self, epoch)

    monkeypatch.setattr(linear_probe._Heads, "set_epoch", stopping)
    status, out, err = xcit_probe(capsys, *arguments)
    assert status == 130
    assert f"xcit: interrupted; what linear learnt is kept in {file}.state; the same command goes on there" in err
    assert "k-NN" in out
    assert "logistic" in out
    assert "linear " not in out
    assert not file.exists()
    monkeypatch.setattr(linear_probe._Heads, "set_epoch", step)
    status, out, _ = xcit_probe(capsys, *arguments)
    assert (status, out) == (0, whole)
    again = load_file(file)
    assert all(torch.equal(again[key], weights[key]) for key in weights | again)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "10,x"], "--k is '10,x'; it must be numbers with commas between them."),
        (["--k", "0", "--temperature", "0"], "--k is 0; it must be 1 or more; --temperature is 0.0"),
        (["--k", "61"], "--k is 61, more than the 60 images of the training part"),
        (["--k", "60"], "k is 60, more than the 59 images that can be neighbours"),
        (["--method", "linear", "--k", "5"], "--k is for --method knn"),
        (["--cache", "--lr", "1"], "--lr, --cache only matter to --method linear"),
        (["--method", "linear", "--temperature", "1"], "--temperature only matters to --method knn"),
        (["--method", "linear", "--cache", "--hflip", "0"], "--hflip mirrors random parts, of which --cache has none"),
        (["--save", "a.safetensors"], "--save keeps a linear head"),
        (["--method", "linear", "--save", "a.safetensors", "--pool", "gem"], "no classifier pools by gem"),
        (["--method", "linear", "--save", "a.pth"], "--save is a.pth; its name must end in .safetensors"),
        (["--method", "linear", "--lr", "0"], "learning rates are (0.0,)"),
        (["--baselines", "pixel"], "Unknown baseline 'pixel'. Did you mean 'pixels'?"),
        (["--random", "--baselines", "untrained"], "the model itself is untrained"),
        (["--crop-pct", "2"], "--crop-pct is 2.0"),
        (["--image-size", "4"], "at least one patch of 8 x 8"),
        (["--batch-size", "0", "--num-workers", "-1"], "--batch-size is 0; it must be 1 or more; --num-workers is -1"),
        (["--output", "data"], "--output is data; its name must end in .json"),
        (["--layout", "fodler"], "Unknown format of data 'fodler'. Did you mean 'folder'"),
        (["--data", "dat"], "dat: is not there; did you mean 'data'?"),
        (["--data", ""], "--data is missing"),
        (["--model", "xcit_nano_12_p61"], "Did you mean 'xcit_nano_12_p16'"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, message):
    status, out, err = xcit_probe(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_without_scikit_learn(capsys, monkeypatch):
    monkeypatch.setattr(probe_module, "find_spec", lambda name: None)
    status, _, err = xcit_probe(capsys, "--method", "logistic")
    assert status == 2
    assert 'pip install "xcit[train]"' in err
