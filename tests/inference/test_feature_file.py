"""Files of features, and the run that makes them: what is in them, what is refused, how it goes on where it was."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError, ExportError
from xcit.inference import embedding
from xcit.inference.embedding import embed_files
from xcit.inference.feature_file import FeatureTable, Origin, read_features, unit_rows, write_features
from xcit.inference.features import FeatureExtractor
from xcit.models.xcit import XCiT

ORIGIN = Origin("ab" * 32, {"model": "m.safetensors", "pool": "token", "scales": [1.0]}, "photos")


def table(n=5, dim=7, origin=ORIGIN):
    rng = np.random.default_rng(0)
    names = [f"ünï/{i}.png" for i in range(n)]
    return FeatureTable(
        origin, names, rng.normal(size=(n, dim)).astype(np.float32), np.arange(n), np.arange(n) + 10**18
    )


def assert_close(a, b):
    """Equal but for rounding: images that share a batch are not the same ones in every run."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def assert_same(a, b):
    assert (a.origin, list(a.paths)) == (b.origin, list(b.paths))
    for name in ("features", "sizes", "mtimes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5])
def test_what_is_written_is_read(tmp_path, n):
    write_features(tmp_path / "f.parquet", table(n))
    found = read_features(tmp_path / "f.parquet")
    assert found.dim == 7
    assert_same(found, table(n))


@pytest.mark.parametrize("name", ["f.parquet", "f.npy", "f.csv"])
def test_names_of_files_may_be_plain_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_features(name, table())
    assert (tmp_path / name).exists()
    if name == "f.parquet":
        assert_same(read_features(name), table())
    with pytest.raises(DataError, match=r"gone\.parquet: there is no such file"):
        read_features("gone.parquet")


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        ({"pool": "token", "dim": 8, "gem_p": None}, {"pool": "gem", "dim": 8, "gem_p": 4.0}, "pool"),
        ({"pool": "token", "dim": 8, "gem_p": None}, {"pool": "both", "dim": 16, "gem_p": None}, "pool"),
        ({"pool": "gem", "dim": 8, "gem_p": 3.0}, {"pool": "gem", "dim": 8, "gem_p": 4.0}, "gem_p"),
        ({"architecture": "a", "dim": 8, "scales": [1]}, {"architecture": "b", "dim": 9, "scales": [2]},
         "architecture, scales"),
    ],
)  # fmt: skip
def test_what_differs_is_told_by_its_cause(ours, theirs, what):
    sentence = Origin("ab" * 32, ours, ".").unlike(Origin("cd" * 32, theirs, "."), "f.parquet")
    assert sentence.endswith(f"; they differ in {what}.")


def test_many_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("xcit.inference.feature_file.ROW_GROUP", 3)
    write_features(tmp_path / "f.parquet", table(11))
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 4
    assert_same(read_features(tmp_path / "f.parquet"), table(11))


def test_any_program_reads_the_parquet(tmp_path):
    write_features(tmp_path / "f.parquet", table())
    plain = pq.read_table(tmp_path / "f.parquet")
    assert plain.column_names == ["path", "size", "mtime_ns", "features"]
    assert plain.schema.field("features").type == pa.list_(pa.float32(), 7)
    assert json.loads(plain.schema.metadata[b"xcit"])["fingerprint"] == ORIGIN.fingerprint
    np.testing.assert_array_equal(np.array(plain["features"].to_pylist(), np.float32), table().features)


def test_npy_and_csv(tmp_path):
    write_features(tmp_path / "f.npy", table())
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), table().features)
    about = json.loads((tmp_path / "f.json").read_text())
    assert about["paths"] == table().paths
    assert about["settings"] == ORIGIN.settings
    write_features(tmp_path / "f.csv", table())
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", *(f"f{i}" for i in range(7))]
    assert [row[0] for row in rows] == table().paths
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], np.float32), table().features)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.parquet"):
        write_features(tmp_path / "f.h5", table())


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "f.parquet"
    write_features(path, table(50))
    whole = path.read_bytes()
    for at in (*range(8, len(whole) - 8, 97), len(whole) - 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            found = read_features(path)
        except DataError:
            continue
        else:  # a byte that says nothing about the rows, such as the writer's name
            assert_same(found, table(50))
    for end in (3, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"damaged|not a Parquet"):
            read_features(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"path,f0\na,1\n", "not a Parquet file"), (b"PAR1 and so on", "damaged or truncated")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "f.parquet").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / "f.parquet")


def test_other_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"path": ["a"], "features": [[1.0]]}), tmp_path / "f.parquet")
    with pytest.raises(DataError, match="not one of features that xcit embed wrote"):
        read_features(tmp_path / "f.parquet")
    with pytest.raises(DataError, match="no such file"):
        read_features(tmp_path / "gone.parquet")
    with pytest.raises(DataError, match="is a folder"):
        read_features(tmp_path)


def test_unit_rows():
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], np.float32))
    np.testing.assert_allclose(rows[0], [0.6, 0.8], rtol=1e-7)
    assert (rows[1] == 0).all()
    assert np.isfinite(rows).all()


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return XCiT(embed_dim=16, depth=1, num_heads=2, patch_size=8, num_classes=0).eval()


def extractor(model, pool="avg"):
    return FeatureExtractor(model, pool=pool, preprocessing=Preprocessing((16, 16)), batch_size=2)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(7):
        picture(i).save(f"photos/{i}.png")
    return [tmp_path.__class__("photos", f"{i}.png") for i in range(7)]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


class Counting:
    """Count the rows that are computed; stop the run like Ctrl-C after some."""

    def __init__(self, stop=None):
        self.rows, self.stop = 0, stop

    def __call__(self, *failed, **others):
        self.rows += 1
        if self.rows == self.stop:
            raise KeyboardInterrupt


def test_rows_are_what_the_extractor_gives(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    done = embed_files(photos, extractor(model), out)
    found = read_features(out)
    assert (done.num_rows, done.num_reused, done.failed) == (7, 0, [])
    assert list(found.paths) == [str(path) for path in photos]
    np.testing.assert_array_equal(found.features, extractor(model)(photos))
    assert found.sizes.tolist() == [path.stat().st_size for path in photos]
    assert found.origin.fingerprint == extractor(model).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.parquet", "photos"]


def test_broken_files_are_left_out_and_listed(tmp_path, model, photos):
    photos[2].write_bytes(b"nothing")
    photos[4].unlink()
    out = tmp_path / "f.parquet"
    done = embed_files(photos, extractor(model), out)
    assert sorted(each.path for each in done.failed) == ["photos/2.png", "photos/4.png"]
    assert list(read_features(out).paths) == [str(photos[i]) for i in (0, 1, 3, 5, 6)]
    with (tmp_path / "f.parquet.errors.csv").open(newline="") as file:
        listed = {row["path"]: row["error"] for row in csv.DictReader(file)}
    assert "not an image" in listed["photos/2.png"]
    assert "no such file" in listed["photos/4.png"]
    # mended, they are read by the next run, and the list goes
    picture(2).save(photos[2])
    picture(4).save(photos[4])
    seen = Counting()
    embed_files(photos, extractor(model), out, on_row=seen)
    assert seen.rows == 2
    assert not (tmp_path / "f.parquet.errors.csv").exists()
    assert_close(read_features(out).features, extractor(model)(photos))


def test_a_name_that_is_no_text(tmp_path, model, photos):
    odd = tmp_path.__class__(os.fsdecode(b"photos/\xff.png"))
    picture(0).save(odd)
    done = embed_files([*photos, odd], extractor(model), tmp_path / "f.parquet")
    assert "not text in UTF-8" in done.failed[0].error
    assert done.num_rows == 7


def test_nothing_can_be_read(tmp_path, model, photos):
    for path in photos:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 7 images can be read. The first: photos/0.png: is empty"):
        embed_files(photos, extractor(model), tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()
    with pytest.raises(DataError, match=r"^photos/0.png: is empty \(0 bytes\)\.$"):
        embed_files(photos[:1], extractor(model), tmp_path / "f.parquet")


@pytest.mark.parametrize(("rows_a_part", "fitting", "num_kept"), [(2, 2, 4), (100, 0, 0), (100, 1, 7), (2, 4, 7)])
def test_what_is_told_as_kept_is_on_the_disk(tmp_path, model, photos, monkeypatch, rows_a_part, fitting, num_kept):
    """Rows that were computed but did not fit are not kept; those of earlier parts are."""
    monkeypatch.setattr(embedding, "PART_ROWS", rows_a_part)
    written, kept = [], []
    write = embedding.write_features

    def filling(path, table):
        if len(written) == fitting:
            raise ExportError("full")
        written.append(len(table))
        write(path, table)

    monkeypatch.setattr(embedding, "write_features", filling)
    with pytest.raises(ExportError, match="full"):
        embed_files(photos, extractor(model), str(tmp_path / "f.parquet"), on_kept=kept.append)
    lying = sum(len(read_features(part)) for part in (tmp_path / ".f.parquet.parts").glob("0*.parquet"))
    assert sum(kept) == lying == num_kept


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can make a file")
def test_a_place_where_no_file_can_be_is_told_as_such(model, photos):
    with pytest.raises(ExportError, match=r"^/proc/f.parquet cannot be written: .* \(/proc\)"):
        embed_files(photos, extractor(model), "/proc/f.parquet")


def test_a_repeat_computes_nothing_and_touches_nothing(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos, extractor(model), out)
    before = out.stat().st_mtime_ns, out.read_bytes()
    seen = Counting()
    done = embed_files(photos, extractor(model), out, on_row=seen)
    assert (seen.rows, done.num_reused) == (0, 7)
    assert (out.stat().st_mtime_ns, out.read_bytes()) == before


def test_changed_and_new_files_are_read(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos[:5], extractor(model), out)
    picture(99).save(photos[1])  # another size, surely another time
    stat = photos[3].stat()
    os.utime(photos[3], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same size
    seen = Counting()
    embed_files(photos, extractor(model), out, on_row=seen)
    assert seen.rows == 4
    assert_close(read_features(out).features, extractor(model)(photos))


def test_another_spelling_is_the_same_file(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos, extractor(model), out)
    seen = Counting()
    embed_files([path.absolute() for path in photos], extractor(model), out, on_row=seen)
    assert seen.rows == 0


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_interrupted_it_goes_on_and_ends_the_same(tmp_path, model, photos, monkeypatch, stop):
    monkeypatch.setattr(embedding, "PART_ROWS", 3)
    embed_files(photos, extractor(model), tmp_path / "whole.parquet")
    out = tmp_path / "f.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_files(photos, extractor(model), out, on_row=Counting(stop))
    assert not out.exists()
    seen, reused = Counting(), []
    embed_files(photos, extractor(model), out, on_row=seen, on_reused=reused.append)
    assert reused == [stop]
    assert seen.rows == 7 - stop
    found, whole = read_features(out), read_features(tmp_path / "whole.parquet")
    assert_close(found.features, whole.features)
    assert_same(replace(found, features=whole.features), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.parquet", "photos", "whole.parquet"]


def test_a_damaged_part_is_computed_again(tmp_path, model, photos, monkeypatch):
    monkeypatch.setattr(embedding, "PART_ROWS", 2)
    out = tmp_path / "f.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_files(photos, extractor(model), out, on_row=Counting(6))
    parts = sorted((tmp_path / ".f.parquet.parts").glob("*.parquet"))
    assert len(parts) == 3
    parts[1].write_bytes(parts[1].read_bytes()[:-20])
    seen = Counting()
    embed_files(photos, extractor(model), out, on_row=seen)
    assert seen.rows == 3
    assert_close(read_features(out).features, extractor(model)(photos))


def test_another_extractor_is_refused_and_nothing_is_lost(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos, extractor(model), out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"was made with XCiT \(pool avg.*not with XCiT \(pool gem"):
        embed_files(photos, extractor(model, "gem"), out)
    assert out.read_bytes() == before
    embed_files(photos, extractor(model, "gem"), out, overwrite=True)
    np.testing.assert_array_equal(read_features(out).features, extractor(model, "gem")(photos))


def test_an_unfinished_run_of_another_extractor_is_refused(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_files(photos, extractor(model), out, on_row=Counting(4))
    with pytest.raises(ConfigError, match="unfinished run"):
        embed_files(photos, extractor(model, "gem"), out)
    seen = Counting()
    embed_files(photos, extractor(model), out, on_row=seen)  # it can still be finished
    assert seen.rows == 3


def test_rows_of_other_images_are_not_dropped_unasked(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos, extractor(model), out)
    with pytest.raises(ConfigError, match=r"holds 2 images that are not named now \(photos/5.png"):
        embed_files(photos[:5], extractor(model), out)
    photos[5].unlink()
    photos[6].unlink()
    assert embed_files(photos[:5], extractor(model), out).num_gone == 2
    assert len(read_features(out)) == 5


def test_rows_of_other_images_are_dropped_when_asked(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos, extractor(model), out)
    seen = Counting()
    embed_files(photos[:5], extractor(model), out, on_row=seen, overwrite=True)
    assert seen.rows == 0
    assert read_features(out).paths == [str(path) for path in photos[:5]]


@pytest.mark.parametrize("name", ["f.parquet", "f.npy"])
def test_killed_between_the_last_part_and_the_output_it_loses_nothing(tmp_path, model, photos, monkeypatch, name):
    out = tmp_path / name
    embed_files(photos[:4], extractor(model), out)
    with monkeypatch.context() as patch:
        patch.setattr(embedding._Run, "_finish", Counting(1))
        with pytest.raises(KeyboardInterrupt):
            embed_files(photos, extractor(model), out, overwrite=name.endswith("npy"))
    seen = Counting()
    embed_files(photos, extractor(model), out, on_row=seen, overwrite=name.endswith("npy"))
    assert seen.rows == 0
    found = read_features(out).features if name.endswith("parquet") else np.load(out)
    assert_close(found, extractor(model)(photos))


def test_rows_stand_in_the_order_of_the_paths_after_a_repeat_too(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    embed_files(photos, extractor(model), out)
    embed_files(photos[::-1], extractor(model), out)
    assert read_features(out).paths == [str(path) for path in photos[::-1]]


def test_what_is_not_ours_is_never_replaced(tmp_path, model, photos):
    out = tmp_path / "f.parquet"
    out.write_text("my diary")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not a Parquet file"):
            embed_files(photos, extractor(model), out, overwrite=overwrite)
    assert out.read_text() == "my diary"


def test_two_runs_at_once_are_refused(tmp_path, model, photos):
    with FileLock(tmp_path / ".f.parquet.lock"), pytest.raises(ConfigError, match="at this moment"):
        embed_files(photos, extractor(model), tmp_path / "f.parquet")


def test_npy_resumes_too_and_is_not_replaced_unasked(tmp_path, model, photos):
    out = tmp_path / "f.npy"
    with pytest.raises(KeyboardInterrupt):
        embed_files(photos, extractor(model), out, on_row=Counting(4))
    seen = Counting()
    embed_files(photos, extractor(model), out, on_row=seen)
    assert seen.rows == 3
    assert_close(np.load(out), extractor(model)(photos))
    with pytest.raises(ConfigError, match="--overwrite"):
        embed_files(photos, extractor(model), out)
