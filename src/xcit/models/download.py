"""Files from the network, once: cached, resumed, verified, and complete or not there at all.

Files lie where torch.hub keeps its own (``$TORCH_HOME/hub/checkpoints``, by default under ``~/.cache/torch``), so that
a checkpoint that another program fetched is found; ``XCIT_CACHE`` names another folder. While a file is on its way it
is called ``<name>.partial``, and a lock keeps a second process from writing to it.
"""

import hashlib
import http
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING

import torch.hub
from filelock import FileLock, Timeout

from xcit.errors import CheckpointError, ConfigError
from xcit.models.storage import SIGNATURE_BYTES, not_a_checkpoint
from xcit.models.zoo import CHECKPOINTS

if TYPE_CHECKING:
    from rich.progress import Progress

OFFLINE_VARIABLES = ("XCIT_OFFLINE", "HF_HUB_OFFLINE")
CACHE_VARIABLE = "XCIT_CACHE"

_CHUNK = 1 << 18
_TIMEOUT_S = 30
_ATTEMPTS = 3
_WAIT_S = 1.0

_log = logging.getLogger("xcit")


class _BrokenOffError(Exception):
    """A transfer that broke off and may go on."""


def is_url(name: str) -> bool:
    """Whether a name is an http(s) address."""
    return name.startswith(("http://", "https://"))


def cache_dir() -> Path:
    """Return the folder for downloads: ``XCIT_CACHE``, or torch.hub's for checkpoints."""
    own = os.environ.get(CACHE_VARIABLE)
    return Path(own).expanduser() if own else Path(torch.hub.get_dir()) / "checkpoints"


def offline_variable() -> str | None:
    """Return the environment variable that forbids the network, if one does."""
    off = ("", "0", "false", "no", "off")
    return next((name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() not in off), None)


def cached_path(url: str) -> Path:
    """Return where an address's file lies in the cache, whether it is there yet or not."""
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "download"
    if not any(checkpoint.url == url for checkpoint in CHECKPOINTS.values()):
        # two servers may well have a model.pth each
        stem, dot, suffix = name.rpartition(".")
        tag = hashlib.sha256(url.encode()).hexdigest()[:8]
        name = f"{stem}-{tag}{dot}{suffix}" if dot else f"{name}-{tag}"
    return cache_dir() / name


def download(url: str, *, sha256: str | None = None, progress: bool = True) -> Path:
    """Fetch a file unless the cache has it.

    A transfer that breaks off is resumed, now or by the next call, if the server can do that and the file is still the
    same there.

    Args:
        url: http or https.
        sha256: the file's checksum in hexadecimal, or its first 8 digits or more. None takes it from a name that ends
            in one, as torch.hub's and mmpretrain's files do (``...-ed776c38.pth``), and else checks nothing.
        progress: show a bar on stderr while it runs.

    Returns:
        The local file.

    Raises:
        CheckpointError: no network, offline mode, the server's refusal, a web page instead of the file, another
            checksum, no room on the disk; each in one sentence that says where to put the file by hand.
    """
    target = cached_path(url)
    if target.exists():
        if sha256 is not None:
            verify_sha256(target, sha256)
        return target
    if variable := offline_variable():
        raise CheckpointError(
            f"{url} is not in the cache, and {variable} is set, which forbids downloads. "
            f"Unset it, or put the file at {target}."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.exists():  # another process may have brought it meanwhile
                _fetch(url, target, sha256 or _sha256_in(url), progress)
    except OSError as err:
        raise CheckpointError(f"{target} could not be written: {err.strerror or err}.") from err
    return target


def verify_sha256(path: Path, sha256: str) -> None:
    """Refuse a file with another checksum.

    Args:
        path: the file.
        sha256: hexadecimal, all 64 digits or at least the first 8.

    Raises:
        ConfigError: that is no checksum.
        CheckpointError: the file has another one.
    """
    expected = sha256.lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", expected):
        raise ConfigError(f"sha256 is {sha256!r}; it must be 8 to 64 hexadecimal digits.")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if not actual.startswith(expected):
        raise CheckpointError(
            f"{path} has the sha256 checksum {actual[: len(expected)]}, not {expected}: it is damaged, or not the file "
            "that was meant. Delete it and download it again."
        )


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of a file in the cache; the system frees it should the process die."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _log.info("Another process is downloading %s; waiting for it.", target.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, target: Path, sha256: str | None, progress: bool) -> None:
    partial = target.with_name(f"{target.name}.partial")
    _log.info("Downloading %s to %s", url, target)
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * _WAIT_S)
        try:
            _transfer(url, partial, target, progress)
            break
        except _BrokenOffError as err:
            reason = err
    else:
        kept = partial.stat().st_size if partial.exists() else 0
        raise CheckpointError(
            f"The download of {url} broke off {_ATTEMPTS} times ({reason}); {kept:,} bytes are kept, and the next call "
            "goes on from there if the server allows it."
        )
    try:
        with partial.open("rb") as file:
            problem = not_a_checkpoint(file.read(SIGNATURE_BYTES))
        if problem:
            raise CheckpointError(f"What {url} brought is {problem}.")
        if sha256 is not None:
            verify_sha256(partial, sha256)
    except CheckpointError:
        partial.unlink()
        raise
    partial.replace(target)
    _validator_file(partial).unlink(missing_ok=True)


def _transfer(url: str, partial: Path, target: Path, progress: bool) -> None:
    """Write what is missing of ``partial``."""
    headers = {"User-Agent": "xcit", "Accept-Encoding": "identity"}
    start, validator = _resumable(partial)
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as err:
        with err:
            if err.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                partial.unlink()  # longer than the file is now: begin again
                raise _BrokenOffError("the file has changed on the server") from err
            if err.code >= 500:
                raise _BrokenOffError(f"the server answered {err.code} {err.reason}") from err
            raise CheckpointError(
                f"The server answered {err.code} {err.reason} for {url}. Check the address, or put the file at "
                f"{target}."
            ) from err
    except (OSError, http.client.HTTPException) as err:
        raise CheckpointError(
            f"No network: {urllib.parse.urlsplit(url).hostname} could not be reached ({_reason(err)}). "
            f"Fetch {url} elsewhere and put it at {target}, or use a file that you have: "
            f"pretrained='PATH' in Python, its path for --model or --pretrained on the command line."
        ) from err

    with response:
        if response.headers.get_content_type() == "text/html":
            raise CheckpointError(f"{url} brought a web page instead of a file; check the address.")
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            partial.unlink()
            raise _BrokenOffError("the server sent another part than asked for")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with partial.open("ab" if start else "wb") as file, _progress_bar(progress) as bar:
            _remember_validator(partial, response.headers)  # only now that no bytes of another version are left
            task = bar.add_task(target.name, total=total, completed=start)
            for chunk in _chunks(response):
                file.write(chunk)
                bar.advance(task, len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and partial.stat().st_size != total:
        raise _BrokenOffError(f"{partial.stat().st_size:,} of {total:,} bytes came")


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    # only reading is guarded here: an OSError of the file that is written means something else
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as err:
            raise _BrokenOffError(_reason(err)) from err
        if not chunk:
            return
        yield chunk


def _resumable(partial: Path) -> tuple[int, str]:
    """How many bytes a former call left, and by what the server can tell that they are of the same file."""
    validator = _validator_file(partial)
    if not partial.exists() or not validator.exists():
        return 0, ""
    return partial.stat().st_size, validator.read_text()


def _remember_validator(partial: Path, headers: Message) -> None:
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    if validator:
        _validator_file(partial).write_text(validator)
    else:
        _validator_file(partial).unlink(missing_ok=True)


def _validator_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")


def _sha256_in(url: str) -> str | None:
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", urllib.parse.urlsplit(url).path)
    return found[1] if found and not found[1].isdigit() else None  # digits alone would be a date


def _reason(err: Exception) -> str:
    reason = getattr(err, "reason", err)
    return str(getattr(reason, "strerror", None) or reason or type(err).__name__)


def _progress_bar(show: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not show)
