"""Large results, written row by row and read by independent libraries; killed, filled up, gone on with."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from xcit.data import large_writing
from xcit.data.large_image import Georeference, open_large_image
from xcit.data.large_output import open_dense_output
from xcit.errors import BackendError, ConfigError, DataError, ExportError, ShapeError

tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")
rasterio = pytest.importorskip("rasterio")

H, W = 603, 517
ENDINGS = ["npy", "zarr", "tif"]
PLACE = Georeference("EPSG:32633", (160.0, 0.0, 500000.0, 0.0, -160.0, 4600000.0))


def values(shape, dtype="uint8", seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    return rng.normal(size=shape).astype(dtype) if dtype.kind == "f" else rng.integers(0, 2, size=shape).astype(dtype)


def write(path, whole, *, steps=(100,), **options):
    with open_dense_output(path, whole.shape, whole.dtype, **options) as output:
        add(output, whole, steps)
    return output


def add(output, whole, steps=(100,), until=None):
    until = len(whole) if until is None else until
    top, number = output.rows_written, 0
    while top < until:
        step = min(steps[number % len(steps)], until - top)
        output.write(top, whole[top : top + step])
        top, number = top + step, number + 1


def read(path):
    """Read a result whole, not by this library."""
    if path.suffix == ".npy":
        return np.load(path)
    return zarr.open_array(str(path), mode="r")[:] if path.suffix == ".zarr" else tifffile.imread(path)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(params=ENDINGS)
def path(request, tmp_path):
    return tmp_path / f"a.{request.param}"


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        *[("uint8", None), ("uint8", 1), ("uint8", 3), ("uint8", 5), ("uint16", 3), ("int32", None), ("int64", 2)],
        *[("float16", None), ("float32", None), ("float32", 1), ("float32", 5), ("float64", 3)],
    ],
)
def test_what_is_written_is_read(path, dtype, channels):
    whole = values((H, W) if channels is None else (H, W, channels), dtype)
    output = write(path, whole, steps=(1, 255, 2, 300))
    got = read(path)
    assert got.dtype == whole.dtype
    np.testing.assert_array_equal(got.reshape(whole.shape), whole)
    assert files(path.parent) == [path.name]
    assert output.bytes_in_memory < 2 * whole.nbytes + (40 << 20)
    with open_large_image(path) as image:
        assert image.size == (H, W)
        np.testing.assert_array_equal(image.read(250, 7, 20, 500), whole.reshape(H, W, -1)[250:270, 7:507])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (300, 20), (20, 300, 4)])
def test_sizes_around_a_tile(path, shape, dtype):
    whole = values(shape, dtype)
    write(path, whole, steps=(7,))
    np.testing.assert_array_equal(read(path), whole)


def test_booleans(tmp_path):
    whole = values((30, 20), "bool")
    for ending in ("npy", "zarr"):
        write(tmp_path / f"a.{ending}", whole)
        np.testing.assert_array_equal(read(tmp_path / f"a.{ending}"), whole)
    with pytest.raises(ConfigError, match="would hold bool"):
        open_dense_output(tmp_path / "a.tif", (3, 3), bool)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_tiff_by_gdal_and_pillow(tmp_path, dtype):
    whole = values((H, W, 3), dtype) * 100
    write(tmp_path / "a.tif", whole, georeference=PLACE)
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, 2), whole)
        assert file.crs.to_epsg() == 32633
        assert file.transform[:6] == PLACE.transform
    if dtype == "uint8":
        with Image.open(tmp_path / "a.tif") as image:
            np.testing.assert_array_equal(np.asarray(image), whole)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.is_bigtiff
        assert tif.pages[0].compression == (1 if dtype == "float32" else 8)


def test_class_maps_are_small(tmp_path):
    whole = np.zeros((2000, 2000), dtype=np.uint8)
    write(tmp_path / "a.tif", whole)
    assert (tmp_path / "a.tif").stat().st_size < whole.nbytes / 100


def test_rows_of_tiles_fit_into_memory(tmp_path):
    """Wide results with many channels: what is gathered stays near 32 MiB."""
    for ending, limit in [("npy", 0), ("zarr", 75 << 20), ("tif", 80 << 20)]:
        output = open_dense_output(tmp_path / f"a.{ending}", (64, 1250, 768), "float32")
        assert output.bytes_in_memory <= limit
        output.abandon()


# --- georeference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [PLACE.transform, (8.0, 6.0, 5.0, 6.0, -8.0, 4.0)])
def test_the_place_is_kept_and_read(path, transform):
    place = Georeference("EPSG:32633", transform)
    write(path, values((40, 30)), georeference=place)
    with open_large_image(path) as image:
        assert (image.georeference.crs, image.georeference.transform) == (place.crs, place.transform)
    if path.suffix == ".npy":
        assert files(path.parent) == ["a.georeference.json", "a.npy"]
        write(path, values((40, 30)))
        assert files(path.parent) == ["a.npy"]  # that of another result would be wrong


@pytest.mark.parametrize("crs", ["EPSG:4326", "+proj=laea +lat_0=52.1 +lon_0=10.3 +ellps=GRS80 +units=m +no_defs"])
@pytest.mark.parametrize("has_rasterio", [True, False])
def test_from_a_geotiff_into_a_geotiff_of_larger_pixels(tmp_path, monkeypatch, crs, has_rasterio):
    transform = rasterio.Affine(8.0, 6.0, 5.0, 6.0, -8.0, 4.0)
    profile = {"driver": "GTiff", "height": 64, "width": 96, "count": 1, "dtype": "uint8"}
    with rasterio.open(tmp_path / "image.tif", "w", crs=crs, transform=transform, **profile) as file:
        file.write(values((1, 64, 96)))
        expected = file.crs
    with monkeypatch.context() as patch:
        if not has_rasterio:
            patch.setitem(sys.modules, "rasterio", None)
        with open_large_image(tmp_path / "image.tif") as image:
            write(tmp_path / "a.tif", values((4, 6)), georeference=image.georeference.scaled(16, 16))
    with rasterio.open(tmp_path / "a.tif") as file:
        assert file.crs == expected
        assert file.transform == transform @ rasterio.Affine.scale(16)


def test_a_system_without_keys_needs_rasterio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(
        BackendError, match=r'written with rasterio, which is not installed: pip install "xcit\[giant\]"'
    ):
        open_dense_output(tmp_path / "a.tif", (4, 6), "uint8", georeference=PLACE)
    assert not files(tmp_path)


def test_a_georeference_that_is_not_ours(tmp_path):
    write(tmp_path / "a.npy", values((40, 30)))
    for text in ('{"crs": 1}', "{", "null"):
        (tmp_path / "a.georeference.json").write_text(text)
        with pytest.raises(DataError, match="is not one that xcit wrote"):
            open_large_image(tmp_path / "a.npy")


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_nothing_has_the_name_before_the_end_and_an_error_leaves_what_was_there(path):
    old, new = values((H, W)), values((H, W), seed=1)
    write(path, old)

    def fail():
        with open_dense_output(path, new.shape, new.dtype) as output:
            add(output, new)
            np.testing.assert_array_equal(read(path), old)
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        fail()
    assert files(path.parent) == [path.name]
    np.testing.assert_array_equal(read(path), old)
    write(path, new)
    assert files(path.parent) == [path.name]
    np.testing.assert_array_equal(read(path), new)


def test_missing_rows_are_no_result(path):
    output = open_dense_output(path, (H, W), "uint8")
    add(output, values((H, W)), until=H - 1)
    with pytest.raises(ShapeError, match="602 of 603 rows were written"):
        output.close()
    output.close()  # has ended
    assert not files(path.parent)


def test_other_rows_than_the_next(path):
    with open_dense_output(path, (4, 6, 2), "float32") as output:
        for top, rows in [
            (1, values((1, 6, 2), "float32")),
            (0, values((1, 6, 2), "float64")),
            (0, values((1, 5, 2), "float32")),
            (0, values((6, 2), "float32")),
            (0, values((5, 6, 2), "float32")),
        ]:
            with pytest.raises(ShapeError, match=r"expected \(rows, 6, 2\) of float32 for row 0 of 4"):
                output.write(top, rows)
        add(output, values((4, 6, 2), "float32"))
    assert read(path).shape == (4, 6, 2)


@pytest.fixture
def small_files():
    """No file may be larger than 100 KB: what a full disk does, at a place that is known."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("key", [None, "key"])
@pytest.mark.usefixtures("small_files")
def test_a_disk_that_is_full(path, key):
    whole = values((H, W), "float64")
    with pytest.raises(ExportError, match=r"could not be written: .*; make room") as error:
        write(path, whole, key=key)
    assert ("what has been written is kept" in str(error.value)) == (key is not None)
    assert not path.exists()
    assert bool(files(path.parent)) == (key is not None)


def test_room_is_asked_for_at_the_beginning(tmp_path):
    for ending in ("npy", "tif"):
        with pytest.raises(ExportError, match=rf"a.{ending} takes .* GiB, and .* are free there; make room"):
            open_dense_output(tmp_path / f"a.{ending}", (10**6, 10**6, 100), "float32")
    assert not files(tmp_path)


def test_an_error_of_the_disk_at_the_end(path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    output = open_dense_output(path, (H, W), "uint8")
    add(output, values((H, W)))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ExportError, match="could not be written: Input/output error"):
        output.close()
    assert not files(path.parent)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "options", "reason"),
    [
        ("a.png", (3, 3), "uint8", {}, "must end in .npy, .zarr, .tif, .tiff"),
        ("a.npy", (3,), "uint8", {}, r"results are \(H, W\) or \(H, W, C\)"),
        ("a.npy", (3, 0), "uint8", {}, r"each 1 or more"),
        ("a.npy", (3, 3), "complex64", {}, "would hold complex64"),
        ("a.npy", (3, 3), "uint8", {"resume": True}, "no key says what it is"),
        ("a.tif", (1, 1, 70000), "uint8", {}, "at most 65535 channels"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, shape, dtype, options, reason):
    with pytest.raises(ConfigError, match=reason):
        open_dense_output(tmp_path / name, shape, dtype, **options)
    assert not files(tmp_path)


def test_folders_and_files_that_are_something_else_stay(tmp_path):
    for name in ("a.npy", "b.zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("mine")
        with pytest.raises(ExportError, match="a folder has this name"):
            open_dense_output(tmp_path / name, (3, 3), "uint8")
        assert (tmp_path / name / "letter.txt").exists()
    (tmp_path / "c.zarr").write_text("mine")
    with pytest.raises(ExportError, match="a file has this name"):
        open_dense_output(tmp_path / "c.zarr", (3, 3), "uint8")
    with pytest.raises(ExportError, match=r"could not be written: .*; name a folder that you may write to"):
        open_dense_output(tmp_path / "c.zarr" / "d.npy", (3, 3), "uint8")


def test_zarr_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(
        BackendError, match=r'is written with zarr, which is not installed: pip install "xcit\[giant\]"'
    ):
        open_dense_output(tmp_path / "a.zarr", (3, 3), "uint8")


# --- going on ---------------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    import numpy as np
    from pathlib import Path
    from xcit.data import large_writing
    from xcit.data.large_output import open_dense_output

    path, source, until = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3])
    large_writing.COMMIT_SECONDS = 0.0
    with open_dense_output(path, source.shape, source.dtype, key="k", resume=True) as output:
        for top in range(output.rows_written, until, 50):
            output.write(top, source[top : min(top + 50, until)])
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_killed_writer_is_gone_on_with_to_the_same_bytes(path, tmp_path_factory, dtype):
    whole = values((H, W, 2), dtype)
    other = tmp_path_factory.mktemp("other")
    np.save(other / "source.npy", whole)
    code = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(other / "source.npy"), "460"]
    assert subprocess.run(code, check=False).returncode == -signal.SIGKILL
    assert not path.exists()
    with open_dense_output(path, whole.shape, whole.dtype, key="k", resume=True) as output:
        begin = output.rows_written
        assert begin == (460 if path.suffix == ".npy" else 256)
        add(output, whole, steps=(33,))
    assert files(path.parent) == [path.name]
    at_once = other / path.name
    write(at_once, whole)
    if path.is_dir():
        names = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
        assert names == sorted(p.relative_to(at_once) for p in at_once.rglob("*") if p.is_file())
        assert all((path / name).read_bytes() == (at_once / name).read_bytes() for name in names)
    else:
        assert path.read_bytes() == at_once.read_bytes()
    np.testing.assert_array_equal(read(path), whole)


def test_rows_after_the_last_commit_are_written_again(path):
    whole = values((H, W), "uint16")
    output = open_dense_output(path, whole.shape, whole.dtype, key="k")
    add(output, whole, until=300)
    begin = output.flush()
    add(output, values((H, W), "uint16", seed=1), until=590)
    output.abandon()
    with open_dense_output(path, whole.shape, whole.dtype, key="k", resume=True) as output:
        assert output.rows_written == begin == (300 if path.suffix == ".npy" else 256)
        add(output, whole)
    np.testing.assert_array_equal(read(path), whole)


def test_another_result_or_none_is_begun_again(path):
    whole = values((H, W))
    first = open_dense_output(path, whole.shape, whole.dtype, key="k")
    add(first, whole, until=550)
    first.flush()
    first.abandon()
    for options, dtype, begin in [
        ({"key": "other", "resume": True}, "uint8", False),
        ({"key": "k", "resume": True}, "uint16", False),
        ({"key": "k", "resume": True, "georeference": PLACE}, "uint8", False),
        ({"key": "k", "resume": True}, "uint8", True),
        ({"key": "k"}, "uint8", False),
        ({"key": "k", "resume": True}, "uint8", False),
    ]:
        output = open_dense_output(path, whole.shape, dtype, **options)
        assert bool(output.rows_written) == begin
        output.abandon()


@pytest.mark.parametrize("damage", ["progress", "partial", "no progress"])
def test_what_cannot_be_gone_on_with_is_begun_again(path, damage, monkeypatch):
    monkeypatch.setattr(large_writing, "COMMIT_SECONDS", 0.0)
    whole = values((H, W))
    output = open_dense_output(path, whole.shape, whole.dtype, key="k")
    add(output, whole, until=550)
    output.abandon()
    partial = next(p for p in path.parent.iterdir() if not p.name.endswith(".progress"))
    progress = partial.with_name(partial.name + ".progress")
    assert json.loads(progress.read_bytes())["rows"] >= 512
    if damage == "progress":
        progress.write_text('{"rows": 3')
    elif damage == "no progress":
        progress.unlink()
    elif partial.is_dir():
        (partial / "zarr.json").unlink()
    else:
        partial.write_bytes(b"short")
    with open_dense_output(path, whole.shape, whole.dtype, key="k", resume=True) as output:
        assert output.rows_written == 0
        add(output, whole)
    np.testing.assert_array_equal(read(path), whole)
    assert files(path.parent) == [path.name]
