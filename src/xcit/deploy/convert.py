"""From a module to a file of another runtime: ONNX, OpenVINO, torch.export, ExecuTorch.

Every way goes through ``torch.export``: one graph of the module, of fixed sizes or with the batch, the height and the
width left open. What comes out is read by ``xcit.inference.runtimes.open_session``. Nothing is proved here; ``export``
does that.

Legend: B batch, C channels, H x W the image.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit import __version__
from xcit.errors import ConfigError, ExportError, UnknownNameError
from xcit.inference.runtimes import DESCRIPTION, DESCRIPTION_FILE, DESCRIPTION_VERSION, SUFFIXES, missing

if TYPE_CHECKING:
    from xcit.deploy.quantise import Quantiser

FORMATS = tuple(SUFFIXES)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
OFFERED = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "torch-export": ("fp32", "bf16"),
    "executorch": ("fp32",),
}
"""Which dtypes a format is written in: those that its runtime computes on a CPU, each proved by a test."""
REASONS = {
    ("onnx", "bf16"): "onnxruntime has no bfloat16 matrix product on CPUs",
    ("torch-export", "fp16"): "torch computes float16 on CPUs without kernels of its own for it",
    ("executorch", "fp16"): "only float32 is proved with ExecuTorch's XNNPACK",
    ("executorch", "bf16"): "XNNPACK has no bfloat16 layers",
    ("torch-export", "int8"): "torch has int8 kernels on CPUs for graphs alone that it compiles where they run",
    ("executorch", "int8"): "only float32 is proved with ExecuTorch's XNNPACK",
}
ALTERNATIVES = {"bf16": "openvino or torch-export", "fp16": "onnx or openvino", "int8": "onnx or openvino"}
OPEN = ("batch", "size")
"""What can be left open: how many images, and their height and width."""
_IN_TYPE = {("onnx", "fp16"), ("torch-export", "bf16")}
"""Pairs whose graph itself is of that type. OpenVINO's stores weights in float16 and gets its arithmetic at loading."""
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "torch-export": (),
    "executorch": ("executorch.exir", "executorch.runtime"),
}
_WIDER = 32
"""Pixels by which an example is widened so that its height and width differ."""
_LARGEST_ONNX = 2**31 - 1
"""Bytes of one protocol buffer."""


class _Traced(NamedTuple):
    """A module on its way into a file."""

    program: torch.export.ExportedProgram
    outputs: list[str]
    description: str
    """JSON."""


def check_pair(format: str, dtype: str) -> None:
    """Refuse what is not offered, with the reason.

    Raises:
        UnknownNameError: no such format or dtype.
        ConfigError: the two do not go together.
    """
    if format not in OFFERED:
        raise UnknownNameError("format", str(format), FORMATS, f"There are {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", str(dtype), DTYPES, f"There are {', '.join(DTYPES)}.")
    if dtype not in OFFERED[format]:
        raise ConfigError(
            f"{dtype} is not offered for {format}: {REASONS[format, dtype]}. Take {' or '.join(OFFERED[format])}, or "
            f"{ALTERNATIVES[dtype]} for {dtype}."
        )


def write_artefact(
    module: nn.Module,
    example: Float[Tensor, "batch chans height width"],
    path: Path,
    *,
    format: str,
    dtype: str = "fp32",
    dynamic: Collection[str] = (),
    smallest: int = 1,
    output_names: Sequence[str] | None = None,
    description: Mapping[str, Any] | None = None,
    calibration: Sequence[np.ndarray] | None = None,
) -> list[Path]:
    """Write any module that takes images as a file for another runtime.

    Args:
        module: takes one float32 tensor (B, C, H, W), returns a tensor or a list or tuple of them. It is used in eval
            mode, on the CPU, and stays as it is.
        example: images; what is not in ``dynamic`` is fixed at their sizes.
        path: where to; ends as the format's files do. An existing file is replaced.
        format: "onnx", "openvino", "torch-export" or "executorch".
        dtype: "fp32", "fp16", "bf16" or "int8", of ``OFFERED[format]``. Inputs and outputs stay float32.
        dynamic: what is left open, of "batch" and "size" (height and width).
        smallest: least height and width, in pixels, that an open size may take.
        output_names: one an output; None for "output", or "output0", "output1", ...
        description: what else the file says of itself, as JSON can hold it.
        calibration: for int8 alone: images as the module gets them, float32 (C, H, W) each. All layers that can be are
            quantised; ``quantiser`` leaves the choice.

    Returns:
        The files: the path, and OpenVINO's ``.bin`` beside it.

    Raises:
        UnknownNameError, ConfigError: as ``check_pair``; another suffix; something open that the format must know;
            int8 without calibration, or calibration without int8.
        BackendError: a package that writes the format is not installed; the message names the extra.
        ExportError: the module cannot be put into that format, or does not fit into a file of it.
        OSError: no space, no permission.
    """
    check_pair(format, dtype)
    check_open(format, dynamic)
    check_packages(format, dtype)
    if path.suffix != SUFFIXES[format]:
        raise ConfigError(f"{path.name} does not end in {SUFFIXES[format]}, as {format} files do; name it so.")
    if dtype != "int8" and calibration is not None:
        raise ConfigError(f"Images to calibrate on are for int8; leave them out for {dtype}.")
    if dtype == "int8":
        if not calibration:
            raise ConfigError("int8 needs images to calibrate on; give some.")
        made = quantiser(
            module, example, format=format, dynamic=dynamic, smallest=smallest, output_names=output_names,
            description=description, calibration=calibration,
        )  # fmt: skip
        with _quiet():
            return made.write(path, made.layers, calibration, None if "batch" in dynamic else len(example))
    traced = _traced(module, example, format, dtype, dynamic, smallest, output_names, description)
    writer = {"onnx": _onnx, "openvino": _openvino, "torch-export": _torch, "executorch": _executorch}[format]
    with _quiet():
        return writer(traced.program, path, dtype, traced.outputs, traced.description)


def quantiser(
    module: nn.Module,
    example: Float[Tensor, "batch chans height width"],
    *,
    format: str,
    calibration: Sequence[np.ndarray],
    dynamic: Collection[str] = (),
    smallest: int = 1,
    output_names: Sequence[str] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Quantiser:
    """Return what writes a module with any choice of its layers in int8; arguments as for ``write_artefact``.

    Raises:
        ConfigError: a format without int8.
        BackendError: a package is not installed; the message names the extra.
        ExportError: the module cannot be put into that format, or its quantiser fails.
    """
    check_pair(format, "int8")
    check_packages(format, "int8")
    traced = _traced(module, example, format, "int8", dynamic, smallest, output_names, description)
    with _quiet():
        weights = {name: value for name, value in traced.program.state_dict.items() if isinstance(value, Tensor)}
        if format == "onnx":
            from xcit.deploy.quantise_onnx import OnnxQuantiser

            proto = _onnx_proto(traced.program, traced.outputs)
            return OnnxQuantiser(proto, weights, {DESCRIPTION: traced.description})
        from xcit.deploy.quantise_openvino import OpenVinoQuantiser

        model = openvino_model(traced.program, traced.outputs, traced.description)
        return OpenVinoQuantiser(model, weights, calibration, None if "batch" in dynamic else len(example))


def _traced(
    module: nn.Module,
    example: Tensor,
    format: str,
    dtype: str,
    dynamic: Collection[str],
    smallest: int,
    output_names: Sequence[str] | None,
    description: Mapping[str, Any] | None,
) -> _Traced:
    graph_type = DTYPES[dtype] if (format, dtype) in _IN_TYPE else None
    artefact = _Artefact(module, None)
    example = example.detach().to("cpu", torch.float32)
    with torch.no_grad(), _in_eval_mode(artefact):
        names = _names(artefact(example), output_names)
        if graph_type is not None:  # a copy, since the caller's module keeps its type
            artefact = _Artefact(copy.deepcopy(module).eval(), graph_type)
        with _quiet():
            program = _program(artefact, example, dynamic, format)
    batch, chans, height, width = example.shape
    described = {
        "format_version": DESCRIPTION_VERSION,
        "xcit": __version__,
        "format": format,
        "dtype": dtype,
        "input": {
            "batch": None if "batch" in dynamic else batch,
            "channels": chans,
            "height": None if "size" in dynamic else height,
            "width": None if "size" in dynamic else width,
            "smallest": smallest,
        },
        "outputs": names,
    }
    return _Traced(program, names, json.dumps(described | dict(description or {})))


def check_packages(format: str, dtype: str = "fp32") -> None:
    """Import what writes and runs a format, so that what is missing is known before the work.

    (But NNCF, which takes seconds and wants to be imported quietly: it is only looked for.)

    Raises:
        BackendError: a package is not installed, or cannot be loaded; the message names the extra.
    """
    for module in _PACKAGES[format]:
        try:
            with _quiet():
                importlib.import_module(module)
        except ImportError as error:
            package = module.partition(".")[0]
            raise missing(package, "edge" if package == "executorch" else "export", error) from None
    if (format, dtype) == ("openvino", "int8") and find_spec("nncf") is None:
        raise missing("nncf", "export", ModuleNotFoundError("nncf"))


def check_open(format: str, dynamic: Collection[str]) -> None:
    """Refuse sizes left open where they cannot be.

    Raises:
        UnknownNameError: something else than "batch" and "size".
        ConfigError: the format needs it fixed.
    """
    for name in dynamic:
        if name not in OPEN:
            raise UnknownNameError("open size", str(name), OPEN, f"There are {' and '.join(OPEN)}.")
    if format == "executorch" and dynamic:
        raise ConfigError(
            f"ExecuTorch plans its memory for one shape, so a dynamic {' and '.join(sorted(dynamic))} is not offered "
            f"for it; give numbers, or take another format."
        )


class _Artefact(nn.Module):
    """A module whose inputs and outputs are float32 tensors, whatever it computes in, and outputs always a tuple."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module = module if dtype is None else module.to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.module(images if self.dtype is None else images.to(self.dtype))
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return tuple(output.to(torch.float32) for output in outputs)


def _names(outputs: Sequence[Tensor], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    if len(names) != len(outputs):
        raise ConfigError(f"There are {len(names)} output_names; the module has {len(outputs)} outputs.")
    return list(names)


def _program(
    artefact: _Artefact, example: Tensor, dynamic: Collection[str], format: str
) -> torch.export.ExportedProgram:
    """Return the module's graph.

    Raises:
        ExportError: torch cannot follow it.
    """
    axes: dict[int, Any] = {}
    if "batch" in dynamic:
        axes[0] = torch.export.Dim.DYNAMIC
        example = example.repeat(2, 1, 1, 1)[: max(2, len(example))]  # of one image torch would take the one for fixed
    if "size" in dynamic:
        axes[2] = axes[3] = torch.export.Dim.DYNAMIC
        if example.shape[2] == example.shape[3]:  # nor shall it take the width for the height
            example = F.pad(example, (0, _WIDER))
    try:
        return torch.export.export(artefact, (example,), dynamic_shapes=(axes or None,), strict=False)
    except Exception as error:  # of many kinds
        raise _cannot(format, "torch.export", error) from error


# --- the formats ------------------------------------------------------------------------------------------------------


def _onnx(program: torch.export.ExportedProgram, path: Path, dtype: str, names: list[str], text: str) -> list[Path]:
    proto = _onnx_proto(program, names)
    entry = proto.metadata_props.add()
    entry.key, entry.value = DESCRIPTION, text
    if proto.ByteSize() > _LARGEST_ONNX:
        raise ExportError(f"{path.name} would exceed 2 GiB, the most that one ONNX file holds; take --dtype fp16.")
    path.write_bytes(proto.SerializeToString())
    return [path]


def _onnx_proto(program: torch.export.ExportedProgram, names: list[str]) -> Any:
    try:
        written = torch.onnx.export(
            program, (), input_names=["images"], output_names=names, dynamo=True, external_data=False, verbose=False
        )
        assert written is not None
        proto = written.model_proto
    except Exception as error:
        raise _cannot("onnx", "torch.onnx", error) from error
    _name_axes(proto)
    return proto


def _name_axes(proto: Any) -> None:
    """Call the open axes what they are instead of torch's s77."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    named = {dims[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width")) if dims[i].dim_param}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in named:
                dim.dim_param = named[dim.dim_param]


def openvino_model(program: torch.export.ExportedProgram, names: Sequence[str], text: str) -> Any:
    """Return the graph as an OpenVINO model that says what it is.

    Raises:
        ExportError: OpenVINO cannot read the graph.
    """
    import openvino

    try:
        model = openvino.convert_model(program)
    except Exception as error:
        raise _cannot("openvino", "OpenVINO", error) from error
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    model.inputs[0].get_tensor().set_names({"images"})
    model.set_rt_info(text, [DESCRIPTION])
    return model


def _openvino(program: torch.export.ExportedProgram, path: Path, dtype: str, names: list[str], text: str) -> list[Path]:
    model = openvino_model(program, names, text)
    import openvino

    try:
        openvino.save_model(model, path, compress_to_fp16=dtype != "fp32")
    except RuntimeError as error:
        raise ExportError(f"{path} could not be written: {_line(error)}.") from error
    return [path, path.with_suffix(".bin")]


def _torch(program: torch.export.ExportedProgram, path: Path, dtype: str, names: list[str], text: str) -> list[Path]:
    program.example_inputs = None  # which would be stored
    buffer = io.BytesIO()  # torch reports a full disk as something else
    torch.export.save(program, buffer, extra_files={DESCRIPTION_FILE: text})
    path.write_bytes(buffer.getbuffer())
    return [path]


def _executorch(
    program: torch.export.ExportedProgram, path: Path, dtype: str, names: list[str], text: str
) -> list[Path]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={DESCRIPTION: text}
        )
        buffer = edge.to_executorch().buffer
    except Exception as error:
        raise _cannot("executorch", "ExecuTorch", error) from error
    path.write_bytes(buffer)
    return [path]


# --- inside -----------------------------------------------------------------------------------------------------------


def _cannot(format: str, who: str, error: Exception) -> ExportError:
    return ExportError(f"The model cannot be written as {format}; {who} says: {_line(error)}. Take another format.")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0][:300].rstrip(".:") if lines else "") or type(error).__name__


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' warnings and log lines to themselves: they are about their own insides."""
    levels = {name: logging.getLogger(name).level for name in ("torch", "torch.onnx", "onnxscript", "executorch")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
