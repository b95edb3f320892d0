"""The device that a model runs on: what the user asked for, or a stated choice."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

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


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory can still be had on a device; None where that cannot be told.

    Of the CPU it is what the system could free without swapping, and where the process is under a limit of its own
    (a container's, a batch job's) not more than is left of that. On CUDA, what PyTorch holds without using it counts.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    found = [n for n in (_system_bytes(), *_group_bytes()) if n is not None]
    return min(found) if found else None


def _system_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # macOS tells how much there is, not how much of it is free
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            continue
    return None


def _group_bytes(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Return what is left of each limit on the memory of the process's control groups, of either version."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for _, kinds, name in (line for line in lines if len(line) == 3):
        if kinds == "":
            top, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        inside = top / name.lstrip("/")
        for group in (inside, *inside.parents):  # in a container the name may be that of the machine outside
            if not group.is_relative_to(top):
                break
            try:
                most = (group / limit).read_text(encoding="ascii").strip()
                if most == "max":
                    continue
                statistics = dict(
                    line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
                )
                taken = int((group / used).read_text(encoding="ascii")) - int(statistics.get(cached, 0))
                found.append(max(0, int(most) - taken))
            except (OSError, ValueError):
                continue
    return found


def bytes_text(num_bytes: float) -> str:
    """Return an amount of memory for a sentence, such as "12.3 GiB" or "340 MiB"."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is PyTorch's or Python's way to say that the memory does not suffice.

    On the CPU and on MPS it is a plain RuntimeError, known by its words alone.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
