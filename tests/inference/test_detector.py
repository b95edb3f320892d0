"""The detector against the model called by hand, and everything that can go wrong on the way."""

import copy
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from xcit.data.coco_masks import decode_mask, encode_mask
from xcit.errors import BackendError, CheckpointError, ConfigError, DataError, UnknownNameError
from xcit.inference.detections import Detections
from xcit.inference.detector import Detector, coco_categories, to_tensor
from xcit.inference.stream import DECODERS
from xcit.models.detectors import create_detector, save_detector
from xcit.models.mask_rcnn import MaskRCNN
from xcit.models.pyramid import XCiTPyramid
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT

NAMES = ["ant", "bee", "cat, wild"]
SMALL = {"out_channels": 16, "box_width": 32, "mask_channels": 16, "mask_convs": 1, "min_size": 64, "max_size": 128}


def build(num_classes=3, **options):
    """Return a detector that finds a hundred things of all classes in noise."""
    torch.manual_seed(0)
    model = create_detector("xcit_nano_12_p16", num_classes=num_classes, **{**SMALL, "score_thresh": 0.0, **options})
    torch.nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.05)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    if model.roi_heads.has_mask():
        torch.nn.init.normal_(model.roi_heads.mask_predictor.logits.weight, std=3.0)
    model.pretrained_cfg = {"class_names": NAMES} if num_classes == 3 else {}
    return model.eval()


@pytest.fixture(scope="module")
def shared():
    return build()


@pytest.fixture
def model(shared):
    return copy.deepcopy(shared)


def photo(height, width, seed=0):
    """Return smooth noise, of which scaling makes something alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tensor_of(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def by_hand(model, image):
    with torch.no_grad():
        return {key: value.numpy() for key, value in copy.deepcopy(model).eval()([tensor_of(image)])[0].items()}


def check(found, want):
    """Compare with what the model itself returns, all of it kept."""
    assert found.error is None
    np.testing.assert_allclose(found.scores, want["scores"], atol=1e-4)
    np.testing.assert_allclose(found.boxes, want["boxes"], atol=0.02)
    assert (found.labels == want["labels"] - 1).all()
    assert found.names == [NAMES[label] for label in found.labels]


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (150, 211), (211, 150), (20, 33), (60, 400)])
def test_what_the_model_finds_in_the_images_own_pixels(model, size):
    image = photo(*size)
    (found,) = Detector(model, score_threshold=0.0)(image)
    want = by_hand(model, image)
    assert len(found) > 10
    assert found.size == size
    assert (found.boxes.dtype, found.labels.dtype, found.scores.dtype) == (np.float32, np.int64, np.float32)
    check(found, want)
    for i in range(len(found)):
        mask, truth = found.mask(i), want["masks"][i, 0] >= 0.5
        assert mask.shape == size
        assert mask.dtype == bool
        assert (mask != truth).sum() <= 0.01 * mask.size  # a box that differs by 1e-3 may move a pixel
        y0, y1, x0, x1 = found.mask_window(i)
        top, left, part = found.cropped_mask(i)
        assert (top, left, part.shape) == (y0, x0, (y1 - y0, x1 - x0))
        assert (mask[y0:y1, x0:x1] == part).all()
        assert mask.sum() == part.sum()


def test_masks_are_exact_where_nothing_is_scaled(model):
    image = photo(64, 96)
    (found,) = Detector(model, score_threshold=0.0)(image)
    want = by_hand(model, image)
    assert len({found.mask(i).sum() for i in range(len(found))}) > 10
    assert (np.stack([found.mask(i) for i in range(len(found))]) == (want["masks"][:, 0] >= 0.5)).all()


def test_scaling_is_that_of_the_model():
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width, high, wide = rng.integers(1, 90, 4).tolist()
        mode = ("RGB", "L")[int(rng.integers(2))]
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        pixels = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
        want = F.interpolate(torch.from_numpy(pixels.copy())[None].double() / 255, (high, wide), mode="bilinear")[0]
        torch.testing.assert_close(to_tensor(image, (high, wide)), want.float(), atol=1e-5, rtol=0)


def test_scaling_goes_strip_by_strip(monkeypatch):
    image = photo(301, 200)
    whole = to_tensor(image, (77, 51))
    monkeypatch.setattr("xcit.inference.detector.STRIP", 3000)
    assert torch.equal(to_tensor(image, (77, 51)), whole)


def test_files_images_and_arrays_are_the_same_to_it(model, tmp_path):
    image = photo(80, 100)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), image, array, array / 255]
    detector = Detector(model, score_threshold=0.0)
    together = detector(sources)
    assert [found.path for found in together] == [tmp_path / "a.png"] * 2 + [None] * 3
    alone = [detector(source)[0] for source in [*sources, tmp_path, f"{tmp_path}/*.p?g"]]
    for found in [*together, *alone]:
        check(found, by_hand(model, image))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100, None])
def test_neighbours_in_a_batch_change_nothing_and_order_is_kept(model, tmp_path, batch_size):
    sizes = [(60, 90), (90, 60), (61, 90), (64, 64), (200, 300), (40, 60)]
    for i, size in enumerate(sizes):
        photo(*size, seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "2b.png").write_bytes(b"nothing of the kind")
    found = Detector(model, score_threshold=0.0, batch_size=batch_size)(tmp_path)
    assert [each.path.name for each in found] == ["0.png", "1.png", "2.png", "2b.png", "3.png", "4.png", "5.png"]
    broken = found.pop(3)
    assert broken.error.startswith(f"{tmp_path / '2b.png'}: is not an image")
    assert (len(broken), broken.size, broken.boxes.shape, broken.names) == (0, (0, 0), (0, 4), [])
    for i, each in enumerate(found):
        check(each, by_hand(model, photo(*sizes[i], seed=i)))


def test_images_of_one_padded_size_go_through_the_model_together(model, monkeypatch):
    seen = []
    detect = model.detect
    monkeypatch.setattr(model, "detect", lambda images: seen.append(len(images)) or detect(images))
    sizes = [(64, 90), (90, 64), (64, 96), (96, 64), (64, 66)]
    Detector(model, batch_size=5)([photo(*size) for size in sizes])
    assert sorted(seen) == [2, 3]


# --- scores and numbers -----------------------------------------------------------------------------------------------


def test_a_threshold_for_all_classes(model):
    image = photo(80, 100)
    want = by_hand(model, image)
    level = float(np.sort(want["scores"])[30]) + 1e-6
    for detector in (Detector(model, score_threshold=level), Detector(model, score_threshold={"*": level})):
        (found,) = detector(image)
        assert 0 < len(found) < len(want["scores"])
        np.testing.assert_allclose(found.scores, want["scores"][want["scores"] > level], atol=1e-4)
    assert Detector(model).thresholds.tolist() == [0.5] * 3


def test_a_threshold_for_each_class(model):
    image = photo(80, 100)
    want = by_hand(model, image)
    level = {"bee": float(np.median(want["scores"][want["labels"] == 2])) + 1e-6, "*": 0.0}
    (found,) = Detector(model, score_threshold=level)(image)
    mine = [0.0, level["bee"], 0.0]
    kept = [score > mine[label - 1] for label, score in zip(want["labels"], want["scores"], strict=True)]
    assert (found.labels == want["labels"][kept] - 1).all()
    assert (found.labels == 2).sum() == (want["labels"] == 3).sum() > 10
    assert 0 < (found.labels == 1).sum() <= (want["labels"] == 2).sum() / 2
    assert len(found.squares) == len(found) == len(found.names) == sum(kept)
    assert Detector(model, score_threshold={"ant": 0.1}).thresholds == pytest.approx([0.1, 0.5, 0.5])


def test_a_threshold_below_the_models_own(model):
    image = photo(80, 100)
    everything = len(by_hand(model, image)["scores"])
    model.roi_heads.score_thresh = 0.9
    (found,) = Detector(model, score_threshold=0.0)(image)
    assert len(found) == everything > (found.scores > 0.9).sum()


def test_at_most_so_many(model):
    image = photo(80, 100)
    want = by_hand(model, image)
    (found,) = Detector(model, score_threshold=0.0, max_detections=7)(image)
    np.testing.assert_allclose(found.scores, want["scores"][:7], atol=1e-4)
    (more,) = Detector(model, score_threshold=0.0, max_detections=150)(image)
    assert len(more) > 100 == len(want["scores"])


def test_a_higher_resolution(model):
    image = photo(500, 700)
    (found,) = Detector(model, score_threshold=0.0, min_size=128, max_size=200)(image)
    larger = build(min_size=128, max_size=200)
    check(found, by_hand(larger, image))
    assert [(d.min_size, d.max_size) for d in (Detector(model, min_size=96), Detector(model, max_size=64))] == [
        (96, 192),
        (32, 64),
    ]


def test_batch_sizes_follow_the_device(model):
    assert Detector(model).batch_size == 1
    assert Detector(model, batch_size=3).batch_size == 3


# --- the caller's model -----------------------------------------------------------------------------------------------


def test_a_model_that_is_passed_keeps_its_mode_and_settings(model):
    model.train()
    model.roi_heads.eval()
    state = {name: module.training for name, module in model.named_modules()}
    Detector(model, min_size=96, score_threshold=0.1, max_detections=3)(photo(50, 50))
    assert {name: module.training for name, module in model.named_modules()} == state
    heads, transform = model.roi_heads, model.transform
    settings = (transform.min_size, transform.max_size, heads.score_thresh, heads.detections_per_img)
    assert settings == (64, 128, 0.0, 100)
    assert not model.backbone._forward_hooks


def test_a_file_alone_suffices(model, tmp_path):
    save_detector(model, tmp_path / "d.safetensors")
    detector = Detector(tmp_path / "d.safetensors", device="cpu", score_threshold=0.0)
    assert detector.class_names == NAMES
    assert detector.category_ids == [1, 2, 3]
    assert not detector.model.training
    check(detector(photo(80, 100))[0], by_hand(model, photo(80, 100)))


def test_a_model_in_double_precision(model):
    (found,) = Detector(model.double(), score_threshold=0.0)(photo(64, 96))
    assert found.scores.dtype == np.float32
    check(found, by_hand(model.float(), photo(64, 96)))


def test_a_model_without_masks():
    detector = Detector(build(with_masks=False), score_threshold=0.0)
    assert not detector.has_masks
    (found,) = detector(photo(64, 96))
    assert found.squares is None
    assert len(found) > 10
    with pytest.raises(ConfigError, match="no masks"):
        found.mask(0)
    assert set(found.to_coco(5, [1, 2, 3])[0]) == {"image_id", "category_id", "bbox", "score"}


def test_a_grey_model():
    xcit = XCiT(embed_dim=128, depth=12, num_heads=4, num_classes=0, in_chans=1)
    model = MaskRCNN(XCiTPyramid(xcit), 3, score_thresh=0.0, mean=[0.5], std=[0.2], **SMALL).eval()
    image = photo(64, 96)
    (found,) = Detector(model, score_threshold=0.0)(image)
    with torch.no_grad():
        want = model([tensor_of(np.asarray(image.convert("L"))[..., None])])[0]
    np.testing.assert_allclose(found.scores, want["scores"].numpy(), atol=1e-4)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_cocos_categories():
    categories = coco_categories()
    assert len(categories) == 80
    assert set(range(1, 91)) - set(categories) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert [categories[i] for i in (1, 13, 18, 90)] == ["person", "stop sign", "dog", "toothbrush"]


def test_classes_of_a_model_on_coco():
    model = build(num_classes=80)
    assert Detector(model).class_names == [str(i) for i in range(80)]
    model.pretrained_cfg = {"label_set": "coco"}
    detector = Detector(model, score_threshold={"dog": 0.2})
    assert (detector.class_names[16], detector.category_ids[16]) == ("dog", 18)
    assert np.flatnonzero(detector.thresholds < 0.5).tolist() == [16]


# --- images of all kinds ----------------------------------------------------------------------------------------------


def test_odd_images(model, tmp_path):
    image = photo(60, 80)
    image.save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    files = {
        "cmyk.jpg": image.convert("CMYK"),
        "grey.png": image.convert("L"),
        "palette.png": image.quantize(64),
        "rgba.png": image.convert("RGBA"),
        "bits16.png": Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
        "pixel.png": Image.new("RGB", (1, 1), "red"),
        "line.png": photo(1, 300),
        "column.png": photo(300, 2),
    }
    for name, each in files.items():
        each.save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "noise.jpg").write_bytes(bytes(range(256)))
    found = {each.path.name: each for each in Detector(model, score_threshold=0.0)(tmp_path)}
    assert {name: each.error is None for name, each in found.items()} == {
        **dict.fromkeys([*files, "whole.jpg"], True),
        **dict.fromkeys(["cut.jpg", "empty.jpg", "noise.jpg"], False),
    }
    for name, each in found.items():
        if each.error is not None:
            assert each.error.startswith(f"{tmp_path / name}: is ")
            assert each.error.count(". ") == 0
            continue
        with Image.open(tmp_path / name) as stored:
            assert each.size == stored.size[::-1]
        limits = [each.size[1], each.size[0]] * 2
        assert (each.boxes >= 0).all()
        assert (each.boxes <= limits).all()
        assert len(each)
        assert each.mask(0).shape == each.size
    (missing,) = Detector(model)(tmp_path / "whole.jpeg")
    assert "there is no such file; did you mean" in missing.error


def test_boxes_are_in_pixels_of_the_upright_image(model, tmp_path):
    image = photo(60, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    (found,) = Detector(model, score_threshold=0.0)(tmp_path)
    assert found.size == (120, 60)
    check(found, by_hand(model, upright))


def test_files_can_be_opened_otherwise(model, tmp_path):
    photo(50, 60).save(tmp_path / "a.png")

    def opener(path):
        if path.name == "b.png":
            raise DataError("b.png: not this one.")
        return Image.open(path).transpose(Image.Transpose.ROTATE_90)

    found = list(Detector(model).stream([tmp_path / "a.png", tmp_path / "b.png"], opener=opener))
    assert found[0].size == (60, 50)
    assert found[1].error == "b.png: not this one."


def test_a_very_large_image_takes_little_memory(model):
    image = Image.new("RGB", (12_000, 9_000), (90, 120, 60))
    image.paste(photo(3000, 3000), (2000, 5000))
    detector = Detector(model, score_threshold=0.0)
    detector(photo(50, 50))  # what is imported and compiled once
    tracemalloc.start()
    try:
        (found,) = detector(image)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 50 * 2**20
        tracemalloc.reset_peak()
        kept = sum(array.nbytes for array in (found.boxes, found.labels, found.scores, found.squares))
        assert kept < 2**19
        widest = max(range(len(found)), key=lambda i: np.prod(found.boxes[i, 2:] - found.boxes[i, :2]))
        smallest = min(range(len(found)), key=lambda i: np.prod(found.boxes[i, 2:] - found.boxes[i, :2]))
        part = found.cropped_mask(smallest)[2]
        assert found.rle(smallest)["size"] == [9000, 12_000]
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 20 * part.size + 2**20
    finally:
        tracemalloc.stop()
    assert found.size == (9000, 12_000)
    assert found.boxes[widest, 2] > 1000
    assert len(found) == 100


def test_an_endless_source_is_read_only_a_little_ahead(model):
    taken = itertools.count()
    source = (Image.new("RGB", (9, 9)) for _ in iter(lambda: next(taken), -1))
    stream = Detector(model, batch_size=2, max_detections=2).stream(source)
    for _ in range(6):
        next(stream)
    assert next(taken) <= 6 + 2 + 2 + DECODERS + 1
    stream.close()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"max_detections": 0, "min_size": 8}, "max_detections is 0; .*min_size is 8; it must be 32 or more"),
        ({"min_size": 100, "max_size": 50}, "max_size is 50, less than min_size, 100"),
        ({"score_threshold": 1.5}, "score_threshold is 1.5; it must be between 0 and 1"),
        ({"score_threshold": float("nan")}, "score_threshold is nan"),
        ({"score_threshold": {"bee": -1}}, "score_threshold of 'bee' is -1"),
        ({"device": "gpu"}, "The device is 'gpu'"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Detector(model, **arguments)


def test_a_class_that_the_model_does_not_know(model):
    with pytest.raises(UnknownNameError, match=r"Unknown class 'bees'. Did you mean 'bee'\? The model knows ant, bee"):
        Detector(model, score_threshold={"bees": 0.3})


def test_models_that_are_none(model, tmp_path):
    classifier = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3)
    save_checkpoint(classifier, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors is a classifier or a backbone, not a detector"):
        Detector(tmp_path / "c.safetensors", device="cpu")
    with pytest.raises(ConfigError, match="Expected a MaskRCNN, got XCiT"):
        Detector(classifier)
    with pytest.raises(CheckpointError, match=r"no\.safetensors"):
        Detector(tmp_path / "no.safetensors", device="cpu")
    (tmp_path / "e.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"e\.safetensors"):
        Detector(tmp_path / "e.safetensors", device="cpu")
    with pytest.raises(UnknownNameError, match="maskrcnn_xcit_small_12_p16"):
        Detector("maskrcnn_xcit_smal_12_p16", device="cpu")
    with pytest.raises(ConfigError, match="No detector on xcit_nano_12_p16 was released"):
        Detector("xcit_nano_12_p16", device="cpu")
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensors \(first: rpn\.head\.bbox_pred"):
        Detector(model)


def test_objects_that_are_no_images(model, tmp_path):
    with pytest.raises(ConfigError, match="got Tensor"):
        Detector(model)([torch.zeros(3, 32, 32)])
    (found,) = Detector(model)(np.zeros((3, 32, 32), np.uint8))
    assert found.error.startswith("image 0: The array's shape is (3, 32, 32)")
    with pytest.raises(DataError, match="holds no image"):
        Detector(model)(tmp_path)


def test_a_device_that_is_not_there(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="'cuda' is not available"):
        Detector(model, device="cuda")


def test_features_that_overflow_cost_their_image_an_error(model):
    with torch.no_grad():
        model.backbone.fpn.layer_blocks[0][0].weight.fill_(3e38)
    (found,) = Detector(model)(photo(64, 96))
    assert found.error.startswith("image 0: the model's features are NaN or infinite")
    assert "float32" in found.error


# --- memory -----------------------------------------------------------------------------------------------------------


def limited(model, monkeypatch, limit):
    """Let the model run out of memory with more pixels than a limit."""
    detect = model.detect

    def detect_some(images):
        if sum(image.shape[1] * image.shape[2] for image in images) > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return detect(images)

    monkeypatch.setattr(model, "detect", detect_some)


def test_too_many_images_for_the_memory(model, monkeypatch):
    limited(model, monkeypatch, 2 * 64 * 96)
    images = [photo(64, 96)] * 8
    with pytest.raises(ConfigError, match=r"8 images of 64 x 96 px at once; 2 fit .*use batch_size=2 \(--batch-size\)"):
        Detector(model, batch_size=8)(images)
    assert len(Detector(model, batch_size=2)(images)) == 8


def test_too_large_an_image_for_the_memory(model, monkeypatch):
    limited(model, monkeypatch, 64 * 96)
    with pytest.raises(ConfigError, match=r"1 image of 256 x 384 px; min_size=64 \(--min-size\) fits"):
        Detector(model, min_size=256)(photo(64, 96))
    limited(model, monkeypatch, 0)
    with pytest.raises(ConfigError, match="not even the smallest size fits"):
        Detector(model)(photo(64, 96))


def test_a_size_without_the_memory_for_it_is_refused_before_anything_is_scaled(model, monkeypatch):
    model.train()  # the count must not touch its batch norms
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: 64 * 2**20)
    monkeypatch.setattr("xcit.inference.detector.to_tensor", lambda *_: pytest.fail("scaled"))
    asked = r"An image of 20000 x 26667 px would take about [\d.]+ GiB of memory on cpu, where 64 MiB are free: use min"
    with pytest.raises(ConfigError, match=asked) as refused:
        Detector(model, min_size=20_000, max_size=30_000)(photo(480, 640))
    monkeypatch.undo()
    fits = int(str(refused.value).partition("min_size=")[2].partition(" ")[0])
    assert 100 < fits < 2000
    assert fits % 32 == 0
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: 64 * 2**20)
    assert Detector(model, min_size=fits, max_size=30_000)(photo(480, 640))[0].error is None
    with pytest.raises(ConfigError, match="use min_size="):
        Detector(model, min_size=fits + 96, max_size=30_000)(photo(480, 640))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_a_batch_without_the_memory_for_it_is_refused(model, monkeypatch):
    monkeypatch.setattr("xcit.inference.devices.available_bytes", lambda device: 16 * 2**20)
    with pytest.raises(ConfigError, match=r"16 images of 280 x 373 px at once would take .* use batch_size=1 "):
        Detector(model, batch_size=16, min_size=280, max_size=400)([photo(480, 640)] * 16)


def test_other_errors_are_not_hidden(model, monkeypatch):
    monkeypatch.setattr(model, "detect", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Detector(model)(photo(64, 96))


# --- detections -------------------------------------------------------------------------------------------------------


def made_up(boxes, size, squares):
    n = len(boxes)
    return Detections(
        None, size, np.array(boxes, np.float32), np.arange(n), ["a"] * n, np.linspace(0.9, 0.5, n, dtype=np.float32),
        np.array(squares, np.float32),
    )  # fmt: skip


def test_rle_is_that_of_the_whole_mask():
    rng = np.random.default_rng(0)
    for number in range(60):
        H, W = rng.integers(1, 40, 2).tolist()
        x, y = np.sort(rng.uniform(-0.2, 1.2, (2, 2)) * [[W], [H]], axis=1)
        box = np.clip([x[0], y[0], x[1] + 0.1, y[1] + 0.1], 0, [W, H, W, H])
        if number % 3 == 0:
            box = np.array([0, 0, W, H])  # runs that go on in the next column
        kind = number % 4
        square = np.full((28, 28), kind % 2, np.float32) if kind < 2 else rng.random((28, 28))
        if min(box[2] - box[0], box[3] - box[1]) <= 0:
            continue
        found = made_up([box], (H, W), [square])
        assert found.rle(0) == encode_mask(found.mask(0))
        assert (decode_mask(found.rle(0), H, W) == found.mask(0)).all()


def test_results_of_coco():
    squares = np.ones((3, 28, 28))
    found = made_up([[1, 2, 11, 22], [0, 0, 5.5, 5.25], [2, 2, 4, 4]], (30, 20), squares)
    results = found.to_coco(7, [18, None, 44])
    assert [result["category_id"] for result in results] == [18, 44]
    assert {result["image_id"] for result in results} == {7}
    assert results[0]["bbox"] == [1, 2, 10, 20]
    assert results[1]["score"] == pytest.approx(0.5)
    assert (decode_mask(results[1]["segmentation"], 30, 20) == found.mask(2)).all()
    assert found.mask(2).sum() == 4


def test_resized():
    found = made_up([[10, 20, 60, 80]], (100, 200), [np.ones((28, 28))])
    smaller = found.resized((50, 20))
    assert smaller.boxes.tolist() == [[1, 10, 6, 40]]
    assert smaller.mask(0).shape == (50, 20)
    assert smaller.mask(0).sum() == 5 * 30
    assert found.size == (100, 200)
    with pytest.raises(IndexError):
        found.mask(1)
