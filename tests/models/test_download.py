"""Downloads against a real server on this machine: whole, interrupted, resumed, refused."""

import hashlib
import io
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from xcit.errors import CheckpointError, ConfigError
from xcit.models import download as module
from xcit.models.download import cache_dir, cached_path, download, is_url, offline_variable, verify_sha256
from xcit.models.weights import load_checkpoint
from xcit.models.zoo import CHECKPOINTS


def checkpoint_bytes(seed=0):
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(200_000, generator=torch.Generator().manual_seed(seed))}, buffer)
    return buffer.getvalue()


DATA = checkpoint_bytes()


class Server(ThreadingHTTPServer):
    """Serves one file, with faults by the path that is asked for, and keeps what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = DATA
        self.requests = []
        self.delay_s = 0.0
        self.faults = 1  # how often a faulty path fails before it works

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def ranges(self):
        return [headers.get("Range") for _, headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers))
        kind = Path(self.path).name.partition(".")[0]
        data, etag = server.data, f'"{hashlib.md5(server.data).hexdigest()}"'
        failing = len(server.requests) <= server.faults
        time.sleep(server.delay_s)
        if kind == "missing":
            return self.send_error(404)
        if kind == "busy" and failing:
            return self.send_error(503)
        if kind == "page":
            return self.answer(200, b"<html>Please log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if kind == "disguised":
            return self.answer(200, b"<html>Please log in</html>")
        if kind == "void":
            return self.answer(200, b"")
        headers = {"ETag": etag} if kind != "plain" else {}
        if kind == "dated":
            headers = {"ETag": f"W/{etag}", "Last-Modified": "Wed, 01 Sep 2021 10:00:00 GMT"}
        start = 0
        asked = self.headers.get("Range")
        unchanged = self.headers.get("If-Range") in (etag, headers.get("Last-Modified"))
        if asked and unchanged and kind != "norange":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.send_error(416)
            if kind == "astray":
                start += 1
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if kind == "short":  # promises more than it has, always
            headers["Content-Length"] = str(len(data) - start + 1000)
        cut = len(data) // 3 if kind in ("breaks", "norange", "dated", "plain", "astray") and failing else None
        return self.answer(206 if start else 200, data[start:], headers, cut)

    def answer(self, status, body, headers=(), cut=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("XCIT_CACHE", str(tmp_path / "cache"))
    for name in ("XCIT_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_WAIT_S", 0.0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_file_is_fetched_once(server):
    path = download(server.url("good.pth"))
    assert path.read_bytes() == DATA
    assert download(server.url("good.pth")) == path
    assert len(server.requests) == 1
    assert visible(path.parent) == [path.name]


@pytest.mark.parametrize("kind", ["breaks", "dated"])
def test_a_broken_transfer_is_resumed_at_once(server, kind):
    path = download(server.url(f"{kind}.pth"))
    assert path.read_bytes() == DATA
    assert server.ranges() == [None, f"bytes={len(DATA) // 3}-"]


def test_a_broken_transfer_is_resumed_by_the_next_call(server, monkeypatch):
    url = server.url("breaks.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ATTEMPTS", 1)
        with pytest.raises(
            CheckpointError, match=rf"broke off 1 times \({len(DATA) // 3:,} of {len(DATA):,} bytes came\)"
        ):
            download(url)
    assert not cached_path(url).exists()
    assert download(url).read_bytes() == DATA
    assert server.ranges()[-1] == f"bytes={len(DATA) // 3}-"


@pytest.mark.parametrize("kind", ["norange", "plain"])
def test_without_resume_it_begins_again(server, kind):
    assert download(server.url(f"{kind}.pth")).read_bytes() == DATA
    # one that names no version of its file is not even asked for the rest
    assert server.ranges()[1] == (f"bytes={len(DATA) // 3}-" if kind == "norange" else None)


def test_a_file_that_changed_meanwhile_is_not_mixed(server, monkeypatch):
    url = server.url("breaks.pth")
    monkeypatch.setattr(module, "_ATTEMPTS", 1)
    with pytest.raises(CheckpointError, match="broke off"):
        download(url)
    server.data = checkpoint_bytes(seed=1)
    assert download(url).read_bytes() == server.data


def test_a_partial_file_longer_than_the_file(server):
    url = server.url("good.pth")
    partial = cached_path(url).with_name(f"{cached_path(url).name}.partial")
    partial.parent.mkdir()
    partial.write_bytes(bytes(len(DATA) + 1))
    partial.with_name(f"{partial.name}.etag").write_text(f'"{hashlib.md5(DATA).hexdigest()}"')
    assert download(url).read_bytes() == DATA


def test_another_part_than_asked_for(server):
    assert download(server.url("astray.pth")).read_bytes() == DATA
    assert server.ranges() == [None, f"bytes={len(DATA) // 3}-", None]


def test_a_wrong_length_never_becomes_a_file(server):
    with pytest.raises(CheckpointError, match=rf"broke off 3 times .*; {len(DATA):,} bytes are kept"):
        download(server.url("short.pth"))
    assert not cached_path(server.url("short.pth")).exists()


def test_a_server_that_is_busy_for_a_moment(server):
    assert download(server.url("busy.pth")).read_bytes() == DATA
    server.faults = 99
    with pytest.raises(CheckpointError, match="the server answered 503 Service Unavailable"):
        download(server.url("busy.pt"))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("missing.pth", "The server answered 404 Not Found for http://"),
        ("page.pth", "brought a web page instead of a file"),
        ("disguised.pth", "brought is a web page"),
        ("void.pth", "brought is empty"),
    ],
)
def test_what_is_no_file(server, path, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        download(server.url(path))
    assert len(server.requests) == 1  # asking again would not help
    assert not cached_path(server.url(path)).exists()
    assert not [name for name in visible(cache_dir()) if name.endswith(".partial")]


def test_checksums(server):
    digest = hashlib.sha256(DATA).hexdigest()
    assert download(server.url("good.pth"), sha256=digest).read_bytes() == DATA
    assert download(server.url("good.pth"), sha256=digest[:8].upper()).exists()
    with pytest.raises(CheckpointError, match="sha256 checksum"):
        download(server.url("good.pth"), sha256="0" * 64)  # of what the cache has
    assert download(server.url(f"model_20230213-{digest[:8]}.pth")).exists()
    assert download(server.url("model-20230213.pth")).exists()  # a date
    with pytest.raises(CheckpointError, match="has the sha256 checksum"):
        download(server.url("model-0123abcd.pth"))
    assert not cached_path(server.url("model-0123abcd.pth")).exists()
    with pytest.raises(ConfigError, match="8 to 64 hexadecimal digits"):
        verify_sha256(download(server.url("good.pth")), "abc")


def test_the_progress_bar_is_on_stderr(server, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    download(server.url("good.pth"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "good-" in shown.err
    download(server.url("good.pt"), progress=False)
    assert capsys.readouterr().err == ""


def test_two_processes_at_once(server, tmp_path):
    server.faults = 2
    server.delay_s = 0.5  # long enough for the other process to come
    code = f"""
        from xcit.models import download
        download._WAIT_S = 0.0
        print(download.download({server.url("breaks.pth")!r}, progress=False))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = paths
    assert Path(path).read_bytes() == DATA
    assert len(server.requests) == 3  # two that broke off and the one that ended; the other process found the file


def test_many_threads_at_once(server):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(download, [server.url("good.pth")] * 8))
    assert len(paths) == 1
    assert len(server.requests) == 1


def test_load_checkpoint_from_an_address(server, small, images, tmp_path):
    original = small()
    torch.save({"model": original.state_dict()}, tmp_path / "it.pth")
    server.data = (tmp_path / "it.pth").read_bytes()
    model = small(seed=1)
    load_checkpoint(model, server.url("good.pth"), sha256=hashlib.sha256(server.data).hexdigest())
    assert torch.equal(model(images), original(images))


# --- without a network ------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there(server):
    url = server.url("good.pth")
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError) as caught:
        download(url)
    assert "No network: 127.0.0.1 could not be reached (Connection refused)." in str(caught.value)
    assert str(cached_path(url)) in str(caught.value)


def test_a_name_that_is_not_there(server):
    with pytest.raises(CheckpointError, match=r"No network: no-such-host\.invalid could not be reached"):
        download("http://no-such-host.invalid/it.pth")


@pytest.mark.parametrize("variable", ["XCIT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server, monkeypatch, variable):
    path = download(server.url("good.pth"))
    monkeypatch.setenv(variable, "1")
    assert offline_variable() == variable
    assert download(server.url("good.pth")) == path
    with pytest.raises(CheckpointError, match=f"is not in the cache, and {variable} is set"):
        download(server.url("other.pth"))
    assert len(server.requests) == 1
    for off in ("0", "false", "no", ""):
        monkeypatch.setenv(variable, off)
        assert offline_variable() is None


# --- the cache --------------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("XCIT_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_dir() == Path("~/.cache/torch/hub/checkpoints").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "torch" / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert cache_dir() == tmp_path / "torch" / "hub" / "checkpoints"
    monkeypatch.setenv("XCIT_CACHE", "~/mine")
    assert cache_dir() == Path("~/mine").expanduser()


def test_names_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XCIT_CACHE", str(tmp_path))
    released = CHECKPOINTS["xcit_nano_12_p16_224"].url
    assert cached_path(released) == tmp_path / "xcit_nano_12_p16_224.pth"  # as torch.hub names it
    a, b = cached_path("http://a/model.pth"), cached_path("http://b/model.pth")
    assert a != b
    assert {a.suffix, b.suffix} == {".pth"}
    assert cached_path("http://a/dir/?x=1").parent == tmp_path
    assert cached_path("http://a/..%2f..%2fevil.pth").parent == tmp_path


def test_a_cache_that_cannot_be_written(server, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XCIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="could not be written"):
        download(server.url("good.pth"))


def test_a_full_disk(server):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written: File too large"):
            download(server.url("good.pth"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert download(server.url("good.pth")).read_bytes() == DATA  # goes on once there is room


def test_what_is_an_address():
    assert is_url("https://a/b.pth")
    assert not is_url("b.pth")
    assert not is_url(os.fspath(Path("/https/b.pth")))
