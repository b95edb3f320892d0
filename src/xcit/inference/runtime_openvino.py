"""OpenVINO's files (``.xml`` and ``.bin``) in OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xcit.errors import BackendError
from xcit.inference.runtimes import DESCRIPTION, Session, damaged, missing, read_description


class OpenVinoSession(Session):
    """An ``.xml`` file, with the ``.bin`` of the same name beside it, in OpenVINO on the CPU.

    The arithmetic's precision is what the description says: bfloat16 for a file of that dtype, else float32 (OpenVINO
    alone would take bfloat16 wherever the CPU has it). In an int8 file whatever is not int8 is bfloat16 on a CPU that
    has it, and float32 on others: rounding to bfloat16 is less than int8's.
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
        dtype = description.get("dtype")
        has_bf16 = "BF16" in core.get_property("CPU", properties.device.capabilities)
        in_bf16 = dtype == "bf16" or (dtype == "int8" and has_bf16)
        precision = openvino.Type.bf16 if in_bf16 else openvino.Type.f32
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
        self.arithmetic = "bfloat16" if in_bf16 else "float32"  # of float16 weights too
        if dtype == "int8":
            self.arithmetic = f"int8, the rest {self.arithmetic}"

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        results = self._model([images])
        # OpenVINO reuses its buffers in the next call
        return [np.array(results[output]) for output in self._model.outputs]
