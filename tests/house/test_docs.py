"""Documents say what is so: their code runs, their commands exist, their references lead somewhere, their tables are
those that the measurements give."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from xcit.bench import tables

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STATUSES = ("reproduced", "partial", "not run", "not built yet (planned)")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands():
    """Every command line in a shell block of a document, without its comment."""
    for path in DOCUMENTS:
        for block in blocks(path.read_text(encoding="utf-8"), "sh"):
            for line in block.splitlines():
                command = re.sub(r"\s+#.*", "", line).strip()
                if command:
                    yield pytest.param(command, id=f"{path.name}: {command}")


# --- README ----------------------------------------------------------------------------------------------------------


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.full((40, 60, 3), 128, dtype=np.uint8)).save(photos / "grey.png")
    monkeypatch.chdir(tmp_path)
    code = blocks(README, "python")
    assert len(code) == 1
    names = {}
    exec(compile(code[0], "README.md", "exec"), names)
    # what the comments promise
    assert names["logits"].shape == (4, 2)
    assert [tuple(m.shape) for m in names["maps"]] == [(4, 128, 14, 20)] * 3
    assert names["looks"].shape == (4, 4, 14, 20)
    shown = capsys.readouterr().out
    assert "grey.png" in shown
    assert "cat" in shown or "dog" in shown
    assert len([line for line in code[0].splitlines() if line and not line.startswith(("import", "from"))]) <= 10


def test_the_readme_shows_a_picture_that_is_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        with Image.open(ROOT / picture) as image:
            image.verify()


@pytest.mark.parametrize("command", list(commands()))
def test_commands_exist(command):
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif words[0] == "xcit":
        verb = words[1:3] if words[1] == "data" else words[1:2]
        assert_help([Path(sys.executable).with_name("xcit"), *verb], command)
    elif words[:3] == ["python", "-m", "xcit.bench"]:
        assert_help([sys.executable, "-m", "xcit.bench", words[3]], command)
    else:
        assert words[:2] == ["pip", "install"]
        extras = re.findall(r"\[(\w+)\]", command)
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8") for extra in extras)


def assert_help(verb, command):
    """The verb exists, and so does every flag of the command."""
    shown = subprocess.run([*verb, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for flag in re.findall(r"--[\w-]+", command):
        assert re.search(rf"{flag}\b", shown.stdout), f"{flag} is not in the help of: {command}"


# --- all documents ---------------------------------------------------------------------------------------------------


def test_tables_are_those_that_the_rows_give():
    stale = [str(path) for path in tables.rewrite(ROOT, write=False)]
    assert stale == [], "run `make tables`"


def test_every_measured_table_is_shown_somewhere():
    shown = set(re.findall(r"<!-- bench:([\w-]+) -->", "".join(p.read_text(encoding="utf-8") for p in DOCUMENTS)))
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


# --- the map of the paper --------------------------------------------------------------------------------------------


def map_rows():
    """The rows of paper-map.md that have a status, as dictionaries."""
    rows = []
    head = []
    for line in (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif not set(line) <= set("|-: "):
            assert len(cells) == len(head), line
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def missing_reference(reference):
    """Return why a `file` or `file::test` does not lead anywhere, or None."""
    file, _, name = reference.partition("::")
    path = ROOT / file
    if not path.is_file():
        return f"{file} is not there"
    if name and not re.search(rf"^(def|class) {name}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
        return f"{file} has no {name}"
    return None


def test_the_map_leads_to_files_and_tests():
    text = (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8")
    references = re.findall(r"`((?:src|tests|docs|benchmarks)/[^`]+)`", text)
    assert len(references) > 40
    assert [why for r in references if (why := missing_reference(r))] == []


def test_a_reference_to_nothing_is_noticed():
    assert missing_reference("src/xcit/ops/nothing.py")
    assert missing_reference("tests/ops/test_xca.py::test_of_nothing")
    assert missing_reference("tests/ops/test_xca.py::test_refusals_say_what_is_wrong") is None


def test_every_row_has_an_honest_status():
    rows = [row for row in map_rows() if "status" in row]
    assert len(rows) > 35
    for row in rows:
        assert row["status"].startswith(STATUSES), row
        has_test = "::" in row["test"]
        if row["status"].startswith(("reproduced", "partial")):
            assert has_test, f"{row['what']}: which test shows it?"
        if row["status"].startswith("not built"):
            assert not has_test, f"{row['what']}: a test of what is not built?"


# --- what belongs to the distribution --------------------------------------------------------------------------------


def test_the_citation_names_the_papers_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "El-Nouby", "Touvron", "Caron", "Bojanowski", "Douze", "Joulin", "Laptev", "Neverova", "Synnaeve", "Verbeek",
        "Jégou",
    ]  # fmt: skip
    assert "2106.09681" in paper["url"]


def test_versions_agree():
    import xcit

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{xcit.__version__}"\n' in project
    assert citation["version"] == xcit.__version__


def test_the_changelog_has_an_unreleased_part_with_numerics():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = text.split("## [Unreleased]")[1].split("\n## [")[0]
    assert "### Added" in unreleased
    assert "### Numerics" in unreleased
