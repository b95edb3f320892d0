"""Compile every fused kernel for a GPU that is not there: run as a script, it prints a JSON line a kernel.

Triton's interpreter takes much that its compiler refuses, and says nothing of registers. Compiling needs no device:
the driver is replaced by one that names the architecture, and every launch stops after ``ptxas``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from xcit.ops import kernels


class Named:
    """A driver of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def usage(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread, and the bytes it keeps on its stack because they do not suffice."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said.stdout)}
    return {"registers": found["reg"], "stack": found["stack"]}


def compile_instead_of_launching(capability: int) -> None:
    """Let every launch compile its kernel, and print what it takes, once."""
    driver.set_active(Named(capability))
    run, seen = jit.JITFunction.run, set()

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            facts = {"kernel": self.fn.__name__, "file": Path(self.fn.__code__.co_filename).stem, "of": case}
            facts |= {"shared": kernel.metadata.shared} | usage(kernel.asm["cubin"])
            sys.stdout.write(json.dumps(facts) + "\n")
        return kernel

    jit.JITFunction.run = compiled


case = ""


def tokens(B: int, N: int, C: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, N, C, dtype=dtype, requires_grad=True)


def chains(C: int, dtype: torch.dtype) -> None:
    """Residuals, norms, the network and the class token."""
    from xcit.ops.class_tokens import class_attention_core
    from xcit.ops.mlp import mlp
    from xcit.ops.residual_norm import residual_norm

    half = torch.bfloat16
    x, update = tokens(2, 196, C, dtype), tokens(2, 196, C, half)
    vector = torch.randn(C, requires_grad=True)
    new, found = residual_norm(
        x, update, vector, None, None, 1e-6, want="statistics", keep=torch.ones(2), kernels="triton"
    )
    (new.float().sum() + found.sum()).backward()
    new, found = residual_norm(x, update, vector, vector, vector, 1e-6, normed_dtype=half, kernels="triton")
    (new.float().sum() + found.float().sum()).backward()
    new, _ = residual_norm(x, update, vector, None, None, 1e-6, want="none", kernels="triton")
    new.float().sum().backward()
    weights = [torch.randn(shape, dtype=half, requires_grad=True) for shape in ((4 * C, C), (C, 4 * C))]
    mlp(tokens(2, 196, C, half), weights[0], None, weights[1], None, kernels="triton").sum().backward()
    with torch.no_grad():
        class_attention_core(
            torch.randn(2, 8, C),
            update,
            torch.randn(2, C, dtype=half),
            statistics=torch.randn(2, 196, 2),
            kernels="triton",
        )


def lpi(C: int, dtype: torch.dtype) -> None:
    from xcit.ops.lpi import LPITrainingWeights, LPIWeights, lpi_residual, lpi_residual_training

    x, vector = tokens(2, 196, C, dtype), torch.randn(C, requires_grad=True)
    taps = torch.randn(C, 1, 3, 3, requires_grad=True)
    with torch.no_grad():
        weights = LPIWeights(vector, vector, 1e-6, taps, vector, vector, vector, taps, vector, vector)
        lpi_residual(x, 14, 14, weights, kernels="triton")
    training = LPITrainingWeights(vector, vector, 1e-6, taps, vector, vector, vector, 1e-5, taps, vector, vector)
    lpi_residual_training(x, 14, 14, training, keep=torch.ones(2), kernels="triton").y.float().sum().backward()


def attention(C: int, dtype: torch.dtype) -> None:
    from xcit.ops.norm_moments import norm_moments
    from xcit.ops.second_moment import second_moment
    from xcit.ops.xca_core import xca_attention_core, xca_core

    h = C // 32 if C == 128 else C // 48
    packed, temperature = tokens(2, 196, 3 * C, dtype), torch.ones(h, 1, 1, requires_grad=True)
    xca_core(packed, temperature, kernels="triton").float().sum().backward()
    xca_attention_core(packed[..., : 2 * C], temperature, kernels="triton").sum().backward()
    x = tokens(2, 196, C, dtype)
    mean, second, _ = norm_moments(x, kernels="triton")
    (mean.sum() + second.sum()).backward()
    second_moment(x, kernels="triton").sum().backward()


def main() -> None:
    global case
    compile_instead_of_launching(int(sys.argv[1]))
    kernels.use_triton = lambda *args: None  # before the files that take it in by name
    for C in (128, 384):
        for dtype in (torch.bfloat16, torch.float32):
            for part in (chains, lpi, attention):
                case = f"{part.__name__} {C} {dtype}"
                part(C, dtype)


if __name__ == "__main__":
    main()
