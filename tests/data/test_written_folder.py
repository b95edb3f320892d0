"""Folders that are written anew: all that was written goes, even half files and indices, and nothing else ever does."""

import json
import os

import pytest

from xcit.data.written_folder import make_room, write_manifest
from xcit.errors import DataError, ExportError

MANIFEST = ".list.json"
NAMES = ["a.txt", "b/c.png", "b/d/train-0000.tar", "b/d/never-written.png"]


@pytest.fixture
def folder(tmp_path):
    """All that is listed but one, and what else a call that was killed, and a reader, may leave."""
    folder = tmp_path / "out"
    write_manifest(folder, MANIFEST, NAMES)
    left = [
        *NAMES[:3],
        "b/.c.0123abcd.partial.png",
        "b/d/.never-written.00000000.partial.png",
        "b/d/train-0000.tar.index.json",
        "b/d/.train-0000.tar.index.89abcdef.partial.json",
        "..list.0123abcd.partial.json",
    ]
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"ours")
    return folder


def all_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def room(folder, overwrite=True):
    make_room(folder, MANIFEST, "xcit data things", overwrite=overwrite)


def test_all_that_was_written_goes_but_the_list(folder):
    room(folder)
    assert all_of(folder) == [MANIFEST]
    room(folder)  # as after a call that was killed here
    assert json.loads((folder / MANIFEST).read_text()) == {"files": NAMES}


def test_new_and_empty_folders_need_nothing(tmp_path):
    room(tmp_path / "new", overwrite=False)
    assert not (tmp_path / "new").exists()
    room(tmp_path, overwrite=False)


def test_nothing_is_removed_unless_asked_for(folder):
    before = all_of(folder)
    with pytest.raises(DataError, match=r"is not empty; name a new folder, or overwrite the things in it with --over"):
        room(folder, overwrite=False)
    assert all_of(folder) == before


@pytest.mark.parametrize(
    "name", ["mine.txt", "b/d/mine.png", "a.txt.index.json", "b/.mine.0123abcd.partial.png", "b/.c.0123abcd.partial"]
)
def test_a_file_of_another_keeps_all(folder, name):
    (folder / name).write_bytes(b"mine")
    before = all_of(folder)
    with pytest.raises(DataError, match="holds files that xcit data things did not write, such as") as refused:
        room(folder)
    assert repr(name) in str(refused.value)
    assert all_of(folder) == before


def test_a_link_to_a_folder_is_another_file_and_not_gone_into(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.png").write_bytes(b"mine")
    (folder / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    before = all_of(folder)
    with pytest.raises(DataError, match="did not write, such as 'b/linked'"):
        room(folder)
    write_manifest(folder, MANIFEST, [*NAMES, "b/linked", "b/linked/c.png"])
    room(folder)  # the link goes, if it is ours
    assert before != all_of(folder) == [MANIFEST]
    assert (tmp_path / "elsewhere" / "c.png").read_bytes() == b"mine"


def test_a_list_that_points_elsewhere_removes_nothing_there(folder, tmp_path):
    for name in ("up.txt", "absolute.txt"):
        (tmp_path / name).write_bytes(b"mine")
    write_manifest(folder, MANIFEST, [*NAMES, "../up.txt", "b/../../up.txt", str(tmp_path / "absolute.txt")])
    room(folder)
    assert all_of(tmp_path) == ["absolute.txt", "out", f"out/{MANIFEST}", "up.txt"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": 5}', b'{"files": [5]}', b"\xff", b'{"files": ["a'])
def test_a_damaged_list(folder, content):
    (folder / MANIFEST).write_bytes(content)
    before = all_of(folder)
    with pytest.raises(DataError, match=r"\.list\.json in it is damaged; remove the folder, or name another"):
        room(folder)
    assert all_of(folder) == before


def test_no_list(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="was not written by xcit data things; name another folder"):
        room(tmp_path)
    assert (tmp_path / "empty").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; name a folder"):
        room(tmp_path / "file")


def test_what_cannot_be_removed(folder, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(ExportError, match=r"partial\.json: cannot be replaced: Permission denied\.$"):
        room(folder)


def test_the_list_is_whole_or_as_it_was(folder, monkeypatch):
    before = (folder / MANIFEST).read_bytes()

    def interrupt(number):
        raise KeyboardInterrupt

    monkeypatch.setattr("xcit.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(folder, MANIFEST, ["other"])
    assert (folder / MANIFEST).read_bytes() == before
