"""A folded stem in tiles against the stem on the whole image, and the memory that it saves."""

from __future__ import annotations

import pytest
import torch

from xcit.bench.memory import peak_mib
from xcit.models import folded_stem
from xcit.models.folded_copy import folded_copy
from xcit.models.xcit import XCiT

TINY = {"num_classes": 5, "embed_dim": 32, "depth": 1, "num_heads": 4}


@pytest.mark.parametrize("tokens", [1, 7, 20, 10**6])
@pytest.mark.parametrize("size", [(8, 8), (97, 61), (64, 128), (200, 33), (50, 16)])
@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("use_pos", [True, False])
def test_tiles_of_every_size_give_the_same(
    use_pos: bool, patch_size: int, size: tuple[int, int], tokens: int, randomize, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = tuple(max(patch_size, side) for side in size)
    model = randomize(XCiT(**TINY, patch_size=patch_size, use_pos=use_pos)).double().eval()
    folded = folded_copy(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model._embed(x)[0]
        monkeypatch.setattr(folded_stem, "LARGE", 0)
        # the first map has 8 channels for patches of 8 and 4 for those of 16
        monkeypatch.setattr(folded_stem, "TILE_BYTES", tokens * (patch_size // 2) ** 2 * 64 // patch_size * 8)
        found, Hp, Wp = folded._embed(x)
    assert (Hp, Wp) == tuple(-(-side // patch_size) for side in size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_small_images_and_the_linear_stem_go_whole(randomize) -> None:
    x = torch.randn(1, 3, 500, 500)
    folded = folded_copy(XCiT(**TINY | {"embed_dim": 1024}, patch_size=16).eval())
    assert folded_stem.embed_in_tiles(folded.patch_embed, x, None) is None
    assert folded_stem.embed_in_tiles(folded.patch_embed, torch.randn(1, 3, 600, 600), None) is not None
    folded = folded_copy(XCiT(**TINY, patch_size=16, variant="linear_patch").eval())
    assert folded_stem.embed_in_tiles(folded.patch_embed, torch.randn(1, 3, 1024, 1024), None) is None


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40, 384, 2000])
@pytest.mark.parametrize("grid", [(1, 1), (1, 900), (32, 32), (33, 47), (500, 3)])
def test_tiles_are_as_large_as_they_may_be_and_no_larger(grid: tuple[int, int], num_tokens: int) -> None:
    tall, wide = folded_stem.tile_of(*grid, num_tokens)
    assert 1 <= tall <= grid[0]
    assert 1 <= wide <= grid[1]
    whole = (tall + folded_stem.SHARED) * (wide + folded_stem.SHARED * (wide < grid[1]))
    assert (tall, wide) in ((1, 1), grid) or whole <= num_tokens
    tiles = -(-grid[0] // tall) * -(-grid[1] // wide)
    assert num_tokens < 40 or tiles <= 2.5 * grid[0] * grid[1] / num_tokens + 1


@pytest.mark.parametrize("patch_size", [8, 16])
def test_the_first_maps_never_exist_as_a_whole(patch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = XCiT(**TINY | {"embed_dim": 256, "depth": 1}, patch_size=patch_size).eval()
    folded, x = folded_copy(model), torch.randn(1, 3, 2048, 1024)
    with torch.inference_mode():
        tiled = peak_mib(lambda: folded._embed(x), "cpu")
        monkeypatch.setattr(folded_stem, "LARGE", 10**9)
        whole = peak_mib(lambda: folded._embed(x), "cpu")
    assert tiled < 0.3 * whole
