"""The folder in which a giant image's tokens lie while it is gone through, so that a killed run can be gone on with.

After each layer stands which layers are done, in which file their result is, and the moments that the next one needs.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from xcit.errors import ConfigError, ExportError
from xcit.files import write_atomic
from xcit.inference.giant_tokens import TokensOnDisk
from xcit.ops.xca_moments import Moments

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Done(NamedTuple):
    """How far a run has come."""

    layers: int
    """XCA layers that are done; 0 when the tokens have just been made."""
    moments: Moments | None
    """Those that the next layer needs; None after the last."""


class WorkFolder:
    """A folder of tokens. Only one process at a time may be at it.

    Args:
        path: the folder.
        fresh: leave aside what a former run has left.

    Attributes:
        path: the folder.
        done: how far a former run had come; None to begin.

    Raises:
        ConfigError: another process is at it.
        ExportError: it cannot be written to, or is too full.
    """

    def __init__(self, path: Path, *, num_bytes: int, fresh: bool = False) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[bytes] = (path / "lock").open("wb")
        except OSError as error:
            raise ExportError(
                f"{path} could not be made: {error.strerror or error}; name a folder for the tokens (--work)."
            ) from error
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"Another process is going through the same image ({path}); wait for it, or name another folder "
                f"(--work)."
            ) from None
        if fresh:
            for file in path.iterdir():
                if file.name != "lock":
                    file.unlink()
        self.done = self._read()
        present = sum(file.stat().st_size for file in path.glob("*.tokens"))
        free = shutil.disk_usage(path).free
        if num_bytes - present > free:
            self.close()
            raise ExportError(
                f"The tokens take {num_bytes / 2**30:.1f} GiB in {path}, where {free / 2**30:.1f} GiB are free; make "
                f"room, name another folder (--work), or give more memory (--memory)."
            )

    def grid(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> TokensOnDisk:
        """Return the tokens of a name; where they are not there as they should be, the run is begun anew."""
        tokens = TokensOnDisk(self.path / f"{name}.tokens", shape, dtype)
        if not tokens.was_there:
            self.done = None
        return tokens

    def save(self, done: Done) -> None:
        """Note how far the run has come; the tokens must have been put on the disk."""
        arrays: dict[str, Any] = {"layers": done.layers}
        if done.moments is not None:
            arrays |= {
                "num_tokens": done.moments.num_tokens,
                "mean": done.moments.mean.cpu().numpy(),
                "second": done.moments.second.cpu().numpy(),
            }
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_atomic(self.path / "done.npz", file.getvalue())

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def leave(self) -> bool:
        """Let go of the folder after an error: it stays if there is something to go on with, which is returned."""
        if not (self.path / "done.npz").exists():
            self.remove()
            return False
        self.close()
        return True

    def close(self) -> None:
        """Let go of the folder, which stays."""
        with suppress(OSError):
            self._lock.close()

    def _read(self) -> Done | None:
        try:
            # of a damaged file np.load would leave the handle open
            content = io.BytesIO((self.path / "done.npz").read_bytes())
            with np.load(content, allow_pickle=False) as arrays:
                layers = int(arrays["layers"])
                if "second" not in arrays:
                    return Done(layers, None)
                mean, second = torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["second"])
                return Done(layers, Moments(int(arrays["num_tokens"]), mean, second))
        except FileNotFoundError:
            return None
        except Exception:  # whatever the damage provokes: it is begun again
            return None


def fingerprint(model: nn.Module, **facts: Any) -> str:
    """Return a checksum of all that the result depends on: the weights and what else is named."""
    checksum = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    state: dict[str, Tensor] = model.state_dict()
    for name in sorted(state):
        checksum.update(name.encode())
        checksum.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()[:16]
