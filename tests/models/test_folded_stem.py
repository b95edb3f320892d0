"""A folded stem in bands against the stem on the whole image, and the memory that it saves."""

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
def test_bands_of_every_height_give_the_same(
    use_pos: bool, patch_size: int, size: tuple[int, int], tokens: int, randomize, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = tuple(max(patch_size, side) for side in size)
    model = randomize(XCiT(**TINY, patch_size=patch_size, use_pos=use_pos)).double().eval()
    folded = folded_copy(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model._embed(x)[0]
        monkeypatch.setattr(folded_stem, "LARGE", 0)
        monkeypatch.setattr(folded_stem, "BAND_BYTES", tokens * (patch_size // 2) ** 2 * 8 * 8)
        monkeypatch.setattr(folded_stem, "LEAST_ROWS", 1)
        found, Hp, Wp = folded._embed(x)
    assert (Hp, Wp) == tuple(-(-side // patch_size) for side in size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_small_images_and_the_linear_stem_go_whole(randomize) -> None:
    x = torch.randn(1, 3, 600, 600)
    folded = folded_copy(XCiT(**TINY, patch_size=16).eval())
    assert folded_stem.embed_in_bands(folded.patch_embed, x, None) is None
    folded = folded_copy(XCiT(**TINY, patch_size=16, variant="linear_patch").eval())
    assert folded_stem.embed_in_bands(folded.patch_embed, torch.randn(1, 3, 1024, 1024), None) is None


@pytest.mark.parametrize("patch_size", [8, 16])
def test_the_first_maps_never_exist_as_a_whole(patch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = XCiT(**TINY | {"embed_dim": 256, "depth": 1}, patch_size=patch_size).eval()
    folded, x = folded_copy(model), torch.randn(1, 3, 2048, 1024)
    with torch.inference_mode():
        banded = peak_mib(lambda: folded._embed(x), "cpu")
        monkeypatch.setattr(folded_stem, "LARGE", 10**9)
        whole = peak_mib(lambda: folded._embed(x), "cpu")
    assert banded < 0.45 * whole
