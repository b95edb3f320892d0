"""Every fused kernel, at released widths, through Triton's compiler and ptxas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {90: 227 << 10}
"""Bytes of shared memory that a program may have, by compute capability (NVIDIA's programming guide)."""
STACK = 512
"""Bytes a thread may spill. Those that do at all are backward passes in float32, which nobody trains in for speed."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [90])
def test_every_kernel_compiles(capability: int) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compiled_kernels.py")
    run = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({(facts["file"], facts["kernel"]) for facts in found}) >= 15
    for facts in found:
        assert facts["shared"] <= SHARED[capability], facts
        assert facts["stack"] <= STACK, facts
        if "bfloat16" in facts["of"] and "backward" not in facts["kernel"]:
            assert facts["stack"] == 0, facts
