import subprocess
import sys

import pytest


def bench(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "xcit.bench", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_help_names_every_verb(tmp_path):
    shown = bench("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for verb in ("xca", "backbone", "pyramid", "memory", "calibrate", "tables"):
        assert verb in shown.stdout


def test_a_users_mistake_is_one_sentence_and_exit_2(tmp_path):
    shown = bench("tables", cwd=tmp_path)
    assert shown.returncode == 2
    assert "root of the xcit repository" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_tables_check_fails_on_a_stale_document_and_writes_nothing(tmp_path):
    (tmp_path / "docs").mkdir()
    stale = "<!-- bench:xca -->\nold\n<!-- /bench -->\n"
    (tmp_path / "README.md").write_text(stale)
    shown = bench("tables", "--check", cwd=tmp_path)
    assert shown.returncode == 1
    assert "README.md: not up to date" in shown.stdout
    assert (tmp_path / "README.md").read_text() == stale
    assert bench("tables", cwd=tmp_path).returncode == 0
    assert bench("tables", "--check", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("verb", ["memory"])
def test_a_quick_look_prints_and_keeps_no_record(tmp_path, verb):
    shown = bench(verb, "--quick", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "XCA 128/4, 1 × 2304 tokens" in shown.stdout
    assert "timm peak" in shown.stdout
    assert list(tmp_path.iterdir()) == []
