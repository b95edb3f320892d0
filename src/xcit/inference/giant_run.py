"""One giant image with one task: what is open while it is gone through, and where tokens and results go.

Legend: H x W the image; p the patch.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xcit.data.large_image import open_large_image
from xcit.errors import ConfigError
from xcit.inference.giant_outputs import Sink, sink
from xcit.inference.giant_plan import Plan
from xcit.inference.giant_stem import ArrayImage, Windows, image_rows
from xcit.inference.giant_stream import Processes, Progress, Stream
from xcit.inference.giant_tokens import TokenGrid
from xcit.inference.giant_work import WorkFolder, fingerprint
from xcit.inference.segment_windows import LEAST
from xcit.models.folded_models import FoldedTrunk
from xcit.models.row_maps import RowMap
from xcit.models.segmentation import SegmentationModel

Source = str | os.PathLike[str] | np.ndarray | Windows
"""A file that ``open_large_image`` reads, an array (H, W) or (H, W, bands), or an opened large image."""

_log = logging.getLogger("xcit")


@dataclass(frozen=True)
class Setup:
    """What all runs of one model have in common.

    Attributes:
        model: the folded model.
        trunk: its backbone, or itself.
        device: where it runs.
        mean: of each band.
        std: likewise.
        work: folder for tokens; None for one beside the result.
        fresh: leave aside what a stopped run has left.
        progress: is told how far a run is.
        processes: who shares the rows.
    """

    model: nn.Module
    trunk: FoldedTrunk
    device: torch.device
    mean: list[float]
    std: list[float]
    work: Path | None
    fresh: bool
    progress: Progress
    processes: Processes

    def image_rows(self, image: Windows, task: str) -> RowMap:
        """Return an image's rows as the model takes them, for a task."""
        dtype = next(self.trunk.parameters()).dtype
        least = LEAST if task == "segment" else 1
        return image_rows(image, self.mean, self.std, dtype=dtype, device=self.device, least=least)


class Run:
    """One image with one task; a context manager.

    Args:
        setup: of the model.
        image: what is read.
        rows: of it, as the model takes them.
        plan: what it takes.
        task: what is done, for the name of what is kept.
        facts: what else the result depends on.
        outputs: the results' files.
        extra: as of ``Stream``.

    Attributes:
        setup: as given.
        plan: likewise.
        size: (H, W).
        stream: the run through the layers.
    """

    def __init__(
        self,
        setup: Setup,
        image: Windows,
        rows: RowMap,
        plan: Plan,
        task: str,
        facts: dict[str, Any],
        outputs: Sequence[Path],
        extra: float,
    ) -> None:
        self.setup, self.plan, self.size = setup, plan, image.size
        self._georeference = getattr(image, "georeference", None)
        self._work = self._work_folder(image, task, facts, outputs) if plan.on_disk else None
        try:
            self.stream = Stream(
                setup.trunk,
                rows,
                plan,
                setup.device,
                work=self._work,
                processes=setup.processes,
                progress=setup.progress,
                extra=extra,
            )
        except BaseException:
            if self._work is not None:
                self._work.leave()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        self.stream.close()
        if self._work is None:
            return
        if kind is None:
            self._work.remove()
        elif self._work.leave():
            _log.info("What is done is kept in %s; the same command goes on with it.", self._work.path)

    def tokens(self, depth: int | None = None) -> TokenGrid:
        """Run the layers and return their tokens."""
        return self.stream.run(len(self.setup.trunk.blocks) if depth is None else depth, {})

    def sink(self, path: Any, shape: tuple[int, ...], dtype: Any, scale: tuple[float, float]) -> Sink:
        """Return where a result goes."""
        georeference = None if self._georeference is None else self._georeference.scaled(*scale)
        wanted = self.stream.processes.rank == 0
        return sink(None if path is None else Path(path), shape, dtype, georeference, wanted=wanted)

    def share(self, stride: int, height: int) -> tuple[int, int]:
        """Return the rows of a map of some stride that are this process's."""
        p, stream = self.setup.trunk.patch_size, self.stream
        return stream.first * p // stride, height if stream.last == self.plan.grid[0] else stream.last * p // stride

    def _work_folder(self, image: Windows, task: str, facts: dict[str, Any], outputs: Sequence[Path]) -> WorkFolder:
        setup, plan = self.setup, self.plan
        key = fingerprint(
            setup.model,
            task=task,
            image=identity(image),
            mean=setup.mean,
            std=setup.std,
            plan=[plan.grid, plan.band, plan.stem_band],
            process=[setup.processes.rank, setup.processes.size],
            **facts,
        )
        if setup.work is not None:
            folder = setup.work / f"{key}.xcit-tokens"
        else:
            beside, name = (outputs[0].parent, outputs[0].stem) if outputs else (Path(), "xcit")
            folder = beside / f".{name}.{key}.xcit-tokens"
        work = WorkFolder(folder, num_bytes=plan.disk_bytes, fresh=setup.fresh or setup.processes.size > 1)
        if work.done is not None:
            _log.info("Going on after layer %d, from %s.", work.done.layers, folder)
        return work


def opened(stack: ExitStack, image: Source, options: dict[str, Any]) -> Windows:
    """Return what an image is read by; a file is closed with the stack.

    Raises:
        ConfigError: options for what is no file.
        DataError: a file that cannot be read.
    """
    if isinstance(image, (str, os.PathLike)):
        return stack.enter_context(open_large_image(image, **options))
    if options:
        raise ConfigError(f"{', '.join(sorted(options))} are for files; this image is open already.")
    return ArrayImage(image) if isinstance(image, np.ndarray) else image


def identity(image: Windows) -> list[Any]:
    """Return what tells an image from others, such that a run can be gone on with."""
    path = getattr(image, "path", None)
    if path is None:
        checksum = hashlib.sha256()
        for top in range(0, image.size[0], 64):
            window = image.read(top, 0, min(64, image.size[0] - top), image.size[1])
            checksum.update(np.ascontiguousarray(window).reshape(-1).view(np.uint8).data)
        return [list(image.size), checksum.hexdigest()]
    status = Path(path).stat()
    chosen = [getattr(image, "level", 0), repr(getattr(image, "_bands", None)), image.channels]
    return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns, list(image.size), chosen]


def scaling(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Return the mean and the deviation of each band: those that are given, or those that the weights expect.

    Raises:
        ConfigError: there are none, or not as many as bands.
    """
    config: dict[str, Any] = model.config  # type: ignore[assignment]
    chans = config["backbone"]["in_chans"] if isinstance(model, SegmentationModel) else config["in_chans"]
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    found = [list(given or cfg.get(name) or ()) for name, given in (("mean", mean), ("std", std))]
    if not all(found):
        raise ConfigError(
            f"The weights do not say which mean and deviation the image's {chans} bands should have; give mean and std "
            f"(--mean, --std), {chans} numbers each, in units of the image's white."
        )
    if any(len(each) != chans for each in found) or min(found[1]) <= 0:
        raise ConfigError(
            f"mean is {found[0]} and std {found[1]}; the model takes {chans} bands, give a number for each, those of "
            f"std above 0."
        )
    return found[0], found[1]
