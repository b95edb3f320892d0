"""Files that appear whole or not at all."""

import errno
import os

import pytest

from xcit.errors import ExportError
from xcit.files import replacing, write_atomic


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"could not be written: No space left on device; 2.0 MiB are needed"):
        write_atomic(path, bytes(2 << 20))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("num_bytes", "amount"), [(7, "7 bytes"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (1 << 20, "1.0 MiB")]
)
def test_what_is_needed_is_told_in_a_unit_that_shows_it(tmp_path, monkeypatch, num_bytes, amount):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=f"; {amount} are needed; make room"):
        write_atomic(tmp_path / "file", bytes(num_bytes))


def test_the_data_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append([p.name for p in tmp_path.iterdir()]), fsync(fd)))
    write_atomic(tmp_path / "file", b"data")
    assert len(events) == 1
    assert "file" not in events[0]
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_writer_that_wants_a_name_gets_one_of_the_same_ending(tmp_path):
    path = tmp_path / "new" / "table.parquet"
    with replacing(path) as partial:
        assert partial.suffix == ".parquet"
        partial.write_bytes(b"data")
        assert not path.exists()
    assert path.read_bytes() == b"data"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        write()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_wrote_nothing_is_told(tmp_path):
    with pytest.raises(ExportError, match="could not be written: No such file"), replacing(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())
