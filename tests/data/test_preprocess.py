"""Preprocessing against torchvision's transforms, bit for bit, and on images that would not fit in memory resized."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(224, 224), (500, 333), (333, 500), (225, 223), (37, 501), (640, 480), (7, 5), (1, 1), (64, 1), (1000, 50)]


def noise(width, height, mode="RGB", low=0, high=256):
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(low, high, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(("side", "crop_pct", "resized"), [(224, 1.0, 224), (96, 0.875, 109), (63, 0.9, 70)])
def test_equals_torchvision(size, interpolation, side, crop_pct, resized):
    image = noise(*size)
    mode = InterpolationMode(interpolation)
    got = Preprocessing((side, side), MEAN, STD, interpolation, crop_pct)(image)
    old = v1.Compose([v1.Resize(resized, mode), v1.CenterCrop(side), v1.ToTensor(), v1.Normalize(MEAN, STD)])
    new = v2.Compose(
        [
            v2.Resize(resized, mode, antialias=True),
            v2.CenterCrop(side),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    assert torch.equal(got, old(image))
    torch.testing.assert_close(got, new(image), rtol=0, atol=1e-6)  # v2 scales by a product instead of a quotient


@pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")
@pytest.mark.parametrize("crop_pct", [0.9, 0.95, 1.0])
def test_equals_timm_where_the_resized_side_is_no_whole_number(crop_pct):
    from timm.data import create_transform

    image = noise(500, 333)
    want = create_transform((3, 224, 224), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=crop_pct)(image)
    assert torch.equal(Preprocessing((224, 224), crop_pct=crop_pct)(image), want)


def test_grey():
    image = noise(300, 200, "L")
    steps = [v1.Resize(32, InterpolationMode.BICUBIC), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize((0.5,), (0.25,))]
    got = Preprocessing((32, 32), (0.5,), (0.25,), in_chans=1)(image)
    assert got.shape == (1, 32, 32)
    assert torch.equal(got, v1.Compose(steps)(image))


def test_the_values_are_those_of_the_equation():
    got = Preprocessing((8, 8), (0.5, 0.0, 0.25), (0.5, 1.0, 0.25))(Image.new("RGB", (8, 8), (255, 51, 0)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, 3, 3], torch.tensor([1.0, 0.2, -1.0]))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (1000, 10)])
@pytest.mark.parametrize("image_size", [(32, 96), (96, 32), (48, 64)])
def test_an_oblong_crop_is_covered_and_central(size, image_size):
    """The same pixels as torchvision's, told the size that keeps the proportions and just covers the crop."""
    width, height = size
    H, W = image_size
    scale = max(H / height, W / width)
    resized = (max(H, int(height * scale + 1e-9)), max(W, int(width * scale + 1e-9)))
    steps = v1.Compose([v1.Resize(resized, InterpolationMode.BICUBIC), v1.CenterCrop(image_size), v1.ToTensor()])
    got = Preprocessing(image_size, (0.0,) * 3, (1.0,) * 3)(noise(*size))
    assert got.shape == (3, H, W)
    assert torch.equal(got, steps(noise(*size)))


@pytest.mark.parametrize("size", [(20_000, 30), (30, 20_000), (9_001, 1), (3, 5_000), (44, 10_357)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_a_strip_is_the_same_up_to_rounding(size, crop_pct):
    image = noise(*size, low=90, high=166)  # no overshoot beyond black and white, which would be clipped
    resized = int(48 / crop_pct)
    want = v1.Compose([v1.Resize(resized, InterpolationMode.BICUBIC), v1.CenterCrop(48)])(image)
    got = Preprocessing((48, 48), crop_pct=crop_pct).resize_and_crop(image)
    difference = np.abs(np.asarray(got, dtype=int) - np.asarray(want, dtype=int))
    assert difference.max() <= 2
    assert difference.mean() < 0.5


def test_a_strip_never_becomes_a_giant(monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def recorded(self, size, *args, **kwargs):
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    Preprocessing((224, 224))(Image.new("RGB", (20_000, 30)))
    Preprocessing((224, 224))(Image.new("RGB", (100_000, 1)))
    assert sizes == [(224, 224)] * 2


def test_one_pixel_fills_the_image():
    got = Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3)(Image.new("RGB", (1, 1), (255, 0, 51)))
    torch.testing.assert_close(got, torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(3, 32, 32))


def test_other_modes_are_converted():
    see_through = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3)(see_through).min() == 1


def test_the_image_itself_stays_as_it_is():
    image = noise(8, 8)
    before = np.asarray(image).copy()
    Preprocessing((8, 8))(image)
    assert np.array_equal(np.asarray(image), before)


def test_cfg_round_trip():
    preprocessing = Preprocessing((48, 64), (0.5,), (0.25,), "bilinear", 0.875, in_chans=1)
    cfg = preprocessing.to_cfg()
    assert cfg == {
        "input_size": [1, 48, 64],
        "mean": [0.5],
        "std": [0.25],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }
    assert Preprocessing.from_cfg(cfg) == preprocessing


def test_timms_own_cfg_is_read():
    cfg = {"input_size": (3, 384, 384), "mean": MEAN, "std": STD, "crop_pct": None, "pool_size": None}
    assert Preprocessing.from_cfg(cfg) == Preprocessing((384, 384), MEAN, STD, "bicubic", 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (0, 4)}, r"image_size is \(0, 4\)"),
        ({"std": (0.0, 1.0, 1.0)}, "std is"),
        ({"mean": (0.5,)}, "mean has 1 and std 3 values; both need 3"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; it must be one of nearest, bilinear"),
        ({"crop_pct": 1.5}, r"crop_pct is 1\.5"),
        ({"in_chans": 4}, "in_chans is 4"),
        ({"crop_pct": 0.0, "interpolation": "x"}, "interpolation is 'x'.*crop_pct is 0"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**{"image_size": (8, 8), **change})


@pytest.mark.parametrize("cfg", [{}, {"mean": MEAN, "std": STD}])
def test_a_model_that_does_not_say(cfg):
    with pytest.raises(ConfigError, match="does not say what images it expects"):
        Preprocessing.from_cfg(cfg)
    with pytest.raises(ConfigError, match="channels, height, width"):
        Preprocessing.from_cfg({"input_size": 224, "mean": MEAN, "std": STD})


def test_memory_of_a_strip_is_that_of_the_crop():
    """Pillow allocates outside of Python; what Python sees is the array: one crop, not the strip."""
    image = Image.new("RGB", (20_000, 30))
    tracemalloc.start()
    Preprocessing((224, 224))(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20
