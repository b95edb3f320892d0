"""Who may write into a folder, and writing that leaves either the old or the new."""

import os

import pytest

from xcit.errors import ConfigError, ExportError
from xcit.recipes.run_folder import epochs_done, new_run, open_run


def unfinished(root):
    root.mkdir()
    (root / "config.yaml").write_text("seed: 0\n")
    (root / "metrics.csv").write_text("epoch\n1\n2\n")
    (root / "last.ckpt").write_bytes(b"state")
    (root / "notes.txt").write_text("mine")
    return root


def test_a_new_folder_and_an_empty_one(tmp_path):
    assert new_run(tmp_path / "a" / "b").root.is_dir()
    assert new_run(tmp_path / "a" / "b").resume is False


def test_an_unfinished_run_is_not_touched(tmp_path):
    root = unfinished(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"holds an unfinished run; go on with it by --resume .*, replace it by --over"
    ):
        new_run(root)
    assert (root / "last.ckpt").read_bytes() == b"state"


def test_a_complete_run_is_not_touched(tmp_path):
    root = unfinished(tmp_path / "run")
    (root / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run; replace it by --overwrite, or name another folder"):
        new_run(root)
    with pytest.raises(ConfigError, match="is complete; its report is"):
        open_run(root)


def test_other_peoples_files_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="holds files, but no run"):
        new_run(tmp_path, overwrite=True)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    root = unfinished(tmp_path / "run")
    (root / ".last.ckpt.12345678.partial").touch()
    run = new_run(root, overwrite=True)
    assert (root / "last.ckpt").exists()  # not before the new run begins
    run.clear()
    assert [p.name for p in root.iterdir()] == ["notes.txt"]


def test_going_on_keeps_all_but_unfinished_files(tmp_path):
    root = unfinished(tmp_path / "run")
    (root / ".last.ckpt.12345678.partial").touch()
    run = open_run(root)
    run.clear()
    assert sorted(p.name for p in root.iterdir()) == ["config.yaml", "last.ckpt", "metrics.csv", "notes.txt"]
    assert run.resume
    assert epochs_done(run) == 2


def test_nothing_to_go_on_with(tmp_path):
    with pytest.raises(ConfigError, match="holds no run to go on with"):
        open_run(tmp_path / "nowhere")


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        new_run(tmp_path / "file")
    with pytest.raises(ExportError, match=r"cannot be used: Not a directory\. Name a folder that you may write to"):
        new_run(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ExportError, match="Permission denied"):
            new_run(tmp_path / "run")
        with pytest.raises(ExportError, match="is not writable"):
            new_run(tmp_path)
    finally:
        tmp_path.chmod(0o700)
