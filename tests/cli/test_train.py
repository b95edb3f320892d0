"""``xcit train`` as it is typed: what its flags mean, how it refuses, stops, goes on, and what it shows beforehand."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from xcit.cli import train as verb
from xcit.cli.main import main
from xcit.errors import BackendError
from xcit.recipes.config_file import read_config
from xcit.recipes.registry import RECIPES, find_recipe

XCIT = [sys.executable, "-m", "xcit.cli.main", "train"]
SMALL = (
    "model.options.depth=1", "model.options.cls_attn_layers=1", "model.options.embed_dim=32",
    "model.options.num_heads=2", "data.num_workers=0", "augment.degrees=0",
)  # fmt: skip
TINY = ("--model", "xcit_nano_12_p8", "--image-size", "16", "--batch-size", "10", "--device", "cpu")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Thirty images of red and of blue."""
    root = tmp_path_factory.mktemp("colours")
    for label, name in enumerate(("blue", "red")):
        (root / name).mkdir()
        for number in range(30):
            pixels = np.random.default_rng([label, number]).normal(40, 20, (12, 12, 3)) + 120 * np.eye(3)[2 - 2 * label]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def runs_of(monkeypatch):
    """What would be trained, instead of training: settings, folder and arguments of each call."""
    calls = []
    monkeypatch.setattr(verb, "execute", lambda config, run, console, command: calls.append((config, run)) or 0)
    return calls


@pytest.fixture
def refused(capsys):
    """The one sentence with which a command ends."""

    def refused(*arguments):
        capsys.readouterr()
        assert main(["train", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        assert err.startswith("xcit: ")
        assert err.count("\n") == 1
        return err

    return refused


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_recipe_as_it_is(runs_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "finetune", "--data", "photos"]) == 0
    ((config, run),) = runs_of
    recipe = find_recipe("finetune").make()
    assert config == replace(recipe, data=replace(recipe.data, root="photos"))
    assert run.root.as_posix() == "runs/finetune"


def test_every_flag_is_its_setting(runs_of, tmp_path):
    flags = {
        "--data": ("photos", "data.root"), "--model": ("xcit_tiny_12_p8", "model.name"),
        "--pretrained": ("none", "model.pretrained"), "--teacher": ("timm:resnet18", "distill.teacher"),
        "--epochs": (9, "epochs"), "--batch-size": (48, "optim.batch_size"), "--lr": (0.003, "optim.lr"),
        "--image-size": (96, "data.image_size"), "--seed": (5, "seed"), "--device": ("cpu", "compute.device"),
        "--devices": (2, "compute.devices"), "--precision": ("bf16", "compute.precision"),
    }  # fmt: skip
    assert {name.removeprefix("--").replace("-", "_") for name in flags} == set(verb.FLAGS)
    given = [text for name, (value, _) in flags.items() for text in (name, str(value))]
    assert main(["train", "finetune", *given, "--out", str(tmp_path / "run")]) == 0
    ((config, run),) = runs_of
    for value, name in flags.values():
        found = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name
    assert config.distill.kind == "hard"  # the paper's, where the recipe has none
    assert run.root == tmp_path / "run"


def test_a_recipe_that_distils_softly_goes_on_doing_so(runs_of, tmp_path):
    find_recipe("xcit_nano_12_p16_224_dist")
    assert main(["train", "xcit_nano_12_p16_224_dist", "--data", "photos", "--teacher", "timm:resnet18",
                 "--out", str(tmp_path / "a"), "--set", "distill.kind=soft", "distill.tau=3"]) == 0  # fmt: skip
    assert (runs_of[0][0].distill.kind, runs_of[0][0].distill.tau) == ("soft", 3.0)


def test_set_reaches_every_setting(runs_of, tmp_path):
    settings = ["optim.clip_grad=1", "augment.hflip=0", "model.options.depth=2", "augment.rand_augment=",
                "log.tensorboard=true", "data.normalize=data"]  # fmt: skip
    assert main(["train", "finetune", "--data", "photos", "--out", str(tmp_path), "--set", *settings]) == 0
    config = runs_of[0][0]
    assert (config.optim.clip_grad, config.augment.hflip, config.model.options) == (1.0, 0.0, {"depth": 2})
    assert (config.augment.rand_augment, config.log.tensorboard, config.data.normalize) == ("", True, "data")


def test_own_images_for_a_recipe_on_the_digits(runs_of, tmp_path):
    assert main(["train", "digits_quickstart", "--data", "photos", "--out", str(tmp_path)]) == 0
    config = runs_of[0][0]
    assert (config.data.format, config.data.root) == ("auto", "photos")


def test_a_file_of_settings_runs_again(runs_of, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: mine\nseed: 4\ndata: {root: photos}\noptim: {lr: 1e-3}\n")
    assert main(["train", str(file), "--seed", "6", "--out", str(tmp_path / "run")]) == 0
    config = runs_of[0][0]
    assert (config.recipe, config.seed, config.optim.lr) == ("mine", 6, 1e-3)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a recipe, such as finetune for your own images (xcit train --list shows all)"),
        (["finetun", "--data", "d"], "Did you mean 'finetune'"),
        (["finetune"], "data.root is empty; name the images with --data"),
        (["finetune", "--data", "nowhere"], "nowhere"),
        (["nowhere.yaml"], "nowhere.yaml cannot be read: No such file"),
        (["finetune", "--data", "d", "--device", "tpu"], "The device is 'tpu'; it must be auto, cpu, cuda"),
        (["finetune", "--data", "d", "--precision", "8"], "compute.precision is '8'; it must be one of 32, bf16, 16"),
        (["finetune", "--data", "d", "--set", "optim.clip=1"], "optim.clip is unknown (did you mean optim.clip_grad?)"),
        (["finetune", "--data", "d", "--set", "optim.lr"], "--set takes NAME=VALUE; got optim.lr."),
        (["finetune", "--data", "d", "--set", "epochs=[1"], "epochs is '[1'; it must be a whole number"),
        (["finetune", "--data", "d", "--set", "epochs.x=1"], "epochs.x is unknown"),
        (["finetune", "--data", "d", "--seed", "0", "--set", "seed=1"], "seed is given twice, by --seed and --set."),
        (["finetune", "--data", "d", "--set", "seed=0", "seed=1"], "seed is given twice"),
        (["finetune", "--data", "d", "--model", "xcit_nano_12_p17"], "Did you mean 'xcit_nano_12_p16"),
        (["--list", "nothing*"], "No recipe matches nothing*; xcit train --list shows all."),
        (["--resume", "nowhere"], "nowhere holds no run to go on with"),
        (["finetune", "--resume", "nowhere"], "--resume goes on in a run's folder with its settings"),
        (["--resume", "nowhere", "--epochs", "3"], "--resume goes on in a run's folder with its settings"),
        (["--resume", "nowhere", "--overwrite"], "--resume goes on in a run's folder with its settings"),
        (["--resume", "nowhere", "--set", "optim.lr=1"], "--resume goes on in a run's folder with its settings"),
    ],
)
def test_a_mistake_costs_a_sentence(arguments, message, refused, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").symlink_to(colours)
    assert message in refused(*arguments)
    assert not [path for path in files_in(tmp_path) if colours not in path.resolve().parents]


def test_contradictions_are_named_all_at_once_before_anything_happens(refused, tmp_path):
    message = refused("finetune", "--data", "nowhere", "--batch-size", 31, "--devices", 2, "--out", tmp_path / "run",
                      "--set", "data.class_weights=balanced", "distill.tau=2", "optim.min_lr=5")  # fmt: skip
    for part in (
        "2 devices x 1 parts do not divide",
        "data.class_weights needs",
        "distill.tau is 2",
        "optim.min_lr is",
    ):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(refused, colours, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    message = refused("scratch", "--data", colours, "--out", tmp_path)
    assert "holds files, but no run; name another folder with --out" in message
    assert "holds files, but no run" in refused("scratch", "--data", colours, "--out", tmp_path, "--overwrite")
    (tmp_path / "config.yaml").write_text("recipe: scratch\n")
    assert "holds an unfinished run; go on with it by --resume" in refused(
        "scratch", "--data", colours, "--out", tmp_path
    )
    assert [path.name for path in sorted(files_in(tmp_path))] == ["config.yaml", "thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "xcit_nano_12_p8_224_dist"], "means weights; name the architecture xcit_nano_12_p8, and the"),
        (["--pretrained", "xcit_nano_12_p16_224"], "xcit_nano_12_p16_224 is of xcit_nano_12_p16, not of"),
        (["--pretrained", "text"], "text"),
        (["--teacher", "text"], "text"),
        (["--teacher", "timm:resnet188"], "Unknown model of timm 'resnet188'"),
        (["--set", "model.surgery=text"], "text"),
    ],
)
def test_weights_that_cannot_be_had(arguments, message, refused, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no weights")
    flags, settings = ([], arguments[1:]) if arguments[0] == "--set" else (arguments, [])
    tiny = TINY[2:] if "--model" in flags else TINY
    found = refused("scratch", "--data", colours, *tiny, *flags, "--epochs", 2, "--out", "run",
                    "--set", "optim.warmup_epochs=0", *SMALL, *settings)  # fmt: skip
    assert message in found
    assert files_in(tmp_path) == [tmp_path / "text"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(verb, "find_spec", lambda name: None if name in ("lightning", "sklearn") else object())
    with pytest.raises(
        BackendError, match=r'needs lightning and scikit-learn, which are not .*pip install "xcit\[train\]"'
    ):
        verb.train("finetune")


# --- shown beforehand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--list"]])
def test_answers_load_nothing_heavy(arguments):
    code = (
        f"import sys; from xcit.cli.main import main; main(['train', *{arguments}]);"
        "print(*({'torch', 'lightning', 'numpy', 'matplotlib', 'timm'} & set(sys.modules)), file=sys.stderr)"
    )
    best = 60.0
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.monotonic() - began)
    assert done.stderr.strip() == ""
    assert best < 3  # a second on a quiet machine; importing torch alone takes longer than this on a busy one
    if arguments == ["--help"]:
        flags = ("--data", "--model", "--pretrained", "--teacher", "--set", "--resume", "--dry-run", "--list")
        assert [flag for flag in flags if flag not in done.stdout] == []
    else:
        assert [name for name in RECIPES if name not in done.stdout] == []


def test_the_list_may_be_narrowed(capsys):
    assert main(["train", "transfer_*", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("transfer_") and line.endswith("]") for line in lines)


def test_a_dry_run_shows_everything_and_writes_nothing(colours, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "scratch", "--data", str(colours), *TINY, "--epochs", "3", "--dry-run", "--set", *SMALL,
                 "optim.warmup_epochs=1", "optim.accumulate=5", "optim.ema_decay=0.9"]  # fmt: skip
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line.split("  ")[1].strip(): line for line in out.splitlines() if line.startswith("  ")}
    for name, text in {
        "recipe": "scratch",
        "data": "54 images to train on, 6 to choose by, none held out",
        "classes": "2; 27 to 27 training images each",
        "model": "xcit_nano_12_p8, random weights",
        "parameters": " M",
        "multiply-adds": "G an image of 16 x 16 px, forward",
        "steps": "3 epochs x 5 = 15",
        "batch": "10 images a step: 2 at once, 5 times",
        "learning rate": "peak 0.002; from 1e-06 in 5 steps; ends at 2e-05",
        "teacher": "none",
        "memory": "for weights, gradients and optimiser",
    }.items():
        assert text in rows[name], name
    assert "█" in out
    assert "Nothing was trained or written." in out
    assert files_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# --- a run -----------------------------------------------------------------------------------------------------------


def command(colours, root, *arguments, epochs=3):
    return ["scratch", "--data", str(colours), *TINY, "--epochs", str(epochs), "--out", str(root), *arguments,
            "--set", *SMALL, "optim.warmup_epochs=0"]  # fmt: skip


def weights(path):
    return safetensors.torch.load_file(path)


def assert_same_weights(ours, theirs):
    for name in ("model.safetensors", "model_last.safetensors"):
        mine, other = weights(ours / name), weights(theirs / name)
        assert mine.keys() == other.keys()
        assert [key for key in mine if not torch.equal(mine[key], other[key])] == []


def test_trained_then_refused_to_go_on_then_replaced(colours, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.setattr("xcit.recipes.classification_job.write_report", lambda *_: None)
    root = tmp_path / "a run"
    assert main(["train", *command(colours, root)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "of the validation images are classified right" in out
    assert "data with a test/ part gives a fair figure" in out
    assert f"--model '{root}/model.safetensors'" in out
    assert "is complete; its report is" in refused("--resume", root)
    assert "holds a run; replace it by --overwrite" in refused(*command(colours, root))
    before = weights(root / "model_last.safetensors")["head.weight"]
    assert main(["train", *command(colours, root, "--seed", "1", "--overwrite")]) == 0
    assert not torch.equal(weights(root / "model_last.safetensors")["head.weight"], before)
    assert read_config(root / "config.yaml").seed == 1

    # and its settings run again, to the same weights
    again = tmp_path / "again"
    assert main(["train", str(root / "config.yaml"), "--out", str(again)]) == 0
    assert_same_weights(again, root)


def test_a_file_of_other_weights_is_refused(colours, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("xcit.recipes.classification_job.write_report", lambda *_: None)
    root = tmp_path / "run"
    assert main(["train", *command(colours, root, epochs=1)]) == 0
    wide = [setting.replace("embed_dim=32", "embed_dim=48") for setting in SMALL]
    message = refused("scratch", "--data", colours, *TINY, "--pretrained", root / "model.safetensors", "--epochs", 1,
                      "--out", tmp_path / "other", "--set", *wide, "optim.warmup_epochs=0")  # fmt: skip
    assert "model.safetensors" in message
    assert files_in(tmp_path / "other") == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_as_it_is_typed_and_gone_on_with(colours, tmp_path, capsys, monkeypatch, number):
    """A real process, a real signal; going on ends with the weights of a run that nobody stopped."""
    monkeypatch.setattr("xcit.recipes.classification_job.write_report", lambda *_: None)
    threads = torch.get_num_threads()
    root, whole = tmp_path / "a run", tmp_path / "whole"
    process = subprocess.Popen(
        [*XCIT, *command(colours, root, epochs=15)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell starts background jobs deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        deadline = time.monotonic() + 300
        while not (root / "metrics.csv").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number, out + err
    assert f"Stopped by {number.name}; the state is saved. Go on with:\n  xcit train --resume '{root}'" in err
    assert "Traceback" not in out + err
    done = len((root / "metrics.csv").read_text().splitlines()) - 1
    assert 1 <= done < 15

    torch.set_num_threads(1)
    try:
        assert main(["train", "--resume", str(root)]) == 0
        assert f"after {done} of 15 epochs" in capsys.readouterr().out
        assert main(["train", *command(colours, whole, epochs=15)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert_same_weights(root, whole)


# --- several processes ------------------------------------------------------------------------------------------------


def test_the_other_processes_get_the_arguments_that_this_call_got(colours, tmp_path, monkeypatch):
    """Not those of the program that calls ``main``; and they mean the same settings."""
    asked = []
    monkeypatch.setattr(
        "xcit.recipes.launch.launch", lambda arguments, processes: asked.append((arguments, processes)) or 0
    )
    monkeypatch.setattr(sys, "argv", ["notebook", "--of", "somebody"])
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "a run"
    single = [*SMALL, "augment.mixup=0", "augment.cutmix=0"]
    given = ["finetune", "--data", str(colours), *TINY, "--lr", "1e-05", "--devices", "2", "--out", str(out)]
    assert main(["train", *given, "--set", *single]) == 0
    ((arguments, processes),) = asked
    assert (arguments[:3], processes) == (["-m", "xcit.cli.main", "train"], 2)
    assert main([*arguments[2:], "--overwrite"]) == 0
    assert asked[1][0] != arguments  # --overwrite is handed on
    assert "--overwrite" in asked[1][0]
    calls = []
    monkeypatch.setattr(verb, "execute", lambda config, run, console, command: calls.append((config, run.root)) or 0)
    for words in (given, asked[1][0][3:]):
        words = [word for word in words if word != "--overwrite"]
        assert main(["train", *words, *([] if "--set" in words else ["--set", *single]), "--overwrite"]) == 0
    assert calls[0] == calls[1]
    assert calls[0][0].optim.lr == 1e-05


def test_a_run_that_is_gone_on_with_in_several_processes(tmp_path):
    assert verb._command(None, {"device": "cpu", "batch_size": 8}, ["log.csv=true"], None, False, tmp_path) == [
        "train", "--device", "cpu", "--batch-size", "8", "--resume", str(tmp_path), "--set", "log.csv=true"
    ]  # fmt: skip
