"""OpenVINO's files (``.xml`` and ``.bin``) in OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xcit.errors import BackendError
from xcit.inference.runtimes import DESCRIPTION, Session, damaged, missing, read_description


class OpenVinoSession(Session):
    """An ``.xml`` file, with the ``.bin`` of the same name beside it, in OpenVINO on the CPU.

    The arithmetic's precision is what the description says: bfloat16 for a file of that dtype, else float32 (OpenVINO
    alone would take bfloat16 wherever the CPU has it).
    """

    format = "openvino"
    runtime = "OpenVINO"

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise missing("openvino", "export", error) from None
        properties = openvino.properties
        core = openvino.Core()
        try:
            model = core.read_model(path, path.with_suffix(".bin"))
        except Exception as error:  # of several types; the message is what counts
            raise damaged(path, self.runtime, error) from error
        text = model.get_rt_info([DESCRIPTION]).astype(str) if model.has_rt_info([DESCRIPTION]) else None
        description = read_description(text, path)
        precision = openvino.Type.bf16 if description.get("dtype") == "bf16" else openvino.Type.f32
        config = {properties.hint.inference_precision: precision}
        if threads is not None:
            config[properties.inference_num_threads] = threads
        try:
            self._model = core.compile_model(model, "CPU", config)
        except Exception as error:
            raise damaged(path, self.runtime, error) from error
        got = self._model.get_property(properties.hint.inference_precision)
        if got != precision:
            raise BackendError(
                f"{path} computes in {precision.get_type_name()}, which OpenVINO does not do on this CPU; export the "
                f"model with --dtype fp32."
            )
        super().__init__(path, str(openvino.__version__), description)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        results = self._model([images])
        # OpenVINO reuses its buffers in the next call
        return [np.array(results[output]) for output in self._model.outputs]
