"""The command as a whole: what it answers, what it costs to answer, and how it ends."""

import logging
import subprocess
import sys

import pytest

from xcit import __version__
from xcit.cli import main as cli
from xcit.cli.main import VERBS, main
from xcit.errors import DataError

XCIT = [sys.executable, "-m", "xcit.cli.main"]
HEAVY = ("torch", "torchvision", "timm", "lightning", "numpy", "PIL", "matplotlib")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_verb_with_its_first_line(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    verbs = "predict,detect,segment,train,eval,probe,embed,index,search,duplicates,retrieval,attend,giant,"
    verbs += "export,bench,data,quickstart,models,info,doctor"
    assert f"usage: xcit [-h] {{{verbs}}}" in text
    assert "predict     Name the likeliest classes of images." in text
    assert "Exit status" not in text  # that is what `xcit predict --help` is for


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys, verb):
    assert main([verb, "--help"]) == 0
    assert f"usage: xcit {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), ["nonsense"]])
def test_answers_come_without_heavy_imports(arguments):
    code = (
        f"import sys; from xcit.cli.main import main; main({arguments!r});"
        f"print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    )
    assert run(code).endswith("heavy: []\n")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(capsys, flag):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"xcit {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predikt"], "Available subcommands: predict, detect, segment, train"),
        (["predict", "a.png"], "--model"),
        (["predict", "a.png", "--model", "x", "--batchsize", "3"], "--batch-size"),
        (["predict", "a.png", "--model", "x", "--top-k", "many"], "many"),
        (["predict", "a.png", "--model", "x", "--format", "xml"], "invalid choice 'xml'"),
        (["models", "a", "b"], "Unrecognized"),
    ],
)
def test_arguments_that_are_refused(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def raising(monkeypatch, error):
    def models(pattern: str = "*") -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(cli, "_function", lambda verb: models)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("The folder is empty."), 2, "xcit: The folder is empty.\n"),
        (KeyboardInterrupt(), 130, "xcit: interrupted.\n"),
    ],
)
def test_how_it_ends(monkeypatch, capsys, error, status, message):
    raising(monkeypatch, error)
    assert main(["models"]) == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(monkeypatch):
    raising(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["models"])


def test_log_lines_go_to_stderr_while_a_verb_runs(monkeypatch, capsys):
    def models() -> None:
        """Log."""
        logging.getLogger("xcit").info("chose %s.", "this")

    monkeypatch.setattr(cli, "_function", lambda verb: models)
    before = list(logging.getLogger("xcit").handlers)
    assert main(["models"]) == 0
    assert capsys.readouterr().err == "xcit: chose this.\n"
    assert logging.getLogger("xcit").handlers == before


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen([*XCIT, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_exit_statuses_reach_the_shell():
    assert subprocess.run([*XCIT, "models", "nano"], capture_output=True, check=False).returncode == 0
    failed = subprocess.run([*XCIT, "models", "no-such"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == "xcit: Unknown model 'no-such'. `xcit models` without a pattern lists them all.\n"
