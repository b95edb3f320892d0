"""Budgets of memory are kept, as the operating system counts it, from the least that is said to work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xcit.bench.giant import write_pattern

if sys.platform != "linux":
    pytest.skip("the system's count is read from /proc", allow_module_level=True)

RUN = """
import json, sys
import torch
import xcit
from xcit.bench.anonymous import AnonymousPeak
from xcit.inference.giant import GiantImages

path, kind, name, extra, out = sys.argv[1:]
torch.manual_seed(0)
scaling = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
if kind == "segment":
    model = xcit.create_segmenter(name, num_classes=20, head="upernet", channels=64)
else:
    model = xcit.create_model(name)
giant = GiantImages(model, memory="100GiB", device="cpu", **scaling)
del model
budget = giant.plan(path, kind).least + (int(extra) << 20)
giant._budget = budget
plan = giant.plan(path, kind)
with AnonymousPeak() as peak:
    giant.segment(path, out) if kind == "segment" else giant.features(path, out)
print(json.dumps({"budget": budget, "peak": peak.highest, "on_disk": plan.on_disk, "band": plan.band}))
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("giant") / "image.tif"
    write_pattern(path, 1500, 4000)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "extra"),
    [
        ("features", "xcit_nano_12_p8", 0),
        ("features", "xcit_nano_12_p8", 100),
        ("features", "xcit_nano_12_p8", 2000),
        ("features", "xcit_small_12_p16", 0),
        ("segment", "xcit_nano_12_p16", 0),
        ("segment", "xcit_nano_12_p16", 200),
    ],
)
def test_a_budget_is_kept(kind: str, name: str, extra: int, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tif"
    command = [sys.executable, "-c", RUN, str(image), kind, name, str(extra), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["peak"] <= found["budget"], found
    if extra in (0, 2000):
        assert found["on_disk"] == (extra == 0)
    assert list(tmp_path.iterdir()) == [out]
