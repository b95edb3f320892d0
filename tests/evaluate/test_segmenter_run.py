"""A segmenter judged by a set: against pixels counted one by one, with broken files and classes in another order."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.mask_parts import open_mask_parts
from xcit.data.mask_set import MaskSet
from xcit.errors import ConfigError, DataError
from xcit.evaluate import segmenter_run
from xcit.evaluate.segmenter_run import evaluate_segmenter
from xcit.inference.segmenter import Segmenter
from xcit.models.segmenters import create_segmenter

NAMES = ["ant", "bee", "cat, wild"]
SIZES = [(40, 60), (50, 50), (64, 90), (40, 60), (33, 47)]  # height, width


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five images of several sizes to validate on, with masks of all classes and ignored pixels."""
    root = tmp_path_factory.mktemp("masks")
    (root / "classes.txt").write_text("\n".join(NAMES))
    rng = np.random.default_rng(0)
    for part, sizes in (("train", SIZES[:2]), ("val", SIZES)):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            noise = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
            noise.resize((width, height), Image.Resampling.BICUBIC).save(root / part / "images" / f"{i}.png")
            mask = rng.choice([0, 1, 2, 255], (height, width)).astype(np.uint8)
            Image.fromarray(mask).save(root / part / "masks" / f"{i}.png")
    return root


@pytest.fixture
def images(root) -> MaskSet:
    return open_mask_parts(root).val


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    options = {"depth": 4, "channels": 16, "image_size": 64, "max_size": 128}
    model = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=3, **options)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    model.pretrained_cfg |= {"class_names": NAMES}
    return model


@pytest.fixture
def model(shared):
    return copy.deepcopy(shared)


def counted(segmenter, images, without=()):
    """Return [truth, predicted] with every pixel looked up by itself."""
    matrix = np.zeros((3, 3), dtype=int)
    for i in range(len(images)):
        if i in without:
            continue
        (seen,) = segmenter(images.path(i))
        with Image.open(images.mask_path(i)) as file:
            mask = np.asarray(file)
        assert mask.shape == seen.labels.shape
        for truth, guess in zip(mask.ravel().tolist(), seen.labels.ravel().tolist(), strict=True):
            if truth != 255:
                matrix[truth, guess] += 1
    return matrix


def spoilt(images, folder, names, what):
    """Return a set with other bytes in some files."""
    root = folder / "copy"
    for name in (*images.names, *images.mask_names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(what if name in names else (images.path(0).parents[2] / name).read_bytes())
    return replace(images, root=str(root))


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "slide", "window": 64},
        {"scales": (0.5, 1.5), "flip": True},
        {"native": True, "batch_size": 3},
    ],
)
def test_every_pixel_is_counted_as_the_segmenter_sees_it(model, images, options):
    segmenter = Segmenter(model, **options)
    heard = []
    evaluation = evaluate_segmenter(segmenter, images, on_image=lambda: heard.append(1))
    want = counted(Segmenter(model, **options | {"batch_size": None}), images)
    assert evaluation.figures.matrix.tolist() == want.tolist()
    assert (want.sum(0) > 0).sum() > 1  # it predicts more than one class
    iou = [want[k, k] / (want[k].sum() + want[:, k].sum() - want[k, k]) for k in range(3)]
    assert evaluation.figures.miou == pytest.approx(np.mean(iou))
    assert evaluation.figures.aacc == pytest.approx(want.trace() / want.sum())
    assert (evaluation.bad, evaluation.num_images, len(heard)) == ((), 5, 5)
    assert evaluation.class_names == tuple(NAMES)


def test_the_segmenters_own_options_matter(model, images):
    images = images.subset([4])

    def matrix(**options):
        return evaluate_segmenter(Segmenter(model, **options), images).figures.matrix.tolist()

    single = matrix()
    for options in ({"scales": (0.5, 1)}, {"flip": True}, {"native": True}, {"mode": "slide", "window": 32}):
        assert matrix(**options) != single, options


def test_model_stays_in_the_mode_that_it_had(model, images):
    model.train()
    evaluate_segmenter(Segmenter(model), images)
    assert model.training


def test_few_images_are_held(model, images, monkeypatch):
    many = images.subset([4] * 20)
    read, most = 0, 0
    original = MaskSet.open_pair

    def open_pair(self, index):
        nonlocal read
        read += 1
        return original(self, index)

    def count(*arguments):
        nonlocal done, most
        done += 1
        most = max(most, read - done)
        return torch.ones(3, 3, dtype=torch.int64)

    done = 0
    monkeypatch.setattr(MaskSet, "open_pair", open_pair)
    monkeypatch.setattr(segmenter_run, "confusion", count)
    evaluate_segmenter(Segmenter(model), many)
    assert (read, done) == (20, 20)
    assert most <= 10


# --- files that cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_broken_files_are_listed(model, images, tmp_path, batch_size):
    images = spoilt(images, tmp_path, ["val/images/1.png", "val/masks/3.png"], b"nothing of the kind")
    Image.new("L", (9, 9)).save(images.mask_path(4))
    segmenter, heard = Segmenter(model, batch_size=batch_size), []
    evaluation = evaluate_segmenter(segmenter, images, on_image=lambda: heard.append(1))
    assert evaluation.figures.matrix.tolist() == counted(Segmenter(model), images, without=(1, 3, 4)).tolist()
    assert (evaluation.num_images, len(heard)) == (2, 5)
    assert [each.name for each in evaluation.bad] == ["val/images/1.png", "val/images/3.png", "val/images/4.png"]
    for each, file in zip(evaluation.bad, ["images/1.png", "masks/3.png", "masks/4.png"], strict=True):
        assert f"{images.root}/val/{file}: " in each.reason
    assert "9 x 9" in evaluation.bad[2].reason


def test_none_of_use(model, images, tmp_path):
    broken = spoilt(images, tmp_path, images.names, b"nothing")
    for share in (0.1, 1.0):
        with pytest.raises(DataError) as error:
            evaluate_segmenter(Segmenter(model), broken.subset([2]), max_bad_fraction=share)
        assert str(error.value).startswith(f"None of 1 image can be used. The first: {broken.root}/val/images/2.png: ")
    with pytest.raises(DataError, match=r"None of 5 images can be used. The first: .*0\.png: "):
        evaluate_segmenter(Segmenter(model), broken)


def test_too_many_of_no_use(model, images, tmp_path):
    broken = spoilt(images, tmp_path, ["val/images/1.png", "val/masks/3.png"], b"nothing")
    assert len(evaluate_segmenter(Segmenter(model), broken, max_bad_fraction=0.4).bad) == 2
    with pytest.raises(DataError, match=r"2 of 5 images cannot be used so far.*share of 0\.3 .*1\.png: "):
        evaluate_segmenter(Segmenter(model), broken, max_bad_fraction=0.3)


def test_ignored_altogether(model, images, tmp_path):
    root = spoilt(images, tmp_path, (), b"")
    for i in range(len(root)):
        Image.fromarray(np.full(SIZES[i], 255, dtype=np.uint8)).save(root.mask_path(i))
    with pytest.raises(DataError, match=r"every pixel of 5 masks is ignored; .*classes\.txt"):
        evaluate_segmenter(Segmenter(model), root)


def test_logits_that_overflow_are_named_by_their_file(model, images, monkeypatch):
    segmenter = Segmenter(model)
    whole = Segmenter._whole
    height = SIZES[2][0]

    def one_overflows(self, items):
        return [f._replace(finite=item.size[0] != height) for f, item in zip(whole(self, items), items, strict=True)]

    monkeypatch.setattr(Segmenter, "_whole", one_overflows)
    (bad,) = evaluate_segmenter(segmenter, images).bad
    assert bad.name == "val/images/2.png"
    assert bad.reason.startswith(f"{images.path(2)}: the model's logits are NaN or infinite")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_arguments_out_of_range(model, images, share):
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        evaluate_segmenter(Segmenter(model), images, max_bad_fraction=share)
    with pytest.raises(ConfigError, match="no images"):
        evaluate_segmenter(Segmenter(model), images.subset([]))


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_found_by_name(model, images):
    plain = evaluate_segmenter(Segmenter(model), images).figures.matrix
    # The model's logits stay as they are, and their names move: what was class 0 is now called like class 2.
    order = [2, 0, 1]
    model.pretrained_cfg |= {"class_names": [NAMES[i] for i in order]}
    moved = evaluate_segmenter(Segmenter(model), images)
    assert moved.class_names == tuple(NAMES[i] for i in order)
    assert moved.figures.matrix.tolist() == plain[order].tolist()  # rows are the data's, columns the model's logits


def test_the_data_may_have_fewer_classes(shared, images):
    torch.manual_seed(0)
    model = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=5, depth=4, channels=16, image_size=64)
    model.pretrained_cfg |= {"class_names": ["dog", *NAMES, "elk "]}
    evaluation = evaluate_segmenter(Segmenter(model), images)
    assert evaluation.figures.matrix.sum(1)[[0, 4]].tolist() == [0, 0]
    assert evaluation.figures.num_pixels == sum(
        int((images.open_mask(i) >= 0).sum()) for i in range(len(images))
    )  # none is lost
    model.pretrained_cfg |= {"class_names": ["ant", "bee", "bee", "cat, wild", "dog"]}
    with pytest.raises(DataError, match="two classes called 'bee'"):
        evaluate_segmenter(Segmenter(model), images)


def test_classes_that_the_segmenter_lacks(model, images):
    model.pretrained_cfg |= {"class_names": ["ant", "bee", "gnu"]}
    with pytest.raises(DataError, match="knows 2 of the data's 3 classes; it lacks 'cat, wild'"):
        evaluate_segmenter(Segmenter(model), images)


def test_classes_without_names_are_taken_in_order(model, images, caplog):
    named = evaluate_segmenter(Segmenter(model), images)
    model.pretrained_cfg |= {"class_names": None}
    with caplog.at_level("INFO", logger="xcit"):
        unnamed = evaluate_segmenter(Segmenter(model), images)
    assert "does not name its classes" in caplog.text
    assert unnamed.class_names == tuple(NAMES)
    assert unnamed.figures.matrix.tolist() == named.figures.matrix.tolist()
    fewer = replace(images, class_names=("ant", "bee"))
    with pytest.raises(DataError, match="has 2 classes, and the segmenter has 3, which it does not name"):
        evaluate_segmenter(Segmenter(model), fewer)
