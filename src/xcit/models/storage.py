"""Weight files on disk: read safely whatever the format, written atomically as safetensors.

A file is judged by its first bytes, not by its name. Nothing in it can run: pickles go through
``torch.load(weights_only=True)``, which builds tensors and plain data only.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xcit.errors import CheckpointError, ExportError
from xcit.files import write_atomic

SAFE_CLASSES: list[Any] = [argparse.Namespace]
"""Classes beyond torch's own list that a pickle may hold: the released training checkpoints of XCiT and DINO keep their
command line as an ``argparse.Namespace``, which is plain data."""

SIGNATURE_BYTES = 64
"""How much of a file's beginning tells its format."""
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # with which torch.save's former format begins
_READINGS = 5
_LONGEST_HEADER = 100_000_000  # of safetensors, whose header's length comes first; text read as a number is larger
_OTHER_FORMATS = {
    b"\x89PNG": "a PNG image, not a checkpoint",
    b"\xff\xd8\xff": "a JPEG image, not a checkpoint",
    b"GIF8": "a GIF image, not a checkpoint",
    b"RIFF": "a WebP image, a sound or a video, not a checkpoint",
    b"%PDF": "a PDF document, not a checkpoint",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x89HDF": "an HDF5 (Keras) file; xcit reads PyTorch checkpoints and safetensors",
    b"GGUF": "a GGUF file; xcit reads PyTorch checkpoints and safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
}


class StoredFile(NamedTuple):
    """What a file holds, before anyone asks what it means."""

    content: Any
    """A dictionary of tensors in every good case; a pickle may hold other plain data."""
    metadata: dict[str, str]
    """Of a safetensors file; {} of the other formats."""


def read_file(path: Path) -> StoredFile:
    """Read a weight file: safetensors, or what ``torch.save`` wrote in its present or its former format.

    Args:
        path: a local file. Its tensors come back on the CPU and may be mapped from the file rather than copied.

    Raises:
        CheckpointError: nothing there, not a file, no permission, empty, truncated, a web page, an image, a pickle that
            would run code, or anything else that is no checkpoint; each with its own sentence.
    """
    for _ in range(_READINGS):
        before = _identity(path)
        try:
            stored = _read(path)
        except CheckpointError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return stored
    raise CheckpointError(f"{path} is being replaced again and again while it is read; wait for the other program.")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Tell whether a file is still the same: the readers below open it twice, and it may be replaced in between."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> StoredFile:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name the weight file in it.")
        with path.open("rb") as file:
            head = file.read(SIGNATURE_BYTES)
    except FileNotFoundError as err:
        raise CheckpointError(f"There is no file {path}.") from err
    except OSError as err:
        raise CheckpointError(f"{path} cannot be read: {err.strerror}.") from err

    if problem := not_a_checkpoint(head):
        raise CheckpointError(f"{path} is {problem}.")
    if _is_safetensors(head):
        return _read_safetensors(path)
    if head.startswith(_ZIP):
        return StoredFile(_read_torch_zip(path), {})
    if _TORCH_MAGIC not in head:
        raise CheckpointError(
            f"{path} is a Python pickle that torch.save did not write. xcit does not read it, since a pickle may run "
            "code; save the weights with torch.save or safetensors."
        )
    return StoredFile(_torch_load(path, mmap=False), {})


def _is_safetensors(head: bytes) -> bool:
    # To be asked before the other formats: the first byte, of the header's length, may be any, a pickle's too.
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER


def not_a_checkpoint(head: bytes) -> str | None:
    """Say what a file is that begins with ``head``, or None if it may be a checkpoint."""
    if not head:
        return "empty (0 bytes); download or save it again"
    if _is_safetensors(head) or head.startswith((_ZIP, _PICKLE)):
        return None
    for magic, description in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return description
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "a web page (HTML or XML), probably a server's error message under this name; download it again"
    return "not a checkpoint: neither safetensors nor what torch.save writes"


def _read_safetensors(path: Path) -> StoredFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return StoredFile({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except SafetensorError as err:
        raise CheckpointError(
            f"{path} is a truncated or damaged safetensors file ({err}); delete it and download or save it again."
        ) from err


def _read_torch_zip(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # its table of contents stands at the end
        raise CheckpointError(f"{path} is truncated: its end is missing; delete it and download or save it again.")
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript program or an exported model, not a checkpoint; save the model's state_dict()."
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, but not a checkpoint that torch.save wrote.")
    return _torch_load(path, mmap=True)


def _torch_load(path: Path, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as err:
        refused = _refused_names(path, str(err))
        if not refused:
            raise CheckpointError(
                f"{path} is a damaged PyTorch checkpoint; delete it and download or save it again."
            ) from err
        raise CheckpointError(
            f"{path} is refused: reading it would import and run {', '.join(refused)}. xcit reads tensors and plain "
            "data only; where you trust the file, save the model's state_dict() alone and load that."
        ) from err
    except Exception as err:  # a parser meeting damaged bytes may fail in any way
        reason = str(err).partition("\n")[0].partition(". ")[0] or type(err).__name__
        raise CheckpointError(
            f"{path} is a truncated or damaged PyTorch checkpoint ({reason}); delete it and download or save it again."
        ) from err


def _refused_names(path: Path, message: str) -> list[str]:
    """What a pickle asked for that is not on the list of safe things."""
    safe = {f"{cls.__module__}.{cls.__qualname__}" for cls in SAFE_CLASSES}
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # torch lists them for its present format only
        names = re.findall(r"GLOBAL ([\w.]+)", message)
    return sorted({name for name in names if name not in safe})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata so that ``path`` holds either all of it or what it held before.

    The same tensors and metadata give the same bytes.

    Args:
        path: where to; its folder is made if need be.
        tensors: on any device, of any dtype; they are stored as they are.
        metadata: strings that go into the file's header.

    Raises:
        CheckpointError: no space, no permission, or the like. No partial file is left behind.
    """
    contiguous = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    data = _in_order(safetensors.torch.save(contiguous, metadata=dict(metadata)))
    try:
        write_atomic(path, data)
    except ExportError as err:
        raise CheckpointError(str(err)) from err


def _in_order(data: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted by name: their order is another in each process."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if "__metadata__" not in header:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # where the tensors begin
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[start:]))
