"""A giant image shared by several processes: each has some rows of tokens, and knows the sums over all of them.

Per layer a process sends its moments (C (C + 1) / 2 + C + 1 numbers) and two rows of tokens to each neighbour, whatever
the number of its tokens. Attention between tokens would have to send all keys and values.

Messages go by gloo through the CPU's memory, where tokens lie, also where layers run on a graphics card.

Legend: C channels, (h, w) the token grid, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from xcit.errors import ConfigError
from xcit.inference.giant_layers import Halo
from xcit.inference.giant_stream import MakeGrid
from xcit.inference.giant_tokens import TokenGrid
from xcit.models.folded_inplace import HALO
from xcit.ops.class_tokens import Softmax, merge_softmax
from xcit.ops.xca_moments import Moments


class RowProcesses:
    """The processes of a ``torch.distributed`` group, which must have been initialised: by torchrun, for instance.

    Attributes:
        rank: of this process.
        size: how many there are.
        bytes_sent: by this process since it began, by what they were.

    Raises:
        ConfigError: no group.
    """

    def __init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "There is no group of processes; start the command with torchrun --nproc-per-node N, or call "
                "torch.distributed.init_process_group first."
            )
        self._group: Any = dist.new_group(backend="gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = {"moments": 0, "halo": 0, "class attention": 0, "results": 0, "levels": 0}

    def share(self, height: int, multiple: int = 1) -> tuple[int, int]:
        """Return the first row of this process, and the one behind its last.

        Args:
            height: rows of the token grid.
            multiple: of which all but the end must be one.

        Raises:
            ConfigError: too few rows for so many processes.
        """
        return self._share(self.rank, height, multiple)

    def _share(self, rank: int, height: int, multiple: int) -> tuple[int, int]:
        parts = height // multiple
        least = -(-HALO // multiple)
        if parts < least * self.size:
            raise ConfigError(
                f"The image has {height} rows of tokens, too few for {self.size} processes; use "
                f"{max(1, parts // least)} or fewer."
            )
        first, last = (multiple * (k * parts // self.size) for k in (rank, rank + 1))
        return first, height if rank == self.size - 1 else last

    def moments(self, own: Moments | None) -> Moments:
        """Return those of all tokens."""
        assert own is not None
        C = own.mean.shape[1]
        count = self.sum(torch.tensor([float(own.num_tokens)], dtype=torch.float64), "moments")
        mean = self.sum(own.mean[0].double().cpu() * own.num_tokens, "moments") / count
        step = own.mean[0].double().cpu() - mean
        second = own.second[0].double().cpu() + own.num_tokens * step.unsqueeze(1) * step.unsqueeze(0)
        upper = torch.triu_indices(C, C)
        total = self.sum(second[upper[0], upper[1]], "moments")
        second[upper[0], upper[1]] = total
        second[upper[1], upper[0]] = total
        return Moments(int(count), mean.to(own.mean).unsqueeze(0), second.to(own.second).unsqueeze(0))

    def softmax(self, own: Softmax) -> Softmax:
        """Return that over all tokens."""
        packed = torch.cat([own.top.unsqueeze(1), own.total.unsqueeze(1), own.weighted], dim=1).cpu()
        found = [torch.empty_like(packed) for _ in range(self.size)]
        dist.all_gather(found, packed, group=self._group)
        self.bytes_sent["class attention"] += packed.nbytes
        merged: Softmax | None = None
        for each in found:
            part = Softmax(*(t.to(own.top) for t in (each[:, 0], each[:, 1], each[:, 2:])))
            merged = part if merged is None else merge_softmax(merged, part)
        assert merged is not None
        return merged

    def sum(self, own: Tensor, what: str = "class attention") -> Tensor:
        """Return the sum of what all have."""
        total = own.cpu().clone()
        dist.all_reduce(total, group=self._group)
        self.bytes_sent[what] += total.nbytes
        return total.to(own.device)

    def halo(self, grid: TokenGrid) -> Halo:
        """Return the two rows above a process's own, and the two below."""
        height, w, C = grid.shape
        above = torch.empty(HALO if self.rank else 0, w, C, dtype=grid.dtype)
        below = torch.empty(HALO if self.rank < self.size - 1 else 0, w, C, dtype=grid.dtype)
        first = grid.read(0, HALO).contiguous() if self.rank else above
        last = grid.read(height - HALO, height).contiguous() if len(below) else below
        messages = []
        for neighbour, sent, received in ((self.rank - 1, first, above), (self.rank + 1, last, below)):
            if len(received):
                messages += [
                    dist.P2POp(dist.isend, _bits(sent), neighbour, group=self._group),
                    dist.P2POp(dist.irecv, _bits(received), neighbour, group=self._group),
                ]
                self.bytes_sent["halo"] += sent.nbytes
        if messages:
            for request in dist.batch_isend_irecv(messages):
                request.wait()
        return Halo(above, below)

    def widened(self, grid: TokenGrid, own: tuple[int, int], wanted: tuple[int, int], make: MakeGrid) -> TokenGrid:
        """Return a grid with rows of other processes too.

        Args:
            grid: this process's rows.
            own: which rows of the whole they are: the first, and the one behind the last.
            wanted: which the result shall have.
            make: gives room for it.
        """
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (own, wanted), group=self._group)
        wide = make(wanted[1] - wanted[0], grid.shape[1])
        for sender, (theirs, _) in enumerate(everyone):
            for receiver, (_, want) in enumerate(everyone):
                first, last = max(theirs[0], want[0]), min(theirs[1], want[1])
                if first >= last or self.rank not in (sender, receiver):
                    continue
                if sender == receiver:
                    wide.write(first - wanted[0], grid.read(first - own[0], last - own[0]))
                elif self.rank == sender:
                    rows = grid.read(first - own[0], last - own[0]).contiguous()
                    dist.send(_bits(rows), receiver, group=self._group)
                    self.bytes_sent["levels"] += rows.nbytes
                else:
                    rows = torch.empty((last - first, *grid.shape[1:]), dtype=grid.dtype)
                    dist.recv(_bits(rows), sender, group=self._group)
                    wide.write(first - wanted[0], rows)
        return wide

    def in_order(self, bands: Iterable[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the bands of all processes from top to bottom in the first process, and none in the others."""
        if self.rank:
            for band in bands:
                dist.send_object_list([band], 0, group=self._group)
                self.bytes_sent["results"] += sum(each.nbytes for each in band)
            dist.send_object_list([None], 0, group=self._group)
            return
        yield from bands
        for sender in range(1, self.size):
            while True:
                received: list[Any] = [None]
                dist.recv_object_list(received, sender, group=self._group)
                if received[0] is None:
                    break
                yield received[0]


def _bits(x: Tensor) -> Tensor:
    """Return a tensor as bytes: gloo does not know every type."""
    return x.view(torch.uint8)
