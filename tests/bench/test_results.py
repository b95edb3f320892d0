import errno

import pytest

from xcit.bench import results
from xcit.errors import DataError, ExportError

COLUMNS = ("date", "case", "ms")


def row(**changes):
    return {"date": "2026-01-01T00:00:00Z", "case": "a, with a comma", "ms": "1.5"} | changes


def test_rows_are_appended_below_one_header(tmp_path):
    path = tmp_path / "new" / "xca.csv"
    results.append(path, [row()], COLUMNS)
    results.append(path, [row(ms="2.5"), row(ms="3.5")], COLUMNS)
    assert path.read_text() == (
        "date,case,ms\n"
        '2026-01-01T00:00:00Z,"a, with a comma",1.5\n'
        '2026-01-01T00:00:00Z,"a, with a comma",2.5\n'
        '2026-01-01T00:00:00Z,"a, with a comma",3.5\n'
    )
    assert [r["ms"] for r in results.read(path, COLUMNS)] == ["1.5", "2.5", "3.5"]


def test_no_file_is_no_rows(tmp_path):
    assert results.read(tmp_path / "none.csv", COLUMNS) == []


def test_a_file_of_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "xca.csv"
    path.write_text("date,seconds\n2020,1\n")
    with pytest.raises(DataError, match="date, seconds"):
        results.append(path, [row()], COLUMNS)
    with pytest.raises(DataError, match="date, seconds"):
        results.read(path, COLUMNS)
    assert path.read_text() == "date,seconds\n2020,1\n"


def test_a_row_with_a_wrong_column_is_a_bug_and_writes_nothing(tmp_path):
    path = tmp_path / "xca.csv"
    with pytest.raises(ValueError, match="seconds"):
        results.append(path, [row(seconds="1")], COLUMNS)
    assert not path.exists()


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "xca.csv"
    results.append(path, [row()], COLUMNS)
    old = path.read_text()

    def crash(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(ExportError, match="No space left"):
        results.append(path, [row(ms="9")], COLUMNS)
    assert path.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["xca.csv"]  # and no temporary one


def test_the_environment_says_where_and_with_what():
    here = results.environment("cpu")
    assert tuple(here) == results.ENVIRONMENT
    assert all(here.values())
