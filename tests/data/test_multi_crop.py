"""Views against the recipe: what each probability, range and size does, seen on pictures that give it away."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms

from xcit.data.image_set import ImageSet
from xcit.data.multi_crop import CropImages, CropRecipe, MultiCrop
from xcit.data.preprocess import Preprocessing
from xcit.data.sampling import Draw, EpochSampler, derive_seed, seed_everything, seeded
from xcit.errors import ConfigError, DataError

RGB = Preprocessing((8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
GREY = Preprocessing((8, 8), mean=(0.0,), std=(1.0,), in_chans=1)
OFF = CropRecipe(
    global_size=8,
    local_size=4,
    num_local=2,
    global_scale=(1.0, 1.0),
    local_scale=(1.0, 1.0),
    hflip=0,
    jitter_prob=0,
    grey_prob=0,
    blur_probs=(0, 0, 0),
    solarize_prob=0,
)
"""Nothing happens but crop and resize, and the crop is the whole of a square picture as far as shapes allow."""


def recipe(**changes):
    return CropRecipe(**{name: getattr(OFF, name) for name in OFF.__dataclass_fields__} | changes)


def photo(height=40, width=60, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def coordinates(side=240):
    """A picture whose red says how far right a pixel is, whose green how far down, up to half of white."""
    ramp = np.linspace(0, 120, side).round().astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1))


def draws(transform, image, n, seed=0):
    """The views of n calls: global (n, 2, C, H, W), local (n, L, C, h, w)."""
    seed_everything(seed)
    return [torch.stack(views) for views in zip(*(transform(image) for _ in range(n)), strict=True)]


def regions(views):
    """Left, right, top, bottom of each view of ``coordinates()``, in units of the whole picture, by fitting a plane."""
    side = views.shape[-1]
    across, down = views[..., 0, :, :].mean(-2) * 255 / 120, views[..., 1, :, :].mean(-1) * 255 / 120
    t = (torch.arange(side) + 0.5) / side
    found = []
    for line in (across, down):
        slope = ((line - line.mean(-1, keepdim=True)) * (t - 0.5)).sum(-1) / (t - 0.5).square().sum()
        middle = line.mean(-1)
        found += [middle - slope / 2, middle + slope / 2]
    return found


def share(flags):
    return flags.double().mean().item()


def probability(found, expected, n):
    """Within four standard deviations of a binomial's mean."""
    assert found == pytest.approx(expected, abs=4 * math.sqrt(max(expected * (1 - expected), 1e-9) / n)), (
        found,
        expected,
    )


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_what_comes_out():
    globals_, locals_ = MultiCrop(recipe(num_local=3), RGB)(photo())
    assert globals_.shape == (2, 3, 8, 8)
    assert locals_.shape == (3, 3, 4, 4)
    assert globals_.dtype == locals_.dtype == torch.float32
    only = MultiCrop(recipe(num_local=0), GREY)(photo(mode="L"))
    assert [tuple(view.shape) for view in only] == [(2, 1, 8, 8)]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (8, 8), (5, 500)])
@pytest.mark.parametrize("degrees", [0, 20])
def test_pictures_of_any_size(size, degrees):
    for mode, prepared in (("RGB", RGB), ("L", GREY)):
        globals_, locals_ = MultiCrop(CropRecipe(degrees=degrees, num_local=1), prepared)(
            photo(8, 8, mode).resize(size)
        )
        assert globals_.shape == (2, prepared.in_chans, 224, 224)
        assert locals_.shape == (1, prepared.in_chans, 96, 96)
        assert torch.isfinite(globals_).all()


def test_values_are_normalised_as_in_evaluation():
    prepared = Preprocessing((8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = photo(8, 8)
    for view in MultiCrop(recipe(), prepared)(image)[0]:
        assert torch.equal(view, prepared(image))


def test_another_mode_is_refused():
    with pytest.raises(DataError, match="mode is RGBA, not RGB"):
        MultiCrop(OFF, RGB)(photo(mode="RGBA"))
    with pytest.raises(DataError, match="mode is RGB, not L"):
        MultiCrop(OFF, GREY)(photo())


# --- statistics ------------------------------------------------------------------------------------------------------


def test_shares_of_the_area_and_aspects():
    wanted = recipe(global_size=32, local_size=24, num_local=4, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    for views, (least, most) in zip(
        draws(MultiCrop(wanted, RGB), coordinates(), 400), ((0.4, 1.0), (0.05, 0.4)), strict=True
    ):
        left, right, top, bottom = regions(views)
        area, aspect = ((right - left) * (bottom - top)).flatten(), ((right - left) / (bottom - top)).flatten()
        assert least * 0.93 < area.min() < least + 0.05
        assert most - 0.05 < area.max() < most * 1.05
        assert 0.75 * 0.94 < aspect.min() < 0.8
        assert 1.25 < aspect.max() < 1.06 * 4 / 3
        # Uniform in the area and in the logarithm of the aspect, but for crops that do not fit and are drawn again.
        if most < 0.5:
            assert area.mean().item() == pytest.approx((least + most) / 2, rel=0.05)
            assert area.std().item() == pytest.approx((most - least) / math.sqrt(12), rel=0.1)
        assert aspect.log().mean().item() == pytest.approx(0, abs=0.03)
        assert aspect.log().std().item() == pytest.approx(math.log(16 / 9) / math.sqrt(12), rel=0.1)
        # Anywhere within the picture.
        assert min(left.min(), top.min()) > -0.03
        assert max(right.max(), bottom.max()) < 1.03
        assert (left / (1 - (right - left)).clamp(min=0.02)).median().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("name", "axis"), [("hflip", -1), ("vflip", -2)])
def test_mirrors(name, axis):
    halves = np.zeros((8, 8, 3), dtype=np.uint8)
    halves[(slice(None), slice(4)) if axis == -1 else (slice(4),)] = 200
    for views in draws(MultiCrop(recipe(**{name: 0.3}), RGB), Image.fromarray(halves), 400):
        size = views.shape[axis] // 2
        first, second = views.split(size, dim=axis)
        mirrored = (second.mean((-1, -2, -3)) > first.mean((-1, -2, -3))).flatten()
        probability(share(mirrored), 0.3, len(mirrored))
        for each in mirrored.reshape(400, -1).T:
            probability(share(each), 0.3, 400)


def test_blur_by_the_kind_of_view():
    point = np.zeros((16, 16, 3), dtype=np.uint8)
    point[8, 8] = 255
    wanted = recipe(global_size=16, local_size=16, blur_probs=(1.0, 0.1, 0.5), blur_radius=(0.7, 2.0))
    globals_, locals_ = draws(MultiCrop(wanted, RGB), Image.fromarray(point), 400)
    blurred = [(views[:, i].amax((-1, -2, -3)) < 0.999) for views in (globals_, locals_) for i in range(2)]
    for flags, expected in zip(blurred, (1.0, 0.1, 0.5, 0.5), strict=True):
        probability(share(flags), expected, 400)
    # The width is what Pillow makes of a radius that is uniform between the two.
    widths = [
        np.asarray(Image.fromarray(point).filter(ImageFilter.GaussianBlur(r))).max() / 255 for r in (0.7, 1.35, 2.0)
    ]
    peaks = globals_[:, 0].amax((-1, -2, -3))
    assert widths[2] - 0.01 <= peaks.min() < widths[2] + 0.02
    assert widths[0] - 0.05 < peaks.max() <= widths[0] + 0.01
    assert peaks.median().item() == pytest.approx(widths[1], abs=0.02)


def test_only_the_second_global_view_is_solarised():
    picture = Image.fromarray(np.repeat(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2))
    expected = torch.from_numpy(np.array(ImageOps.solarize(picture, 128))).permute(2, 0, 1) / 255
    plain = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    globals_, locals_ = draws(MultiCrop(recipe(solarize_prob=0.2), RGB), picture, 400)
    is_plain, is_solarised = ((globals_ == kind).flatten(2).all(-1) for kind in (plain, expected))
    assert (is_plain | is_solarised).all()
    assert is_plain[:, 0].all()
    probability(share(is_solarised[:, 1]), 0.2, 400)
    assert locals_[:, :, 0, -1, -1].min() > 0.9


def test_grey_by_its_probability_and_in_the_eyes_weights():
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    for views in draws(MultiCrop(recipe(grey_prob=0.2), RGB), red, 400):
        grey = (views[:, :, 0] == views[:, :, 2]).flatten(2).all(-1).flatten()
        probability(share(grey), 0.2, len(grey))
        assert torch.allclose(views.flatten(0, 1)[grey], torch.tensor(round(0.299 * 200) / 255), atol=1e-3)


def test_jitter_by_its_probability_and_ranges():
    flat = Image.new("RGB", (8, 8), (100, 100, 100))
    for views in draws(
        MultiCrop(recipe(jitter_prob=0.8, brightness=0.4, contrast=0, saturation=0, hue=0), RGB), flat, 500
    ):
        factor = (views[:, :, 0, 0, 0] * 2.55).flatten()
        changed = (factor - 1).abs() > 1e-3
        probability(share(changed), 0.8 * (1 - 1 / 80), len(changed))  # a factor near 1 rounds to 1
        assert 0.59 < factor.min() < 0.62
        assert 1.38 < factor.max() < 1.41
        assert factor[changed].mean().item() == pytest.approx(1, abs=0.02)
        assert factor[changed].std().item() == pytest.approx(0.8 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("name", ["contrast", "saturation", "hue"])
def test_each_colour_change_does_something(name):
    colours = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {name: 0.1}
    globals_, locals_ = draws(MultiCrop(recipe(jitter_prob=1.0, **colours), RGB), photo(8, 8), 20)
    for views in (globals_, locals_):
        assert (views - views[:1]).abs().flatten(1).amax(1)[1:].min() > 0


def test_grey_pictures_skip_what_is_of_colours():
    wanted = recipe(jitter_prob=1.0, brightness=0, contrast=0, saturation=1.0, hue=0.5, grey_prob=1.0)
    image = photo(8, 8, "L")
    for view in MultiCrop(wanted, GREY)(image)[0]:
        assert torch.equal(view, GREY(image))
    assert "Jitter" not in repr(MultiCrop(wanted, GREY).steps)
    brighter = MultiCrop(recipe(jitter_prob=1.0, brightness=0.4), GREY)(image)[0]
    assert not torch.equal(brighter[0], GREY(image))


def test_each_view_is_turned_by_itself():
    bar = np.zeros((64, 64), dtype=np.uint8)
    bar[:32, 31:33] = 255  # from the middle up
    views = torch.cat(
        draws(MultiCrop(recipe(global_size=64, local_size=64, degrees=30.0), GREY), Image.fromarray(bar), 150), 1
    )
    ramp = torch.arange(64.0) - 31.5
    mass = views.sum((-1, -2, -3))
    x = (views.sum((-2, -3)) * ramp).sum(-1) / mass
    y = (views.sum((-1, -3)) * ramp).sum(-1) / mass
    angles = torch.rad2deg(torch.atan2(x, -y)).flatten()
    assert angles.abs().max().item() == pytest.approx(30, abs=2)
    assert angles.std().item() == pytest.approx(60 / math.sqrt(12), rel=0.1)
    assert angles.mean().item() == pytest.approx(0, abs=3)
    for view in range(4):
        assert angles.reshape(-1, 4)[:, view].std() > 10


def test_a_small_picture_is_enlarged_before_it_is_turned():
    digit = photo(8, 8, "L")
    seed_everything(0)
    turned = MultiCrop(recipe(global_size=64, degrees=1e-6), GREY)(digit)[0][0]
    large = Preprocessing((64, 64), mean=(0.0,), std=(1.0,), in_chans=1)(digit)
    assert (turned - large).abs().mean() < 0.01


# --- the released code's pipeline ------------------------------------------------------------------------------------


class Blur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def original(kind):
    """The augmentation of the paper, put together from its description in torchvision's parts."""
    size, scale = (96, (0.05, 0.4)) if kind == 2 else (224, (0.4, 1.0))
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            Blur((1.0, 0.1, 0.5)[kind]),
            *([transforms.RandomSolarize(128, 0.2)] if kind == 1 else []),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def test_the_defaults_are_the_released_pipeline_draw_for_draw():
    image, ours = photo(120, 160), MultiCrop(CropRecipe(), Preprocessing((224, 224)))
    for seed in range(6):
        seed_everything(seed)
        globals_, locals_ = ours(image)
        seed_everything(seed)
        expected = [original(min(i, 2))(image) for i in range(10)]
        for view, theirs in zip([*globals_, *locals_], expected, strict=True):
            torch.testing.assert_close(view, theirs, rtol=0, atol=1e-6)


# --- the set ---------------------------------------------------------------------------------------------------------


class Reader:
    """Grey pictures of one value each; those in ``broken`` cannot be decoded."""

    def __init__(self, broken=()):
        self.broken = set(broken)

    def __call__(self, number):
        if number in self.broken:
            raise DataError(f"{number}.png is broken.")
        return Image.new("L", (8, 8), number)


def picture_set(n, broken=()):
    return ImageSet(("a",), [f"{i}.png" for i in range(n)], np.zeros(n, dtype=np.int64), Reader(broken), np.arange(n))


def test_a_draw_follows_from_its_seed_alone():
    crops = CropImages(picture_set(9), MultiCrop(recipe(jitter_prob=1.0, global_scale=(0.3, 1.0)), GREY))
    assert len(crops) == 9
    first = crops[Draw(4, 77)]
    before = torch.get_rng_state(), random.getstate()
    again = crops[Draw(4, 77)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for mine, other in zip(first.views, again.views, strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(crops[Draw(4, 78)].views[0], first.views[0])
    assert (first.indices.item(), first.decoded.item()) == (4, True)


def test_another_picture_stands_in_for_a_broken_one():
    crops = CropImages(picture_set(9, broken={4}), MultiCrop(OFF, GREY))
    item = crops[Draw(4, 3)]
    assert (item.indices.item(), item.decoded.item()) == (4, False)
    substitute = derive_seed(3, 0) % 9
    assert substitute != 4
    assert torch.allclose(item.views[0], torch.tensor(substitute / 255))
    with seeded(3):
        expected = crops.transform(Image.new("L", (8, 8), substitute))
    assert torch.equal(item.views[1], expected[1])
    assert crops[Draw(5, 3)].decoded.item()


def test_too_many_broken_ones_are_an_error_that_names_the_first():
    with pytest.raises(DataError, match=r"20 images in a row .* The first: 2\.png is broken"):
        CropImages(picture_set(5, broken=range(5)), MultiCrop(OFF, GREY))[Draw(2, 0)]


def test_batches_of_worker_processes():
    crops = CropImages(picture_set(9, broken={1}), pickle.loads(pickle.dumps(MultiCrop(OFF, GREY))))
    (batch,) = DataLoader(crops, batch_size=9, sampler=EpochSampler(9, 9, seed=0), num_workers=0)
    assert [tuple(views.shape) for views in batch.views] == [(9, 2, 1, 8, 8), (9, 2, 1, 4, 4)]
    assert sorted(batch.indices.tolist()) == list(range(9))
    assert batch.decoded.sum() == 8


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        CropRecipe(global_size=0, num_local=-1, global_scale=(0.9, 0.4), hflip=1.5, blur_probs=(0, 2, 0), hue=0.6)
    for fragment in (
        "global_size is 0",
        "num_local is -1",
        "global_scale is 0.9, 0.4",
        "hflip is 1.5",
        "blur_probs is 2",
        "hue is 0.6",
    ):
        assert fragment in str(caught.value)
    assert CropRecipe(local_scale=[0.1, 0.2]).local_scale == (0.1, 0.2)  # as YAML gives it
