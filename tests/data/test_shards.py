"""Tar shards: as webdataset writes them, read at random; and the sentence about each way in which they can break."""

import gc
import io
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit.data.images import open_image
from xcit.data.shard_index import index_shard
from xcit.data.shards import find_shards
from xcit.data.sources import open_data, open_eval_set
from xcit.errors import DataError, ExportError


def png(value=0, size=(5, 4)):
    file = io.BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def pack(path, members, **options):
    """Write a tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(start, stop, classes=2):
    """Members of samples whose pixels are their number and whose class is that modulo so many."""
    for i in range(start, stop):
        yield f"{i:04d}.png", png(i)
        yield f"{i:04d}.cls", str(i % classes).encode()


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        pack(tmp_path / f"train-{i:04d}.tar", samples(10 * i, 10 * i + 10))
    pack(tmp_path / "val-0000.tar", samples(30, 36))
    pack(tmp_path / "test-0000.tar", samples(36, 40))
    return tmp_path


def read_by_webdataset(wds, pattern):
    """Return what webdataset makes of shards: classes and pictures, in its order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        dataset = wds.WebDataset(str(pattern), shardshuffle=False).decode("pil")
        found = [(sample["cls"], np.asarray(sample["png"])) for sample in dataset]
        del dataset
        gc.collect()
    return found


def values(images):
    return [images.open(i).getpixel((0, 0))[0] for i in range(len(images))]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_shards(folder):
    train, val, test, notes = open_data(folder)
    assert (values(train), values(val), values(test)) == ([*range(30)], [*range(30, 36)], [*range(36, 40)])
    assert train.labels.tolist() == [i % 2 for i in range(30)]
    assert train.class_names == ("0", "1")
    assert train.names[12] == "train-0001.tar/0012"
    assert notes == ()
    assert train.open(3).mode == "RGB"
    assert open_data(folder, in_chans=1).train.open(3).mode == "L"


def test_shards_that_webdataset_writes(tmp_path):
    """The format is theirs: keys with folders and dots, .cls as text, images by Pillow, a shard size of choice."""
    wds = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (8, 9, 3), dtype=np.uint8) for _ in range(7)]
    with wds.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=3, verbose=0) as sink:
        for i, picture in enumerate(pictures):
            sink.write({"__key__": f"a/b{i}", "png": picture, "cls": i % 3, "seg.png": picture})
    with wds.TarWriter(str(tmp_path / "val-0000.tar")) as sink:
        for i, picture in enumerate(pictures[:3]):
            sink.write({"__key__": f"{i}", "png": picture, "json": {"label": i, "caption": "x"}})
    train, val, _, _ = open_data(tmp_path)
    assert train.labels.tolist() == [i % 3 for i in range(7)]
    assert val.labels.tolist() == [0, 1, 2]
    assert [len(index_shard(tmp_path / f"train-{i:04d}.tar")[0]) for i in range(3)] == [3, 3, 1]
    for i, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(train.open(i)), picture)
    assert train.names[4] == "train-0001.tar/a/b4"
    # and they read what we do: the same samples in the same order
    theirs = read_by_webdataset(wds, tmp_path / "train-{0000..0002}.tar")
    assert [label for label, _ in theirs] == train.labels.tolist()
    assert all(np.array_equal(picture, np.asarray(train.open(i))) for i, (_, picture) in enumerate(theirs))


def test_our_digits_are_read_by_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset")
    from xcit.data.digits_folder import write_digits

    write_digits(tmp_path / "d", layout="shards", image_size=8)
    train = open_data(tmp_path / "d", in_chans=1).train
    theirs = read_by_webdataset(wds, tmp_path / "d" / "train-{0000..0002}.tar")
    assert [label for label, _ in theirs] == train.labels.tolist()
    assert np.array_equal(theirs[700][1][..., 0], np.asarray(train.open(700)))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("train-{0000..0001}.tar", 20),
        ("train-000{0..2}.tar", 30),
        ("train-*.tar", 30),
        ("train-000{0,2}.tar", 20),
        ("train-0001.tar", 10),
    ],
)
def test_patterns(folder, pattern, count):
    train, val, _, notes = open_data(str(folder / pattern), val_fraction=0.2)
    assert len(train) + len(val) == count
    assert notes[-1].endswith("were split off for validation: by class, with seed 0.")


def test_a_pattern_for_all_parts(folder):
    train, val, test, _ = open_data(str(folder / "{train-{0000..0002},val-0000}.tar"))
    assert (len(train), len(val), test) == (30, 6, None)
    assert len(open_eval_set(str(folder / "*.tar"), split="val")) == 6


@pytest.mark.parametrize("name", ["imagenet1k-{}-0000.tar", "{}/00.tar", "set_{}00.tar"])
def test_the_part_is_told_by_a_word(tmp_path, name):
    pack(tmp_path / name.format("train"), samples(0, 4))
    pack(tmp_path / name.format("validation"), samples(4, 6))
    train, val, _, _ = open_data(tmp_path)
    assert (values(train), values(val)) == ([0, 1, 2, 3], [4, 5])


def test_labels_in_json_and_as_names(tmp_path):
    pack(
        tmp_path / "a.tar",
        [
            ("0.png", png()), ("0.json", b'{"label": "Katze", "width": 5}'),
            ("1.jpg", png()), ("1.cls", "Hündin\n".encode()),
            ("2.txt", b"Katze"), ("2.json", b'{"cls": "Katze"}'), ("2.png", png()),
            ("3.png", png()), ("3.cls", b"Katze"), ("3.json", b'{"caption": "no label here"}'),
        ],
    )  # fmt: skip
    images = open_eval_set(tmp_path / "a.tar")
    assert images.class_names == ("Hündin", "Katze")
    assert images.labels.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "text"), [("classes.txt", "cat\ndog\neel\n"), ("classes.json", '["cat","dog","eel"]')]
)
def test_class_names_beside_the_shards(folder, name, text):
    (folder / name).write_text(text)
    train, _, _, notes = open_data(folder)
    assert train.class_names == ("cat", "dog", "eel")
    assert notes[-1] == "1 class without a training image: 'eel'."
    assert open_eval_set(str(folder / "val-*.tar"), class_names=["dog", "cat"]).labels.tolist() == [1, 0] * 3


def test_names_in_labels_are_those_beside_the_shards(tmp_path):
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    pack(tmp_path / "a.tar", [("0.png", png()), ("0.cls", b"cat"), ("1.png", png()), ("1.cls", b"dog")])
    assert open_eval_set(tmp_path).labels.tolist() == [1, 0]
    pack(tmp_path / "a.tar", [("0.png", png()), ("0.cls", b"cat"), ("1.png", png()), ("1.cls", b"cow")])
    with pytest.raises(DataError, match=r"'1' is 'cow', which is none of the class names beside the shards"):
        open_eval_set(tmp_path)


def test_what_is_no_sample_is_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "é" * 600}) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        long = "d/" + "ü" * 150
        for name, content in [
            ("__meta__.json", b"{}"), ("README", b"x"), ("d/.hidden.png", b"x"), (f"{long}.png", png(7)),
            (f"{long}.cls", b"0"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = open_eval_set(path)
    assert values(images) == [7]
    assert images.names[0] == f"a.tar/{long}"


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    """As tar writes a folder that is not sorted."""
    pack(tmp_path / "a.tar", [("0.png", png(3)), ("1.cls", b"0"), ("1.png", png(4)), ("0.cls", b"1")])
    images = open_eval_set(tmp_path / "a.tar")
    assert sorted(zip(values(images), images.labels.tolist(), strict=True)) == [(3, 1), (4, 0)]


def test_broken_images_are_found_when_opened(tmp_path):
    pack(tmp_path / "a.tar", [("0.png", b"rubbish"), ("0.cls", b"0"), ("1.png", b""), ("1.cls", b"0")])
    images = open_eval_set(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar/0: is not an image in a format that can be read"):
        images.open(0)
    with pytest.raises(DataError, match=r"a\.tar/1: is empty"):
        images.open(1)


def test_images_of_every_kind_are_read_as_from_files(tmp_path):
    rng = np.random.default_rng(0)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds = {
        "cmyk.jpg": (Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8), "CMYK"), {}),
        "turned.jpg": (Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)), {"exif": rotated}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (6, 9), dtype=np.uint16)), {}),
        "clear.png": (Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8)), {}),
        "palette.gif": (Image.fromarray(rng.integers(0, 256, (6, 9), dtype=np.uint8)).convert("P"), {}),
    }
    members = []
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
        members += [(name, (tmp_path / name).read_bytes()), (f"{name.partition('.')[0]}.cls", b"0")]
    images = open_eval_set(pack(tmp_path / "a.tar", members))
    for index, name in enumerate(kinds):
        assert np.array_equal(np.asarray(images.open(index)), np.asarray(open_image(tmp_path / name)))
    assert images.open(1).size == (6, 9)


def _value(job):
    images, index = job
    return os.getpid(), images.open(index).getpixel((0, 0))[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_the_same(folder, start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    train = open_data(folder).train
    assert len(pickle.dumps(train)) < 6000
    order = np.random.default_rng(0).permutation(30)
    train.open(0)
    if start == "fork":
        pool = multiprocessing.get_context("fork").Pool(2)
        with pool:
            got = pool.map(_value, [(train, i) for i in order])
    else:
        # importlib mode hides this file's functions from a fresh interpreter; the set itself is what is under test
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            images = list(executor.map(train.open, [int(i) for i in order[:5]]))
        got = [(0, image.getpixel((0, 0))[0]) for image in images]
    assert [value for _, value in got] == list(order[: len(got)])
    assert os.getpid() not in {pid for pid, _ in got}


# --- the kept index ---------------------------------------------------------------------------------------------------


def test_the_index_is_kept_and_used(folder, monkeypatch):
    path = folder / "val-0000.tar"
    first = index_shard(path)
    assert (folder / "val-0000.tar.index.json").is_file()
    monkeypatch.setattr(tarfile, "open", None)  # not read through again
    assert index_shard(path) == first
    assert not list(folder.glob(".*"))


def test_a_changed_shard_is_indexed_anew(folder):
    path = folder / "val-0000.tar"
    index_shard(path)
    pack(path, samples(50, 53))
    assert values(open_eval_set(path)) == [50, 51, 52]
    # the same size, another time
    pack(path, samples(60, 63))
    os.utime(path, ns=(1, 1))
    assert values(open_eval_set(path)) == [60, 61, 62]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"stamp": 1, "samples": []}'])
def test_a_damaged_index_is_made_anew(folder, content):
    path = folder / "val-0000.tar"
    kept = folder / "val-0000.tar.index.json"
    kept.write_text(content)
    assert len(index_shard(path)[0]) == 6
    assert len(json.loads(kept.read_text())["samples"]) == 6


def test_a_folder_that_cannot_be_written(folder, monkeypatch, caplog):
    def refuse(path, content):
        raise ExportError(f"{path} could not be written") from PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("xcit.data.shard_index.write_atomic", refuse)
    with caplog.at_level(logging.WARNING, logger="xcit"):
        assert len(open_data(folder).train) == 30
    assert caplog.messages[0] == (
        f"The index of 3 shards cannot be kept beside them and is made in each run "
        f"({folder / 'train-0000.tar.index.json'}: Permission denied)."
    )
    assert not list(folder.glob("*.json"))


def test_a_shard_that_shrinks_while_in_use(folder):
    images = open_eval_set(folder / "val-0000.tar")
    os.truncate(folder / "val-0000.tar", 700)
    with pytest.raises(DataError, match=r"val-0000\.tar/0033: the shard has become shorter"):
        images.open(3)
    (folder / "val-0000.tar").unlink()
    with pytest.raises(DataError, match=r"val-0000\.tar/0033: cannot be read: No such file"):
        images.open(3)


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(source):
    with pytest.raises(DataError) as caught:
        open_eval_set(source, "shards")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_shard_that_is_cut_short(tmp_path, keep):
    path = pack(tmp_path / "a.tar", samples(0, 20), format=tarfile.USTAR_FORMAT)
    os.truncate(path, int(20 * 2048 * keep) + 100)
    assert refusal(path).startswith(f"{path}: is cut short or damaged")
    assert not list(tmp_path.glob("*.json"))


def test_a_shard_that_is_cut_between_members_or_within_the_last(tmp_path):
    """Python's tarfile takes such a file for whole."""
    path = pack(tmp_path / "a.tar", samples(0, 20), format=tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    path.write_bytes(whole[: 10 * 2048])
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 20
    assert "at byte 20,480 there is neither a member nor the mark of its end" in refusal(path)
    path.write_bytes(whole[: 20 * 2048 - 5])
    assert "is cut short or damaged" in refusal(path)
    path.write_bytes(whole[: 10 * 2048] + b"x" * 512 + whole[10 * 2048 :])
    assert "is cut short or damaged" in refusal(path)


def test_tars_that_were_joined(tmp_path):
    one, two = pack(tmp_path / "a.tar", samples(0, 2)), pack(tmp_path / "b.tar", samples(2, 4))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert refusal(one) == f"{one}: goes on after its end, as tar files do that were joined; join them with tar -A."


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("0.png", png())],
            "the sample '0' has no label: neither 0.cls, nor 0.json with label or cls; it holds 'png'.",
        ),
        ([("0.cls", b"1")], "the sample '0' has no image; it holds 'cls'."),
        (
            [("0.png", png()), ("0.cls", b"-1")],
            "the label of the sample '0' is -1 (.cls); it must be the class's number from 0, or its name.",
        ),
        ([("0.png", png()), ("0.cls", b"")], "the label of the sample '0' is '' (.cls); it must be"),
        ([("0.png", png()), ("0.cls", b"\xff\xfe")], "the label of the sample '0' is b'\\xff\\xfe' (.cls); it must be"),
        ([("0.png", png()), ("0.cls", b"9999999")], "the label of the sample '0' is 9999999 (.cls); it must be"),
        (
            [("0.png", png()), ("0.json", b"{not json")],
            "the label of the sample '0' is b'{not json' (.json); it must be",
        ),
        (
            [("0.png", png()), ("0.json", b'{"label": [1, 2]}')],
            "the label of the sample '0' is [1, 2] (.json); it must be",
        ),
        ([("0.png", png()), ("0.json", b'{"label": true}')], "the label of the sample '0' is True (.json); it must be"),
        ([("0.png", png()), ("0.json", b"[1]")], "the sample '0' has no label"),
        ([("0.png", png()), ("0.cls", b"1"), ("0.json", b'{"label": 2}')], "the sample '0' has two labels: 1 and 2."),
        ([("0.png", png()), ("0.jpg", png()), ("0.cls", b"1")], "the sample '0' has two images ('jpg', 'png')."),
        (
            [("0.png", png()), ("0.cls", b"1"), ("0.PNG", png())],
            "the sample '0' has two members .png; keys must differ.",
        ),
        ([("readme", b"x")], "holds no sample; its members should be called such as 0001.jpg and 0001.cls."),
        (
            [("0.png", png()), ("0.cls", b"1"), ("1.png", png()), ("1.cls", b"x")],
            "the label of the sample '1' is 'x', and the first one is 1; take either numbers or names in all shards.",
        ),
    ],
)
def test_samples_that_are_refused(tmp_path, members, message):
    path = pack(tmp_path / "a.tar", members)
    assert refusal(path).startswith(f"{path}: {message}")


def test_files_that_are_refused(tmp_path):
    packed = tmp_path / "train-0.tar.gz"
    with tarfile.open(packed, "w:gz"):
        pass
    why = "is compressed, so that no image in it can be read by itself; unpack it to a plain .tar"
    assert refusal(packed).startswith(f"{packed}: {why}")
    assert refusal(tmp_path).startswith(f"{packed}: {why}")
    with pytest.raises(DataError, match="is compressed"):
        open_data(packed)
    disguised = packed.rename(tmp_path / "b.tar")
    assert refusal(disguised).startswith(f"{disguised}: is cut short or damaged, or no tar file")
    (tmp_path / "void.tar").write_bytes(b"")
    assert refusal(tmp_path / "void.tar").startswith(
        f"{tmp_path / 'void.tar'}: is cut short or damaged, or no tar file"
    )
    assert refusal(tmp_path / "x.tar") == (
        f"The shard of {str(tmp_path / 'x.tar')!r} does not exist: {str(tmp_path / 'x.tar')!r}."
    )
    assert refusal(str(tmp_path / "x*.tar")) == f"The pattern {str(tmp_path / 'x*.tar')!r} matches no file."
    assert "the range {9..0} must rise" in refusal("a-{9..0}.tar")
    assert "{abc} must be a range such as {0000..0009}" in refusal("a-{abc}.tar")
    (tmp_path / "none").mkdir()
    assert refusal(tmp_path / "none").endswith("holds no tar file, nor do folders train, val and test in it.")


def test_a_missing_shard_of_a_range(folder):
    with pytest.raises(DataError, match=r"1 of 5 shards of .* does not exist: .*train-0003") as caught:
        open_data(str(folder / "{train-{0000..0003},val-0000}.tar"))
    assert str(folder / "train-0003.tar") in str(caught.value)


def test_names_of_parts_that_contradict(folder):
    pack(folder / "more.tar", samples(40, 42))
    with pytest.raises(
        DataError, match=r"some shards are named after a part \('test', 'train', 'val'\), others are not"
    ):
        open_data(folder)
    pack(folder / "train_val-1.tar", samples(40, 42))
    with pytest.raises(DataError, match=r"its name speaks of train and val; name it after one part"):
        open_data(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[1, 2]", '{"a": 1}', '["a", "a"]'])
def test_class_names_that_are_none(folder, text):
    (folder / "classes.json").write_text(text)
    with pytest.raises(
        DataError, match=r"classes\.json: (is not valid JSON|must list the names|names two classes alike)"
    ):
        open_data(folder)


def test_more_labels_than_class_names(folder):
    (folder / "classes.txt").write_text("cat\n")
    with pytest.raises(
        DataError, match=r"test-0000\.tar|train-0000\.tar: .* is 1, but there are 1 class names \(0 to 0\)"
    ):
        open_data(folder)


def test_classes_that_train_lacks(folder):
    pack(folder / "val-0000.tar", samples(0, 6, classes=4))
    with pytest.raises(DataError, match="val has 2 classes without an image in train: '2', '3'"):
        open_data(folder)
    # even though their names are known
    (folder / "classes.txt").write_text("cat\ndog\neel\nfox\n")
    with pytest.raises(DataError, match="val has 2 classes without an image in train: 'eel', 'fox'"):
        open_data(folder)


@pytest.mark.parametrize("pattern", ["a-{0000..0012}.tar", "{a,b}-{8..11}.tar", "x.tar", "{a,b{0..1}}-{098..101}.tar"])
def test_braces_mean_what_they_mean_to_webdataset(tmp_path, pattern):
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    names = sorted(braceexpand(str(tmp_path / pattern)))
    for name in names:
        Path(name).touch()
    assert sorted(map(str, find_shards(str(tmp_path / pattern)))) == names
