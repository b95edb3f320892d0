"""Windows of TIFF files: every layout, compression, type and colour, compared with tifffile, Pillow and GDAL."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from xcit.data.images import open_image
from xcit.data.large_image import open_large_image
from xcit.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from large_samples import PLACE, H, W, agrees, pixels, rasterio, tifffile, write_packed

LAYOUTS = {
    "tiled": {"tile": (16, 32)},
    "strips": {"rowsperstrip": 7},
    "one strip": {"rowsperstrip": H},
    "big": {"bigtiff": True, "tile": (32, 16)},
    "big-endian": {"byteorder": ">", "tile": (16, 16)},
    "big-endian strips": {"byteorder": ">", "rowsperstrip": 10},
    "planar": {"planarconfig": "separate", "tile": (16, 16)},
    "planar strips": {"planarconfig": "separate", "rowsperstrip": 5},
}


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_layouts_and_compressions(tmp_path, layout, compression):
    whole = pixels((H, W, 3), "uint16")
    options = dict(LAYOUTS[layout])
    stored = np.moveaxis(whole, 2, 0) if options.get("planarconfig") else whole
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", compression=compression, metadata=None, **options)
    read = tifffile.imread(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.moveaxis(read, 0, 2) if options.get("planarconfig") else read, whole)
    image = agrees(tmp_path / "a.tif", whole)
    assert image.format == "tiff"
    assert image.is_windowed == (layout != "one strip" or compression is None)
    if layout == "tiled":
        assert image.block == (16, 32)
        assert image.bytes_in_memory == 16 * 128 * 3 * 2  # a row of tiles


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64", "int8"]
)
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_tiff_types(tmp_path, dtype, compression):
    whole = pixels((H, W, 5), dtype)
    tifffile.imwrite(
        tmp_path / "a.tif",
        whole,
        photometric="minisblack",
        planarconfig="contig",
        tile=(16, 16),
        compression=compression,
    )
    agrees(tmp_path / "a.tif", whole)
    agrees(tmp_path / "a.tif", whole[..., [4, 0, 0]], bands=(5, 1, 1))
    agrees(tmp_path / "a.tif", whole[..., [1, 2, 3]], bands=(2, 3, 4))


@pytest.mark.parametrize("predictor", [True, 3])
def test_tiff_predictors(tmp_path, predictor):
    whole = pixels((H, W), "float32" if predictor == 3 else "uint16")
    tifffile.imwrite(tmp_path / "a.tif", whole, tile=(16, 16), compression="deflate", predictor=predictor)
    agrees(tmp_path / "a.tif", whole)


@pytest.mark.parametrize("colours", ["rgb", "ycbcr"])
def test_tiff_of_jpeg_tiles(tmp_path, colours):
    """Compared with libtiff's decoder, in GDAL."""
    ramp = np.asarray(Image.linear_gradient("L").resize((W, H)))
    whole = np.stack([ramp, 255 - ramp, np.asarray(Image.fromarray(ramp).transpose(0).rotate(180))], axis=-1)
    profile = {"driver": "GTiff", "height": H, "width": W, "count": 3, "dtype": "uint8", "tiled": True}
    options = {"blockxsize": 32, "blockysize": 16, "compress": "jpeg", "interleave": "pixel", "photometric": colours}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, **options, transform=PLACE) as file:
        file.write(np.moveaxis(whole, 2, 0))
    with rasterio.open(tmp_path / "a.tif") as file:
        expected = np.moveaxis(file.read(), 0, 2)
    with open_large_image(tmp_path / "a.tif") as image:
        got = image.read(0, 0, H, W)
        part = image.read(10, 20, 30, 40)
    assert np.abs(got.astype(int) - expected).max() <= 3  # two decoders
    np.testing.assert_array_equal(got, tifffile.imread(tmp_path / "a.tif"))
    np.testing.assert_array_equal(part, got[10:40, 20:60])


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_tiff_of_few_bits(tmp_path, bits):
    limit = 2**bits
    values = np.random.default_rng(0).integers(0, limit, size=(H, W))
    options = {"tile": (16, 16), "photometric": "minisblack"}
    if bits == 1:
        whole = values.astype(bool)
        tifffile.imwrite(tmp_path / "a.tif", whole, **options)
    else:
        whole = values.astype(np.uint8 if bits < 8 else np.uint16)
        write_packed(tmp_path / "a.tif", whole, bits, **options)
    image = agrees(tmp_path / "a.tif", whole)
    assert image.scale == limit - 1


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "CMYK", "LA", "RGBA", "YCbCr"])
@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate"])
def test_tiff_by_pillow_looks_as_it_does_elsewhere_in_the_library(tmp_path, mode, compression):
    image = Image.fromarray(pixels((H, W, 4)), "RGBA")
    if mode not in ("LA", "RGBA"):
        image = image.convert("RGB")
    image.convert(mode).save(tmp_path / "a.tif", compression=compression)
    in_chans = 1 if mode in ("1", "L", "LA") else 3
    expected = np.asarray(open_image(tmp_path / "a.tif", in_chans))
    if mode == "YCbCr" and compression != "raw":  # libtiff converts, and rounds in another way than Pillow
        with open_large_image(tmp_path / "a.tif") as opened:
            assert np.abs(opened.read(0, 0, H, W).astype(int) - expected).max() <= 1
        return
    agrees(tmp_path / "a.tif", expected > 0 if mode == "1" else expected)


def test_tiff_whose_least_value_is_white(tmp_path):
    whole = pixels((H, W))
    tifffile.imwrite(tmp_path / "a.tif", whole, photometric="miniswhite", tile=(16, 16), compression="deflate")
    agrees(tmp_path / "a.tif", np.asarray(open_image(tmp_path / "a.tif", 1)))
    agrees(tmp_path / "a.tif", 255 - whole)


@pytest.mark.parametrize(("dtype", "white"), [("uint8", 255), ("uint16", 65535), ("float32", 1.0)])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparency_is_composited_on_white(tmp_path, dtype, white, kind):
    whole = np.abs(pixels((H, W, 4), dtype))
    whole = whole if dtype != "float32" else whole / whole.max()
    if kind == "assocalpha":
        whole[..., :3] = np.minimum(whole[..., :3], whole[..., 3:])
    tifffile.imwrite(tmp_path / "a.tif", whole, photometric="rgb", extrasamples=[kind], tile=(16, 16))
    alpha = whole[..., 3:].astype(np.float64) / white
    colour = whole[..., :3].astype(np.float64)
    expected = colour * (alpha if kind == "unassalpha" else 1) + white * (1 - alpha)
    with open_large_image(tmp_path / "a.tif") as image:
        assert image.channels == 3
        got = image.read(3, 4, 50, 60)
    assert got.dtype == dtype
    assert np.abs(got - expected[3:53, 4:64]).max() <= (0.5 if dtype != "float32" else 1e-6)
    agrees(tmp_path / "a.tif", whole, bands=(1, 2, 3, 4))  # as they are


def test_a_fourth_band_that_is_no_transparency_is_a_band(tmp_path):
    whole = pixels((H, W, 4))
    tifffile.imwrite(tmp_path / "a.tif", whole, photometric="rgb", extrasamples=["unspecified"], tile=(16, 16))
    agrees(tmp_path / "a.tif", whole)


@pytest.mark.parametrize("subifds", [True, False])
def test_pyramids(tmp_path, subifds):
    whole = pixels((H * 2, W * 2, 3))
    levels = [whole, whole[::2, ::2], whole[::4, ::4]]
    options = {"photometric": "rgb", "tile": (16, 16), "compression": "deflate", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(levels[0], subifds=2 if subifds else 0, **options)
        for smaller in levels[1:]:
            file.write(smaller, subfiletype=1, **options)
    for level, expected in enumerate(levels):
        with open_large_image(tmp_path / "a.tif", level=level) as image:
            assert image.levels == tuple(one.shape[:2] for one in levels)
            assert image.level == level
            np.testing.assert_array_equal(image.read(3, 5, 30, 40), expected[3:33, 5:45])
    with pytest.raises(ConfigError, match=r"level 3 was asked for; it holds 0: 166 x 234, 1: 83 x 117, 2: 42 x 59"):
        open_large_image(tmp_path / "a.tif", level=3)


def test_ome_tiff_with_channels_in_pages_and_a_pyramid(tmp_path):
    whole = pixels((4, H, W), "uint16")
    options = {"photometric": "minisblack", "tile": (16, 16), "compression": "deflate"}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        file.write(whole, subifds=1, metadata={"axes": "CYX"}, **options)
        file.write(np.ascontiguousarray(whole[:, ::2, ::2]), subfiletype=1, **options)
    image = agrees(tmp_path / "a.ome.tif", np.moveaxis(whole, 0, 2))
    assert image.levels == ((H, W), (42, 59))
    agrees(tmp_path / "a.ome.tif", np.moveaxis(whole[[3, 1]], 0, 2), bands=(4, 2))
    with open_large_image(tmp_path / "a.ome.tif", level=1, bands=(3,)) as image:
        np.testing.assert_array_equal(image.read(1, 2, 30, 40)[..., 0], whole[2, ::2, ::2][1:31, 2:42])


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_ome_tiff_of_times_and_rgb_pages(tmp_path, compression):
    whole = pixels((2, 3, H, W, 3))
    tifffile.imwrite(
        tmp_path / "a.ome.tif", whole, photometric="rgb", metadata={"axes": "TCYXS"}, compression=compression, ome=True
    )
    agrees(tmp_path / "a.ome.tif", np.concatenate(list(whole[0]), axis=-1))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_of_several_pages_the_first_unless_they_are_named_bands(tmp_path, caplog, compression):
    whole = pixels((5, H, W))
    tifffile.imwrite(tmp_path / "a.tif", whole, photometric="minisblack", compression=compression, metadata=None)
    with caplog.at_level(logging.WARNING):
        agrees(tmp_path / "a.tif", whole[0])
    assert "of its 5 pages the first is read; axes='CYX' reads pages as bands" in caplog.text
    agrees(tmp_path / "a.tif", np.moveaxis(whole, 0, 2), axes="CYX")
    agrees(tmp_path / "a.tif", np.moveaxis(whole[[4, 2]], 0, 2), axes="CYX", bands=(5, 3))
    with pytest.raises(ConfigError, match="axes are 'CY'"):
        open_large_image(tmp_path / "a.tif", axes="CY")


def test_the_largest_image_of_a_slide(tmp_path):
    whole = pixels((H * 2, W * 2, 3))
    small, label = pixels((20, 30, 3), seed=1), pixels((24, 24, 3), seed=2)
    text = f"Aperio Image Library v1\n{W * 2}x{H * 2} [0,0 {W * 2}x{H * 2}] (16x16) |AppMag = 20"
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        options = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
        file.write(whole, tile=(16, 16), description=text, **options)
        file.write(small, description="Aperio Image Library v1\nthumbnail -> 30x20", **options)
        file.write(np.ascontiguousarray(whole[::2, ::2]), tile=(16, 16), description=text, **options)
        file.write(label, subfiletype=1, description="Aperio Image Library v1\nlabel 24x24", **options)
    with open_large_image(tmp_path / "a.svs", level=1) as image:
        assert image.levels == ((H * 2, W * 2), (H, W))
        np.testing.assert_array_equal(image.read(0, 0, H, W), whole[::2, ::2])


def test_tiles_that_were_left_out(tmp_path):
    whole = pixels((64, 64))
    tiles = [whole[y : y + 16, x : x + 16] for y in range(0, 64, 16) for x in range(0, 64, 16)]
    tiles[5] = None
    tifffile.imwrite(
        tmp_path / "a.tif", iter(tiles), shape=(64, 64), dtype="uint8", tile=(16, 16), compression="deflate",
        extratags=[(42113, "s", 0, "7", True)],
    )  # fmt: skip
    whole[16:32, 16:32] = 7
    with open_large_image(tmp_path / "a.tif") as image:
        assert image.nodata == 7
        np.testing.assert_array_equal(image.read(0, 0, 64, 64)[..., 0], whole)


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_orientation(tmp_path, orientation, ending):
    stored = pixels((H, W, 3) if orientation < 5 else (W, H, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == (H, W, 3)
    agrees(tmp_path / f"a.{ending}", expected)


def test_an_orientation_that_stands_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels((W, H, 3))).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"eXIf") - 4
    length = int.from_bytes(data[at : at + 4], "big") + 12
    moved = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
    assert moved.index(b"eXIf") > moved.rindex(b"IDAT")
    (tmp_path / "a.png").write_bytes(moved)
    agrees(tmp_path / "a.png", np.asarray(open_image(tmp_path / "a.png")))
