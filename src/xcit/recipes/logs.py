"""A run's figures on disk as they come, and to whom else they are told."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcit.errors import BackendError, ExportError
from xcit.files import write_atomic
from xcit.recipes.settings import LogConfig

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

TIMING = "timing"
"""Key of what differs from one run to the next even where all else is bitwise the same."""

_log = logging.getLogger("xcit")


class MetricsLog:
    """A file of JSON lines that only grows, and that a resumed run takes back to where its state was saved.

    Each row is handed to the system at once and whole, so that it outlives the process, however that ends; ``position``
    waits for the disk too. A state that is saved with ``position``, and after a restart ``rewind`` to it, leave every
    row in the file exactly once. Numbers are written so that reading them gives the same float; one that is not finite,
    which JSON does not have, is written as null.

    Args:
        path: the file; it is made with its first row. The torn last line of an earlier crash is removed.

    Raises:
        ExportError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._truncate(_after_last_line(path))

    def log(self, row: Mapping[str, Any], *, timing: Mapping[str, float] | None = None) -> None:
        """Append a row.

        Args:
            row: what the run alone decides.
            timing: what the machine does, such as images a second; stands under the key ``timing``.

        Raises:
            ExportError: the disk is full, or the like; the file keeps its rows so far.
        """
        content = dict(row) | ({TIMING: dict(timing)} if timing else {})
        data = (json.dumps(_finite(content), ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(file).st_size
                try:
                    _write_all(file, data)
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(file, size)  # half a line would spoil the next one
                    raise
            finally:
                os.close(file)
        except OSError as err:
            raise _not_written(self.path, err) from err

    def position(self) -> int:
        """Return where the file ends, once everything before is on the disk; a saved state keeps it.

        Raises:
            ExportError: the disk does not take it.
        """
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return 0  # no row yet
        except OSError as err:
            raise _not_written(self.path, err) from err
        try:
            os.fsync(file)
            return os.fstat(file).st_size
        except OSError as err:
            raise _not_written(self.path, err) from err
        finally:
            os.close(file)

    def rewind(self, position: int) -> None:
        """Remove all rows after a position.

        Where rows before it are gone, since somebody removed or replaced the file, a warning says so; the run itself
        does not need them.

        Raises:
            ExportError: the file cannot be written.
        """
        end = _after_last_line(self.path, position)
        if end != position:
            _log.warning("%s lacks rows of before the run was stopped; it was changed since.", self.path)
        self._truncate(end)

    def _truncate(self, size: int) -> None:
        try:
            if self.path.exists() and self.path.stat().st_size != size:
                os.truncate(self.path, size)
        except OSError as err:
            raise _not_written(self.path, err) from err


def _after_last_line(path: Path, limit: int | None = None) -> int:
    """Return where the last complete line ends, of all or of so many bytes; 0 where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as err:
        raise ExportError(f"{path} cannot be read: {err.strerror}.") from err
    return content[:limit].rfind(b"\n") + 1


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _not_written(path: Path, err: OSError) -> ExportError:
    full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "make room, then go on by --resume" if full else "name a folder that you may write to"
    return ExportError(f"{path} could not be written: {err.strerror}; {advice}.")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- others ----------------------------------------------------------------------------------------------------------


def build_loggers(config: LogConfig, folder: Path) -> list[Logger]:
    """Return Lightning's loggers for those who are to hear of the run. A resumed run goes on in the same place.

    W&B and MLflow are asked for the run now, so that a missing login or a wrong address is known before the first step.

    Args:
        config: who.
        folder: for TensorBoard's event files, W&B's files, and the names that the services know the run by.

    Raises:
        BackendError: a package is not installed, or a service does not answer; with what to do.
        ExportError: the folder cannot be written.
    """
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    loggers: list[Logger] = []
    if config.tensorboard:
        _need("tensorboard", "log.tensorboard")
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False))
    if config.wandb:
        _need("wandb", "log.wandb")
        own_id = _noted(folder / "wandb_run") or uuid.uuid4().hex[:8]
        folder.mkdir(parents=True, exist_ok=True)  # or W&B writes to the system's temporary folder
        wandb = WandbLogger(project=config.wandb, name=folder.parent.name, save_dir=folder, id=own_id, resume="allow")
        _ask("W&B", "log in by `wandb login`, or set WANDB_MODE=offline", lambda: wandb.experiment)
        _note(folder / "wandb_run", own_id)
        loggers.append(wandb)
    if config.mlflow:
        _need("mlflow", "log.mlflow")
        options: dict[str, Any] = {"run_name": folder.parent.name, "tracking_uri": config.mlflow}
        advice = f"see whether {config.mlflow} is its address"
        mlflow = _ask("MLflow", advice, lambda: MLFlowLogger("xcit", **options, run_id=_noted(folder / "mlflow_run")))
        _note(folder / "mlflow_run", _ask("MLflow", advice, lambda: mlflow.run_id))
        loggers.append(mlflow)
    return loggers


def _need(package: str, setting: str) -> None:
    if find_spec(package) is None:
        raise BackendError(f"{setting} needs a package that is not installed; install it by: pip install {package}")


def _ask(service: str, advice: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as err:  # its own, its network library's, or the system's
        reason = " ".join(str(err).split()) or type(err).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise BackendError(f"{service} does not take the run ({reason}); {advice}.") from err


def _noted(path: Path) -> str | None:
    """Return the name that a service knows the run by, if it was told of it before."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _note(path: Path, name: str) -> None:
    """Keep that name; of several processes the first alone talks to services."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0 and not path.exists():  # type: ignore[attr-defined]
        write_atomic(path, f"{name}\n".encode())
