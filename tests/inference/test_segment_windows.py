"""Labels from logits strip by strip and window by window, against all of it at once by PyTorch's own functions."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xcit.errors import ConfigError, ShapeError
from xcit.inference import segment_image as module
from xcit.inference.segment_image import default_stride, label_type, labelled, segment_image, strip_logits, views
from xcit.inference.segment_windows import Picture, WholeLogits, WindowLogits, whole_logits
from xcit.models.segmenters import create_segmenter
from xcit.ops.image_size import scaled_size

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class StandIn(nn.Module):
    """Logits at stride 4 by one linear map of each patch of 4 px: what a window sees does not depend on where it is."""

    def __init__(self, num_classes=5, image_size=64, max_size=256):
        super().__init__()
        self.mean, self.std, self.image_size, self.max_size = MEAN, STD, image_size, max_size
        self.map = nn.Conv2d(3, num_classes, 4, stride=4)
        self.seen = []

    def forward_low(self, x):
        self.seen.append(tuple(x.shape))
        # Patches of 16, as the real ones: the logits cover whole patches.
        h, w = (-side % 16 for side in x.shape[-2:])
        return self.map(F.pad(x, (0, w, 0, h)))


def photo(height, width, seed=0):
    """Return smooth noise, (3, H, W) uint8."""
    noise = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, (height, width), mode="bicubic")[0].clamp(0, 1) * 255).round().byte()


def resized(x, size):
    return F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]


def scaled(image, size):
    """Scale and normalise, by PyTorch."""
    image = image.double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return (resized(image, size) - mean) / std


def whole_reference(model, image, size, flip=False):
    """Return the logits of the whole image at its own size, as mmsegmentation makes them."""
    x = scaled(image, size)[None]
    with torch.no_grad():
        low = model.forward_low(x.flip(-1) if flip else x)[0]
    at_size = resized(low, size)
    return resized(at_size.flip(-1) if flip else at_size, image.shape[1:])


def same(found, logits, tolerance=1e-3):
    """Compare labels and scores with those of logits or probabilities, ties aside."""
    probabilities = logits.softmax(0)
    label = torch.from_numpy(found.labels.astype(np.int64))
    best, chosen = probabilities.amax(0), probabilities.gather(0, label[None])[0]
    assert (best - chosen).max() < 1e-5
    np.testing.assert_allclose(found.scores.astype(np.float64), best.numpy(), atol=tolerance)
    assert found.finite


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_parts_of_a_picture_are_those_of_the_scaled_image(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(40):
        H, W, h, w = rng.integers(1, 70, 4).tolist()
        image = torch.from_numpy(rng.integers(0, 256, (3, H, W), dtype=np.uint8))
        want = scaled(image, (h, w))
        y0, x0 = int(rng.integers(0, h)), int(rng.integers(0, w))
        y1, x1 = int(rng.integers(y0 + 1, h + 9)), int(rng.integers(x0 + 1, w + 9))
        padded = F.pad(want[None], (0, 9, 0, 9), mode="replicate")[0][:, y0:y1, x0:x1]
        picture = Picture(image, (h, w), MEAN, STD)
        part = picture.crop((y0, y1), (x0, x1))
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), padded, atol=2e-5, rtol=0)
        assert torch.equal(picture.ready().crop((y0, y1), (x0, x1)), part)
        monkeypatch.setattr("xcit.inference.segment_windows.STRIP", 40)
        assert torch.equal(picture.crop((y0, y1), (x0, x1)), part)
        monkeypatch.undo()


# --- strips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (60, 91), (203, 31), (1, 1), (7, 300)])
@pytest.mark.parametrize("rows", [1, 3, 10_000])
def test_strips_are_all_of_it_at_once(size, rows):
    low = torch.randn(5, 16, 24, dtype=torch.float64)
    for extent, inner in (((64, 96), (64, 96)), ((64, 96), (61, 93)), ((62, 90), (62, 90))):
        want = resized(resized(low, extent)[:, : inner[0], : inner[1]], size)
        look = WholeLogits(low, inner, extent)
        found = torch.cat([strip_logits(look, size, i, min(size[0], i + rows)) for i in range(0, size[0], rows)], 1)
        torch.testing.assert_close(found, want, atol=1e-12, rtol=0)


def test_how_high_strips_are_changes_no_bit():
    low = torch.randn(7, 16, 40)
    looks = [WholeLogits(low, (62, 160), (64, 160))]
    more = [*looks, WholeLogits(torch.randn(7, 8, 20), (31, 77), (32, 80))]
    for each, size in itertools.product((looks, more), ((333, 217), (62, 160))):
        at_once = labelled(each, size)
        for strip_bytes in (1, 30_000, 100_000):
            found = labelled(each, size, strip_bytes=strip_bytes)
            assert (found.labels == at_once.labels).all()
            assert (found.scores == at_once.scores).all()


@pytest.mark.parametrize("size", [(64, 96), (150, 211), (211, 150), (20, 33), (60, 400), (3, 500)])
@pytest.mark.parametrize("flip", [False, True])
def test_whole_images_are_as_published(size, flip):
    model, image = StandIn().double(), photo(*size)
    h, w = scaled_size(*size, 64, 256)
    found = segment_image(model, image, flip=flip)
    assert (found.labels.shape, found.labels.dtype, found.scores.dtype) == (size, np.uint8, np.float16)
    assert len(np.unique(found.labels)) > 1
    if min(h, w) < 32:  # which the pyramid cannot look at: padded
        return
    if flip:
        want = [whole_reference(model, image, (h, w), flip=each).softmax(0) for each in (False, True)]
        same(found, torch.stack(want).mean(0).log())
    else:
        same(found, whole_reference(model, image, (h, w)))


def test_several_scales_are_averaged_as_probabilities():
    model, image = StandIn().double(), photo(100, 140)
    scales = (0.5, 1.0, 1.75)
    found = segment_image(model, image, scales=scales, flip=True)
    sizes = [scaled_size(100, 140, round(64 * s), round(256 * s)) for s in scales]
    want = [whole_reference(model, image, size, flip).softmax(0) for size in sizes for flip in (False, True)]
    same(found, torch.stack(want).mean(0).log())
    assert [view.size for view in views((100, 140), (64, 256), scales, False)] == sizes
    assert [view.size for view in views((100, 140), None, scales, False)] == [(50, 70), (100, 140), (175, 245)]


def test_own_sizes():
    model, image = StandIn().double(), photo(100, 140)
    same(segment_image(model, image, native=True), whole_reference(model, image, (100, 140)))
    same(segment_image(model, image, image_size=96, max_size=120), whole_reference(model, image, (86, 120)))


def test_thin_images_are_padded():
    model = StandIn()
    found = segment_image(model, photo(3, 500))
    assert found.labels.shape == (3, 500)
    assert model.seen == [(1, 3, 32, 256)]


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (61, 91), (20, 33), (96, 96), (1, 40)])
@pytest.mark.parametrize("flip", [False, True])
def test_one_window_is_the_whole_image(size, flip):
    model, image = StandIn(), photo(*size)
    whole = segment_image(model, image, native=True, flip=flip)
    slid = segment_image(model, image, native=True, flip=flip, window=96)
    assert (slid.labels == whole.labels).all()
    assert (slid.scores == whole.scores).all()


def test_one_window_of_a_real_model_is_the_whole_image():
    options = {"channels": 16, "depth": 4, "num_classes": 5}
    model = create_segmenter("xcit_nano_12_p16", **options).eval()
    nn.init.normal_(model.decode_head.conv_seg.weight)
    for size in ((90, 150), (33, 160)):
        image = photo(*size)
        whole = segment_image(model, image, native=True)
        slid = segment_image(model, image, native=True, window=160)
        assert len(np.unique(whole.labels)) > 1
        assert (slid.labels == whole.labels).all()
        assert (slid.scores == whole.scores).all()
        x = scaled(image, size).float()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
        x = (x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1) - mean) / std
        with torch.no_grad():
            same(whole, model(x[None])[0].double(), tolerance=2e-3)


def all_rows(look):
    return torch.cat([look.rows(i, i + 1).clone() for i in range(look.shape[1])], 1)


@pytest.mark.parametrize(("size", "window", "stride"), [((128, 256), 64, 40), ((100, 330), 64, 56), ((70, 64), 32, 4)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_of_a_local_model_are_the_whole_map(size, window, stride, batch_size):
    model, image = StandIn().double(), photo(*size)
    picture = Picture(image, size, MEAN, STD)
    look = WindowLogits(model, picture, window, stride, batch_size=batch_size)
    extent = [-(-side // 4) * 4 for side in size]
    want = model.map(picture.crop((0, extent[0]), (0, extent[1])).double()[None])[0].detach()
    assert look.extent == tuple(extent)
    assert look.shape == tuple(want.shape)
    with torch.no_grad():
        torch.testing.assert_close(all_rows(look), want, atol=1e-12, rtol=0)
    assert {shape[2:] for shape in model.seen} == {(window, window)}
    assert max(shape[0] for shape in model.seen) <= batch_size


class Marking(nn.Module):
    """Says which window it was: logit 0 of the n-th is n; the others tell what its pixels count."""

    mean, std, image_size, max_size = MEAN, STD, 64, 256

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))
        self.count = itertools.count()

    def forward_low(self, x):
        B, _, h, w = x.shape
        low = torch.zeros(B, 40, -(-h // 4), -(-w // 4))
        for i in range(B):
            low[i, next(self.count)] = 1
        return low


@pytest.mark.parametrize("size", [(64, 200), (200, 64), (131, 111), (65, 65), (40, 300)])
def test_every_pixel_is_covered_and_seams_are_blended(size):
    stride = default_stride(64)
    look = WindowLogits(Marking(), Picture(photo(*size), size, MEAN, STD), 64, stride)
    with torch.no_grad():
        weights = all_rows(look)
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1:]))
    assert (weights.sum(0) > 0.999).all()
    assert (weights.amax(dim=(1, 2)) > 0).sum() > 1
    # No edge within the image: from a pixel of the logits to the next no window's share jumps. Even spread apart, the
    # overlap has (64 - stride) / 4 pixels; a hard edge would be a step of 1.
    overlap = (64 - stride) // 4
    for dim in (1, 2):
        assert weights.diff(dim=dim).abs().max() < 4 / overlap


def test_windows_are_spread_evenly_on_the_grid():
    from xcit.inference.segment_windows import _side

    rng = np.random.default_rng(0)
    for _ in range(500):
        window = 32 * int(rng.integers(1, 6))
        stride = 4 * int(rng.integers(1, window * 7 // 8 // 4 + 1))
        length = int(rng.integers(1, 900))
        starts, side, extent = _side(length, window, stride)
        if length <= window:
            assert (starts, side, extent) == ([0], max(32, length), max(32, length))
            continue
        assert length <= extent < length + 4
        assert side == window
        assert (starts[0], starts[-1]) == (0, extent - window)
        steps = np.diff(starts)
        assert (np.array(starts) % 4 == 0).all()
        assert (steps > 0).all()
        assert steps.max() <= stride
        assert steps.max() - steps.min() <= 4


@pytest.mark.parametrize("scales", [(1.0,), (0.4, 1.2)])
def test_windows_of_a_local_model_give_the_labels_of_the_whole(scales):
    model, image = StandIn().double(), photo(224, 336)  # of which all scales give multiples of 16
    whole = segment_image(model, image, image_size=160, max_size=320, scales=scales, flip=True)
    slid = segment_image(
        model, image, image_size=160, max_size=320, scales=scales, flip=True, window=64, stride=32, batch_size=4
    )
    assert len(np.unique(whole.labels)) > 2
    assert (slid.labels == whole.labels).mean() > 0.9999
    np.testing.assert_allclose(slid.scores.astype(float), whole.scores.astype(float), atol=1e-3)


def test_rows_that_a_small_image_passes_over():
    image = photo(20, 30)
    found = segment_image(StandIn(), image, image_size=400, max_size=600, window=32)
    assert found.labels.shape == (20, 30)


def test_rows_are_forgotten(monkeypatch):
    image = photo(2000, 64)
    look = WindowLogits(StandIn(), Picture(image, (2000, 64), MEAN, STD), 64, 40)
    most = 0
    with torch.no_grad():
        for i in range(look.shape[1]):
            look.rows(i, i + 1)
            most = max(most, look._buffer.shape[1])
    assert look.shape[1] == 500
    assert most <= 16 + 10 + 1
    with pytest.raises(AssertionError, match="top down"):
        look.rows(0, 1)


# --- refusals and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 100}, "window is 100; it must be a multiple of 32 px, such as 96"),
        ({"window": 64, "stride": 30}, "stride is 30; it must be a multiple of 4 px, at most 56 with windows of 64"),
        ({"window": 64, "stride": 64}, "stride is 64"),
        ({"scales": ()}, "scales is empty"),
        ({"scales": 0.5}, r"scales is 0.5; it must be a list of numbers, such as \[0.5, 1.0\]"),
        ({"scales": "1"}, "scales is '1'; it must be a list of numbers"),
        ({"scales": ["1", 2]}, r"scales is \['1', 2\]; it must be a list of numbers"),
        ({"scales": (1, 0, float("nan"))}, "scales has 0; each must be above 0 and at most 8; scales has nan"),
        ({"image_size": 8, "batch_size": 0}, "image_size is 8; it must be 32 or more; batch_size is 0"),
        ({"image_size": 128, "max_size": 64}, "max_size is 64, less than image_size, 128"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        segment_image(StandIn(), photo(40, 40), **options)


def test_images_that_are_none():
    for image in (torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(3, 0, 4, dtype=torch.uint8)):
        with pytest.raises(ShapeError, match=r"Expected an image \(C, H, W\) of uint8"):
            segment_image(StandIn(), image)


def test_types_of_labels():
    assert (label_type(255), label_type(256)) == (np.uint8, np.uint16)
    with pytest.raises(ConfigError, match="65,536 classes"):
        label_type(65_536)
    low = torch.full((300, 8, 8), -9.0)
    low[299] = 9
    found = labelled([WholeLogits(low, (32, 32), (32, 32))], (32, 32))
    assert found.labels.dtype == np.uint16
    assert (found.labels == 299).all()


def test_logits_that_are_not_finite_are_noticed():
    low = torch.zeros(3, 8, 8)
    low[1, 5, 5] = float("nan")
    looks = [WholeLogits(low, (32, 32), (32, 32))]
    assert not labelled(looks, (32, 32)).finite
    assert not labelled(looks * 2, (32, 32)).finite


def test_the_model_keeps_its_mode():
    model = StandIn().train()
    segment_image(model, photo(40, 40))
    assert model.training


def test_images_of_one_size_go_together():
    model = StandIn()
    pictures = [Picture(photo(40, 50, seed), (64, 80), MEAN, STD) for seed in range(3)]
    with torch.no_grad():
        looks = whole_logits(model, pictures)
        assert model.seen == [(3, 3, 64, 80)]
        for look, picture in zip(looks, pictures, strict=True):
            torch.testing.assert_close(look.low, whole_logits(model, [picture])[0].low)


MEASURE = """
import json, threading, time
import torch
from pathlib import Path
from xcit.inference.segmenter import Segmenter
from xcit.models.segmenters import create_segmenter

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20

torch.manual_seed(0)
model = create_segmenter("xcit_nano_12_p16", head="sem_fpn", num_classes=150, channels=32, depth=4).eval()
segmenter = Segmenter(model, native=True, mode="slide", device="cpu")
from PIL import Image
image = Image.effect_noise((60, 40), 90).convert("RGB").resize((6000, 4000))
before, most, ended = anonymous(), 0.0, False

def watch():
    global most
    while not ended:
        most = max(most, anonymous())
        time.sleep(0.02)

thread = threading.Thread(target=watch)
thread.start()
begin = time.time()
(seen,) = segmenter(image)
ended = True
thread.join()
assert seen.labels.shape == (4000, 6000), seen.error
print(json.dumps({"before_gib": before, "peak_gib": most, "seconds": time.time() - begin}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_very_large_image_by_windows_within_4_gib():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["before_gib"] < figures["peak_gib"] < 4


def test_strips_take_what_they_may(monkeypatch):
    most = []
    monkeypatch.setattr(
        module, "strip_logits", lambda *args, do=strip_logits: most.append(do(*args).shape) or do(*args)
    )
    labelled([WholeLogits(torch.randn(5, 16, 16), (64, 64), (64, 64))], (500, 300), strip_bytes=4 * 5 * 300 * 7)
    assert max(shape[1] for shape in most) == 7
