"""Public sets, written small in their published layouts by the tools that the publishers used."""

import hashlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from xcit.data import named
from xcit.data.check import check_data
from xcit.data.sources import open_data, open_eval_set
from xcit.errors import DataError


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path, quality=100)


def first_value(images, index):
    return images.open(index).getpixel((0, 0))[0]


def refusal(root, format, **options):
    with pytest.raises(DataError) as caught:
        open_data(root, format, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def batch(path, start, count, key, classes):
    """Write a batch as the published ones are: rows of 3,072 bytes, red first."""
    data = np.zeros((count, 3072), dtype=np.uint8)
    data[:, :1024] = np.arange(start, start + count)[:, None]
    content = {"data": data, key: [i % classes for i in range(start, start + count)], "batch_label": "x"}
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    kind = datasets.CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(5):
        batch(folder / f"data_batch_{i + 1}", 20 * i, 20, "labels", 10)
    batch(folder / "test_batch", 100, 10, "labels", 10)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    monkeypatch.setattr(kind, "train_list", [[name, md5(folder / name)] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path


def test_cifar10(cifar10):
    train, val, test, notes = open_data(cifar10, "cifar10", val_fraction=0.2)
    assert train.class_names[3] == "cat"
    assert (train.class_counts.tolist(), val.class_counts.tolist(), test.class_counts.tolist()) == (
        [8] * 10, [2] * 10, [1] * 10,
    )  # fmt: skip
    assert sorted([*train.names, *val.names]) == [f"cifar10/train/{i:05d}" for i in range(100)]
    for part in (train, val):
        for i, name in enumerate(part.names):
            number = int(name.rpartition("/")[2])
            assert part.labels[i] == number % 10
            assert np.array_equal(np.unique(np.asarray(part.open(i))[..., 0]), [number])
    assert first_value(test, 4) == 104
    assert train.open(0).size == (32, 32)
    assert notes == ("20 of 100 images (20.0%) were split off for validation: by class, with seed 0.",)
    assert open_eval_set(cifar10, "cifar10", in_chans=1).open(0).mode == "L"
    assert len(open_eval_set(cifar10, "cifar10", split="train")) == 100
    with pytest.raises(DataError, match="has test and train; it has no val part"):
        open_eval_set(cifar10, "cifar10", split="val")
    assert len(pickle.loads(pickle.dumps(test))) == 10
    assert check_data(cifar10, "cifar10").clean


def test_cifar100(tmp_path, monkeypatch):
    kind = datasets.CIFAR100
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    batch(folder / "train", 0, 200, "fine_labels", 100)
    batch(folder / "test", 0, 100, "fine_labels", 100)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, protocol=2))
    for name, file in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(kind, name, [[file, md5(folder / file)]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "meta")})
    train, val, test, _ = open_data(tmp_path, "cifar100")
    assert len(train.class_names) == 100
    assert (len(train), len(val), len(test)) == (100, 100, 100)  # of two images of a class, one is on each side


def test_cifar_that_is_not_there_or_damaged(tmp_path, cifar10):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", "cifar10") == (
        f"{tmp_path / 'empty'}: holds no whole copy of cifar10 (cifar-10-batches-py/ as published, unpacked from "
        f"cifar-10-python.tar.gz); put it there, or ask for the download (data.download=true)."
    )
    (cifar10 / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"evil pickle")
    assert "holds no whole copy of cifar10" in refusal(cifar10, "cifar10")
    assert refusal(tmp_path / "gone", "cifar10").startswith(f"{tmp_path / 'gone'}: is not there")


def test_a_download_that_fails(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    message = refusal(tmp_path / "new", "cifar10", download=True)
    assert message.endswith("and downloading it failed: no route to host.")


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError(args)

    for name in ("cifar.download_and_extract_archive", "flowers102.download_and_extract_archive"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", never)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", never)
    for name in named.NAMED_SETS:
        assert "holds no whole copy" in refusal(tmp_path, name)


# --- Flowers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    from scipy.io import savemat

    folder = tmp_path / "flowers-102"
    count = 306
    for i in range(1, count + 1):
        picture(folder / "jpg" / f"image_{i:05d}.jpg", i % 200)
    savemat(folder / "imagelabels.mat", {"labels": [[(i % 102) + 1 for i in range(count)]]})
    ids = np.arange(1, count + 1)
    savemat(folder / "setid.mat", {"trnid": [ids[:102]], "valid": [ids[102:204]], "tstid": [ids[204:]]})
    files = {
        **datasets.Flowers102._file_dict,
        "label": ("imagelabels.mat", md5(folder / "imagelabels.mat")),
        "setid": ("setid.mat", md5(folder / "setid.mat")),
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    return tmp_path


def test_flowers102(flowers):
    train, val, test, notes = open_data(flowers, "flowers102")
    assert (len(train), len(val), len(test), notes) == (102, 102, 102, ())
    assert train.class_names[:2] == ("pink primrose", "hard-leaved pocket orchid")
    assert train.labels.tolist() == list(range(102))
    assert val.names[0] == "flowers-102/jpg/image_00103.jpg"
    assert abs(first_value(val, 0) - 103) <= 3
    assert len(open_eval_set(flowers, "flowers102")) == 102
    for i in range(103, 150):
        (flowers / "flowers-102" / "jpg" / f"image_{i:05d}.jpg").unlink()
    assert refusal(flowers, "flowers102").startswith("Flowers102 lists 102 files of which 47 do not exist (")


# --- Cars -------------------------------------------------------------------------------------------------------------


def cars(root):
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(
        ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"], dtype=object
    )
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, file, count in (
        ("train", folder / "devkit" / "cars_train_annos.mat", 12),
        ("test", folder / "cars_test_annos_withlabels.mat", 6),
    ):
        rows = np.zeros((1, count), dtype=[("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
        for i in range(count):
            rows[0, i] = (1, i % 3 + 1, f"{i + 1:05d}.jpg")
            picture(folder / f"cars_{part}" / f"{i + 1:05d}.jpg", 10 * i)
        savemat(file, {"annotations": rows})
    return root


def test_stanford_cars(tmp_path):
    train, val, test, _ = open_data(cars(tmp_path), "stanford_cars", val_fraction=0.25)
    assert train.class_names[2] == "Ram C/V Cargo Van Minivan 2012"
    assert (train.class_counts.tolist(), val.class_counts.tolist(), test.class_counts.tolist()) == (
        [3] * 3, [1] * 3, [2] * 3,
    )  # fmt: skip
    assert test.names[4] == "stanford_cars/cars_test/00005.jpg"
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert abs(first_value(test, 4) - 40) <= 3
    assert "no longer offer for download: get a copy elsewhere" in refusal(tmp_path / "stanford_cars", "stanford_cars")
    (tmp_path / "stanford_cars" / "devkit" / "cars_train_annos.mat").write_bytes(b"")
    assert refusal(tmp_path, "stanford_cars").endswith("Mat file appears to be truncated.")


# --- iNaturalist ------------------------------------------------------------------------------------------------------


def inat(root, year="2018", folder="train_val2018", categories=4):
    """Write lists and images: the lists name the published folder, whatever it is called here."""
    for part, start, count in (("train", 0, 12), ("val", 12, 4)):
        images, annotations = [], []
        for i in range(start, start + count):
            below = f"{'Aves' if i % categories < 2 else 'Plantae'}/{i % categories}/{i:032x}.jpg"
            picture(root / folder / below, 10 * i)
            images.append({"id": 1000 + i, "width": 8, "height": 6, "file_name": f"train_val{year}/{below}"})
            annotations.append({"id": 5000 + i, "image_id": 1000 + i, "category_id": i % categories})
        named_as = [{"id": i, "name": f"{i}", "supercategory": "x"} for i in range(categories)]
        content = {"info": {}, "images": images, "annotations": annotations[::-1], "categories": named_as[::-1]}
        (root / f"{part}{year}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("folder", ["train_val2018", "2018"])
def test_inat18(tmp_path, folder):
    train, val, test, notes = open_data(inat(tmp_path, folder=folder), "inat18")
    assert (len(train), len(val), test, notes) == (12, 4, None, ())
    assert train.class_names == ("0", "1", "2", "3")
    assert val.labels.tolist() == [3, 2, 1, 0]
    assert val.names[0] == f"{folder}/Plantae/3/{15:032x}.jpg"
    assert abs(first_value(val, 0) - 150) <= 3
    assert len(open_eval_set(tmp_path, "inat18")) == 4


def test_inat19_with_the_names_that_came_later(tmp_path):
    inat(tmp_path, "2019", "train_val2019")
    names = [{"id": i, "name": ["Turdus merula", "Quercus robur"][i % 2]} for i in range(4)]
    (tmp_path / "categories.json").write_text(json.dumps(names))
    assert open_data(tmp_path, "inat19").train.class_names == (
        "0 Turdus merula", "1 Quercus robur", "2 Turdus merula", "3 Quercus robur",
    )  # fmt: skip


def test_inat_that_is_not_whole(tmp_path):
    (tmp_path / "train_val2018").mkdir()
    assert refusal(tmp_path, "inat18") == (
        f"{tmp_path}: holds no whole copy of iNaturalist 2018: train2018.json not there; get them from "
        f"https://ml-inat-competition-datasets.s3.amazonaws.com/2018/, or ask for the download (data.download=true)."
    )
    inat(tmp_path)
    (tmp_path / "train2018.json").write_text("{}")
    assert refusal(tmp_path, "inat18").endswith(
        "train2018.json: lacks 'images', 'annotations', 'categories'; it must be the published list."
    )
    (tmp_path / "train2018.json").write_text("{")
    assert "train2018.json: is not valid JSON" in refusal(tmp_path, "inat18")
    lists = {"images": [{"id": 1}], "annotations": [{"image_id": 2}], "categories": [{"id": 0, "name": "a"}]}
    (tmp_path / "train2018.json").write_text(json.dumps(lists))
    assert "is not in the published form (KeyError: 'file_name')" in refusal(tmp_path, "inat18")
    lists["images"] = []
    lists["annotations"] = []
    (tmp_path / "train2018.json").write_text(json.dumps(lists))
    assert "or it names no image" in refusal(tmp_path, "inat18")


def test_inat_is_fetched_when_asked(tmp_path, monkeypatch):
    """What torchvision leaves, and what it does not fetch: the lists, checked against their published MD5."""
    asked = []

    def fetch(address, root, md5):
        asked.append((address, md5))
        inat(tmp_path, folder="2018") if len(asked) == 1 else None

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    train, _, _, _ = open_data(tmp_path, "inat18", download=True)
    assert len(train) == 12
    address = "https://ml-inat-competition-datasets.s3.amazonaws.com/2018/train2018.json.tar.gz"
    assert asked == [(address, "bfa29d89d629cbf04d826a720c0a68b0")]
