"""The device that a model runs on: what the user asked for, or a stated choice."""

from __future__ import annotations

import logging
import re

import torch

from xcit.errors import BackendError, ConfigError

_log = logging.getLogger("xcit")
_logged: set[str] = set()


def choose_device(name: str = "auto") -> torch.device:
    """Return the device that a name means.

    Args:
        name: "cpu"; "cuda", or "cuda:1" for the second card; "mps"; or "auto": CUDA where there is a card, else MPS on
            Apple machines, else the CPU. What "auto" chose is logged once.

    Raises:
        ConfigError: no such kind of device.
        BackendError: the device is not available here, and why.
    """
    if name == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if chosen not in _logged:
            _logged.add(chosen)
            _log.info("Device: %s.", describe_device(torch.device(chosen)))
        return torch.device(chosen)
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if not match or (match[1] != "cuda" and match[2]):
        raise ConfigError(f"The device is {name!r}; it must be auto, cpu, cuda, cuda:<number> or mps.")
    kind, index = match[1], int(match[2] or 0)
    if kind == "cuda":
        _check_cuda(name, index)
    if kind == "mps" and not torch.backends.mps.is_available():
        built = "no Apple GPU" if torch.backends.mps.is_built() else "a PyTorch without MPS (Apple GPUs)"
        raise BackendError(f"The device 'mps' is not available: this machine has {built}. Use cpu or auto.")
    return torch.device(name)


def _check_cuda(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            reason = f"this PyTorch ({torch.__version__}) is built without it"
        else:
            reason = "PyTorch finds no card or no driver for it"
        raise BackendError(f"The device {name!r} is not available: {reason}. Use cpu or auto.")
    count = torch.cuda.device_count()
    if index >= count:
        cards = "one card, cuda:0" if count == 1 else f"{count} cards, cuda:0 to cuda:{count - 1}"
        raise BackendError(f"The device {name!r} is not available: this machine has {cards}.")


def describe_device(device: torch.device) -> str:
    """Return a device's name with what a person knows it by, e.g. "cuda (NVIDIA H200)" or "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "mps (Apple GPU)"
    return f"{device} ({torch.get_num_threads()} threads)"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is PyTorch's or Python's way to say that the memory does not suffice.

    On the CPU and on MPS it is a plain RuntimeError, known by its words alone.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
