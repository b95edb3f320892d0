"""The folder that a run writes into: who may use it, where things are, and writing that survives a kill."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from xcit.errors import ConfigError, ExportError


@dataclass(frozen=True)
class RunFolder:
    """Names of what a training run leaves behind.

    Attributes:
        root: the folder.
        resume: whether an earlier run in it is gone on with; if not, it is replaced.
    """

    root: Path
    resume: bool = False

    @property
    def config(self) -> Path:
        """All settings, as YAML."""
        return self.root / "config.yaml"

    @property
    def model(self) -> Path:
        """The weights of the best epoch so far, in the form that ``create_model`` reads."""
        return self.root / "model.safetensors"

    @property
    def last_model(self) -> Path:
        """The weights after the last epoch, in that form."""
        return self.root / "model_last.safetensors"

    @property
    def ema_model(self) -> Path:
        """The averaged weights of their own best epoch, in that form."""
        return self.root / "model_ema.safetensors"

    @property
    def dino(self) -> Path:
        """Student and teacher of DINO with their heads, as its released checkpoints hold them."""
        return self.root / "dino_checkpoint.pth"

    @property
    def neighbours(self) -> Path:
        """Images and those that are most like them by their features, as a picture."""
        return self.root / "neighbours.png"

    @property
    def last(self) -> Path:
        """Everything that going on needs."""
        return self.root / "last.ckpt"

    @property
    def log(self) -> Path:
        """A line every few steps and one an epoch, as JSON."""
        return self.root / "metrics.jsonl"

    @property
    def provenance(self) -> Path:
        """Which code ran where, by which command."""
        return self.root / "provenance.json"

    @property
    def skipped(self) -> Path:
        """Images that could not be decoded, with the reasons."""
        return self.root / "skipped.csv"

    @property
    def loggers(self) -> Path:
        """What TensorBoard and the like write."""
        return self.root / "logs"

    @property
    def history(self) -> Path:
        """One row an epoch."""
        return self.root / "metrics.csv"

    @property
    def metrics(self) -> Path:
        """The final figures; written last, so that its presence says that the run is complete."""
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.root / "report.html"

    @property
    def curves(self) -> Path:
        """Loss and accuracy over the epochs, as a picture."""
        return self.root / "curves.png"

    @property
    def confusion(self) -> Path:
        """Which class was taken for which, as a picture."""
        return self.root / "confusion_matrix.png"

    @property
    def attention(self) -> Path:
        """Where the class token looks, as a picture."""
        return self.root / "attention.png"

    @property
    def heads(self) -> Path:
        """The same for each head, as a picture."""
        return self.root / "attention_heads.png"

    @property
    def samples(self) -> Path:
        """A few held-out images as files."""
        return self.root / "samples"

    @property
    def results(self) -> Path:
        """What a detector found in the images that it was judged by, in COCO's format."""
        return self.root / "results.json"

    @property
    def detections(self) -> Path:
        """Pictures of what a detector found."""
        return self.root / "detections"

    @property
    def segmentations(self) -> Path:
        """Pictures of what a segmenter saw, and of the masks."""
        return self.root / "segmentations"

    def clear(self) -> None:
        """Remove what an earlier run wrote, and nothing else; of a run that is gone on with, its unfinished files only.

        Raises:
            ExportError: a file cannot be removed.
        """
        # The settings go last: until then the folder still counts as a run that may be overwritten.
        finished = () if self.resume else (
            *self.samples.glob("*.png"), *self.detections.glob("*.jpg"), *self.segmentations.glob("*.jpg"),
            self.results, self.metrics, self.report, self.curves, self.confusion, self.attention,
            self.heads, self.neighbours, self.dino, self.last, self.model, self.last_model, self.ema_model,
            self.history, self.log, self.provenance, self.skipped, self.config,
        )  # fmt: skip
        try:
            if not self.resume:
                shutil.rmtree(self.loggers, ignore_errors=True)
            folders = (self.root, self.samples, self.detections, self.segmentations)
            unfinished = [path for folder in folders for path in folder.glob(".*.partial")]
            for path in (*unfinished, *finished):
                path.unlink(missing_ok=True)
        except OSError as err:
            raise ExportError(f"{err.filename} cannot be removed: {err.strerror}. Name another folder.") from err


def new_run(root: Path, *, overwrite: bool = False) -> RunFolder:
    """Make a folder for a new run. What an earlier one left in it stays until ``RunFolder.clear``.

    Args:
        root: the folder; it may exist if it is empty.
        overwrite: allow it to hold an earlier run.

    Raises:
        ConfigError: the folder is in use, or its name belongs to a file, or it holds something else than a run.
        ExportError: it cannot be made or written to.
    """
    run = RunFolder(root)
    try:
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file; name a folder that the run may write into.")
        if root.is_dir() and any(root.iterdir()):
            _check_occupied(run, overwrite)
        root.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ExportError(f"{root} cannot be used: {err.strerror}. Name a folder that you may write to.") from err
    if not os.access(root, os.W_OK | os.X_OK):
        raise ExportError(f"{root} is not writable. Name a folder that you may write to.")
    return run


def _check_occupied(run: RunFolder, overwrite: bool) -> None:
    if not run.config.exists():
        raise ConfigError(f"{run.root} holds files, but no run; name another folder with --out.")
    if not overwrite:
        resume = "" if run.metrics.exists() else f" go on with it by --resume {run.root},"
        raise ConfigError(
            f"{run.root} holds {'an unfinished' if resume else 'a'} run;{resume} replace it by --overwrite, or name "
            f"another folder with --out."
        )


def open_run(root: Path) -> RunFolder:
    """Return the folder of a run that stopped before its end.

    Raises:
        ConfigError: no such run, or it is complete.
    """
    run = RunFolder(root, resume=True)
    if not run.config.exists():
        raise ConfigError(f"{root} holds no run to go on with (there is no {run.config}).")
    if run.metrics.exists():
        raise ConfigError(f"The run in {root} is complete; its report is {run.report}.")
    return run


def epochs_done(run: RunFolder) -> int:
    """Return how many whole epochs a run has behind it."""
    try:
        return max(0, len(run.history.read_text(encoding="utf-8").splitlines()) - 1)  # the first line is the header
    except OSError:
        return 0
