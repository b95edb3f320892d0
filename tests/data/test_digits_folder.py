"""The digits as files: the same pixels and parts as the embedded ones in every layout, and no other file replaced."""

import json

import numpy as np
import pytest
import torch

from xcit.data.digits import digit_preprocessing, digit_splits
from xcit.data.digits_folder import MANIFEST, write_digits
from xcit.data.sources import open_data
from xcit.errors import ConfigError, DataError, ExportError


@pytest.mark.parametrize("layout", ["folder", "csv", "shards"])
def test_every_layout_holds_the_digits(tmp_path, layout):
    """A model at their size sees the pixels that one trained on the embedded digits sees, bit for bit."""
    written = write_digits(tmp_path / "d", layout=layout)
    assert written.counts == {"train": 1149, "val": 288, "test": 360}
    splits = open_data(written.root, in_chans=1)
    assert splits.notes == ()
    embedded = digit_splits(0.2)
    prepare = digit_preprocessing(embedded.train, 32)
    for images, digits in zip(splits[:3], embedded, strict=True):
        number_of = {int(n): i for i, n in enumerate(digits.indices)}
        order = [number_of[int(name.rpartition("/")[2].removesuffix(".png"))] for name in images.names]
        assert sorted(order) == list(range(len(digits)))
        assert images.class_names == tuple("0123456789")
        assert np.array_equal(images.labels, digits.labels[order])
        for i in range(0, len(images), 40):
            image = images.open(i)
            assert (image.mode, image.size) == ("L", (32, 32))
            assert torch.equal(prepare(image), prepare(digits.picture(order[i])))


def test_size_and_validation_share(tmp_path):
    written = write_digits(tmp_path / "d", image_size=8, val_fraction=0.5)
    assert written.counts["val"] == written.counts["train"] + 1 == 719
    splits = open_data(written.root, in_chans=1)
    assert splits.test.open(0).size == (8, 8)


def test_what_is_there_stays(tmp_path):
    write_digits(tmp_path / "d", image_size=8)
    with pytest.raises(DataError, match="is not empty; name a new folder, or overwrite the digits in it"):
        write_digits(tmp_path / "d")
    (tmp_path / "d" / "train" / "3" / "mine.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"did not write, such as 'train/3/mine\.png', and will not be overwritten"):
        write_digits(tmp_path / "d", overwrite=True)
    assert len(list((tmp_path / "d" / "train").rglob("*.png"))) == 1150

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match=r"was not written by xcit data digits; name another folder"):
        write_digits(other, overwrite=True)
    assert (other / "thesis.txt").read_text() == "years"


def test_overwriting_leaves_nothing_of_the_earlier_layout(tmp_path):
    folder = tmp_path / "d"
    root = write_digits(folder, layout="shards", image_size=8).root
    open_data(root)  # leaves its indices beside the shards
    assert list(folder.glob("*.index.json"))
    write_digits(folder, layout="csv", image_size=8, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "digits.csv", "images"]
    write_digits(folder, image_size=8, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "test", "train", "val"]


def test_a_list_of_files_that_points_elsewhere_removes_nothing(tmp_path):
    outside = tmp_path / "precious.png"
    outside.write_bytes(b"x")
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"files": ["../precious.png", str(outside)]}))
    write_digits(folder, image_size=8, overwrite=True)
    assert outside.exists()
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(DataError, match="in it is damaged; remove the folder"):
        write_digits(folder, overwrite=True)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="layout is 'tar'; it must be one of folder, csv, shards"):
        write_digits(tmp_path / "d", layout="tar")
    with pytest.raises(ConfigError, match="image_size is 4; it must be between 8 and 1024"):
        write_digits(tmp_path / "d", image_size=4)
    with pytest.raises(ConfigError, match=r"val_fraction is 0\.9"):
        write_digits(tmp_path / "d", val_fraction=0.9)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; name a folder"):
        write_digits(tmp_path / "file")
    with pytest.raises(ExportError, match="cannot be written: Not a directory"):
        write_digits(tmp_path / "file" / "d")
