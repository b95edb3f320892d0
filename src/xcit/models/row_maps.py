"""Feature maps that are made a few rows at a time, from top to bottom, each row once.

A map knows its size and how its rows follow from those of the maps before it. Whoever asks for rows makes the maps
before compute just those that are still missing; of what was computed, that stays which some reader has yet to read. So
a whole network of convolutions, poolings and resizings runs over a map of any height in the memory of a few rows, and
gives what it gives on the whole map, borders included.

Legend: C channels, h x w a map, K x K a kernel, s its stride.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PointWise = Callable[[Tensor], Tensor]
"""Of (1, C, rows, w), every pixel by itself."""


class Reader:
    """One of those who read a map."""

    def __init__(self, rows: RowMap) -> None:
        self.map = rows
        self.begin = 0

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows (1, C, end - begin, w) of the map, to be left as they are.

        Args:
            begin: not above that of the call before, or all that is needed for them is made anew.
            end: behind the last one.
        """
        assert 0 <= begin < end <= self.map.height
        self.begin = begin
        return self.map.serve(begin, end)


class RowMap(ABC):
    """A map of which rows are made where they are asked for.

    Attributes:
        channels: C.
        height: h.
        width: w.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.channels, self.height, self.width = channels, height, width
        self._readers: list[Reader] = []
        self._kept: Tensor | None = None
        self._top = 0  # the row of the map with which the kept ones begin

    @property
    def inputs(self) -> list[RowMap]:
        """The maps that this one is made of."""
        found = [value for value in vars(self).values() if isinstance(value, Reader)]
        listed = [each for value in vars(self).values() if isinstance(value, list) for each in value]
        readers = found + [each for each in listed if isinstance(each, Reader) and each.map is not self]
        return [reader.map for reader in readers]

    def reader(self) -> Reader:
        """Return a new reader; rows are kept until every one has gone beyond them."""
        self._readers.append(Reader(self))
        return self._readers[-1]

    @abstractmethod
    def make(self, begin: int, end: int) -> Tensor:
        """Return rows (1, C, end - begin, w), computed from those of the maps before."""

    def serve(self, begin: int, end: int) -> Tensor:
        """Return rows for a reader, which has said so."""
        if self._kept is not None and not self._top <= begin <= self._top + self._kept.shape[2]:
            self._kept = None  # a reader begins elsewhere
        if self._kept is None:
            self._kept, self._top = self.make(begin, end), begin
        bottom = self._top + self._kept.shape[2]
        needed = min(begin, *(reader.begin for reader in self._readers))
        dropped = min(max(0, needed - self._top), self._kept.shape[2])
        if end > bottom:
            new = self.make(bottom, end)
            kept = self._kept[:, :, dropped:]
            self._kept = torch.cat((kept, new), dim=2) if kept.shape[2] else new
            self._top += dropped
        return self._kept[:, :, begin - self._top : end - self._top]

    def forget(self) -> None:
        """Let go of the kept rows."""
        self._kept = None


class Whole(RowMap):
    """A map (1, C, h, w) that there is."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(*x.shape[1:])
        self._x = x

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        return self._x[:, :, begin:end]


class Filled(RowMap):
    """A map whose rows a function gives.

    Args:
        channels: C.
        height: h.
        width: w.
        rows: gives (1, C, end - begin, w).
    """

    def __init__(self, channels: int, height: int, width: int, rows: Callable[[int, int], Tensor]) -> None:
        super().__init__(channels, height, width)
        self._rows = rows

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        return self._rows(begin, end)


class Convolved(RowMap):
    """A convolution with zeros around the map, and what follows it at every pixel.

    Args:
        x: the map before.
        conv: of stride s, one number for both axes like its kernel and its padding.
        then: of its output, which is nobody else's.
        padded: rows and columns of zeros below and on the right, beyond its padding.
    """

    def __init__(
        self, x: RowMap, conv: nn.Conv2d, then: PointWise | None = None, padded: tuple[int, int] = (0, 0)
    ) -> None:
        (K, _), (s, _) = conv.kernel_size, conv.stride
        assert isinstance(conv.padding, tuple)
        p = conv.padding[0]
        assert conv.kernel_size == (K, K)
        assert conv.dilation == (1, 1)
        sides = (x.height + padded[0], x.width + padded[1])
        super().__init__(conv.out_channels, *((side + 2 * p - K) // s + 1 for side in sides))
        self._x, self._conv, self._then, self._padded = x.reader(), conv, then, padded
        self._kernel, self._stride, self._padding, self._rows_before = K, s, p, x.height

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        first = begin * self._stride - self._padding
        last = (end - 1) * self._stride - self._padding + self._kernel
        x = self._x.rows(max(0, first), min(self._rows_before, last))
        above, below = max(0, -first), max(0, last - self._rows_before)
        conv, columns = self._conv, self._padding
        if above == below == columns and not any(self._padded):  # the whole map at once
            y = conv(x)
        else:
            if above or below or self._padded[1]:
                x = F.pad(x, (0, self._padded[1], above, below))
            x = x.contiguous(memory_format=torch.channels_last)
            y = F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, columns), groups=conv.groups)
        return y if self._then is None else self._then(y)


class Doubled(RowMap):
    """A transposed 2 x 2 convolution of stride 2, and what follows it at every pixel.

    Args:
        x: the map before.
        conv: of one group.
        then: of its output.
    """

    def __init__(self, x: RowMap, conv: nn.ConvTranspose2d, then: PointWise | None = None) -> None:
        assert (conv.kernel_size, conv.stride, conv.padding) == ((2, 2), (2, 2), (0, 0))
        super().__init__(conv.out_channels, 2 * x.height, 2 * x.width)
        self._x, self._conv, self._then = x.reader(), conv, then

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        first = begin // 2
        y = self._conv(self._x.rows(first, -(-end // 2)))[:, :, begin - 2 * first : end - 2 * first]
        return y if self._then is None else self._then(y)


class Pooled(RowMap):
    """The highest values of K x K cells; what is left on the right and below is dropped."""

    def __init__(self, x: RowMap, size: int) -> None:
        super().__init__(x.channels, x.height // size, x.width // size)
        self._x, self._size = x.reader(), size

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        return F.max_pool2d(self._x.rows(begin * self._size, end * self._size), self._size)


class Mapped(RowMap):
    """What a function makes of maps of one size, each pixel by itself.

    Args:
        maps: those before.
        function: of their rows, a tensor each, which it must not change; gives (1, channels, rows, w).
        channels: of the result.
    """

    def __init__(self, maps: Sequence[RowMap], function: Callable[..., Tensor], channels: int) -> None:
        super().__init__(channels, maps[0].height, maps[0].width)
        assert all((each.height, each.width) == (self.height, self.width) for each in maps)
        self._maps, self._function = [each.reader() for each in maps], function

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        return self._function(*(each.rows(begin, end) for each in self._maps))


def joined(maps: Sequence[RowMap]) -> RowMap:
    """Return maps of one size beside each other along the channels."""
    return Mapped(maps, lambda *rows: torch.cat(rows, dim=1), sum(each.channels for each in maps))


def resized(x: RowMap, size: tuple[int, int], mode: str = "bilinear") -> RowMap:
    """Return a map at another size, or as it is if it has that already."""
    return x if (x.height, x.width) == size else Resized(x, size, mode)


def step_bytes(x: RowMap, rows: int, itemsize: int) -> int:
    """Return about how many bytes are held while rows of a map are made, by it and by all that it is made of.

    Args:
        x: the map.
        rows: of it, at once.
        itemsize: bytes of a value.
    """
    maps: dict[int, RowMap] = {}
    waiting = [x]
    while waiting:
        each = waiting.pop()
        if id(each) not in maps:
            maps[id(each)] = each
            waiting += each.inputs
    total = 0
    for each in maps.values():
        share = min(each.height, -(-rows * each.height // x.height) + 4)
        total += 2 * share * each.width * each.channels  # what is kept, and what is new beside it
    return total * itemsize


def added(a: RowMap, b: RowMap) -> RowMap:
    """Return the sum of two maps."""
    return Mapped((a, b), torch.add, a.channels)


class Resized(RowMap):
    """A map at another size: bilinear, corners not aligned, or with each pixel repeated, as ``F.interpolate``."""

    def __init__(self, x: RowMap, size: tuple[int, int], mode: str = "bilinear") -> None:
        super().__init__(x.channels, *size)
        self._x, self._mode, self._size = x.reader(), mode, (x.height, x.width)

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows."""
        old, new = self._size[0], self.height
        places = torch.arange(begin, end)
        if self._mode == "nearest":
            rows = nearest(places, old, new)
            first = int(rows[0])
            x = self._x.rows(first, int(rows[-1]) + 1)
            x = x.index_select(2, (rows - first).to(x.device))
        else:
            upper, lower, share = between(places, old, new)
            first = int(upper[0])
            x = self._x.rows(first, int(lower[-1]) + 1)
            a, b = (x.index_select(2, (rows - first).to(x.device)) for rows in (upper, lower))
            x = torch.lerp(a, b, share.to(x)[:, None])
        if self.width == self._size[1]:
            return x
        if self._mode == "nearest":
            return x.index_select(3, nearest(torch.arange(self.width), self._size[1], self.width).to(x.device))
        left, right, share = (t.to(x.device) for t in between(torch.arange(self.width), self._size[1], self.width))
        return torch.lerp(x.index_select(3, left), x.index_select(3, right), share.to(x))


def between(places: Tensor, old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for places of a scaled side, the two old ones between which each lies and the share of the second."""
    place = ((places.double() + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    first = place.floor().long()
    return first, (first + 1).clamp(max=old - 1), place - first


def nearest(places: Tensor, old: int, new: int) -> Tensor:
    """Return the old place that each place of a scaled side repeats; in float32, as PyTorch computes it."""
    if new == 2 * old:
        return places // 2
    scale = torch.tensor(old, dtype=torch.float32) / new
    return (places.float() * scale).floor().long().clamp(max=old - 1)


def pooled_evenly(
    x: RowMap,
    sizes: Sequence[int],
    band: int,
    *,
    begin: int = 0,
    end: int | None = None,
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> list[Tensor]:
    """Return a map averaged into n x n cells, (1, C, n, n) for each n: ``F.adaptive_avg_pool2d`` in one pass.

    Args:
        x: the map.
        sizes: the n's.
        band: rows at once.
        begin: the first row of this process.
        end: behind its last; None for all.
        total: adds what other processes have.
    """
    reader = x.reader()
    end = x.height if end is None else end
    sums = [torch.zeros(1, x.channels, n, n, dtype=torch.float64) for n in sizes]
    like = torch.empty(0)
    for top in range(begin, end, band):
        bottom = min(top + band, end)
        like = reader.rows(top, bottom)
        for n, cells in zip(sizes, sums, strict=True):
            across = F.adaptive_avg_pool2d(like.double(), (bottom - top, n)).cpu()
            for i in range(n):
                first, last = max(top, i * x.height // n), min(bottom, _ceil((i + 1) * x.height, n))
                if first < last:
                    cells[:, :, i] += across[:, :, first - top : last - top].sum(dim=2)
    x.forget()
    for n, cells in zip(sizes, sums, strict=True):
        for i in range(n):
            cells[:, :, i] /= _ceil((i + 1) * x.height, n) - i * x.height // n
    return [total(cells).to(like) for cells in sums]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
