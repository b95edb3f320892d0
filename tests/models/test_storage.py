"""Every kind of wrong file gets its own sentence, and a save that fails leaves what was there."""

import argparse
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from xcit.errors import CheckpointError
from xcit.models.storage import read_file, write_safetensors


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch SIGN_OF_CODE",)


@pytest.fixture
def tensors():
    return {"a": torch.arange(4096.0), "b": torch.arange(6).reshape(2, 3)}


def torch_file(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("new_format", [True, False])
def test_torch_formats(tmp_path, tensors, new_format):
    content = {"model": tensors, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    path = torch_file(tmp_path / "it.pth", content, _use_new_zipfile_serialization=new_format)
    stored = read_file(path)
    assert torch.equal(stored.content["model"]["a"], tensors["a"])
    assert stored.content["args"].lr == 0.1
    assert stored.metadata == {}


def test_safetensors_whatever_its_name(tmp_path, tensors):
    write_safetensors(tmp_path / "it.pth", tensors, {"key": "värde"})
    stored = read_file(tmp_path / "it.pth")
    assert stored.content.keys() == tensors.keys()
    assert all(torch.equal(stored.content[key], tensors[key]) for key in tensors)
    assert stored.metadata == {"key": "värde"}
    # what any other program reads
    assert torch.equal(safetensors.torch.load_file(tmp_path / "it.pth")["b"], tensors["b"])


def test_safetensors_whatever_its_headers_length(tmp_path):
    """The length comes first in the file, so its low byte may look like the beginning of another format."""
    lengths = set()
    for i in range(0, 300, 8):
        path = tmp_path / f"{i}.safetensors"
        write_safetensors(path, {"a": torch.ones(3)}, {"padding": "x" * i})
        lengths.add(path.read_bytes()[0])
        assert read_file(path).content["a"].sum() == 3
    assert 0x80 in lengths  # a pickle's first byte


def wrong_files(folder):
    """One file of each wrong kind, with what the sentence must say."""
    good = torch_file(folder / "good.pth", {"a": torch.randn(5000)}).read_bytes()
    old = torch_file(folder / "old.pth", {"a": torch.randn(5000)}, _use_new_zipfile_serialization=False).read_bytes()
    safe = safetensors.torch.save({"a": torch.randn(5000)})
    (folder / "sub.pth").mkdir()
    with zipfile.ZipFile(folder / "notes.zip", "w") as archive:
        archive.writestr("notes/hello.txt", "hello")
    torch_file(folder / "code.pth", {"model": RunsCode()})
    torch_file(folder / "code_old.pth", {"model": RunsCode()}, _use_new_zipfile_serialization=False)
    torch_file(folder / "module.pth", torch.nn.Linear(2, 2))
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(folder / "script.pt")
    written = {
        "empty.pth": b"",
        "cut.pth": good[: len(good) // 2],
        "cut_early.pth": good[:40],
        "cut_old.pth": old[: len(old) // 2],
        "cut.safetensors": safe[: len(safe) // 2],
        "cut_header.safetensors": safe[:30],
        "page.pth": b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "error.pth": b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "photo.pth": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "photo.jpg": b"\xff\xd8\xff\xe0" + bytes(100),
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "archive.pth": b"\x1f\x8b\x08" + bytes(100),
        "text.pth": b"a note about weights, and braces { }",
        "braces.pth": b"12345678{not a header}",
        "plain.pkl": pickle.dumps({"a": 1}, protocol=4),
        "code.pkl": pickle.dumps(RunsCode()),
    }
    for name, data in written.items():
        (folder / name).write_bytes(data)
    return {
        "empty.pth": "is empty (0 bytes)",
        "cut.pth": "is truncated: its end is missing",
        "cut_early.pth": "is truncated: its end is missing",
        "cut_old.pth": "is a truncated or damaged PyTorch checkpoint",
        "cut.safetensors": "is a truncated or damaged safetensors file",
        "cut_header.safetensors": "is a truncated or damaged safetensors file",
        "page.pth": "is a web page",
        "error.pth": "is a web page",
        "photo.pth": "is a PNG image, not a checkpoint",
        "photo.jpg": "is a JPEG image, not a checkpoint",
        "pointer.safetensors": "is a Git LFS pointer",
        "archive.pth": "is a gzip archive; unpack it first",
        "text.pth": "is not a checkpoint",
        "braces.pth": "is not a checkpoint",
        "plain.pkl": "is a Python pickle that torch.save did not write",
        "code.pkl": "is a Python pickle that torch.save did not write",
        "code.pth": "is refused: reading it would import and run posix.system",
        "code_old.pth": "is refused: reading it would import and run posix.system",
        "module.pth": "is refused: reading it would import and run torch.nn.modules.linear.Linear",
        "script.pt": "is a TorchScript program",
        "notes.zip": "is a zip archive, but not a checkpoint",
        "sub.pth": "is a folder",
        "nothing.pth": "There is no file",
        "good.pth/inside.pth": "cannot be read: Not a directory",
    }


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_wrong_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = wrong_files(tmp_path)
    sentences = {}
    for name in expected:
        with pytest.raises(CheckpointError) as caught:
            read_file(tmp_path / name)
        sentences[name] = str(caught.value)
    wrong = {name: s for name, s in sentences.items() if expected[name] not in s or str(tmp_path / name) not in s}
    assert not wrong
    assert all(s.endswith(".") and "\n" not in s and len(s) < 400 for s in sentences.values())
    assert not (tmp_path / "SIGN_OF_CODE").exists()


def test_no_permission(tmp_path):
    path = torch_file(tmp_path / "it.pth", {"a": torch.zeros(1)})
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_file(path)


def test_writing_replaces_and_respects_the_umask(tmp_path, tensors):
    path = tmp_path / "new" / "folder" / "it.safetensors"
    write_safetensors(path, {"a": torch.zeros(1)}, {})
    write_safetensors(path, tensors, {})
    assert torch.equal(read_file(path).content["a"], tensors["a"])
    assert [p.name for p in path.parent.iterdir()] == ["it.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_tensors_of_any_layout(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"transposed": base.T, "strided": base[:, ::2], "shared": base, "empty": base[:0]}
    write_safetensors(tmp_path / "it.safetensors", views, {})
    stored = read_file(tmp_path / "it.safetensors").content
    assert all(torch.equal(stored[key], views[key]) for key in views)


def test_the_same_content_is_the_same_bytes_in_every_process(tmp_path):
    """What a resumed run writes is compared by a checksum; metadata in no fixed order would spoil it."""
    code = """
        import sys, torch
        from pathlib import Path
        from xcit.models.storage import write_safetensors
        metadata = {f"key {i}": "\u51ac\\u0007\\"" * (i % 3) for i in range(40)}
        keys = sorted(metadata, reverse=sys.argv[2] == "2")
        tensors = {f"t{i}": torch.arange(5.0) + i for i in range(5)} | {"half": torch.ones(3, dtype=torch.float16)}
        write_safetensors(Path(sys.argv[1]), tensors, {key: metadata[key] for key in keys})
    """
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(path), seed],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
        )
        written.append(path.read_bytes())
    assert written[0] == written[1]
    stored = read_file(path)
    assert stored.metadata == {f"key {i}": '\u51ac\u0007"' * (i % 3) for i in range(40)}
    assert stored.content["t4"].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert stored.content["half"].tolist() == [1.0, 1.0, 1.0]
    assert int.from_bytes(written[0][:8], "little") % 8 == 0  # tensors that are mapped from the file stay aligned


def test_a_full_disk_leaves_the_former_file(tmp_path, tensors):
    path = tmp_path / "it.safetensors"
    write_safetensors(path, {"a": torch.zeros(1)}, {})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # what the system answers then is a real failure to write
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: File too large; [\d.]+ [KM]iB are needed"):
            write_safetensors(path, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("where", "reason"), [("file/it.safetensors", "exists|Not a directory"), ("folder.safetensors", "directory")]
)
def test_places_that_cannot_be_written(tmp_path, tensors, where, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=rf"could not be written: .*({reason})"):
        write_safetensors(tmp_path / where, tensors, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "it.safetensors"
    code = f"""
        import itertools, time, torch
        from pathlib import Path
        from xcit.models.storage import write_safetensors
        for i in itertools.count():
            write_safetensors(Path({str(path)!r}), {{"a": torch.full((100_000,), float(i))}}, {{"i": str(i)}})
            if i == 0:
                print("begun", flush=True)
            time.sleep(0.03)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begun\n"
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # a reader at the same time meets one file or the next, never a mixture
            stored = read_file(path)
            assert (stored.content["a"] == float(stored.metadata["i"])).all()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    stored = read_file(path)
    assert (stored.content["a"] == float(stored.metadata["i"])).all()


def test_messages_name_the_file_once(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_file(Path(tmp_path / "nothing.pth"))
    assert re.fullmatch(r"There is no file \S+nothing\.pth\.", str(caught.value))
