"""Windows of pictures and arrays of every kind that users have, compared with what other libraries read whole."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit.data.images import open_image
from xcit.data.large_image import fill_nodata, open_large_image, value_scale
from xcit.errors import DataError

sys.path.insert(0, str(Path(__file__).parent))
from large_samples import H, W, agrees, pixels, written, zarr

# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "gif", "ppm", "tga", "pcx", "qoi", "sgi"])
def test_pictures(tmp_path, ending):
    picture = Image.fromarray(pixels((H, W, 3)))
    picture.save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    image = agrees(tmp_path / f"a.{ending}", np.asarray(open_image(tmp_path / f"a.{ending}")))
    assert image.format == "plain"
    assert not image.is_windowed
    assert image.bytes_in_memory >= H * W


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA", "grey16", "see-through", "palette see-through"])
def test_modes_of_png_look_as_they_do_elsewhere_in_the_library(tmp_path, mode):
    rgba = Image.fromarray(pixels((H, W, 4)), "RGBA")
    path = tmp_path / "a.png"
    if mode == "grey16":
        whole = pixels((H, W), "uint16")
        Image.fromarray(whole).save(path)
        assert agrees(path, whole).scale == 65535
        return
    if mode == "see-through":
        rgba.convert("RGB").save(path, transparency=(1, 2, 3))
    elif mode == "palette see-through":
        rgba.convert("RGB").convert("P").save(path, transparency=7)
    else:
        (rgba.convert("P") if mode == "PA" else rgba.convert(mode)).save(path)
    expected = np.asarray(open_image(path, 1 if mode in ("1", "L", "LA") else 3))
    agrees(path, expected > 0 if mode == "1" else expected)


def test_jpegs_grey_and_cmyk(tmp_path):
    Image.fromarray(pixels((H, W))).save(tmp_path / "grey.jpg")
    agrees(tmp_path / "grey.jpg", np.asarray(open_image(tmp_path / "grey.jpg", 1)))
    Image.fromarray(pixels((H, W, 4)), "CMYK").save(tmp_path / "cmyk.jpg")
    agrees(tmp_path / "cmyk.jpg", np.asarray(open_image(tmp_path / "cmyk.jpg")))


def test_pictures_beyond_pillows_limit_are_read_and_nothing_is_decoded_before(tmp_path, monkeypatch):
    whole = pixels((H, W, 3))
    Image.fromarray(whole).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("xcit.data.large_plain._PIXELS_AT_ONCE", 100)
    with pytest.raises(DataError, match="claims more than 200 pixels"):
        open_image(tmp_path / "a.png")
    with open_large_image(tmp_path / "a.png") as image:
        assert image.bytes_in_memory == 4 * H * W
        assert image._image.tile  # not decoded
        np.testing.assert_array_equal(image.read(10, 0, 1, 90), whole[10:11, :90])


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "bool", ">u2", ">f8"])
def test_npy(tmp_path, dtype):
    whole = pixels((H, W, 6), np.dtype(dtype).newbyteorder("=")).astype(dtype)
    np.save(tmp_path / "a.npy", whole)
    image = agrees(tmp_path / "a.npy", whole.astype(np.dtype(dtype).newbyteorder("=")))
    assert (image.format, image.is_windowed, image.bytes_in_memory) == ("npy", True, 0)
    np.save(tmp_path / "b.npy", np.ascontiguousarray(np.moveaxis(whole, 2, 0)))
    agrees(tmp_path / "b.npy", whole.astype(np.dtype(dtype).newbyteorder("=")), axes="cyx")
    agrees(
        tmp_path / "b.npy", whole[..., [5, 5, 2]].astype(np.dtype(dtype).newbyteorder("=")), axes="CYX", bands=(6, 6, 3)
    )
    np.save(tmp_path / "c.npy", np.ascontiguousarray(np.moveaxis(whole, 2, 1)))  # lines of bands
    agrees(tmp_path / "c.npy", whole.astype(np.dtype(dtype).newbyteorder("=")), axes="YCX")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("chunks", [(16, 16, 3), (20, 117, 1), (H, W, 3)])
def test_zarr(tmp_path, version, chunks):
    whole = pixels((H, W, 3), "uint16")
    zarr.create_array(str(tmp_path / "a.zarr"), data=whole, chunks=chunks, zarr_format=version)
    image = agrees(tmp_path / "a.zarr", whole)
    assert image.format == "zarr"
    assert image.block == chunks[:2]
    assert image.is_windowed == (chunks[:2] != (H, W))
    agrees(tmp_path / "a.zarr", whole[..., [2, 0]], bands=(3, 1))


def test_zarr_of_other_axes(tmp_path):
    whole = pixels((2, 5, H, W), "float32")
    zarr.create_array(str(tmp_path / "a.zarr"), data=whole, chunks=(1, 2, 16, 16))
    with pytest.raises(DataError, match=r"its array is \(2, 5, 83, 117\), expected .* axes='CYX'"):
        open_large_image(tmp_path / "a.zarr")
    agrees(tmp_path / "a.zarr", np.moveaxis(whole[0], 0, 2), axes="TCYX")
    zarr.create_array(str(tmp_path / "b.zarr"), data=whole[0], dimension_names=("band", "y", "x"))
    agrees(tmp_path / "b.zarr", np.moveaxis(whole[0], 0, 2))


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr(tmp_path, version):
    whole = pixels((3, H, W))
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=version)
    group.create_array("0", data=whole, chunks=(1, 16, 16))
    group.create_array("1", data=np.ascontiguousarray(whole[:, ::2, ::2]), chunks=(1, 16, 16))
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    scales = [{"axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]
    group.attrs.update({"multiscales": scales} if version == 2 else {"ome": {"version": "0.5", "multiscales": scales}})
    image = agrees(tmp_path / "a.zarr", np.moveaxis(whole, 0, 2))
    assert image.levels == ((H, W), (42, 59))
    with open_large_image(tmp_path / "a.zarr", level=1) as image:
        np.testing.assert_array_equal(image.read(0, 0, 42, 59), np.moveaxis(whole[:, ::2, ::2], 0, 2))


def test_groups_of_zarr(tmp_path):
    group = zarr.create_group(str(tmp_path / "a.zarr"))
    with pytest.raises(DataError, match="it holds no array"):
        open_large_image(tmp_path / "a.zarr")
    whole = pixels((H, W))
    group.create_array("red", data=whole)
    agrees(tmp_path / "a.zarr", whole)
    group.create_array("blue", data=whole)
    with pytest.raises(DataError, match=r"it holds blue, red; name one: .*a.zarr/blue"):
        open_large_image(tmp_path / "a.zarr")
    agrees(tmp_path / "a.zarr" / "red", whole)


# --- values -----------------------------------------------------------------------------------------------------------


def test_value_scale_and_nodata():
    assert [value_scale(t) for t in ("uint8", "uint16", "float32", "float64", "int16", "bool")] == [
        255,
        65535,
        1,
        1,
        1,
        1,
    ]
    window = np.array([[[1.0], [np.nan]], [[-9999.0], [4.0]]], dtype=np.float32)
    np.testing.assert_array_equal(fill_nodata(window, -9999.0, 5)[..., 0], [[1, 5], [5, 4]])
    np.testing.assert_array_equal(fill_nodata(window, None, 5)[..., 0], [[1, 5], [-9999, 4]])
    whole = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    assert fill_nodata(whole, 9, 5) is whole
    assert fill_nodata(whole, None, 5) is whole
    assert fill_nodata(whole, 2, 5).dtype == np.uint8


def test_nan_is_given_as_it_is(tmp_path):
    whole = pixels((H, W), "float32")
    whole[3, 4] = np.nan
    written(tmp_path / "a.tif", whole, nodata=np.nan)
    assert np.isnan(agrees(tmp_path / "a.tif", whole).nodata)
