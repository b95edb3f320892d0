"""Rules about the files themselves."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.:/~$}>-])/(?:home|root|Users|work|mnt|workspace|scratch)" + r"/\w")


def project_files():
    """Yield the files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_path_of_a_machine_is_written_down():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("user", ["home", "root", "Users"])
def test_the_path_check_catches(user):
    assert MACHINE_PATH.search(f'open("/{user}' + '/name/file")')
    assert not MACHINE_PATH.search(f"https://host.org/{user}" + "/name")


def test_no_source_file_holds_two_ideas():
    assert {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(text_of(p).splitlines())) > 600} == {}


def test_no_file_is_named_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [str(p.relative_to(ROOT)) for p in SOURCES if vague & set(p.with_suffix("").parts)] == []


def test_source_files_say_what_they_are_for():
    silent = [str(p.relative_to(ROOT)) for p in SOURCES if not text_of(p).lstrip().startswith('"""')]
    assert silent == []


def test_weights_are_never_unpickled():
    """torch.load stands in one room, with weights_only=True; pickle's own loader nowhere."""
    for path in SOURCES:
        text = text_of(path)
        assert not re.search(r"weights_only\s*=\s*False|pickle\.loads?\(|joblib\.load|allow_pickle\s*=\s*True", text), (
            path
        )
        for call in re.finditer(r"\btorch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], path


def test_tests_mirror_the_source():
    rooms = {p.name for p in (ROOT / "src" / "xcit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    extra = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name != "__pycache__"} - rooms
    assert extra <= {"house", "parity", "assets"}


def test_test_files_have_names_of_their_own():
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
