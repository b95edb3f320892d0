"""Images that the tests of large images write, and how windows are compared with a whole."""

import numpy as np
import pytest

from xcit.data.large_image import open_large_image

rasterio, tifffile, zarr = (pytest.importorskip(name) for name in ("rasterio", "tifffile", "zarr"))
for name in ("imagecodecs", "rasterio.shutil", "rasterio.vrt"):
    pytest.importorskip(name)

H, W = 83, 117
WINDOWS = [
    (0, 0, H, W),
    (0, 0, 1, 1),
    (H - 1, W - 1, 1, 1),
    (15, 30, 18, 40),
    (31, 0, 2, W),
    (0, 63, H, 3),
    (80, 100, 3, 17),
]
PLACE = rasterio.Affine(10.0, 0.0, 500000.0, 0.0, -10.0, 4600000.0)


def pixels(shape, dtype="uint8", seed=0):
    """Noise on a gradient: no two tiles are alike."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) > 0.5
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)


def agrees(path, whole, **options):
    """Compare the windows with a whole image, (H, W) or (H, W, C), exactly, type included."""
    whole = whole if whole.ndim == 3 else whole[..., None]
    with open_large_image(path, **options) as image:
        assert image.size == whole.shape[:2]
        assert image.channels == whole.shape[2]
        assert image.dtype == whole.dtype
        for top, left, height, width in WINDOWS:
            got = image.read(top, left, height, width)
            assert got.dtype == whole.dtype
            assert got.dtype.isnative
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, whole[top : top + height, left : left + width])
        bands = list(image.rows(20))
        assert [top for top, _ in bands] == [0, 20, 40, 60, 80]
        np.testing.assert_array_equal(np.concatenate([band for _, band in bands]), whole)
        return image


def written(path, whole, transform=PLACE, crs="EPSG:32633", **options):
    bands = whole if whole.ndim == 3 else whole[..., None]
    profile = {"height": H, "width": W, "count": bands.shape[2], "dtype": bands.dtype, "driver": "GTiff", **options}
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as file:
        file.write(np.moveaxis(bands, 2, 0))
    return path


def write_packed(path, whole, bits, **options):
    try:
        tifffile.imwrite(path, whole, bitspersample=bits, **options)
    except NotImplementedError:
        pytest.skip("this imagecodecs unpacks bits, but does not pack them")
