"""Splitting, choosing parts, and finding the data's classes among a model's, whatever the layout."""

import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from xcit.data.digits import digit_splits
from xcit.data.image_set import ImageSet
from xcit.data.labels import imagenet_names
from xcit.data.parts import Texts, split_off
from xcit.data.sources import imagenet_wnids, match_classes, open_data, open_eval_set
from xcit.errors import ConfigError, DataError, UnknownNameError


def unread(number):
    raise AssertionError(number)


def image_set(labels, class_names, names=None):
    labels = np.asarray(labels)
    names = names or [f"{i}.png" for i in range(len(labels))]
    return ImageSet(tuple(class_names), names, labels, unread, np.arange(len(labels)))


def fill(folder, classes=("cat", "dog"), count=4):
    for label, name in enumerate(classes):
        for i in range(count):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 10 * label + i).save(path)
    return folder


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_a_sequence():
    words = ["", "a", "été", "\udcff.png", "", "a/b.jpg"]
    texts = Texts(words)
    assert list(texts) == words
    assert len(texts) == 6
    assert texts[-1] == "a/b.jpg"
    assert texts[1:4] == words[1:4]
    assert list(pickle.loads(pickle.dumps(texts))) == words
    with pytest.raises(IndexError):
        texts[6]
    assert list(Texts([])) == []


def test_a_million_names_are_few_objects():
    texts = Texts(f"train/n{i % 1000:08d}/n{i:08d}.JPEG" for i in range(20_000))
    assert len(pickle.dumps(texts)) < 20_000 * 45


# --- splitting --------------------------------------------------------------------------------------------------------


def test_each_class_is_split_in_proportion():
    labels = np.repeat([0, 1, 2], [100, 30, 4])
    images = image_set(labels, "abc")
    train, val, notes = split_off(images, 0.1, 0)
    assert sorted([*train, *val]) == list(range(134))
    assert np.bincount(labels[val]).tolist() == [10, 3, 1]
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()  # noqa: PT018
    assert notes == ("14 of 134 images (10.4%) were split off for validation: by class, with seed 0.",)


def test_the_split_is_pinned():
    """A resumed run, and one on another machine, must hold out the same images."""
    _, val, _ = split_off(image_set(np.arange(40) % 2, "ab"), 0.2, 0)
    assert val.tolist() == [6, 9, 13, 14, 15, 16, 22, 31]


def test_the_split_follows_the_seed_and_the_names_not_the_order():
    names = [f"{i}.png" for i in range(60)]
    labels = np.arange(60) % 3
    _, val, _ = split_off(image_set(labels, "abc", names), 0.2, 7)
    order = np.random.default_rng(0).permutation(60)
    _, again, _ = split_off(image_set(labels[order], "abc", [names[i] for i in order]), 0.2, 7)
    assert sorted(order[again]) == val.tolist()
    _, other, _ = split_off(image_set(labels, "abc", names), 0.2, 8)
    assert other.tolist() != val.tolist()


def test_a_set_that_grows_keeps_most_of_its_split():
    names = [f"{i}.png" for i in range(220)]
    small = {names[i] for i in split_off(image_set([0] * 200, "a", names[:200]), 0.2, 0)[1]}
    large = {names[i] for i in split_off(image_set([0] * 220, "a", names), 0.2, 0)[1]}
    assert len(small - large) <= 6


def test_the_split_does_not_depend_on_where_the_data_lies(tmp_path):
    first = open_data(fill(tmp_path / "a", count=20))
    second = open_data(fill(tmp_path / "b" / "c", count=20))
    assert list(first.val.names) == list(second.val.names)


def test_the_split_does_not_depend_on_how_accents_are_written():
    composed = [f"\u00e9{i}.png" for i in range(60)]
    decomposed = [f"e\u0301{i}.png" for i in range(60)]
    one, two = (split_off(image_set([0] * 60, "a", names), 0.2, 0)[1] for names in (composed, decomposed))
    assert one.tolist() == two.tolist()


def test_single_images_are_trained_on():
    train, val, notes = split_off(image_set([0, 0, 0, 1, 2], ["many", "one", "uno"]), 0.5, 0)
    assert {3, 4} <= set(train)
    assert len(val) == 2
    assert notes[1] == "The only image of 2 classes is trained on: 'one', 'uno'."


def test_images_of_several_classes_are_split_in_proportion():
    rng = np.random.default_rng(0)
    labels = rng.random((2000, 12)) < np.geomspace(0.004, 0.5, 12)
    _, val, _ = split_off(image_set(labels, "abcdefghijkl"), 0.2, 0)
    wanted = labels.sum(0) * 0.2
    got = labels[val].sum(0)
    assert (np.abs(got - wanted) <= np.maximum(1, 0.25 * wanted)).all(), (got, wanted)
    assert abs(len(val) - 400) < 80


def test_a_rare_class_is_on_both_sides_of_a_multi_label_split():
    labels = np.ones((100, 2), dtype=bool)
    labels[2:, 1] = False
    _, val, _ = split_off(image_set(labels, ["all", "two"]), 0.1, 0)
    assert labels[val].sum(0).tolist() == [10, 1]


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_share_out_of_range(tmp_path, fraction):
    with pytest.raises(ConfigError, match="must be more than 0 and less than 1"):
        open_data(tmp_path, val_fraction=fraction)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_honoured(tmp_path):
    fill(tmp_path)
    with pytest.raises(UnknownNameError, match="Did you mean 'folder'"):
        open_data(tmp_path, "foldr")
    with pytest.raises(ConfigError, match=r"Only public sets can be downloaded .*; the format is auto"):
        open_data(tmp_path, download=True)
    with pytest.raises(ConfigError, match="root is empty"):
        open_data("")
    with pytest.raises(ConfigError, match="takes 2 channels"):
        open_data(tmp_path, in_chans=2)
    with pytest.raises(ConfigError, match="The digits are embedded; leave the root empty"):
        open_data(tmp_path, "digits")
    with pytest.raises(DataError, match="is a folder; name the CSV file in it"):
        open_data(tmp_path, "csv")


def test_shards_and_folders_side_by_side_are_not_guessed(tmp_path):
    fill(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="holds tar files as well as folders; say which"):
        open_data(tmp_path)
    assert len(open_data(tmp_path, "folder").train) == 6


def test_archives_beside_train_and_val_are_not_guessed(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(DataError, match="holds tar files as well as folders"):
        open_data(tmp_path)


# --- the digits -------------------------------------------------------------------------------------------------------


def test_the_embedded_digits():
    splits = open_data("", "digits", val_fraction=0.2, in_chans=1)
    for part, digits in zip(splits[:3], digit_splits(0.2), strict=True):
        assert part.class_names == tuple("0123456789")
        assert np.array_equal(part.labels, digits.labels)
        assert part.names[3] == f"digits/{digits.indices[3]:05d}"
        image = part.open(3)
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), digits.images[3])
    assert splits.notes == ()
    assert open_data("", "digits").train.open(0).mode == "RGB"
    assert np.array_equal(open_eval_set("", "digits").labels, splits.test.labels)
    with pytest.raises(ConfigError, match="only test is the same in every run"):
        open_eval_set("", "digits", split="val")


# --- which part is judged ---------------------------------------------------------------------------------------------


def test_the_part_that_is_judged(tmp_path, caplog):
    for part in ("train", "val", "test"):
        fill(tmp_path / part, count={"train": 3, "val": 2, "test": 1}[part])
    with caplog.at_level(logging.INFO, logger="xcit"):
        assert len(open_eval_set(tmp_path)) == 2
    assert f"{tmp_path} has test and train and val; test is taken." in caplog.messages
    assert len(open_eval_set(tmp_path, split="val")) == 4
    assert len(open_eval_set(tmp_path, split="validation")) == 4
    assert len(open_eval_set(tmp_path, split="train")) == 6
    assert len(open_eval_set(tmp_path / "val")) == 4
    with pytest.raises(UnknownNameError, match=r"Unknown part 'tset'\. Did you mean 'test'"):
        open_eval_set(tmp_path, split="tset")
    with pytest.raises(DataError, match="is not divided; it has no test part"):
        open_eval_set(tmp_path / "val", split="test")


def test_val_is_judged_where_there_is_no_test_and_train_is_not_even_looked_at(tmp_path):
    (tmp_path / "train").mkdir()
    fill(tmp_path / "val")
    assert len(open_eval_set(tmp_path)) == 8
    with pytest.raises(DataError, match="has train and val; it has no test part"):
        open_eval_set(tmp_path, split="test")
    with pytest.raises(DataError, match="train: is empty"):
        open_eval_set(tmp_path, split="train")


def test_a_set_of_train_alone_is_not_judged_unasked(tmp_path):
    fill(tmp_path / "train")
    with pytest.raises(DataError, match="has train, but neither test nor val; say which part"):
        open_eval_set(tmp_path)


# --- the model's classes ----------------------------------------------------------------------------------------------


def test_classes_are_found_by_name(tmp_path):
    model = ("dog", "eel", "café", "cat")
    images = open_eval_set(fill(tmp_path, ["cafe\u0301", "cat", "dog"], 1), class_names=model)
    assert images.class_names == model
    assert images.labels.tolist() == [2, 3, 0]
    with pytest.raises(DataError) as caught:
        open_eval_set(tmp_path, class_names=["dog", "eel"])
    assert str(caught.value) == (
        "The model knows 1 of the data's 3 classes; it lacks 'café', 'cat'. Its own 2 are 'dog', 'eel'."
    )


def test_several_classes_an_image_are_found_by_name():
    images = image_set(np.array([[True, False, True], [False, False, True]]), ["a", "none", "c"])
    found = match_classes(images, ["c", "b", "a"])
    assert found.labels.tolist() == [[True, False, True], [True, False, False]]


def test_imagenets_synsets():
    wnids = imagenet_wnids()
    assert len(wnids) == 1000
    assert list(wnids) == sorted(set(wnids))
    timm_data = pytest.importorskip("timm.data")
    assert list(wnids) == timm_data.ImageNetInfo("imagenet-1k").label_names()
    # known by heart: tench, goldfish, tabby, toilet tissue
    names = imagenet_names()
    assert [names[wnids.index(w)] for w in ("n01440764", "n01443537", "n02123045", "n15075141")] == [
        "tench", "goldfish", "tabby", "toilet tissue",
    ]  # fmt: skip


def test_imagenet_folders_fit_imagenet_models(caplog):
    wnids = imagenet_wnids()
    with caplog.at_level(logging.INFO, logger="xcit"):
        whole = match_classes(image_set(np.arange(1000), wnids), imagenet_names())
    assert whole.labels.tolist() == list(range(1000))
    assert "with the model's as ImageNet's synsets" in caplog.text
    some = match_classes(image_set([0, 1], [wnids[281], wnids[999]]), imagenet_names())
    assert some.labels.tolist() == [281, 999]
    with pytest.raises(DataError, match="lacks 'n01440764'"):
        match_classes(image_set([0, 1], ["n01440764", "n99999999"]), imagenet_names())
    # a model of another thousand classes does not take them by their order
    with pytest.raises(DataError, match="The model knows 0 of the data's 1,000 classes"):
        match_classes(image_set(np.arange(1000), wnids), [f"c{i}" for i in range(1000)])


def test_folders_called_by_numbers():
    """ImageNet-V2's folders are 0 to 999, which no sorting of texts brings into order."""
    names = sorted(str(i) for i in range(1000))
    images = match_classes(image_set(np.arange(1000), names), imagenet_names())
    assert images.labels.tolist() == [int(name) for name in names]
    with pytest.raises(DataError, match="lacks '7', '1000'"):
        match_classes(image_set([0, 1], ["7", "1000"]), imagenet_names())
    # names win over numbers, and half by name and half by number is a mistake
    with pytest.raises(DataError, match="knows 1 of the data's 2 classes; it lacks '3'"):
        match_classes(image_set([0, 1], ["1", "3"]), ["0", "1", "2", "x"])
    assert match_classes(image_set([0, 1], ["1", "2"]), ["2", "1", "0"]).labels.tolist() == [1, 0]


def test_a_name_that_two_classes_have():
    with pytest.raises(DataError, match="two classes called 'crane'"):
        match_classes(image_set([0, 1], ["crane", "tench"]), ["crane", "tench", "crane"])
    assert match_classes(image_set([0, 0], ["tench"]), ["crane", "tench", "crane"]).labels.tolist() == [1, 1]
