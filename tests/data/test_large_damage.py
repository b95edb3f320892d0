"""Large images that cannot be read, or not everywhere: one sentence that names the file and the place."""

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit.data.large_image import open_large_image
from xcit.errors import BackendError, ConfigError, DataError, ShapeError, XCiTError

sys.path.insert(0, str(Path(__file__).parent))
from large_samples import H, W, pixels, rasterio, tifffile, write_packed, written, zarr


def test_windows_beyond_the_border(tmp_path):
    np.save(tmp_path / "a.npy", pixels((H, W)))
    with open_large_image(tmp_path / "a.npy") as image:
        for window in [(0, 0, H + 1, 1), (-1, 0, 2, 2), (0, W, 1, 1), (0, 0, 0, 5), (0, 0, 5, -1)]:
            with pytest.raises(ShapeError, match="is not within its 83 x 117 px"):
                image.read(*window)
        with pytest.raises(ConfigError, match="0 rows high"):
            next(image.rows(0))


@pytest.mark.parametrize("bands", [(0,), (4,), (), (1, -1)])
def test_bands_that_are_not_there(tmp_path, bands):
    np.save(tmp_path / "a.npy", pixels((H, W, 3)))
    with pytest.raises(ConfigError, match="it has 3, counted from 1"):
        open_large_image(tmp_path / "a.npy", bands=bands)


@pytest.mark.parametrize("name", ["a.npy", "a.png"])
def test_one_resolution_only(tmp_path, name):
    np.save(tmp_path / "a.npy", pixels((H, W)))
    Image.fromarray(pixels((H, W))).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="it holds one resolution"):
        open_large_image(tmp_path / name, level=1)


def test_no_image(tmp_path):
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("no image at all, but a long enough text")
    (tmp_path / "folder").mkdir()
    for name, reason in [
        ("empty.tif", "is empty"),
        ("text.tif", "is not an image in a format that can be read; it begins with b'no image"),
        ("folder", "is a folder, and not a zarr"),
        ("missing.tif", "there is no such file"),
    ]:
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            open_large_image(tmp_path / name)
    with pytest.raises(ConfigError, match="axes are for TIFF"):
        open_large_image(tmp_path / "text.tif", axes="YX")


@pytest.mark.parametrize("keep", [4, 8, 10, 40, 120])
def test_tiff_with_half_a_header(tmp_path, caplog, keep):
    tifffile.imwrite(tmp_path / "a.tif", pixels((H, W)), tile=(16, 16), compression="deflate", metadata=None)
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:keep])
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError, match=r"b.tif: is a damaged or incomplete TIFF"):
        open_large_image(tmp_path / "b.tif")
    assert not caplog.records  # nor does tifffile add its own


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "zstd", "jpeg"])
@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"rowsperstrip": 16}])
def test_a_truncated_tiff_is_read_as_far_as_it_goes(tmp_path, compression, options):
    whole = pixels((96, 96))
    tifffile.imwrite(tmp_path / "a.tif", whole, compression=compression, metadata=None, **options)
    expected = tifffile.imread(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: int(len(data) * 0.6)])
    with open_large_image(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(image.read(0, 0, 40, 96)[..., 0], expected[:40])
        with pytest.raises(DataError, match=r"a.tif: .*(row 80|row 90).* cannot be read: .*(cut off)"):
            image.read(90, 0, 2, 96)


@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd", "jpeg", "packbits"])
def test_a_damaged_tile_is_named_and_the_others_are_read(tmp_path, compression):
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels((96, 96)),
        compression=compression,
        tile=(16, 16),
        metadata=None,
        photometric="minisblack",
    )
    expected = tifffile.imread(tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        offset, count = tif.pages[0].dataoffsets[8], tif.pages[0].databytecounts[8]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset : offset + count] = bytes([0x80]) * count
    (tmp_path / "a.tif").write_bytes(data)
    with open_large_image(tmp_path / "a.tif") as image:
        for _ in range(2):
            with pytest.raises(DataError, match=r"a.tif: its tile 1, 2, at row 16, column 32, cannot be read: "):
                image.read(0, 0, 96, 96)
        np.testing.assert_array_equal(image.read(32, 0, 64, 96)[..., 0], expected[32:])


def test_a_file_that_is_cut_off_or_removed_while_it_is_read(tmp_path):
    whole = pixels((H, W))
    np.save(tmp_path / "a.npy", whole)
    with open_large_image(tmp_path / "a.npy") as image:
        (tmp_path / "a.npy").unlink()  # what is open stays readable
        np.testing.assert_array_equal(image.read(0, 0, H, W)[..., 0], whole)
    np.save(tmp_path / "a.npy", whole)
    with open_large_image(tmp_path / "a.npy") as image:
        with (tmp_path / "a.npy").open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(DataError, match=r"83 x 117 px at row 0, column 0 cannot be read: the file is cut off"):
            image.read(0, 0, H, W)


def test_a_zarr_that_is_removed_or_damaged_while_it_is_read(tmp_path):
    path = tmp_path / "a.zarr"
    array = zarr.create_array(str(path), shape=(64, 64), chunks=(16, 16), dtype="uint8", zarr_format=2)
    array[:] = pixels((64, 64))
    with open_large_image(path) as image:
        (path / "1.2").write_bytes(b"damage")
        image.read(0, 0, 64, 32)
        with pytest.raises(DataError, match=r"a.zarr: the window of 1 x 64 px at row 16, column 0 cannot be read: "):
            image.read(16, 0, 1, 64)
        path.rename(tmp_path / "b.zarr")
        with pytest.raises(DataError, match="cannot be read: it is no longer there"):
            image.read(0, 0, 8, 8)
    (tmp_path / "b.zarr" / ".zarray").write_text("{")
    with pytest.raises(DataError, match="is a damaged zarr"):
        open_large_image(tmp_path / "b.zarr")


def test_npy_that_cannot_be_used(tmp_path):
    np.save(tmp_path / "a.npy", pixels((H, W)))
    data = (tmp_path / "a.npy").read_bytes()
    for name, content, reason in [
        ("cut.npy", data[:-5], "is cut off; 5 bytes are missing"),
        ("header.npy", data[:30], "is a damaged .npy"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            open_large_image(tmp_path / name)
    for name, array, reason in [
        ("columns.npy", np.asfortranarray(pixels((H, W))), "is stored by columns"),
        ("complex.npy", np.zeros((H, W), dtype=np.complex64), "holds complex64"),
        ("objects.npy", np.full((H, W), None), "holds object"),
        ("first.npy", pixels((3, H, W)), r"expected \(H, W\) or \(H, W, C\); say which axis is which"),
        ("none.npy", pixels((0, W)), r"has no pixels \(0 x 117\)"),
    ]:
        np.save(tmp_path / name, array, allow_pickle=True)
        with pytest.raises(DataError, match=f"{name}: .*{reason}"):
            open_large_image(tmp_path / name)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "jp2"])
def test_a_truncated_picture(tmp_path, ending):
    Image.fromarray(pixels((H, W, 3))).save(tmp_path / f"a.{ending}")
    data = (tmp_path / f"a.{ending}").read_bytes()
    (tmp_path / f"a.{ending}").write_bytes(data[: len(data) // 2])

    try:
        image = open_large_image(tmp_path / f"a.{ending}")
    except DataError:
        assert ending in ("webp", "jp2")
        return
    with image:
        for _ in range(3):
            with pytest.raises(
                DataError, match=rf"a.{ending}: the window of 10 x 117 px at row 70, column 0 cannot be"
            ):
                image.read(70, 0, 10, W)


def test_a_raster_whose_source_is_gone(tmp_path):
    written(tmp_path / "a.tif", pixels((H, W)))
    with rasterio.open(tmp_path / "a.tif") as file, rasterio.vrt.WarpedVRT(file) as warped:
        rasterio.shutil.copy(warped, tmp_path / "a.vrt", driver="VRT")
    (tmp_path / "a.tif").unlink()

    def read():
        with open_large_image(tmp_path / "a.vrt") as image:
            image.read(0, 0, H, W)

    with pytest.raises(DataError, match=r"a.vrt: "):
        read()


@pytest.mark.parametrize(("package", "name"), [("tifffile", "a.tif"), ("zarr", "a.zarr")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, package, name):
    tifffile.imwrite(tmp_path / "a.tif", pixels((H, W)))
    zarr.create_array(str(tmp_path / "a.zarr"), data=pixels((H, W)))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf'need {package}, which is not installed: pip install "xcit\[giant\]"'):
        open_large_image(tmp_path / name)


WITHOUT_IMAGECODECS = """
    import sys
    sys.modules["imagecodecs"] = None
    from xcit.data.large_image import open_large_image
    from xcit.errors import BackendError
    for name in sys.argv[1:]:
        try:
            with open_large_image(name) as image:
                print(image.read(0, 0, 64, 64).sum())
        except BackendError as error:
            print(error)
"""


def test_compressions_that_need_imagecodecs(tmp_path):
    whole = pixels((64, 64))
    names = {"deflate": None, "jpeg": "compressed (JPEG)", "lzw": "compressed (LZW)", "12": "decoded by imagecodecs"}
    for name in names:
        if name == "12":
            write_packed(tmp_path / name, whole.astype(np.uint16), 12, tile=(16, 16))
        else:
            tifffile.imwrite(tmp_path / name, whole, tile=(16, 16), compression=name)
    code = [sys.executable, "-c", textwrap.dedent(WITHOUT_IMAGECODECS), *(str(tmp_path / name) for name in names)]
    lines = subprocess.run(code, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == str(whole.sum())
    for line, reason in zip(lines[1:], list(names.values())[1:], strict=True):
        assert reason in line
        assert line.endswith('imagecodecs, which is not installed: pip install "xcit[giant]"')


@pytest.mark.parametrize("name", ["a.tif", "b.tif", "a.png", "a.jpg", "a.npy"])
def test_damage_anywhere_is_one_sentence(tmp_path, name):
    """A few bytes are changed at random, most of them in the header: an image comes back, or an error of ours."""
    whole = pixels((40, 50, 3))
    if name == "a.tif":
        tifffile.imwrite(tmp_path / name, whole, photometric="rgb", tile=(16, 16), compression="deflate")
    elif name == "b.tif":
        tifffile.imwrite(tmp_path / name, whole, photometric="rgb", rowsperstrip=9)
    elif name == "a.npy":
        np.save(tmp_path / name, whole)
    else:
        Image.fromarray(whole).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(0, min(len(data), 400 if rng.random() < 0.7 else len(data)), size=4):
            changed[at] = rng.integers(256)
        (tmp_path / name).write_bytes(changed)
        try:
            with open_large_image(tmp_path / name) as image:
                if np.prod(image.size) < 1e6 and image.channels < 100:
                    image.read(0, 0, *image.size)
        except XCiTError as error:
            assert name in str(error)  # noqa: PT017 (most are no errors)


def test_rasters_without_rasterio(tmp_path, monkeypatch):
    (tmp_path / "a.vrt").write_text("<VRTDataset/>")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r'GDAL\'s formats \(VRT, IMG, ...\) need rasterio: pip install "xcit\[giant\]"'
    ):
        open_large_image(tmp_path / "a.vrt")
