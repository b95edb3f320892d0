"""What a run says about its code, its command and its machine."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xcit.recipes import provenance
from xcit.recipes.config import TrainConfig
from xcit.recipes.provenance import code_commit, environment, note_session
from xcit.recipes.run_folder import RunFolder

CPU = torch.device("cpu")
CONFIG = TrainConfig(recipe="mine", seed=7)


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source tree under version control that passes for the package's."""
    package = tmp_path / "src" / "xcit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    return package


def test_versions_and_machine():
    found = environment(CPU)
    for package in ("xcit", "torch", "torchvision", "lightning", "timm", "numpy"):
        assert found[package] == version(package)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["device"].startswith("cpu")
    assert "CPU cores" in found["system"]
    assert all(isinstance(value, str) for value in found.values())


def test_the_commit_and_whether_files_differ_from_it(source):
    head = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert code_commit() == head.stdout[:12]
    (source.parents[1] / "notes.txt").write_text("not the package's")
    assert code_commit() == head.stdout[:12]
    (source / "__init__.py").write_text("changed = True\n")
    assert code_commit() == f"{head.stdout[:12]}+"
    git(source, "checkout", "--", ".")
    (source / "new.py").write_text("")
    assert code_commit() == f"{head.stdout[:12]}+"


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_commit() == ""
    assert "commit" not in environment(CPU)


def test_without_git_there_is_no_commit(source, monkeypatch):
    monkeypatch.setenv("PATH", str(source))
    assert code_commit() == ""


def test_each_start_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/xcit", "train", "finetune", "--data", "my photos"])
    note_session(RunFolder(tmp_path), CONFIG, CPU)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/xcit", "train", "--resume", "runs/finetune"])
    note_session(RunFolder(tmp_path, resume=True), CONFIG, CPU)
    first, second = json.loads((tmp_path / "provenance.json").read_text())["sessions"]
    assert first["command"] == "xcit train finetune --data 'my photos'"
    assert second["command"] == "xcit train --resume runs/finetune"
    assert (first["recipe"], first["seed"], first["processes"]) == ("mine", 7, 1)
    assert first["environment"] == second["environment"] == environment(CPU)
    assert first["started"] <= second["started"]
    assert first["started"].endswith("+00:00")


def test_a_new_run_forgets_the_former_ones(tmp_path):
    for _ in range(2):
        note_session(RunFolder(tmp_path), CONFIG, CPU)
    assert len(json.loads((tmp_path / "provenance.json").read_text())["sessions"]) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"other": 1}', b'{"sessions": 3}'])
def test_a_damaged_file_does_not_stop_a_run(tmp_path, content):
    Path(tmp_path / "provenance.json").write_bytes(content)
    note_session(RunFolder(tmp_path, resume=True), CONFIG, CPU)
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert len(found["sessions"]) == 1
    assert "could not be read" in found["note"]
