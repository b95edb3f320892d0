"""A folded XCiT over a giant image: from its rows to the tokens after the last layer, and what is taken on the way.

Legend: (h, w) the token grid, C embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from xcit.errors import CheckpointError
from xcit.inference.giant_layers import ClassAttending, Halo, MomentSum, attend, bands, patch_tokens, run_layer
from xcit.inference.giant_plan import Plan
from xcit.inference.giant_stem import token_rows
from xcit.inference.giant_tokens import TokenGrid, TokensInMemory
from xcit.inference.giant_work import Done, WorkFolder
from xcit.models.folded_layers import FoldedBlock, FoldedClassBlock
from xcit.models.folded_models import FoldedPyramid, FoldedTrunk, FoldedXCiT
from xcit.models.row_maps import RowMap
from xcit.ops.class_tokens import Softmax
from xcit.ops.xca_moments import Moments

Progress = Callable[[str, float], None]
"""Told what is going on, and the share of the whole that is done, 0 to 1."""


MakeGrid = Callable[[int, int], TokenGrid]
"""Room for so many rows and columns of tokens."""


class Processes(Protocol):
    """Those that share an image's rows among them; ``giant_processes`` has several."""

    rank: int
    size: int

    def share(self, height: int, multiple: int = 1) -> tuple[int, int]:
        """Return the first row of this process, and the one behind its last."""
        ...

    def moments(self, own: Moments | None) -> Moments:
        """Return those of all tokens."""
        ...

    def softmax(self, own: Softmax) -> Softmax:
        """Return that over all tokens."""
        ...

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum of what all have."""
        ...

    def halo(self, grid: TokenGrid) -> Halo | None:
        """Return the rows beyond this process's own."""
        ...

    def widened(self, grid: TokenGrid, own: tuple[int, int], wanted: tuple[int, int], make: MakeGrid) -> TokenGrid:
        """Return the wanted rows of the whole, of which this process has its own."""
        ...

    def in_order(self, bands: Iterable[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the bands of all processes from top to bottom in the first process, and none in the others."""
        ...


class Alone:
    """One process, which has all rows."""

    rank, size = 0, 1

    def share(self, height: int, multiple: int = 1) -> tuple[int, int]:
        """Return all rows."""
        return 0, height

    def moments(self, own: Moments | None) -> Moments:
        """Return its own."""
        assert own is not None
        return own

    def softmax(self, own: Softmax) -> Softmax:
        """Return its own."""
        return own

    def sum(self, own: Tensor) -> Tensor:
        """Return its own."""
        return own

    def halo(self, grid: TokenGrid) -> Halo | None:
        """There is nothing beyond."""
        return None

    def widened(self, grid: TokenGrid, own: tuple[int, int], wanted: tuple[int, int], make: MakeGrid) -> TokenGrid:
        """Return the grid, which has all rows."""
        assert wanted[0] == 0
        return grid

    def in_order(self, bands: Iterable[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield its own."""
        yield from bands


class Stream:
    """One run over one image.

    Args:
        trunk: the folded model.
        image: its rows, as the model takes them.
        plan: what may be taken.
        device: where layers run.
        work: where tokens go that are to lie on the disk.
        processes: who else is at it.
        progress: is told how far the run is.
        extra: the share of ``progress`` that is left for what follows the layers, in units of one layer.
    """

    def __init__(
        self,
        trunk: FoldedTrunk,
        image: RowMap,
        plan: Plan,
        device: torch.device,
        *,
        work: WorkFolder | None = None,
        processes: Processes | None = None,
        progress: Progress = lambda what, share: None,
        extra: float = 0.0,
    ) -> None:
        self.trunk, self.plan, self.device, self.work = trunk, plan, device, work
        self.processes: Processes = processes or Alone()
        self._tokens = token_rows(trunk, image)
        multiple = trunk.strides[-1] // trunk.patch_size if isinstance(trunk, FoldedPyramid) else 1
        self.first, self.last = self.processes.share(plan.grid[0], multiple)
        parameter = next(trunk.parameters())
        self._dtype = parameter.dtype
        self._progress, self._extra = progress, extra
        self._total = 1.0
        self._open: list[TokenGrid] = []

    def grid(self, name: str, height: int | None = None, width: int | None = None) -> TokenGrid:
        """Return room for rows of tokens, in memory or on the disk.

        Args:
            name: of the file.
            height: rows; None for those of this process.
            width: columns; None for those of the token grid.
        """
        shape = (height or self.last - self.first, width or self.plan.grid[1], self.trunk.embed_dim)
        if self.work is None:
            return TokensInMemory(shape, self._dtype)
        self._open.append(self.work.grid(name, shape, self._dtype))
        return self._open[-1]

    def close(self) -> None:
        """Let go of tokens in files."""
        for grid in self._open:
            grid.close()

    def run(self, depth: int, taps: Mapping[int, Callable[[TokenGrid], None]]) -> TokenGrid:
        """Run the stem and the first layers; return their tokens.

        Args:
            depth: layers that are run.
            taps: of a layer's number, counted from 0, what is given the tokens after it. Of a run that is gone on
                with, those of layers that are done are not called.
        """
        self._total = 1 + depth + self._extra
        grids = [self.grid("a")]
        grids.append(grids[0] if self.work is None else self.grid("b"))
        done = None if self.work is None or self.processes.size > 1 else self.work.done
        moments: Moments | None
        if done is None or done.layers > depth:
            moments = self._embed(grids[0])
            start = 0
            self._keep(grids[0], Done(0, moments))
        else:
            start, moments = done.layers, done.moments
        for i in range(start, depth):
            source, target = grids[i % 2], grids[(i + 1) % 2]
            assert moments is not None
            self._say(f"layer {i + 1} of {depth}", 1 + i)
            moments = self._layer(i, depth, moments, source, target)
            if i in taps:
                taps[i](target)
            self._keep(target, Done(i + 1, moments))
        self._say("reading out", 1 + depth)
        return grids[depth % 2]

    def within(self, share: float) -> None:
        """Say which share of what follows the layers is done."""
        self._say("reading out", self._total - self._extra * (1 - share))

    def _embed(self, target: TokenGrid) -> Moments:
        found = self._moment_sum(0)
        reader = self._tokens.reader()
        self._say("embedding", 0.0)
        with torch.inference_mode():
            for top, bottom in bands(target.shape[0], self.plan.stem_band):
                rows = reader.rows(self.first + top, self.first + bottom)[0].permute(1, 2, 0)
                rows = rows.contiguous()
                found.add(rows)
                target.write(top, rows.cpu())
                self._say("embedding", bottom / target.shape[0])
        self._tokens.forget()
        return self._all(found, 0)

    def _layer(self, i: int, depth: int, moments: Moments, source: TokenGrid, target: TokenGrid) -> Moments | None:
        found = self._moment_sum(i + 1) if i + 1 < depth else None
        block = self.trunk.blocks[i]
        assert isinstance(block, FoldedBlock)
        height = source.shape[0]

        def each(top: int, rows: Tensor) -> None:
            if found is not None:
                found.add(rows)
            self._say(f"layer {i + 1} of {depth}", 1 + i + (top + len(rows)) / height)

        halo = self.processes.halo(source)
        run_layer(block, moments, source, target, band=self.plan.band, device=self.device, halo=halo, each=each)
        return None if found is None else self._all(found, i + 1)

    def _moment_sum(self, i: int) -> MomentSum:
        block = self.trunk.blocks[i]
        assert isinstance(block, FoldedBlock)
        return MomentSum(block.norm1)

    def _all(self, found: MomentSum, layer: int) -> Moments:
        moments = self.processes.moments(found.moments)
        if not moments.second.isfinite().all():
            what = "the image's first tokens" if layer == 0 else f"the tokens after layer {layer}"
            raise CheckpointError(
                f"{what[0].upper()}{what[1:]} are NaN or infinite: training has diverged, the file is damaged, or "
                f"something overflows in the model's type; the image's own values may be too large."
            )
        return moments

    def _keep(self, grid: TokenGrid, done: Done) -> None:
        if self.work is not None:
            grid.keep()
            self.work.save(done)

    def _say(self, what: str, units: float) -> None:
        self._progress(what, min(1.0, units / self._total))


class ReadOut(NamedTuple):
    """What the class token is in the end."""

    pooled: Tensor
    """(1, C): as ``FoldedXCiT``'s head takes it: normed, without the affine where the head has that."""
    layers: list[ClassAttending]
    """What each class-attention layer did; empty where the model takes the tokens' mean."""


def read_out(stream: Stream, tokens: TokenGrid) -> ReadOut:
    """Return the pooled features of tokens after the last XCA layer, as the model pools them."""
    trunk = stream.trunk
    assert isinstance(trunk, FoldedXCiT)
    blocks = class_blocks(trunk)
    options = {"band": stream.plan.band, "device": stream.device}
    if trunk.global_pool == "avg":
        return ReadOut(_mean(stream, tokens, blocks), [])
    assert trunk.cls_token is not None
    cls = trunk.cls_token[:1].to(stream.device)
    layers = []
    for i, block in enumerate(blocks):
        attended = attend(blocks[:i], block, cls, tokens, **options, merge=stream.processes.softmax)  # type: ignore[arg-type]
        cls = attended.cls
        layers.append(attended)
        stream.within((i + 1) / (len(blocks) + 1))
    with torch.inference_mode():
        return ReadOut(trunk.final_norm(cls)[:, 0], layers)


def attention_rows(stream: Stream, tokens: TokenGrid, attended: ClassAttending, layer: int) -> Iterator[Tensor]:
    """Yield, band by band, what each head of a class-attention layer pays to each token, (n, w, H) float64.

    Of what is paid to tokens, the share of each: over the image they sum to one.
    """
    trunk = stream.trunk
    assert isinstance(trunk, FoldedXCiT)
    blocks = class_blocks(trunk)
    block, found = blocks[layer], attended.patches
    with torch.inference_mode():
        for top, bottom in bands(tokens.shape[0], stream.plan.band):
            x = patch_tokens(blocks[:layer], tokens.read(top, bottom).to(stream.device).view(1, -1, tokens.shape[2]))
            scores = (block.norm1(x)[0] @ attended.direction.t()).double()
            yield ((scores - found.top).exp() / found.total).view(bottom - top, -1, len(found.top))


def final_rows(stream: Stream, tokens: TokenGrid) -> Iterator[Tensor]:
    """Yield, band by band, the tokens after class attention's layers and the final norm, (n, w, C)."""
    trunk = stream.trunk
    assert isinstance(trunk, FoldedXCiT)
    with torch.inference_mode():
        for top, bottom in bands(tokens.shape[0], stream.plan.band):
            x = patch_tokens(class_blocks(trunk), tokens.read(top, bottom).to(stream.device))
            yield trunk.whole_final_norm(x)


def map_rows(x: RowMap, begin: int, end: int, band: int) -> Iterator[Tensor]:
    """Yield rows of a map, band by band, (n, w, C)."""
    reader = x.reader()
    with torch.inference_mode():
        for top in range(begin, end, band):
            yield reader.rows(top, min(end, top + band))[0].permute(1, 2, 0)


def put(x: RowMap, grid: TokenGrid, band: int) -> None:
    """Write a map's rows into a grid of its size."""
    top = 0
    for rows in map_rows(x, 0, x.height, band):
        grid.write(top, rows.cpu())
        top += len(rows)


def class_blocks(trunk: FoldedXCiT) -> list[FoldedClassBlock]:
    """Return the class-attention layers."""
    return list(trunk.cls_attn_blocks)  # type: ignore[arg-type]


def _mean(stream: Stream, tokens: TokenGrid, blocks: list[FoldedClassBlock]) -> Tensor:
    trunk = stream.trunk
    assert isinstance(trunk, FoldedXCiT)
    total = torch.zeros(tokens.shape[2], dtype=torch.float64)
    with torch.inference_mode():
        for top, bottom in bands(tokens.shape[0], stream.plan.band):
            x = patch_tokens(blocks, tokens.read(top, bottom).to(stream.device))
            total += trunk.final_norm(x).double().sum(dim=(0, 1)).cpu()
    count = stream.plan.grid[0] * stream.plan.grid[1]
    return (stream.processes.sum(total) / count).unsqueeze(0).to(next(trunk.parameters()))
