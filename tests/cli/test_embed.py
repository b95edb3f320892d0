"""`xcit embed` and `xcit index` on real files, and real processes that are really killed."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.cli.main import main
from xcit.inference import embedding, feature_file
from xcit.inference.feature_file import read_features
from xcit.inference.features import FeatureExtractor
from xcit.inference.index import read_index
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NUM = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and photos."""
    folder = tmp_path_factory.mktemp("embed")
    cfg = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    for seed, name in enumerate(("m", "n")):
        torch.manual_seed(seed)
        model = XCiT(embed_dim=16, depth=1, num_heads=2, patch_size=8, num_classes=0)
        save_checkpoint(model, folder / f"{name}.safetensors", preprocessing=cfg)
    (folder / "photos").mkdir()
    for i in range(NUM):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def run(capsys, *arguments):
    status = main([*map(str, arguments), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected(**options):
    return FeatureExtractor("m.safetensors", device="cpu", **options)("photos")


def test_features_of_a_folder(capsys, tmp_path):
    out = tmp_path / "f.parquet"
    status, shown, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors", "--pool", "both")
    assert (status, err) == (0, "")
    assert shown == f"{out}: 40 images, 32 numbers each (m.safetensors, pool both).\n"
    np.testing.assert_allclose(read_features(out).features, expected(pool="both"), atol=1e-6)
    status, _, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors", "--pool", "both")
    assert (status, err) == (0, "xcit: 40 of 40 images were done before.\n")


def test_options_reach_the_extractor(capsys, tmp_path):
    out = tmp_path / "f.npy"
    options = ["--pool", "gem", "--gem-p", "2", "--scales", "1,0.5", "--image-size", "32", "--batch-size", "7"]
    assert run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors", *options)[0] == 0
    want = expected(pool="gem", gem_p=2, scales=(1, 0.5), image_size=32)
    np.testing.assert_allclose(np.load(out), want, rtol=1e-4, atol=1e-6)


def test_broken_images_cost_a_line_each(capsys, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    out = tmp_path / "f.parquet"
    status, _, err = run(capsys, "embed", "photos/00.png", bad, "-o", out, "--model", "m.safetensors")
    assert status == 1
    first, last = err.splitlines()
    assert first.startswith(f"xcit: {bad}: is not an image")
    assert last == f"xcit: 1 of 2 images cannot be read and is left out. {out}.errors.csv lists them."
    with (tmp_path / "f.parquet.errors.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(bad)]
    status, _, err = run(capsys, "embed", bad, "-o", tmp_path / "g.parquet", "--model", "m.safetensors")
    assert status == 2
    assert err == f"{first}\n"


def test_images_that_are_not_there_are_told_before_a_model_is_loaded(capsys, tmp_path):
    for verb, names, sentence in (
        ("embed", ["photos/00.pngg"], "photos/00.pngg: there is no such file; did you mean 'photos/00.png'?"),
        ("embed", ["a.png", "b.png"], "None of the 2 images can be read. The first: a.png: there is no such file."),
        ("index", ["nosuch"], "nosuch: there is no such file."),
    ):
        status, out, err = run(capsys, verb, *names, "-o", tmp_path / "f.parquet", "--model", "gone.safetensors")
        assert (status, out, err) == (2, "", f"xcit: {sentence}\n")
    status, _, err = run(
        capsys, "embed", "a.png", "photos/00.png", "-o", tmp_path / "f.npy", "--model", "m.safetensors"
    )
    assert status == 1  # of some, the others are read
    assert "a.png: there is no such file" in err


def test_one_is_not_spoken_of_as_many(capsys, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("00.png", "01.png"):
        shutil.copy(f"photos/{name}", folder)
    arguments = ["embed", folder, "-o", tmp_path / "f.parquet", "--model", "m.safetensors"]
    run(capsys, *arguments)
    (folder / "01.png").unlink()
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert err.splitlines() == [
        "xcit: 1 of 1 image was done before.",
        "xcit: 1 image whose file is gone was taken out.",
    ]
    assert ": 1 image, 16 numbers each" in out
    shutil.copy("photos/02.png", folder)
    status, _, err = run(capsys, *arguments[:1], folder / "02.png", *arguments[2:])
    assert status == 2
    assert f"holds an image that is not named now ({folder}/00.png); name it too, or another file, or drop it" in err


def test_a_full_disk(capsys, tmp_path, monkeypatch):
    """What is told as kept is what was written; what is needed is told in a unit that shows it."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "f.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(feature_file, "replacing", _replacing_on(full))
        status, shown, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors")
    assert (status, shown) == (2, "")
    assert "kept" not in err
    assert "No space left on device; 2.5 KiB are needed; make room" in err
    monkeypatch.setattr(embedding, "PART_ROWS", 16)
    with monkeypatch.context() as patched:
        patched.setattr(feature_file, "replacing", _replacing_on(full, after=2))
        status, _, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors")
    assert status == 2
    assert "xcit: 32 of 40 images are done and kept.\n" in err
    status, _, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors")
    assert (status, err) == (0, "xcit: 32 of 40 images were done before.\n")


def _replacing_on(full, after=0):
    """Return the real ``replacing`` on a disk that is full after some files."""
    real, written = feature_file.replacing, []

    @contextmanager
    def replacing(path, **options):
        with real(path, **options) as partial:
            yield partial
            written.append(path)
            if len(written) > after:
                full(0)

    return replacing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "n.safetensors"],
            r"was made with m.safetensors \(pool token, fingerprint \w{12}\), not with n.safe",
        ),
        (["--model", "m.safetensors", "--pool", "avg"], "not with m.safetensors .pool avg"),
        (["--model", "m.safetensors", "--scales", "1,x"], "--scales is '1,x'; it must be numbers"),
        (["--model", "m.safetensors", "--batch-size", "0"], "--batch-size is 0; it must be 1 or more"),
        (["--model", "m.safetensors", "--scales", "0.1"], "smaller than one patch"),
        (["--model", "gone.safetensors"], "There is no file gone.safetensors"),
        (["--model", "photos"], "photos is a folder, and neither the name of a model nor a checkpoint"),
        (["--model", "m.safetensors", "--gem-p", "3"], "--gem-p is for --pool gem, and --pool is token"),
        (["--model", "m.safetensors", "--pool", "both", "--gem-p", "4"], "and --pool is both"),
        (["--model", "m.safetensors", "--pool", "gem", "--gem-p", "0"], "--gem-p is 0.0; it must be more than 0"),
        (["--model", "m.safetensors", "--pool", "gem"], r"not with m.safetensors .*; they differ in pool\. Name"),
    ],
)
def test_refusals_leave_the_output_alone(capsys, tmp_path, arguments, message):
    out = tmp_path / "f.parquet"
    run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors")
    before = out.read_bytes()
    status, shown, err = run(capsys, "embed", "photos", "-o", out, *arguments)
    assert (status, shown) == (2, "")
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1
    assert out.read_bytes() == before


def test_outputs_that_cannot_be(capsys, tmp_path):
    for out, message in (("f.h5", "must end in .parquet or .npy or .csv"), ("photos", "must end in")):
        status, _, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors")
        assert status == 2
        assert message in err
    (tmp_path / "d.parquet").mkdir()
    status, _, err = run(capsys, "embed", "photos", "-o", tmp_path / "d.parquet", "--model", "m.safetensors")
    assert status == 2
    assert "is a folder; name a file in it" in err


# --- killed -----------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
import torch
torch.set_num_threads(1)
from xcit.cli.main import main
from xcit.inference import embedding, features
embedding.PART_ROWS = 4
stream = features.FeatureExtractor.stream
def slow(self, images):
    for each in stream(self, images):
        time.sleep(0.05)
        yield each
features.FeatureExtractor.stream = slow
sys.exit(main(sys.argv[1:]))
"""


def stopped(out, number):
    """Start a run of its own, send it a signal when some parts are there, and return how it ended."""
    arguments = ["embed", "photos", "-o", str(out), "--model", "m.safetensors", "--device", "cpu", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # heard in background jobs too
    )
    parts = out.with_name(f".{out.name}.parts")
    end = time.monotonic() + 120
    while len(list(parts.glob("0*.parquet"))) < 3 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(capsys, tmp_path, number):
    out = tmp_path / "f.parquet"
    status, err = stopped(out, number)
    assert not out.exists()
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130
        assert err.splitlines()[-1].endswith("images are done and kept. Repeat the command to go on.")
    status, _, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors", "--pool", "avg")
    assert status == 2  # another pool would mix them
    assert "unfinished run" in err
    status, _, err = run(capsys, "embed", "photos", "-o", out, "--model", "m.safetensors")
    assert status == 0
    done = int(err.split()[1])
    assert err == f"xcit: {done} of 40 images were done before.\n"
    assert 12 <= done < 40
    found = read_features(out)
    assert list(found.paths) == [f"photos/{i:02d}.png" for i in range(NUM)]
    np.testing.assert_allclose(found.features, expected(), rtol=1e-5, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["f.parquet"]


# --- index ------------------------------------------------------------------------------------------------------------


def test_an_index_of_features_and_one_of_their_folder_are_alike(capsys, tmp_path):
    run(capsys, "embed", "photos", "-o", tmp_path / "f.parquet", "--model", "m.safetensors", "--pool", "avg")
    status, shown, _ = run(capsys, "index", tmp_path / "f.parquet", "-o", tmp_path / "a.index")
    assert status == 0
    assert "40, 16 numbers each" in shown
    status, _, _ = run(
        capsys, "index", "photos", "-o", tmp_path / "b.index", "--model", "m.safetensors", "--pool", "avg"
    )
    assert status == 0
    a, b = read_index(tmp_path / "a.index"), read_index(tmp_path / "b.index")
    assert list(a.paths) == list(b.paths)
    assert a.origin.fingerprint == b.origin.fingerprint
    np.testing.assert_array_equal(a.search(expected(pool="avg"), 1).positions[:, 0], np.arange(NUM))


def test_agreement_is_shown(capsys, tmp_path):
    run(capsys, "embed", "photos", "-o", tmp_path / "f.parquet", "--model", "m.safetensors")
    _, shown, _ = run(capsys, "index", tmp_path / "f.parquet", "-o", tmp_path / "a.index", "--kind", "hnsw")
    stated = read_index(tmp_path / "a.index").recall
    assert f"{100 * stated.value:.1f} % of the 10 nearest neighbours that exact finds, of 40 images" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos"], "--model is missing"),
        (["{f}", "--kind", "ivf"], "needs at least 624 images to train its 16 cells; there are 40"),
        (["{f}", "--pool", "gem"], "--pool, --scales and --image-size are for folders"),
        (["{f}", "--model", "n.safetensors"], "not with n.safetensors"),
        (["gone.parquet"], "gone.parquet: there is no such file"),
    ],
)
def test_indexes_that_cannot_be(capsys, tmp_path, arguments, message):
    run(capsys, "embed", "photos", "-o", tmp_path / "f.parquet", "--model", "m.safetensors")
    words = [word.replace("{f}", str(tmp_path / "f.parquet")) for word in arguments]
    status, _, err = run(capsys, "index", *words, "-o", tmp_path / "a.index")
    assert status == 2
    assert message in err
    assert not (tmp_path / "a.index").exists()


def test_an_index_replaces_an_index_and_nothing_else(capsys, tmp_path):
    features, index = tmp_path / "f.parquet", tmp_path / "a.index"
    run(capsys, "embed", "photos", "-o", features, "--model", "m.safetensors")
    before = features.read_bytes()
    status, _, err = run(capsys, "index", features, "-o", features)
    assert (status, features.read_bytes()) == (2, before)
    assert "is there already and is no index" in err
    for kind in ("exact", "hnsw"):
        assert run(capsys, "index", features, "-o", index, "--kind", kind)[0] == 0
        assert read_index(index).kind == kind


def test_metadata_names_the_model(capsys, tmp_path):
    run(capsys, "embed", "photos", "-o", tmp_path / "f.npy", "--model", "m.safetensors")
    about = json.loads((tmp_path / "f.json").read_text())
    assert about["settings"]["model"] == "m.safetensors"
    assert about["fingerprint"] == FeatureExtractor("m.safetensors", device="cpu").fingerprint
