"""Exported models in use: one call, whichever runtime runs the file.

``xcit export`` writes files for four runtimes. Each file carries a description of itself (task, sizes that it takes,
preparation of images, names of classes), so that nothing else is needed to use it:

    format        file        runtime
    onnx          .onnx       onnxruntime
    openvino      .xml, .bin  OpenVINO
    torch-export  .pt2        torch
    executorch    .pte        ExecuTorch

Legend: B batch, C channels, H x W the image.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from xcit.errors import BackendError, CheckpointError, ConfigError, ShapeError

DESCRIPTION = "xcit"
"""Under which the description stands in a file: ONNX metadata, OpenVINO rt_info, a method of ExecuTorch's."""
DESCRIPTION_FILE = "xcit.json"
"""Under which it stands among the extra files of torch's archive."""
DESCRIPTION_VERSION = 1

FORMAT_OF_SUFFIX = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch-export", ".pte": "executorch"}
"""What a file is, by how its name ends."""
SUFFIXES = {format: suffix for suffix, format in FORMAT_OF_SUFFIX.items()}


ARITHMETIC = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8, the rest float32"}
"""What a file's dtype means, where its runtime does not decide otherwise."""


class Session(ABC):
    """An exported model, loaded in its runtime. ``open_session`` makes one.

    Attributes:
        path: the file.
        format: "onnx", "openvino", "torch-export" or "executorch".
        runtime: the runtime's name.
        version: the runtime's version.
        description: what the file says of itself, as ``xcit.deploy.export`` wrote it.
        arithmetic: in which types the runtime computes here, in words.
    """

    format: str
    runtime: str

    def __init__(self, path: Path, version: str, description: Mapping[str, Any]) -> None:
        self.path = path
        self.version = version
        self.description = dict(description)
        self.arithmetic = ARITHMETIC.get(str(self.description.get("dtype")), "not known")

    def __call__(self, images: Float[np.ndarray, "batch chans height width"]) -> tuple[np.ndarray, ...]:
        """Return the model's outputs, each float32 with B as its first axis.

        Args:
            images: float32 (B, C, H, W), prepared as the description says.

        Raises:
            ShapeError: another shape or type than the file was made for; the message says which it takes.
            BackendError: the runtime fails on it.
        """
        self.check(images)
        try:
            return tuple(np.asarray(output) for output in self._run(np.ascontiguousarray(images)))
        except Exception as error:  # the runtimes' exceptions have no common base
            raise BackendError(
                f"{self.runtime} {self.version} fails on {self.path} for images {tuple(images.shape)} "
                f"({_reason(error)}); export the model again, with a fixed --size, or for another runtime."
            ) from error

    def check(self, images: np.ndarray) -> None:
        """Raise ShapeError for images that the file was not made for."""
        made_for = self.description["input"]
        batch, chans, height, width = (made_for[key] for key in ("batch", "channels", "height", "width"))
        fits = (
            images.ndim == 4
            and images.dtype == np.float32
            and images.shape[1] == chans
            and images.shape[0] == (batch or max(1, images.shape[0]))
            and images.shape[2] == (height or max(made_for["smallest"], images.shape[2]))
            and images.shape[3] == (width or max(made_for["smallest"], images.shape[3]))
        )
        if fits:
            return
        size = f"{height} x {width} px" if height else f"any size of {made_for['smallest']} px and more a side"
        number = "any number" if batch is None else str(batch)
        raise ShapeError(
            f"{self.path} takes float32 images (batch, {chans}, H, W): {number} at once, {size}; got "
            f"{tuple(images.shape)}, {images.dtype}. Export it again with another --size or --batch for others."
        )

    @abstractmethod
    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for images that fit."""


def is_artefact(path: str | os.PathLike[str]) -> bool:
    """Return whether a name is, by its ending, that of an exported file."""
    return Path(path).suffix.lower() in FORMAT_OF_SUFFIX


def open_session(path: str | os.PathLike[str], *, threads: int | None = None) -> Session:
    """Load an exported file in its runtime, on the CPU.

    A ``.pt2`` holds a program that torch rebuilds: pickled parts in it are refused, but open those files only that come
    from somebody you trust. The same goes for ``.pte``.

    Args:
        path: what ``xcit export`` wrote; of OpenVINO's two files the ``.xml``.
        threads: that the runtime may use; None for its own choice. torch's and ExecuTorch's threads belong to the whole
            process: torch gets them back after each call, ExecuTorch's stay set.

    Raises:
        ConfigError: another ending, or fewer than one thread.
        BackendError: the runtime is not installed (the message names the extra), or cannot run the file's precision on
            this machine.
        CheckpointError: no such file, a damaged one, or one without description, which xcit did not write.
    """
    path = Path(path).expanduser()
    format = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if format is None:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in FORMAT_OF_SUFFIX.items())
        raise ConfigError(f"{path} does not end as an exported file does: {known}.")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be 1 or more.")
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name an exported file.")
    if format == "onnx":
        from xcit.inference.runtime_onnx import OnnxSession

        return OnnxSession(path, threads)
    if format == "openvino":
        from xcit.inference.runtime_openvino import OpenVinoSession

        return OpenVinoSession(path, threads)
    if format == "torch-export":
        from xcit.inference.runtime_torch import TorchSession

        return TorchSession(path, threads)
    from xcit.inference.runtime_executorch import ExecuTorchSession

    return ExecuTorchSession(path, threads)


def read_description(text: Any, path: Path) -> dict[str, Any]:
    """Read what a file says of itself.

    Args:
        text: the JSON, or None where the file has none.
        path: of the file, for messages.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a newer xcit.
    """
    if text is None:
        raise CheckpointError(
            f"{path} does not say what it is, as a file that xcit export wrote would; export the model again."
        )
    try:
        description = json.loads(text)
        version = int(description["format_version"])
        made_for = description["input"]
        complete = {"batch", "channels", "height", "width", "smallest"} <= made_for.keys()
    except (TypeError, ValueError, KeyError, AttributeError):
        version, complete = 0, False
    if not complete:
        raise CheckpointError(f"{path} has a damaged description of itself; export the model again.")
    if version > DESCRIPTION_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this xcit reads up to {DESCRIPTION_VERSION}. Update xcit to run it."
        )
    return description


def missing(package: str, extra: str, error: ImportError) -> BackendError:
    """Return the error for a runtime that is not installed, or that cannot be loaded."""
    if isinstance(error, ModuleNotFoundError):
        return BackendError(f'{package} is not installed; pip install "xcit[{extra}]" brings it.')
    return BackendError(f'{package} cannot be loaded ({error}); install it again: pip install "xcit[{extra}]".')


def damaged(path: Path, runtime: str, error: Exception) -> CheckpointError:
    """Return the error for a file that its runtime cannot read, with the runtime's reason in one line."""
    return CheckpointError(f"{path} cannot be read by {runtime} ({_reason(error)}): it is damaged, or no such file.")


def _reason(error: Exception) -> str:
    """Return an error's last line, where the runtimes say what the matter is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200].rstrip(".") if lines else type(error).__name__
