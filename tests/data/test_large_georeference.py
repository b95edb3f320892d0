"""Large images on the earth, written by GDAL: their pixels and their place."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit.data.large_image import Georeference, open_large_image

sys.path.insert(0, str(Path(__file__).parent))
from large_samples import PLACE, H, W, agrees, pixels, rasterio, written

TURNED = rasterio.Affine(8.0, 6.0, 500000.0, 6.0, -8.0, 4600000.0)
OWN_SYSTEM = "+proj=laea +lat_0=52.1 +lon_0=10.3 +x_0=1 +y_0=2 +ellps=GRS80 +units=m +no_defs"


@pytest.mark.parametrize("transform", [PLACE, TURNED])
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", OWN_SYSTEM])
@pytest.mark.parametrize("point", [False, True])
def test_geotiff(tmp_path, transform, crs, point):
    whole = pixels((H, W, 4), "uint16")
    path = tmp_path / "a.tif"
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 16, "compress": "lzw"}
    written(path, whole, transform, crs, photometric="minisblack", alpha="no", nodata=17, **tiles)
    if point:
        with rasterio.open(path, "r+") as file:
            file.update_tags(AREA_OR_POINT="Point")
    image = agrees(path, whole)
    with rasterio.open(path) as file:
        assert image.georeference.transform == pytest.approx(file.transform[:6], rel=1e-14)
        assert rasterio.crs.CRS.from_user_input(image.georeference.crs) == file.crs
        assert image.nodata == file.nodata == 17
    if crs.startswith("EPSG"):
        assert image.georeference.crs == crs


def test_geotiff_without_rasterio(tmp_path, monkeypatch):
    whole = pixels((H, W))
    written(tmp_path / "a.tif", whole)
    written(tmp_path / "b.tif", whole, crs=OWN_SYSTEM)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    image = agrees(tmp_path / "a.tif", whole)
    assert (image.georeference.crs, image.georeference.transform) == ("EPSG:32633", tuple(PLACE[:6]))
    image = agrees(tmp_path / "b.tif", whole)
    assert image.georeference.crs is None
    assert image.georeference.keys  # outputs get them as they are


def test_a_cloud_optimised_geotiff_has_a_place_at_every_level(tmp_path):
    big = np.kron(pixels((H, W)), np.ones((16, 16), dtype=np.uint8))
    profile = {"height": H * 16, "width": W * 16, "count": 1, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="COG",
        crs="EPSG:32633",
        transform=PLACE,
        blocksize=128,
        compress="deflate",
        **profile,
    ) as file:
        file.write(big[None])
    with rasterio.open(tmp_path / "a.tif") as file:
        factors = file.overviews(1)
    assert factors
    for level, factor in enumerate([1, *factors]):
        with open_large_image(tmp_path / "a.tif", level=level) as image:
            options = {"overview_level": level - 1} if level else {}
            with rasterio.open(tmp_path / "a.tif", **options) as file:
                assert image.size == (file.height, file.width)
                assert image.georeference.transform == pytest.approx(file.transform[:6])
                np.testing.assert_array_equal(image.read(0, 0, *image.size)[..., 0], file.read(1))
            assert len(image.levels) == len(factors) + 1
            assert image.size[0] == -(-big.shape[0] // factor)


def test_vrt_jp2_and_img_through_gdal(tmp_path):
    whole = pixels((H, W, 3))
    written(tmp_path / "a.tif", whole)
    written(tmp_path / "a.jp2", whole, driver="JP2OpenJPEG", quality=100, reversible=True, blockxsize=32, blockysize=32)
    written(tmp_path / "a.img", whole, driver="HFA")
    with rasterio.open(tmp_path / "a.tif") as file, rasterio.vrt.WarpedVRT(file, crs="EPSG:32633") as warped:
        rasterio.shutil.copy(warped, tmp_path / "a.vrt", driver="VRT")
    for name in ("a.jp2", "a.img", "a.vrt"):
        image = agrees(tmp_path / name, whole)
        assert image.format == "raster"
        assert image.georeference == Georeference("EPSG:32633", tuple(PLACE[:6]))
        agrees(tmp_path / name, whole[..., [2, 0]], bands=(3, 1))


def test_rasters_with_palette_and_transparency(tmp_path):
    index = pixels((H, W)) % 5
    table = {0: (0, 0, 0, 255), 1: (255, 0, 0, 255), 2: (0, 255, 0, 255), 3: (9, 8, 7, 255), 4: (1, 2, 3, 255)}
    with rasterio.open(
        tmp_path / "a.img", "w", driver="HFA", height=H, width=W, count=1, dtype="uint8", transform=PLACE
    ) as file:
        file.write(index[None])
        file.write_colormap(1, table)
    agrees(tmp_path / "a.img", np.array([table[i][:3] for i in range(5)], dtype=np.uint8)[index])


def test_jp2_without_rasterio_is_decoded_whole_and_says_so(tmp_path, monkeypatch, caplog):
    whole = pixels((H, W, 3))
    Image.fromarray(whole).save(tmp_path / "a.jp2", irreversible=False)
    assert agrees(tmp_path / "a.jp2", whole).format == "raster"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert agrees(tmp_path / "a.jp2", whole).format == "plain"
    assert (
        'is decoded whole, as rasterio, which reads windows of it, is missing: pip install "xcit[giant]"' in caplog.text
    )


def test_control_points_have_no_place(tmp_path, caplog):
    points = [rasterio.control.GroundControlPoint(0, 0, 1, 2), rasterio.control.GroundControlPoint(0, 5, 3, 2),
              rasterio.control.GroundControlPoint(7, 0, 1, 9)]  # fmt: skip
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", height=H, width=W, count=1, dtype="uint8", gcps=points, crs="EPSG:4326"
    ) as file:
        file.write(pixels((1, H, W)))
    with caplog.at_level(logging.WARNING), open_large_image(tmp_path / "a.tif") as image:
        assert image.georeference is None
    assert "control points" in caplog.text


def test_georeferences_scale_move_and_go_through_json():
    place = Georeference("EPSG:4326", (2.0, 1.0, 100.0, 3.0, -2.0, 50.0), ((34735, (1, 1, 0, 0)), (34737, "WGS 84|")))
    affine = rasterio.Affine(*place.transform)
    scaled = place.scaled(16, 8)
    assert rasterio.Affine(*scaled.transform) @ (3, 5) == affine @ (24, 80)
    moved = place.moved(7, 9)
    assert rasterio.Affine(*moved.transform) @ (3, 5) == affine @ (12, 12)
    assert Georeference.from_json(json.loads(json.dumps(place.to_json()))) == place
