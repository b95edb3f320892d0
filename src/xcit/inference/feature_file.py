"""Files of features: one row an image, and what made them.

A Parquet file has the columns ``path`` (text), ``size`` (bytes), ``mtime_ns`` (both of the image's file when it was
read) and ``features`` (a list of float32 of one length). Its metadata, under the key ``xcit``, holds an ``Origin`` as
JSON. Every page has a checksum, so that a damaged file is noticed.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcit.errors import BackendError, ConfigError, DataError
from xcit.files import replacing, write_atomic

KEY = b"xcit"
FORMAT = 1
ROW_GROUP = 16384
ENDINGS = (".parquet", ".npy", ".csv")
_FOLLOWS = {"pool": ("dim", "gem_p"), "architecture": ("dim",)}
"""Settings that differ because another one does."""


@dataclass(frozen=True)
class Origin:
    """What made features, so that others can be made to compare with them.

    Attributes:
        fingerprint: of the extractor (``FeatureExtractor.fingerprint``): weights, preprocessing, pooling, scales.
        settings: the extractor's, as plain data.
        folder: what relative paths are relative to.
    """

    fingerprint: str
    settings: Mapping[str, Any]
    folder: str

    def describe(self) -> str:
        """Return who made the features, in the words of a sentence."""
        pool, model = self.settings.get("pool"), self.settings.get("model")
        return f"{model or 'an unnamed model'} ({f'pool {pool}, ' if pool else ''}fingerprint {self.fingerprint[:12]})"

    def unlike(self, other: Origin, name: str) -> str:
        """Return the sentence that what this made cannot be compared with what another made; it names both.

        Args:
            other: what is to be compared with it.
            name: of the file that this made.
        """
        keys = sorted({*self.settings, *other.settings} - {"model"})
        differing = [key for key in keys if self.settings.get(key) != other.settings.get(key)]
        for cause, follows in _FOLLOWS.items():
            if cause in differing:
                differing = [key for key in differing if key not in follows]
        what = f"; they differ in {', '.join(differing)}" if differing else ""
        return f"{name} was made with {self.describe()}, not with {other.describe()}{what}."

    def locate(self, path: str) -> Path:
        """Return where an image lies, as seen from the present folder."""
        here = Path(path)
        return here if here.is_absolute() or os.path.lexists(here) else Path(self.folder, path)

    def key(self, path: str) -> str:
        """Return what tells files apart, however they are spelt."""
        return os.path.abspath(os.path.join(self.folder, path))  # noqa: PTH100, PTH118 (a million of them)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"fingerprint": self.fingerprint, "settings": dict(self.settings), "folder": self.folder}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        """Read what ``to_json`` gave; KeyError or TypeError where it did not."""
        origin = cls(data["fingerprint"], data["settings"], data["folder"])
        if not (isinstance(origin.fingerprint, str) and isinstance(origin.settings, dict)):
            raise TypeError("not an origin")
        return origin


@dataclass(frozen=True)
class FeatureTable:
    """Features of images, in order.

    Attributes:
        origin: what made them.
        paths: (n) files, as they were spelt.
        features: (n, dim) float32, as the extractor gave them (not normalised).
        sizes: (n,) int64, bytes of the files.
        mtimes: (n,) int64, when the files were changed last, in nanoseconds.
    """

    origin: Origin
    paths: Sequence[str]
    features: np.ndarray
    sizes: np.ndarray
    mtimes: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return int(self.features.shape[1])


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Return vectors of length 1, so that their inner products are cosines; a vector of zeros stays one.

    Args:
        features: (n, dim).

    Returns:
        (n, dim) float32, contiguous.
    """
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray(features / np.maximum(norms, 1e-12), dtype=np.float32)


def write_features(path: str | os.PathLike[str], table: FeatureTable) -> None:
    """Write features whole or not at all, in the format that the file's ending names.

    ``.parquet`` as above. ``.npy`` holds the (n, dim) array alone; paths and origin stand beside it in a file of the
    same name with the ending ``.json``. ``.csv`` has the columns path, f0, f1, ... and no origin.

    Raises:
        ConfigError: another ending.
        BackendError: Parquet needs pyarrow, which is not installed.
        ExportError: no space, no permission, or the like.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".parquet":
        _write_parquet(path, table)
    elif ending == ".npy":
        about = {**table.origin.to_json(), "paths": list(table.paths)}
        write_atomic(path.with_suffix(".json"), json.dumps(about, indent=1).encode())
        with replacing(path, num_bytes=table.features.nbytes) as partial, partial.open("xb") as file:
            np.save(file, table.features)
    elif ending == ".csv":
        text = io.StringIO(newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["path", *(f"f{i}" for i in range(table.dim))])
        for name, vector in zip(table.paths, table.features, strict=True):
            rows.writerow([name, *(f"{value:.9g}" for value in vector)])
        write_atomic(path, text.getvalue().encode())
    else:
        raise ConfigError(f"{path} would hold features; its name must end in {' or '.join(ENDINGS)}.")


def _write_parquet(path: Path, table: FeatureTable) -> None:
    pa, pq = arrow()
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
            ("features", pa.list_(pa.float32(), table.dim)),
        ],
        metadata={KEY: json.dumps({"format": FORMAT, **table.origin.to_json()}).encode()},
    )
    with (
        replacing(path, num_bytes=table.features.nbytes) as partial,
        pq.ParquetWriter(
            partial,
            schema,
            compression={"path": "zstd", "size": "zstd", "mtime_ns": "zstd", "features.list.element": "none"},
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        for start in range(0, len(table), ROW_GROUP):
            part = slice(start, start + ROW_GROUP)
            vectors = np.ascontiguousarray(table.features[part], dtype=np.float32)
            columns = [
                pa.array(list(table.paths[part]), pa.string()),
                pa.array(table.sizes[part], pa.int64()),
                pa.array(table.mtimes[part], pa.int64()),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), table.dim),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def read_features(path: str | os.PathLike[str]) -> FeatureTable:
    """Read a Parquet file that ``write_features`` wrote.

    Raises:
        DataError: nothing there, not such a file, or a damaged one; the message names it.
        BackendError: pyarrow is not installed.
    """
    path = Path(path)
    pa, pq = arrow()
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head != b"PAR1":
            what = "is empty (0 bytes)" if not head else "is not a Parquet file"
            raise DataError(f"{path}: {what}; xcit embed writes the files of features that are read here.")
        table = pq.read_table(path, page_checksum_verification=True, memory_map=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; xcit embed writes one.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a file of features.") from None
    except (OSError, pa.ArrowException) as error:  # Arrow raises OSError for damage as well
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
        raise DataError(f"{path}: is damaged or truncated; delete it and run xcit embed again.") from None
    try:
        about = json.loads((table.schema.metadata or {})[KEY])
        if about["format"] != FORMAT:
            raise DataError(f"{path}: is of format {about['format']}; this xcit reads {FORMAT}. Make it again.")
        origin = Origin.from_json(about)
        kind = table.schema.field("features").type
        if kind != pa.list_(pa.float32(), kind.list_size):
            raise TypeError("other features")
        vectors = table["features"].combine_chunks()
        features = vectors.flatten().to_numpy().reshape(-1, kind.list_size) if len(table) else None
        return FeatureTable(
            origin,
            table["path"].to_pylist(),
            np.zeros((0, kind.list_size), np.float32) if features is None else features,
            table["size"].to_numpy(),
            table["mtime_ns"].to_numpy(),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: is a Parquet file, but not one of features that xcit embed wrote; name one of these."
        ) from None


def arrow() -> tuple[Any, Any]:
    """Return pyarrow and its Parquet part.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise BackendError(
            'Files of features need pyarrow, which is not installed: pip install "xcit[retrieval]"'
        ) from None
    return pyarrow, pyarrow.parquet
