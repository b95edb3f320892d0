"""Maps that are made a few rows at a time, against the same operations on the whole map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.models.row_maps import (
    Convolved,
    Doubled,
    Filled,
    Mapped,
    Pooled,
    RowMap,
    Whole,
    added,
    joined,
    pooled_evenly,
    resized,
    step_bytes,
)

SIZES = [(1, 1), (2, 7), (5, 3), (13, 8), (16, 16)]


def source(x: Tensor) -> tuple[RowMap, list[tuple[int, int]]]:
    """Return a map whose rows are noted as they are asked for."""
    asked: list[tuple[int, int]] = []

    def rows(begin: int, end: int) -> Tensor:
        asked.append((begin, end))
        return x[:, :, begin:end]

    return Filled(*x.shape[1:], rows), asked


def in_bands(x: RowMap, band: int, begin: int = 0) -> Tensor:
    reader = x.reader()
    return torch.cat([reader.rows(top, min(x.height, top + band)) for top in range(begin, x.height, band)], dim=2)


CONVOLUTIONS = [
    nn.Conv2d(3, 4, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, 3, padding=1),
    nn.Conv2d(3, 4, 1),
    nn.Conv2d(3, 3, 3, padding=1, groups=3),
    nn.Conv2d(3, 4, 5, padding=2, bias=False),
]


@pytest.mark.parametrize("band", [1, 2, 5, 100])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolutions(conv: nn.Conv2d, size: tuple[int, int], band: int) -> None:
    conv = conv.double()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    rows, asked = source(x)
    with torch.no_grad():
        torch.testing.assert_close(in_bands(Convolved(rows, conv, then=F.relu), band), F.relu(conv(x)))
    assert sorted({row for begin, end in asked for row in range(begin, end)}) == list(range(size[0]))
    assert sum(end - begin for begin, end in asked) == size[0]  # each once


@pytest.mark.parametrize("band", [1, 3])
def test_patches_with_zeros_beyond_the_image(band: int) -> None:
    conv = nn.Conv2d(3, 4, 8, stride=8).double()
    x = torch.randn(1, 3, 21, 30, dtype=torch.float64)
    rows = Convolved(source(x)[0], conv, padded=(3, 2))
    with torch.no_grad():
        torch.testing.assert_close(in_bands(rows, band), conv(F.pad(x, (0, 2, 0, 3))))


@pytest.mark.parametrize("band", [1, 2, 3, 100])
@pytest.mark.parametrize("size", SIZES)
def test_doubling_and_pooling(size: tuple[int, int], band: int) -> None:
    conv = nn.ConvTranspose2d(3, 4, 2, stride=2).double()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(in_bands(Doubled(source(x)[0], conv, then=F.gelu), band), F.gelu(conv(x)))
    if min(size) >= 2:
        torch.testing.assert_close(in_bands(Pooled(source(x)[0], 2), band), F.max_pool2d(x, 2))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("new", [(1, 1), (10, 6), (7, 5), (26, 31), (5, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_resizing(size: tuple[int, int], new: tuple[int, int], mode: str) -> None:
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    options = {"align_corners": False} if mode == "bilinear" else {}
    expected = F.interpolate(x, size=new, mode=mode, **options)
    torch.testing.assert_close(in_bands(resized(source(x)[0], new, mode), 2), expected)


def test_nearest_rounds_as_pytorch_does() -> None:
    for old in range(1, 40):
        x = torch.arange(old, dtype=torch.float32).view(1, 1, old, 1)
        for new in range(1, 60):
            expected = F.interpolate(x, size=(new, 1), mode="nearest")
            assert torch.equal(in_bands(resized(Whole(x), (new, 1), "nearest"), 7), expected), (old, new)


@pytest.mark.parametrize("band", [1, 4, 100])
@pytest.mark.parametrize("size", SIZES)
def test_even_pooling(size: tuple[int, int], band: int) -> None:
    x = torch.randn(1, 3, *size)
    found = pooled_evenly(source(x)[0], (1, 2, 3, 6), band)
    for n, cells in zip((1, 2, 3, 6), found, strict=True):
        torch.testing.assert_close(cells, F.adaptive_avg_pool2d(x, n))


def network(x: Tensor, of: Callable[[Tensor], RowMap], layers: nn.ModuleList) -> RowMap:
    """Return a map that branches and joins again, with branches that lag behind each other."""
    rows = of(x)
    down = Convolved(Convolved(rows, layers[0], then=F.gelu), layers[1])
    up = resized(down, (rows.height, rows.width))
    sum_ = added(Convolved(rows, layers[2]), up)
    return joined([sum_, Mapped((sum_, rows), lambda a, b: a * b, 3)])


def test_branches_that_lag_behind_each_other() -> None:
    layers = nn.ModuleList(
        [nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 5, padding=2)]
    ).double()
    x = torch.randn(1, 3, 37, 9, dtype=torch.float64)
    asked: list[tuple[int, int]] = []

    def of(x: Tensor) -> RowMap:
        nonlocal asked
        rows, asked = source(x)
        return rows

    with torch.no_grad():
        whole = in_bands(network(x, of, layers), 100)
        for band in (1, 2, 5, 11):
            torch.testing.assert_close(in_bands(network(x, of, layers), band), whole, rtol=1e-12, atol=1e-12)
            assert sum(end - begin for begin, end in asked) == 37
        from_below = in_bands(network(x, of, layers), 4, begin=20)
        torch.testing.assert_close(from_below, whole[:, :, 20:], rtol=1e-12, atol=1e-12)
        assert min(begin for begin, _ in asked) > 0


def test_rows_that_all_have_read_are_let_go() -> None:
    rows, _ = source(torch.randn(1, 3, 200, 4))
    map_ = Convolved(rows, nn.Conv2d(3, 3, 3, padding=1))
    reader = map_.reader()
    for top in range(0, 200, 5):
        reader.rows(top, top + 5)
        assert rows._kept.shape[2] <= 12


def test_going_back_makes_rows_anew() -> None:
    x = torch.randn(1, 3, 20, 4)
    rows, asked = source(x)
    reader = rows.reader()
    reader.rows(0, 5)
    reader.rows(10, 15)
    assert torch.equal(reader.rows(2, 4), x[:, :, 2:4])
    assert asked[-1] == (2, 4)


def test_bytes_of_a_step_grow_with_rows_and_width() -> None:
    def bytes_of(width: int, rows: int) -> int:
        x, _ = source(torch.empty(1, 3, 400, width))
        return step_bytes(Convolved(x, nn.Conv2d(3, 8, 3, padding=1)), rows, 4)

    assert bytes_of(20, 10) == 2 * bytes_of(10, 10)
    assert bytes_of(10, 40) > 2 * bytes_of(10, 10)
