"""Peak memory of one competitor in a process of its own: what the system sees, whichever library allocates.

On a CPU it is the resident set, from Linux' high-water mark, which is set back just before what is measured. What the
process holds by then is not counted: weights, the runtime's copies of them, code. A runtime that reserves memory when
it loads a file has it not counted; one that does so at its first call, and keeps it, has it counted. PyTorch is called
once before, so that neither the compiler's memory nor what is set up once is counted, and gives back what it can.
glibc is kept from raising the size from which on freed memory goes back at once: what it kept for later would be
counted as well, by chance, up to half of a small peak.
On CUDA it is the peak of torch's allocator.

``python -m xcit.bench.deploy_memory JSON`` is the child; its last line is the answer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from xcit.bench.deploy_cases import DeployCase, Entry
from xcit.errors import BackendError

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIVE_BACK_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""glibc's own starting value, which it leaves alone if told."""


class Peak(NamedTuple):
    """Of one call, in MiB."""

    step_mib: float
    """The most above what the process had before the call."""
    process_mib: float
    """The most that the process had meanwhile, all in all."""


@dataclass(frozen=True)
class Request:
    """What the child is asked for; ``file`` is what onnxruntime or OpenVINO runs, "" for PyTorch."""

    case: DeployCase
    entry: Entry
    dtype: str
    device: str
    threads: int
    file: str = ""


def measure_apart(request: Request) -> Peak | None:
    """Measure a competitor's peak in a new process.

    Returns:
        The peak, or None if the system killed the process: it did not fit into memory.

    Raises:
        BackendError: the child failed, with its last words.
    """
    command = [sys.executable, "-m", "xcit.bench.deploy_memory", json.dumps(asdict(request))]
    environment = os.environ | GIVE_BACK_AT_ONCE
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode in (-9, 137):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BackendError(f"The memory of {request.entry} in {request.case} could not be measured: {said}")
    answer = json.loads(lines[-1])
    return None if answer is None else Peak(*answer)


def measure_here(request: Request) -> Peak | None:
    """Measure a competitor's peak in this process, which should do nothing else.

    Returns:
        The peak, or None if the device's memory is too small.

    Raises:
        BackendError: the CPU's memory on another system than Linux.
    """
    import torch

    from xcit.bench import deploy_models, deploy_runtimes
    from xcit.inference.devices import is_out_of_memory

    torch.set_num_threads(request.threads)
    entry, case = request.entry, request.case
    device = torch.device(request.device)
    if device.type == "cpu" and not RESET.exists():
        raise BackendError("A process's peak memory is measured on Linux only; leave it out with --no-memory.")
    images = deploy_models.make_images(entry.image_size, case.batch_size)
    if request.file:
        step = deploy_runtimes.file_step(Path(request.file), images, request.threads)
    else:
        module = deploy_models.build(entry.source, entry.model, entry.image_size)
        if case.mode == "training":
            labels = deploy_models.make_labels(case.batch_size)
            step = deploy_runtimes.training_step(module, images, labels, entry.runtime, request.dtype, device)
        else:
            step = deploy_runtimes.forward_step(module, images, entry.runtime, request.dtype, device)
        try:
            step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        # gradients and all else that a step leaves behind and the next one frees
        module.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return Peak((peak - before) / MIB, peak / MIB)
    give_back()
    RESET.write_text("5")
    before = status_bytes("VmRSS")
    step()
    peak = status_bytes("VmHWM")
    return Peak((peak - before) / MIB, peak / MIB)


def give_back() -> None:
    """Return the allocator's free memory to the system, so that using it again counts."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim:
        trim(0)


def status_bytes(name: str) -> int:
    """Return a figure of this process as Linux gives it, such as VmRSS or VmHWM, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    assert match, name
    return int(match[1]) * 1024


def main() -> None:
    """Answer one request."""
    fields = json.loads(sys.argv[1])
    request = Request(**{**fields, "case": DeployCase(**fields["case"]), "entry": Entry(**fields["entry"])})
    print(json.dumps(measure_here(request)))


if __name__ == "__main__":
    main()
