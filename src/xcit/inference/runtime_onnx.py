"""ONNX files in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xcit.inference.runtimes import DESCRIPTION, Session, damaged, missing, read_description

QUIET = 4
"""onnxruntime's log level for what is fatal: its warnings are not for users, and its errors come as exceptions too."""


class OnnxSession(Session):
    """An ``.onnx`` file in onnxruntime on the CPU."""

    format = "onnx"
    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing("onnxruntime", "export", error) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = QUIET
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise damaged(path, self.runtime, error) from error
        text = self._session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
        super().__init__(path, onnxruntime.__version__, read_description(text, path))
        self._input = self._session.get_inputs()[0].name

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: images})
