"""What a tar shard holds: read through once, checked, and kept beside it."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcit.data.images import EXTENSIONS
from xcit.data.parts import canonical, listing
from xcit.errors import DataError, ExportError
from xcit.files import write_atomic

BLOCK = tarfile.BLOCKSIZE
INDEX_VERSION = 1
MAX_CLASSES = 1_000_000
"""A larger class number is a mistake, and would cost as many logits."""
MAX_LABEL_BYTES = 1 << 20
"""A larger .cls or .json is no label."""

Sample = tuple[str, int, int, int | str]
"""Key, offset and size of the image's bytes in the shard, and the label."""


def index_shard(path: Path) -> tuple[list[Sample], str]:
    """Return the samples of a tar file, in its order, and why their index could not be kept, or "".

    The index is kept beside the shard, as ``NAME.tar.index.json``; it holds as long as the shard's size and time of
    change do. Where that file cannot be written, the shard is read through in each run.

    Raises:
        DataError: the tar is cut short or damaged, or a sample has no image, no label, or one that is none; the message
            names the shard and the sample.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    stamp = {"version": INDEX_VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    kept = index_of(path)
    with suppress(OSError, ValueError, KeyError, TypeError):  # one that is not whole is made anew
        content = json.loads(kept.read_bytes())
        if content["stamp"] == stamp:
            return [(str(key), int(offset), int(size), label) for key, offset, size, label in content["samples"]], ""
    samples = list(_read_through(path))
    try:
        write_atomic(kept, json.dumps({"stamp": stamp, "samples": samples}, separators=(",", ":")).encode())
    except ExportError as error:
        return samples, f"{kept}: {getattr(error.__cause__, 'strerror', error)}"
    return samples, ""


def index_of(path: Path) -> Path:
    """Return where the index of a shard is kept."""
    return path.with_name(f"{path.name}.index.json")


@dataclass
class _Draft:
    """What is known of a sample while its shard is read."""

    image: tuple[int, int] | None = None
    label: int | str | None = None
    fields: set[str] = field(default_factory=set)


def _read_through(path: Path) -> Iterator[Sample]:
    drafts: dict[str, _Draft] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, field_name = _key_and_field(member.name)
                if member.isreg() and field_name:
                    _take(path, tar, member, drafts.setdefault(key, _Draft()), key, field_name)
            _check_end(path, file, tar)
    except tarfile.TarError as error:
        raise DataError(f"{path}: is cut short or damaged, or no tar file ({str(error).rstrip('.')}).") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if not drafts:
        raise DataError(f"{path}: holds no sample; its members should be called such as 0001.jpg and 0001.cls.")
    for key, draft in drafts.items():
        if draft.image is None:
            raise DataError(f"{path}: the sample {key!r} has no image; it holds {listing(sorted(draft.fields))}.")
        if draft.label is None:
            raise DataError(
                f"{path}: the sample {key!r} has no label: neither {key}.cls, nor {key}.json with label or cls; it "
                f"holds {listing(sorted(draft.fields))}."
            )
        yield key, *draft.image, draft.label


def _key_and_field(name: str) -> tuple[str, str]:
    """Divide a member's name at the first dot of its last part; ("", "") if it is no part of a sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, field_name = base.partition(".")
    if not stem or base.startswith("__"):  # hidden files, and the format's own notes such as __meta__
        return "", ""
    return f"{folder}{slash}{stem}", field_name.lower()


def _take(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, draft: _Draft, key: str, field_name: str) -> None:
    if field_name in draft.fields:
        raise DataError(f"{path}: the sample {key!r} has two members .{field_name}; keys must differ.")
    draft.fields.add(field_name)
    if f".{field_name}" in EXTENSIONS:
        if draft.image is not None:
            raise DataError(f"{path}: the sample {key!r} has two images ({listing(sorted(draft.fields))}).")
        if member.issparse():
            raise DataError(f"{path}: the image of {key!r} is stored with holes (sparse); pack the tar without.")
        draft.image = member.offset_data, member.size
    elif field_name in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
        file = tar.extractfile(member)
        content = file.read() if file else b""
        label = _label(path, key, field_name, content)
        if label is None:
            return
        if draft.label is not None and draft.label != label:
            raise DataError(f"{path}: the sample {key!r} has two labels: {draft.label!r} and {label!r}.")
        draft.label = label


def _label(path: Path, key: str, field_name: str, content: bytes) -> int | str | None:
    """Return what a label file says; None if a .json says nothing of a label."""
    value: Any = content
    try:
        text = content.decode("utf-8").strip()
        value = text
        if field_name == "json":
            record = json.loads(text)
            if not isinstance(record, dict):
                return None
            value = record.get("label", record.get("cls"))
            if value is None:
                return None
        elif re.fullmatch(r"[+-]?\d+", text):
            value = int(text)
    except ValueError:  # not UTF-8, not JSON
        value = content
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_CLASSES:
        return value
    if isinstance(value, str) and value.strip():
        return canonical(value.strip())
    shown = value[:40] if isinstance(value, bytes | str) else value
    raise DataError(
        f"{path}: the label of the sample {key!r} is {shown!r} (.{field_name}); it must be the class's number from 0, "
        f"or its name."
    )


def _check_end(path: Path, file: Any, tar: tarfile.TarFile) -> None:
    """Refuse a tar whose end is missing, or after whose end something follows."""
    file.seek(tar.offset)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK or mark.strip(b"\0"):
        raise DataError(
            f"{path}: is cut short or damaged: at byte {tar.offset:,} there is neither a member nor the mark of its "
            f"end. Copy or pack it again."
        )
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(f"{path}: goes on after its end, as tar files do that were joined; join them with tar -A.")
