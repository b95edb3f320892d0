"""Windows of a large file take the memory of a window and of a row of tiles, as the operating system counts it."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")
pytest.importorskip("imagecodecs")
if sys.platform != "linux":
    pytest.skip("the system's count is read from /proc", allow_module_level=True)

READ = """
    import json, sys
    import numpy as np
    import xcit.data.large_image, xcit.data.large_output
    from xcit.bench.anonymous import AnonymousPeak
    assert not {"tifffile", "zarr", "rasterio", "imagecodecs"} & set(sys.modules)

    path, out, band = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with xcit.data.large_image.open_large_image(path) as image:
        H, W = image.size
        image.read(0, 0, 1, 1)  # decoders are imported
        x = np.arange(W)[None, :, None]
        held = image.bytes_in_memory
        output = xcit.data.large_output.open_dense_output(out, (H, W), image.dtype)
        with AnonymousPeak() as peak, output:
            for top in range(0, H, band):
                window = image.read(top, 0, min(band, H - top), W)
                for y in (top, top + len(window) - 1):  # the pattern, known beforehand
                    expected = (7 * y + 13 * x[0] + 50 * np.arange(image.channels) + (y * x[0] >> 8)) & 255
                    assert (window[y - top] == expected).all(), y
                output.write(top, window[..., 0])
    print(json.dumps({"taken": peak.highest - peak.before, "held": held, "writing": output.bytes_in_memory}))
"""


def pattern(top, left, height, width, channels):
    y = np.arange(top, top + height)[:, None, None]
    x = np.arange(left, left + width)[None, :, None]
    return ((7 * y + 13 * x + 50 * np.arange(channels) + (y * x >> 8)) & 255).astype(np.uint8)


def tiles(size, side, channels):
    for top in range(0, size, side):
        row = pattern(top, 0, side, -(-size // side) * side, channels)
        for left in range(0, size, side):
            tile = np.ascontiguousarray(row[:, left : left + side])
            yield tile if channels > 1 else tile[..., 0]


def write_tiff(path, size, channels, **options):
    options["photometric"] = "rgb" if channels == 3 else "minisblack"
    shape = (size, size, 3) if channels == 3 else (size, size)
    with tifffile.TiffWriter(path) as file:
        file.write(tiles(size, 256, channels), shape=shape, dtype=np.uint8, tile=(256, 256), **options)


def measured(path, out, band):
    code = [sys.executable, "-c", textwrap.dedent(READ), str(path), str(out), str(band)]
    process = subprocess.run(code, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", ["tiled.tif", "strips.tif", "a.npy", "a.zarr"])
def test_a_window_takes_its_own_memory(tmp_path, name):
    size, band = 3000, 64
    path = tmp_path / name
    if name == "tiled.tif":
        write_tiff(path, size, 3, compression="deflate")
    elif name == "strips.tif":
        tifffile.imwrite(path, pattern(0, 0, size, size, 3), photometric="rgb", rowsperstrip=16, compression="lzw")
    elif name == "a.npy":
        np.save(path, pattern(0, 0, size, size, 3))
    else:
        zarr.create_array(str(path), data=pattern(0, 0, size, size, 3), chunks=(64, 256, 3))
    got = measured(path, tmp_path / "out.npy", band)
    window = band * size * 3
    assert got["held"] <= max(256 * 3072 * 3, 20 * 64 * 256 * 3)
    assert got["taken"] <= 3 * window + got["held"] + (8 << 20), got  # the image has 27 million bytes


@pytest.mark.slow
def test_a_file_of_20000_x_20000(tmp_path):
    size, band = 20_000, 200
    write_tiff(tmp_path / "a.tif", size, 1, compression="deflate")
    got = measured(tmp_path / "a.tif", tmp_path / "out.tif", band)
    assert got["held"] == 256 * 20_224
    window = band * size
    assert got["taken"] <= 2 * window + got["held"] + got["writing"] + (24 << 20), (
        got
    )  # the image has 400 million bytes
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        page = tif.pages[0]
        assert page.shape == (size, size)
        rows = -(-size // page.tilelength) * -(-size // page.tilewidth)
        assert len([count for count in page.databytecounts if count]) == rows
        data, _, _ = page.decode(read_at(tmp_path / "out.tif", page, rows - 1), rows - 1)
    last = size - size % page.tilelength
    np.testing.assert_array_equal(
        data[0, : size - last, : size - last, 0], pattern(last, last, size - last, size - last, 1)[..., 0]
    )


def read_at(path, page, index):
    with path.open("rb") as file:
        file.seek(page.dataoffsets[index])
        return file.read(page.databytecounts[index])


PLAIN = """
    import json, sys, time
    from xcit.bench.anonymous import AnonymousPeak
    from xcit.data.large_image import open_large_image

    with open_large_image(sys.argv[1]) as image:
        with AnonymousPeak() as peak:
            image.read(0, 0, 1, 1)
            time.sleep(0.01)
        print(json.dumps({"taken": peak.highest - peak.before, "held": image.bytes_in_memory}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "progressive.jpg", "grey.jpg", "a.webp", "a.gif"])
def test_pictures_take_what_they_say(tmp_path, name):
    picture = Image.fromarray(pattern(0, 0, 3000, 3000, 3))
    options = (
        {"progressive": True, "subsampling": 0} if name.startswith("p") else {"method": 0} if "webp" in name else {}
    )
    (picture.convert("L") if name.startswith("grey") else picture).save(tmp_path / name, **options)
    code = [sys.executable, "-c", textwrap.dedent(PLAIN), str(tmp_path / name)]
    got = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert 0.8 * got["held"] - (2 << 20) <= got["taken"] <= 1.1 * got["held"] + (4 << 20), got
