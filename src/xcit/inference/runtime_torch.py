"""torch's exported programs (``.pt2``) in torch."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from xcit.errors import CheckpointError
from xcit.inference.runtimes import DESCRIPTION_FILE, Session, damaged, read_description

_TENSOR_FILES = ("weight_", "tensor_")
"""How the names of plain tensors begin in torch's archive; other constants are pickled objects."""


class TorchSession(Session):
    """A ``.pt2`` file in torch on the CPU."""

    format = "torch-export"
    runtime = "torch"

    def __init__(self, path: Path, threads: int | None) -> None:
        _refuse_pickles(path)
        extra: dict[str, str] = {DESCRIPTION_FILE: ""}
        try:
            with _quiet():
                program = torch.export.load(path, extra_files=extra)
                self._module = program.module()
        except Exception as error:  # whatever the deserialiser trips over
            raise damaged(path, self.runtime, error) from error
        super().__init__(path, torch.__version__, read_description(extra[DESCRIPTION_FILE] or None, path))
        self._threads = threads

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        before = torch.get_num_threads()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                outputs = self._module(torch.from_numpy(images))
        finally:
            if self._threads is not None:
                torch.set_num_threads(before)
        return [output.numpy() for output in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]


def _refuse_pickles(path: Path) -> None:
    """Refuse an archive with parts that torch would unpickle, which could run code.

    Raises:
        CheckpointError: such a part, or no archive of torch's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # a bare "version" marks torch 2.7's format, whose weights are pickled
            if "version" in names or not any(name.endswith("/archive_format") for name in names):
                raise CheckpointError(f"{path} is no program that torch.export saved; export the model again.")
            payloads = [
                payload
                for name in names
                if name.endswith(("_weights_config.json", "_constants_config.json"))
                for payload in json.loads(archive.read(name))["config"].values()
            ]
            samples = [archive.read(name) for name in names if "/sample_inputs/" in name]
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, AttributeError) as error:
        raise damaged(path, "torch", error) from error
    pickled = any(p.get("use_pickle") or not str(p.get("path_name")).startswith(_TENSOR_FILES) for p in payloads)
    for sample in samples:
        try:
            torch.load(io.BytesIO(sample), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            pickled = pickled or bool(sample)
    if pickled:
        raise CheckpointError(
            f"{path} has pickled parts, which could run code when it is opened; it is refused. Export the model again."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the deserialiser's log lines to itself: what goes wrong, we report."""
    log = logging.getLogger("torch.export")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
