"""ExecuTorch's programs (``.pte``) in ExecuTorch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from xcit.inference.runtimes import DESCRIPTION, Session, damaged, missing, read_description


class ExecuTorchSession(Session):
    """A ``.pte`` file in ExecuTorch's Python runtime, on the CPU (XNNPACK)."""

    format = "executorch"
    runtime = "ExecuTorch"

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
            from executorch.version import __version__
        except ImportError as error:
            raise missing("executorch", "edge", error) from None
        if threads is not None:
            portable_lib._unsafe_reset_threadpool(threads)
        text = None
        try:
            with _no_output():
                self._program = Runtime.get().load_program(path)
                if DESCRIPTION in self._program.method_names:
                    (text,) = self._program.load_method(DESCRIPTION).execute([])
                self._forward = self._program.load_method("forward")
        except (RuntimeError, KeyError, ValueError) as error:
            raise damaged(path, self.runtime, error) from error
        super().__init__(path, __version__, read_description(text, path))

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        return [output.numpy().copy() for output in self._forward.execute([torch.from_numpy(images)])]


@contextmanager
def _no_output() -> Iterator[None]:
    """Let what the C++ part writes go nowhere: lines about the processor, and about errors that it also raises."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
