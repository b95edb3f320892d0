"""Shapes in signatures are true: every public op and model verb runs with its annotations checked."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("checked_run.py")


def test_annotated_shapes_hold_and_wrong_ones_are_refused():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    *refused, last = done.stdout.splitlines()
    assert last == "checked"
    # each of these was given a wrong shape, and beartype, not our own check, stopped it
    for name in ("xca", "xca_tokens", "xca_covariance", "second_moment", "LPI", "forward", "forward_features"):
        assert f"refused {name}" in refused
