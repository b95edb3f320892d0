"""The segmenter against the model called by hand, and everything that can go wrong on the way."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from xcit.data import ade20k
from xcit.errors import BackendError, CheckpointError, ConfigError, DataError, UnknownNameError
from xcit.inference import devices
from xcit.inference.segmentations import Segmentation, class_counts
from xcit.inference.segmenter import AHEAD, Segmenter
from xcit.inference.stream import DECODERS
from xcit.models.segmenters import create_segmenter, save_segmenter
from xcit.models.weights import save_checkpoint
from xcit.models.xcit import XCiT
from xcit.ops.image_size import scaled_size

NAMES = ["ant", "bee", "cat, wild", "dog", "elk"]
COLOURS = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 90, 200]]
SMALL = {"depth": 4, "channels": 16, "image_size": 64, "max_size": 256}


def build(head="sem_fpn", num_classes=5, **options):
    """Return a segmenter that sees all classes in noise."""
    torch.manual_seed(0)
    model = create_segmenter("xcit_nano_12_p16", head=head, num_classes=num_classes, **{**SMALL, **options})
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=1.0)
    if num_classes == 5:
        model.pretrained_cfg |= {"class_names": NAMES, "palette": COLOURS}
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


def by_hand(model, image, size):
    """Return logits of an image as published: scaled, whole, brought back."""
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()((x - mean) / std)
    return F.interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=False)[0]


def check(found, model, image, size=None):
    """Compare with the model called by hand."""
    assert found.error is None
    assert found.size == (image.height, image.width) == found.labels.shape == found.scores.shape
    assert (found.labels.dtype, found.scores.dtype) == (np.uint8, np.float16)
    size = size or scaled_size(image.height, image.width, model.image_size, model.max_size)
    probabilities = by_hand(model, image, size).softmax(0)
    best = probabilities.amax(0)
    chosen = probabilities.gather(0, torch.from_numpy(found.labels.astype(np.int64))[None])[0]
    assert (best - chosen).max() < 1e-4
    np.testing.assert_allclose(found.scores.astype(np.float32), best.numpy(), atol=2e-3)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["sem_fpn", "upernet"])
@pytest.mark.parametrize("size", [(64, 96), (150, 211), (211, 150), (20, 33), (60, 240)])
def test_what_the_model_sees_in_the_images_own_pixels(head, size):
    model, image = build(head), photo(*size)
    (found,) = Segmenter(model)(image)
    assert len(np.unique(found.labels)) > 1
    check(found, model, image)
    assert found.class_names == NAMES
    assert found.palette.tolist() == COLOURS
    assert found.palette.dtype == np.uint8


def test_areas(model):
    (found,) = Segmenter(model)(photo(90, 110))
    areas = found.areas()
    counts = {k: int((found.labels == k).sum()) for k in range(5)}
    assert {area.label: area.num_pixels for area in areas} == {k: n for k, n in counts.items() if n}
    assert [area.num_pixels for area in areas] == sorted((n for n in counts.values() if n), reverse=True)
    assert sum(area.share for area in areas) == pytest.approx(1)
    assert [area.name for area in areas] == [NAMES[area.label] for area in areas]
    assert (found.mask(areas[0].label).sum(), found.mask(0).dtype) == (areas[0].num_pixels, bool)
    content = found.to_dict()
    assert (content["file"], content["height"], content["width"], content["error"]) == (None, 90, 110, None)
    assert [tuple(each.values())[:3] for each in content["areas"]] == [area[:3] for area in areas]
    empty = Segmentation(None, error="no.").to_dict()
    assert (empty["height"], empty["areas"], empty["error"]) == (None, [], "no.")


def test_counts_go_strip_by_strip(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 300, (37, 41)).astype(np.uint16)
    whole = class_counts(labels, 301)
    monkeypatch.setattr("xcit.inference.segmentations.STRIP", 100)
    assert (class_counts(labels, 301) == whole).all()
    assert whole.sum() == 37 * 41


def test_files_images_and_arrays_are_the_same_to_it(model, tmp_path):
    image = photo(80, 100)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), image, array, array / 255]
    segmenter = Segmenter(model)
    together = segmenter(sources)
    assert [found.path for found in together] == [tmp_path / "a.png"] * 2 + [None] * 3
    alone = [segmenter(source)[0] for source in [*sources, tmp_path, f"{tmp_path}/*.p?g"]]
    for found in [*together, *alone]:
        check(found, model, image)


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_neighbours_in_a_batch_change_nothing_and_order_is_kept(model, tmp_path, batch_size, mode):
    sizes = [(60, 90), (90, 60), (60, 90), (64, 64), (200, 300), (40, 60)]
    for i, size in enumerate(sizes):
        photo(*size, seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "2b.png").write_bytes(b"nothing of the kind")
    found = Segmenter(model, batch_size=batch_size, mode=mode)(tmp_path)
    assert [each.path.name for each in found] == ["0.png", "1.png", "2.png", "2b.png", "3.png", "4.png", "5.png"]
    broken = found.pop(3)
    assert broken.error.startswith(f"{tmp_path / '2b.png'}: is not an image")
    assert (broken.size, broken.labels.shape, broken.scores.shape, broken.areas()) == ((0, 0), (0, 0), (0, 0), [])
    for i, each in enumerate(found):
        if mode == "whole":
            check(each, model, photo(*sizes[i], seed=i))
        else:
            (alone,) = Segmenter(model, mode=mode)(photo(*sizes[i], seed=i))
            assert (each.labels == alone.labels).mean() > 0.999


def test_images_of_one_size_go_through_the_model_together(model, monkeypatch):
    seen = []
    forward = model.forward_low
    monkeypatch.setattr(model, "forward_low", lambda x: seen.append(len(x)) or forward(x))
    Segmenter(model, batch_size=5)([photo(*size) for size in [(64, 90), (90, 64), (64, 90), (96, 64), (64, 90)]])
    assert sorted(seen) == [1, 1, 3]


# --- sizes, scales, windows -------------------------------------------------------------------------------------------


def test_other_sizes(model):
    image = photo(100, 150)
    check(Segmenter(model, image_size=96, max_size=128)(image)[0], model, image, (85, 128))
    check(Segmenter(model, native=True)(image)[0], model, image, (100, 150))
    segmenters = Segmenter(model), Segmenter(model, image_size=96), Segmenter(model, max_size=128)
    assert [(s.image_size, s.max_size) for s in segmenters] == [(64, 256), (96, 384), (32, 128)]
    assert (Segmenter(model, native=True).image_size, Segmenter(model).window, Segmenter(model).stride) == (
        None,
        64,
        40,
    )


def test_scales_and_mirrored_images_are_averaged(model):
    image = photo(64, 128)
    (found,) = Segmenter(model, scales=(1.0, 0.5), flip=True)(image)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    total = 0
    for size in ((64, 128), (32, 64)):
        total = total + by_hand(model, image, size).softmax(0) + by_hand(model, mirrored, size).softmax(0).flip(-1)
    best = (total / 4).amax(0)
    np.testing.assert_allclose(found.scores.astype(np.float32), best.numpy(), atol=2e-3)
    chosen = (total / 4).gather(0, torch.from_numpy(found.labels.astype(np.int64))[None])[0]
    assert (best - chosen).max() < 1e-4


def sizes_seen(model, monkeypatch):
    seen = []
    forward = model.forward_low
    monkeypatch.setattr(model, "forward_low", lambda x: seen.append(tuple(x.shape[2:])) or forward(x))
    return seen


def test_auto_goes_by_windows_beyond_the_models_own_sizes(model, monkeypatch):
    seen = sizes_seen(model, monkeypatch)
    auto = Segmenter(model, native=True)
    auto(photo(64, 256))
    auto(photo(128, 128))
    assert seen == [(64, 256), (128, 128)]
    seen.clear()
    (found,) = auto(photo(129, 128))
    assert set(seen) == {(64, 64)}
    assert found.labels.shape == (129, 128)
    seen.clear()
    Segmenter(model, native=True, mode="whole")(photo(300, 300))
    Segmenter(model, mode="slide")(photo(30, 60))
    Segmenter(model, mode="slide", window=96, stride=32)(photo(30, 60))
    assert seen == [(300, 300), *[(64, 64)] * 3, *[(64, 96)] * 2]


def test_a_window_that_covers_the_image_changes_nothing(model):
    image = photo(90, 130)
    (whole,) = Segmenter(model, native=True, mode="whole", flip=True)(image)
    (slid,) = Segmenter(model, native=True, mode="slide", window=160, flip=True)(image)
    assert (slid.labels == whole.labels).all()
    assert (slid.scores == whole.scores).all()


# --- the caller's model -----------------------------------------------------------------------------------------------


def test_a_model_that_is_passed_keeps_its_mode(model):
    model.train()
    model.decode_head.eval()
    state = {name: module.training for name, module in model.named_modules()}
    Segmenter(model)(photo(50, 50))
    assert {name: module.training for name, module in model.named_modules()} == state


def test_a_file_alone_suffices(model, tmp_path):
    save_segmenter(model, tmp_path / "s.safetensors")
    segmenter = Segmenter(tmp_path / "s.safetensors", device="cpu")
    assert segmenter.class_names == NAMES
    assert segmenter.palette.tolist() == COLOURS
    assert not segmenter.model.training
    check(segmenter(photo(80, 100))[0], model, photo(80, 100))


def test_a_model_in_double_precision(model):
    (found,) = Segmenter(model.double())(photo(64, 96))
    assert found.scores.dtype == np.float16
    check(found, model.float(), photo(64, 96))


def test_a_grey_model():
    model = build(in_chans=1, mean=(0.5,), std=(0.2,))
    image = photo(64, 96)
    (found,) = Segmenter(model)(image)
    x = torch.from_numpy(np.asarray(image.convert("L")).copy())[None, None] / 255
    with torch.no_grad():
        want = model((x - 0.5) / 0.2)[0].softmax(0).amax(0)
    np.testing.assert_allclose(found.scores.astype(np.float32), want.numpy(), atol=2e-3)


def test_classes_of_models():
    model = build(num_classes=150)
    plain = Segmenter(model)
    assert plain.class_names == [str(i) for i in range(150)]
    assert len({tuple(colour) for colour in plain.palette.tolist()}) == 150
    model.pretrained_cfg |= {"label_set": "ade20k"}
    released = Segmenter(model)
    assert released.class_names == list(ade20k.CLASS_NAMES)
    assert (released.palette == ade20k.PALETTE).all()
    model.pretrained_cfg |= {"palette": [[1, 2, 3]]}
    with pytest.raises(ConfigError, match=r"palette has the shape \(1, 3\); it must be 150 colours"):
        Segmenter(model)
    many = Segmenter(build(num_classes=256))(photo(40, 40))[0]
    assert many.labels.dtype == np.uint16


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
    for options in ({}, {"native": True, "mode": "slide"}, {"scales": (0.5, 1), "flip": True}):
        found = {each.path.name: each for each in Segmenter(model, **options)(tmp_path)}
        assert {name: each.error is None for name, each in found.items()} == {
            **dict.fromkeys([*files, "whole.jpg"], True),
            **dict.fromkeys(["cut.jpg", "empty.jpg", "noise.jpg"], False),
        }
        for name, each in found.items():
            if each.error is not None:
                assert each.error.startswith(f"{tmp_path / name}: is ")
                continue
            with Image.open(tmp_path / name) as stored:
                assert each.labels.shape == stored.size[::-1]
    (missing,) = Segmenter(model)(tmp_path / "whole.jpeg")
    assert "there is no such file; did you mean" in missing.error


def test_labels_are_those_of_the_upright_image(model, tmp_path):
    image = photo(60, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    (found,) = Segmenter(model)(tmp_path)
    check(found, model, image.transpose(Image.Transpose.ROTATE_270))


def test_files_can_be_opened_otherwise(model, tmp_path):
    photo(50, 60).save(tmp_path / "a.png")

    def opener(path):
        if path.name == "b.png":
            raise DataError("b.png: not this one.")
        return Image.open(path).transpose(Image.Transpose.ROTATE_90)

    found = list(Segmenter(model).stream([tmp_path / "a.png", tmp_path / "b.png"], opener=opener))
    assert found[0].size == (60, 50)
    assert found[1].error == "b.png: not this one."


def test_an_endless_source_is_read_only_a_little_ahead(model):
    taken = itertools.count()
    source = (Image.new("RGB", (9, 9)) for _ in iter(lambda: next(taken), -1))
    stream = Segmenter(model, batch_size=2).stream(source)
    for _ in range(6):
        next(stream)
    assert next(taken) <= 6 + 2 + 2 + AHEAD + 1 <= 6 + 2 + 2 + DECODERS + 2
    stream.close()


def test_a_large_image_waits_in_the_size_at_which_it_is_looked_at(model):
    item = Segmenter(model)._prepare(None, (0, photo(1000, 2000)))
    ((view, picture),) = item.pictures
    assert view.size == (64, 128)
    assert picture.pixels.shape == (3, 64, 128)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"image_size": 8, "scales": (0,)}, "image_size is 8; it must be 32 or more; scales has 0"),
        ({"scales": 0.5}, r"scales is 0.5; it must be a list of numbers, such as \[0.5, 1.0\]"),
        ({"scales": "1"}, "scales is '1'; it must be a list of numbers"),
        ({"image_size": 100, "max_size": 50}, "max_size is 50, less than image_size, 100"),
        ({"mode": "tile"}, "mode is 'tile'; it must be 'auto', 'whole' or 'slide'"),
        ({"mode": "whole", "window": 64}, "window and stride are for the modes 'slide' and 'auto'"),
        ({"native": True, "max_size": 64}, "native keeps each image's own size; leave image_size and max_size out"),
        ({"window": 63}, "window is 63; it must be a multiple of 32 px, such as 64"),
        ({"stride": 60}, "stride is 60; it must be a multiple of 4 px, at most 56 with windows of 64 px"),
        ({"device": "gpu"}, "The device is 'gpu'"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Segmenter(model, **arguments)


def test_models_that_are_none(model, tmp_path):
    classifier = XCiT(embed_dim=32, depth=1, num_heads=4, num_classes=3)
    save_checkpoint(classifier, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors is a classifier or a backbone, not a segmenter"):
        Segmenter(tmp_path / "c.safetensors", device="cpu")
    with pytest.raises(ConfigError, match="Expected a SegmentationModel, got XCiT"):
        Segmenter(classifier)
    with pytest.raises(CheckpointError, match=r"no\.safetensors"):
        Segmenter(tmp_path / "no.safetensors", device="cpu")
    with pytest.raises(UnknownNameError, match="upernet_xcit_small_12_p16"):
        Segmenter("upernet_xcit_smal_12_p16", device="cpu")
    with pytest.raises(ConfigError):
        Segmenter(copy.deepcopy(model).to("meta"))
    with torch.no_grad():
        model.decode_head.conv_seg.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinite values in 1 tensors"):
        Segmenter(model)


def test_objects_that_are_no_images(model, tmp_path):
    with pytest.raises(ConfigError, match="got Tensor"):
        Segmenter(model)([torch.zeros(3, 32, 32)])
    (found,) = Segmenter(model)(np.zeros((3, 32, 32), np.uint8))
    assert found.error.startswith("image 0: The array's shape is (3, 32, 32)")
    with pytest.raises(DataError, match="holds no image"):
        Segmenter(model)(tmp_path)


def test_a_device_that_is_not_there(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="'cuda' is not available"):
        Segmenter(model, device="cuda")


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_logits_that_overflow_cost_their_image_an_error(model, mode):
    with torch.no_grad():
        model.decode_head.conv_seg.weight.fill_(3e38)
    (found,) = Segmenter(model, mode=mode)(photo(64, 96))
    assert found.error.startswith("image 0: the model's logits are NaN or infinite")
    assert "float32" in found.error


# --- memory -----------------------------------------------------------------------------------------------------------


def limited(model, monkeypatch, limit):
    """Let the model run out of memory with more pixels than a limit."""
    forward = model.forward_low

    def forward_some(images):
        if len(images) * images.shape[2] * images.shape[3] > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(images)

    monkeypatch.setattr(model, "forward_low", forward_some)


def test_running_out_of_memory_says_what_to_do(model, monkeypatch, caplog):
    limited(model, monkeypatch, 64 * 96)
    images = [photo(64, 96)] * 4
    with pytest.raises(
        ConfigError, match=r"Out of memory on cpu with 4 images of 64 x 96 px: use batch_size=2 \(--batch"
    ):
        Segmenter(model, batch_size=4)(images)
    assert len(Segmenter(model, batch_size=1)(images)) == 4
    with pytest.raises(ConfigError, match=r"one image of 128 x 192 px: use mode='slide' \(--mode slide\), or image_s"):
        Segmenter(model, image_size=128, mode="whole")(images)
    with caplog.at_level(logging.INFO, "xcit"):
        assert [each.error for each in Segmenter(model, image_size=96)(images[:2])] == [None, None]
    (said,) = [record.message for record in caplog.records if "windows" in record.message]
    assert "96 x 144 px; images of this size are looked at by windows of 64 px." in said
    limited(model, monkeypatch, 32 * 32)
    with pytest.raises(ConfigError, match=r"one window of 64 x 64 px: use window=32 \(--window\) or less"):
        Segmenter(model, mode="slide")(images[0])
    limited(model, monkeypatch, 0)
    with pytest.raises(ConfigError, match="not even the smallest would fit"):
        Segmenter(model, mode="slide", window=32, stride=16)(images[0])


def test_what_would_not_fit_is_not_begun(model, monkeypatch, caplog):
    seen = sizes_seen(model, monkeypatch)
    image = photo(600, 600)
    monkeypatch.setattr(devices, "available_bytes", lambda device: 40 * 2**20)
    message = r"One image of 600 x 600 px would take about .* of memory on cpu, where 40 MiB are free: use mode='slide'"
    with pytest.raises(ConfigError, match=message):
        Segmenter(model, mode="whole", native=True)(image)
    assert seen == [(600, 600)]  # the count itself, of tensors without data
    model.image_size = model.max_size = 1024  # so that "auto" would look at the whole
    with caplog.at_level(logging.INFO, "xcit"):
        (found,) = Segmenter(model, native=True, window=64)(image)
    assert found.error is None
    assert set(seen[3:]) == {(64, 64)}
    assert "40 MiB are free; images of this size are looked at by windows of 64 px." in caplog.text
    with pytest.raises(ConfigError, match=r"One window of 1024 x 1024 px would take .*: use window=\d+ \(--window\)"):
        Segmenter(model, native=True, window=1024, mode="slide")(image)


def test_other_errors_are_not_hidden(model, monkeypatch):
    monkeypatch.setattr(model, "forward_low", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Segmenter(model)(photo(64, 96))
