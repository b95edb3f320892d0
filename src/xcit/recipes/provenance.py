"""Which code ran where, by which command: what a result depends on besides its settings."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xcit.files import write_atomic
from xcit.inference.devices import describe_device
from xcit.recipes.run_folder import RunFolder
from xcit.recipes.settings import RunConfig

PACKAGES = ("xcit", "torch", "torchvision", "lightning", "timm", "scikit-learn", "numpy", "pillow")


def environment(device: torch.device) -> dict[str, str]:
    """Return versions and machine."""
    commit = code_commit()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **({"commit": commit} if commit else {}),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "device": describe_device(device),
    }


def code_commit() -> str:
    """Return the commit of the package's source tree, with "+" if files differ from it; "" if it is installed."""
    spec = find_spec("xcit")
    try:
        folder = Path(spec.origin if spec and spec.origin else "").resolve().parent
        commit = _git(folder, "rev-parse", "HEAD")
        return commit[:12] + ("+" if _git(folder, "status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def note_session(run: RunFolder, config: RunConfig, device: torch.device) -> None:
    """Add this start, or this going on, to the run's provenance.

    Raises:
        ExportError: the file cannot be written.
    """
    content: dict[str, Any] = {"sessions": []}
    if run.resume and run.provenance.exists():
        try:
            found = json.loads(run.provenance.read_text(encoding="utf-8"))
            content = found | {"sessions": list(found["sessions"])}
        except (OSError, ValueError, TypeError, KeyError):
            content = {"sessions": [], "note": "an earlier provenance file could not be read"}
    content["sessions"].append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "recipe": config.recipe,
            "seed": config.seed,
            "processes": config.world_size,
            "environment": environment(device),
        }
    )
    write_atomic(run.provenance, (json.dumps(content, indent=2) + "\n").encode())


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
