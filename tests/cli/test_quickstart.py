"""``xcit quickstart`` as it is typed: refusals, Ctrl-C, a kill, and the whole run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch

from xcit.cli import quickstart as verb
from xcit.cli import train as training_verb
from xcit.cli.main import main
from xcit.errors import BackendError
from xcit.recipes.digits import digits_quickstart

XCIT = [sys.executable, "-m", "xcit.cli.main", "quickstart"]


def epochs(root):
    try:
        with (root / "metrics.csv").open() as file:
            return [int(row["epoch"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


@pytest.fixture
def start():
    """Starts ``xcit quickstart``; what still runs at the test's end is killed."""
    with ExitStack() as stack:

        def start(*arguments):
            process = subprocess.Popen(
                [*XCIT, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # One thread: two wait for each other wherever other programs run on the same cores.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # A shell starts background jobs deaf to Ctrl-C, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def wait_for_epoch(process, root, number):
    deadline = time.monotonic() + 300
    while len(epochs(root)) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no epoch came to its end"
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_stopped_killed_and_gone_on_with(start, tmp_path, capsys):
    """Ctrl-C after an epoch, then a kill in a later one; the third start ends the run."""
    root = tmp_path / "a run"
    process = start("--out", root, "--epochs", 4, "--device", "cpu")
    wait_for_epoch(process, root, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    done = len(epochs(root))
    assert "Stopped by SIGINT; the state is saved." in err
    assert f"xcit train --resume '{root}'" in err
    assert "Traceback" not in out + err

    process = start("--resume", root, "--device", "cpu")
    wait_for_epoch(process, root, done + 1)
    process.kill()
    process.communicate(timeout=300)
    assert torch.load(root / "last.ckpt", weights_only=True)["epoch"] >= done
    kept = len(epochs(root))

    assert main(["quickstart", "--resume", str(root), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert epochs(root) == [1, 2, 3, 4]
    assert err == ""
    assert f"after {kept} of 4 epochs" in out
    assert str(root / "report.html") in out
    assert f"xcit predict '{root}/samples' --model '{root}/model.safetensors'" in out
    assert not list(root.glob(".*"))


def test_a_run_is_not_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("recipe: digits_quickstart\n")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "holds an unfinished run; go on with it by --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs is 0; it must be 1 or more"),
        (["--seed", "-1"], "seed is -1; it must be from 0"),
        (["--device", "tpu"], "The device is 'tpu'; it must be auto, cpu, cuda"),
        (["--resume", "nowhere"], "nowhere holds no run to go on with"),
        (["--resume", "nowhere", "--epochs", "3"], "leave out --out, --epochs, --seed and --overwrite"),
        (["--resume", "nowhere", "--overwrite"], "leave out --out, --epochs, --seed and --overwrite"),
    ],
)
def test_mistakes_cost_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(training_verb, "find_spec", lambda name: None if name in ("lightning", "sklearn") else object())
    with pytest.raises(
        BackendError, match=r'needs lightning and scikit-learn, which are not .*pip install "xcit\[train\]"'
    ):
        verb.quickstart()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from xcit.cli.main import main; main(['quickstart', '--help']);"
        "print(*({'torch', 'lightning', 'sklearn', 'matplotlib', 'timm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert "--resume" in done.stdout
    assert f"training images. (default: {digits_quickstart().epochs})" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_quickstart(start, tmp_path, monkeypatch):
    """The first main job: at least 98.5 % of the held-out digits, and everything that it promises to write."""
    monkeypatch.chdir(tmp_path)
    process = start()
    out, err = process.communicate(timeout=1100)
    assert process.returncode == 0, out + err
    root = tmp_path / "runs" / "quickstart"
    figures = json.loads((root / "metrics.json").read_text())
    assert figures["test"]["accuracy"] >= 0.985, figures["test"]
    assert figures["test"]["num_images"] == 360
    for name in (
        "model.safetensors", "last.ckpt", "config.yaml", "metrics.csv", "metrics.jsonl", "provenance.json",
        "curves.png", "confusion_matrix.png",
        "attention.png", "attention_heads.png", "report.html", *(f"samples/digit_{i}.png" for i in range(10)),
    ):  # fmt: skip
        assert (root / name).stat().st_size > 100, name
    assert "xcit predict runs/quickstart/samples --model runs/quickstart/model.safetensors" in out

    predict = [*XCIT[:-1], "predict", "runs/quickstart/samples", "--model", "runs/quickstart/model.safetensors"]
    done = subprocess.run([*predict, "--format", "json"], capture_output=True, text=True, check=True)
    for prediction in json.loads(done.stdout):
        assert prediction["file"].endswith(f"digit_{prediction['predictions'][0]['name']}.png")
