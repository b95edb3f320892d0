"""Images of any size, exactly: one XCiT over the whole image, in the memory that one allows.

The usual way with an image that does not fit is to cut it into tiles, each of which knows nothing of the others. An
XCiT need not: XCA wants sums over the tokens, LPI two rows beyond a band, class attention a softmax that can be
gathered in parts. So the image goes through layer by layer, a band of rows at a time, and what comes out is what the
model gives on the whole image, up to rounding. Tokens lie in memory, or in files where a budget wants it.

Legend: H x W the image; (h, w) its token grid, of patches p; C embed_dim; K classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from xcit.errors import CheckpointError, ConfigError
from xcit.inference.devices import choose_device
from xcit.inference.giant_heads import MARGIN, StreamedLogits, low_rows
from xcit.inference.giant_levels import run_to_levels, with_head
from xcit.inference.giant_outputs import take_all
from xcit.inference.giant_plan import Needs, Plan, make_plan, parse_bytes
from xcit.inference.giant_run import Run, Setup, Source, opened, scaling
from xcit.inference.giant_stem import Windows
from xcit.inference.giant_stream import (
    Alone,
    Processes,
    Progress,
    attention_rows,
    final_rows,
    map_rows,
    read_out,
)
from xcit.inference.giant_tokens import GridRows, TokenGrid
from xcit.inference.segment_image import Labelled, label_type, labelled_strips
from xcit.inference.segment_windows import LEAST
from xcit.models.folded_copy import folded_copy
from xcit.models.folded_models import FoldedPyramid, FoldedTrunk, FoldedXCiT
from xcit.models.pyramid import STRIDES, XCiTPyramid
from xcit.models.row_maps import RowMap, pooled_evenly
from xcit.models.segmentation import SegmentationModel
from xcit.models.xcit import XCiT

WRITING = 64 << 20
"""Bytes that writing results holds, about: blocks of rows that are not complete."""


class Classified(NamedTuple):
    """What a classifier says of a giant image."""

    logits: np.ndarray | None
    """(K,); None of a model without a head."""
    features: np.ndarray
    """(C,): the class token (or, of models that take it, the tokens' mean) after the final norm."""


class Attended(NamedTuple):
    """Where a classifier looks."""

    patches: np.ndarray | None
    """(h, w, heads) float32, as of ``attention_maps.ClassAttention`` with the heads last; None if written to a file."""
    own: np.ndarray
    """(heads,): the share of its attention that the class token keeps for itself."""


class Segmented(NamedTuple):
    """What each pixel is."""

    labels: np.ndarray | None
    """(H, W): classes; None if written to a file."""
    scores: np.ndarray | None
    """(H, W) float16: their probabilities; None if not asked for, or written to a file."""


class GiantImages:
    """Runs a model over images of any size, in bounded memory, as if each were a single input.

    Args:
        model: an ``XCiT``, an ``XCiTPyramid`` or a segmenter, in float32, float64 or bfloat16. It is folded
            (``xcit.deploy.fold``) and not changed.
        device: where layers run: "auto", "cpu", "cuda", ...; tokens stay in the CPU's memory, or on the disk.
        memory: that the whole process may take, in bytes or as "4GiB"; None for most of what is free.
        work: a folder for tokens that do not fit into it, and for going on after a kill; None for one beside the
            result, or in the current folder where there is none.
        fresh: begin anew, even if a run that was killed has left something to go on with.
        mean: of each band, in units of the image's white; None for what the weights expect.
        std: likewise.
        band: rows of tokens at once; None for what the memory allows.
        progress: is told what is going on, and the share of the whole that is done.
        processes: who shares the image's rows (``giant_processes.RowProcesses``); None for this process alone. The
            first has the result.

    Attributes:
        model: the folded model.
        device: where it runs.
        setup: what all runs have in common.

    Raises:
        ConfigError: no such model; numbers out of their range; a model whose weights do not say mean and deviation.
        ExportError: a variant that cannot be folded.

    Example:
        >>> giant = xcit.GiantImages(xcit.create_model("xcit_small_12_p8", pretrained=True), memory="3GiB")
        >>> giant.classify("scene.tif").logits
        >>> giant.features("scene.tif", "scene_features.zarr")
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str = "auto",
        memory: int | str | None = None,
        work: str | os.PathLike[str] | None = None,
        fresh: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        band: int | None = None,
        progress: Progress = lambda what, share: None,
        processes: Processes | None = None,
    ) -> None:
        self.device = choose_device(device)
        self._budget = None if memory is None else parse_bytes(memory)
        if band is not None and band < 1:
            raise ConfigError(f"band is {band}; it must be one row of tokens or more.")
        if not isinstance(model, (XCiT, XCiTPyramid, SegmentationModel)):
            raise ConfigError(f"Expected an XCiT, an XCiTPyramid or a segmenter; got {type(model).__name__}.")
        self.model = folded_copy(model).to(self.device)
        (self._trunk,) = (each for each in self.model.modules() if isinstance(each, FoldedTrunk))
        self._band = band
        self.setup = Setup(
            self.model,
            self._trunk,
            self.device,
            *scaling(model, mean, std),
            work=None if work is None else Path(work),
            fresh=fresh,
            progress=progress,
            processes=processes or Alone(),
        )

    # --- what can be had --------------------------------------------------------------------------------------------

    def classify(self, image: Source, **options: Any) -> Classified:
        """Return the logits, and the features that they are made of.

        Args:
            image: see ``Source``.
            **options: of ``open_large_image``, for a file.

        Raises:
            ConfigError: the model is no classifier; too little memory; an image of other bands.
            DataError: a file that cannot be read, or a part of it.
            ShapeError: an image smaller than a patch.
            CheckpointError: NaN or infinite values.
        """
        trunk = self._classifier("classify")
        with self._run(image, "classify", [], options, extra=0.5) as run:
            pooled = read_out(run.stream, run.tokens()).pooled
            with torch.inference_mode():
                logits = None if trunk.head is None else trunk.head(pooled)[0].cpu().double().numpy()
                if trunk.head is not None:
                    pooled = pooled * trunk.norm_scale + trunk.norm_shift
            if logits is not None and not np.isfinite(logits).all():
                raise CheckpointError("The logits are NaN or infinite: something overflows in the model's type.")
            return Classified(logits, pooled[0].cpu().double().numpy())

    def features(
        self,
        image: Source,
        path: str | os.PathLike[str] | None = None,
        *,
        block: int | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> np.ndarray | None:
        """Return or write the features of every patch, (h, w, C).

        Args:
            image: see ``Source``.
            path: a file to write, as of ``open_dense_output`` (.npy, .zarr, .tif); None to return an array.
            block: the XCA layer after which they are taken, from 0, negative from the end; None for the tokens after
                class attention and the final norm, as ``forward_features`` gives them.
            dtype: of the result: "float32", "float16" or "float64".
            **options: of ``open_large_image``, for a file.

        Raises:
            ConfigError: no such block; of a pyramid, none named; otherwise as ``classify``.
            ExportError: the file cannot be written.
            XCiTError: as ``classify``.
        """
        depth = len(self._trunk.blocks)
        if block is None:
            self._classifier("give final features of (name a block instead)")
        elif not -depth <= block < depth:
            raise ConfigError(f"block is {block}; the model has the blocks 0 to {depth - 1}.")
        layers = depth if block is None else block % depth + 1
        with self._run(image, "features", [path], options, block=block, dtype=dtype, extra=0.5) as run:
            tokens = run.tokens(layers)
            h, w = run.plan.grid
            p = self._trunk.patch_size
            out = run.sink(path, (h, w, self._trunk.embed_dim), dtype, (p, p))
            rows = final_rows(run.stream, tokens) if block is None else _block_rows(run, tokens)
            return out.take(run.stream, (each.cpu() for each in rows))

    def pyramid(
        self, image: Source, path: str | os.PathLike[str] | None = None, *, dtype: str = "float32", **options: Any
    ) -> list[np.ndarray | None]:
        """Return or write a pyramid's levels, (rows, columns, C) each, the finest first.

        Args:
            image: see ``Source``.
            path: of the files: ``scene.zarr`` gives ``scene_4.zarr``, ``scene_8.zarr``, ... by their strides.
            dtype: as of ``features``.
            **options: of ``open_large_image``, for a file.

        Raises:
            ConfigError: the model has no pyramid.
            XCiTError: as ``features``.
        """
        trunk = self._trunk
        if not isinstance(trunk, FoldedPyramid):
            raise ConfigError("The model has no pyramid; create_pyramid and create_segmenter make models that do.")
        names = [None if path is None else _numbered(Path(path), stride) for stride in trunk.strides]
        with self._run(image, "pyramid", [path], options, dtype=dtype, extra=2.0) as run:
            levels = run_to_levels(run, margin=0)
            found = []
            for name, level, stride in zip(names, levels, trunk.strides, strict=True):
                out = run.sink(name, (level.height, level.width, level.channels), dtype, (stride, stride))
                begin, end = run.share(stride, level.height)
                rows = map_rows(level, begin, end, run.plan.head_rows)
                found.append(out.take(run.stream, (each.cpu() for each in rows)))
                level.forget()
            return found

    def attend(
        self, image: Source, path: str | os.PathLike[str] | None = None, *, layer: int = -1, **options: Any
    ) -> Attended:
        """Return or write how the class token divides its attention among the patches, (h, w, heads) float32.

        Args:
            image: see ``Source``.
            path: as of ``features``.
            layer: of the class-attention layers; -1 is the last.
            **options: of ``open_large_image``, for a file.

        Raises:
            ConfigError: no class attention, or no such layer.
            XCiTError: as ``features``.
        """
        trunk = self._classifier("attend with")
        layers = len(trunk.cls_attn_blocks)
        if trunk.global_pool == "avg" or not -layers <= layer < layers:
            raise ConfigError(
                f"layer is {layer}; the model has {0 if trunk.global_pool == 'avg' else layers} layers of class "
                f"attention that it reads."
            )
        with self._run(image, "attend", [path], options, layer=layer, extra=0.7) as run:
            tokens = run.tokens()
            attended = read_out(run.stream, tokens).layers[layer]
            h, w = run.plan.grid
            p = trunk.patch_size
            out = run.sink(path, (h, w, len(attended.own)), "float32", (p, p))
            rows = attention_rows(run.stream, tokens, attended, layer % layers)
            return Attended(out.take(run.stream, (each.cpu() for each in rows)), attended.own.cpu().numpy())

    def segment(
        self,
        image: Source,
        path: str | os.PathLike[str] | None = None,
        *,
        scores: bool | str | os.PathLike[str] = False,
        **options: Any,
    ) -> Segmented:
        """Return or write the class of every pixel, at the image's own size: ``segment_image(..., native=True)``.

        Args:
            image: see ``Source``.
            path: as of ``features``: uint8, from 256 classes on uint16.
            scores: also the probability of each pixel's class, float16: a file to write, or True to return them.
            **options: of ``open_large_image``, for a file.

        Raises:
            ConfigError: the model is no segmenter.
            XCiTError: as ``features``.
        """
        model = self.model
        if not isinstance(model, SegmentationModel):
            raise ConfigError("The model is no segmenter; create_segmenter makes them.")
        with self._run(image, "segment", [path, scores], options, extra=3.0) as run:
            levels = run_to_levels(run, margin=MARGIN)
            begin, end = run.share(STRIDES[-1], levels[-1].height)
            pool = partial(pooled_evenly, band=run.plan.head_rows, begin=begin, end=end, total=run.stream.processes.sum)
            H, W = run.size
            labels = run.sink(path, (H, W), label_type(model.num_classes), (1, 1))
            sinks = [labels]
            if scores is not False:
                sinks.append(run.sink(None if scores is True else scores, (H, W), "float16", (1, 1)))
            with torch.inference_mode():
                low = low_rows(model, levels, pool)
                look = StreamedLogits(low, (H, W), (max(LEAST, H), max(LEAST, W)), self.device)
                begin, end = run.share(1, H)
                strip = run.plan.head_rows * 4 * W * 4 * model.num_classes
                strips = labelled_strips([look], (H, W), strip_bytes=strip, begin=begin, end=end)
                take_all(sinks, run.stream, (_checked(found)[: len(sinks)] for _, found in strips))
            return Segmented(labels.array, sinks[1].array if len(sinks) > 1 else None)

    def plan(self, image: Source, task: str, **options: Any) -> Plan:
        """Return what an image will take, without going through it.

        Args:
            image: see ``Source``.
            task: "classify", "features", "pyramid", "attend" or "segment".
            **options: of ``open_large_image``, for a file.
        """
        with ExitStack() as stack:
            windows = opened(stack, image, options)
            return self._planned(windows, self.setup.image_rows(windows, task), task)

    # --- how ----------------------------------------------------------------------------------------------------------

    def _classifier(self, what: str) -> FoldedXCiT:
        if not isinstance(self._trunk, FoldedXCiT):
            raise ConfigError(f"The model has a pyramid instead of class attention; there is nothing to {what}.")
        return self._trunk

    def _planned(self, image: Windows, rows: RowMap, task: str) -> Plan:
        needs = Needs(
            trunk=self._trunk,
            image_size=(rows.height, rows.width),
            channels=image.channels,
            sample_bytes=np.dtype(getattr(image, "dtype", np.float64)).itemsize,
            held=image.bytes_in_memory + WRITING,
            processes=self.setup.processes.size,
        )
        if task in ("pyramid", "segment"):
            needs = with_head(needs, self.model if task == "segment" else self._trunk, rows)
        return make_plan(needs, self._budget, band=self._band)

    @contextmanager
    def _run(
        self, image: Source, task: str, outputs: Sequence[Any], options: dict[str, Any], *, extra: float, **facts: Any
    ) -> Iterator[Run]:
        with ExitStack() as stack:
            windows = opened(stack, image, options)
            rows = self.setup.image_rows(windows, task)
            plan = self._planned(windows, rows, task)
            files = [Path(path) for path in outputs if isinstance(path, (str, os.PathLike))]
            yield stack.enter_context(Run(self.setup, windows, rows, plan, task, facts, files, extra))


def _checked(found: Labelled) -> tuple[np.ndarray, ...]:
    if not found.finite:
        raise CheckpointError("The logits are NaN or infinite: something overflows in the model's type.")
    return found.labels, found.scores


def _block_rows(run: Run, tokens: TokenGrid) -> Iterator[torch.Tensor]:
    return map_rows(GridRows(tokens, torch.device("cpu")), 0, tokens.shape[0], run.plan.band)


def _numbered(path: Path, stride: int) -> Path:
    return path.with_name(f"{path.stem}_{stride}{path.suffix}")
