"""Counted costs against the arithmetic by hand, and against tensors that really hold memory."""

import gc
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from xcit.errors import ShapeError
from xcit.inference.costs import count_costs, peak_bytes, time_forward
from xcit.models.xcit import XCiT

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}


def multiply_adds(form, rows, columns):
    """Of SMALL on a (rows, columns) grid of patches of 16 px, added up from the paper's definitions."""
    N, C, h, depth = rows * columns, 32, 4, 2
    d = C // h
    stem = sum(
        9 * before * after * N * (side * side)
        for before, after, side in ((3, 4, 8), (4, 8, 4), (8, 16, 2), (16, 32, 1))
    )
    position = 64 * C * N
    if form == "tokens":
        xca = 3 * N * C * C + 2 * N * C * d + N * C * C
    else:
        # moment, W_q and W_k times it, W_q C W_k^T a head, P A, (P A) W_v, the mixing, and the offsets' two small ones
        xca = N * C * C + 2 * C**3 + C * C * d + C * C * d + C**3 + N * C * C + 4 * C * C
    block = xca + 2 * 9 * C * N + 8 * N * C * C  # LPI's two depthwise convolutions, the feed-forward network
    tokens = N + 1
    cls = C * C + 2 * tokens * C * C + 2 * tokens * C + C * C + 8 * C * C  # q of one token, k v, products, proj, mlp
    return stem + position + depth * block + 2 * cls + C * 10


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_multiply_adds_of_the_token_form_are_those_by_hand(size):
    counted = count_costs(SMALL, size, "tokens").multiply_adds
    assert counted == multiply_adds("tokens", size[0] // 16, size[1] // 16)


def test_multiply_adds_of_the_covariance_form_are_those_by_hand():
    counted = count_costs(SMALL, (128, 128), "covariance").multiply_adds
    assert counted == pytest.approx(multiply_adds("covariance", 8, 8), rel=0.01)


def real_saved_bytes(model, image):
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(image)
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


@pytest.mark.parametrize("form", ["tokens", "covariance"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_memory_for_training_is_what_real_tensors_take(form, size):
    model = XCiT(**SMALL, attn_form=form).train()
    assert count_costs(model.config, size, form).training_bytes == real_saved_bytes(model, torch.randn(1, 3, *size))


@pytest.mark.parametrize("form", ["tokens", "covariance"])
def test_memory_for_inference_lies_between_what_must_live_and_what_ever_lived(form):
    size = (128, 128)
    image = 3 * 128 * 128 * 4
    first_convolution = 4 * 64 * 64 * 4
    costs = count_costs(SMALL, size, form)
    # at the stem's start: the image, the convolution's result and its normalised copy
    assert costs.inference_bytes >= image + 2 * first_convolution
    assert costs.inference_bytes < costs.training_bytes


def test_memory_for_inference_of_a_known_chain(monkeypatch):
    """A chain whose peak is known: 1 MiB in, 4 MiB made, 2 MiB made of it while the 4 and the 1 still live."""
    from xcit.inference import costs

    class Chain(torch.nn.Module):
        def forward(self, x):
            y = torch.cat((x, x, x, x))
            y = y[: y.shape[0] // 2] * 2
            return y + 1

    x = torch.zeros(2**18)
    with torch.no_grad(), costs._LiveBytes(x) as memory:
        Chain()(x)
    gc.collect()
    assert memory.peak == 7 * 2**20
    assert memory.live == 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peak_of_any_function_of_a_real_model(dtype):
    """As counted of the model without its values; twice as much in float64, and in proportion to batch and pixels."""
    model = XCiT(**SMALL, attn_form="covariance").eval().to(dtype)
    of = partial(peak_bytes, model, dtype=dtype, device=torch.device("cpu"))
    small, large = of((1, 3, 512, 512)), of((2, 3, 1024, 2048))
    expected = count_costs(SMALL, (512, 512), "covariance").inference_bytes
    assert small == pytest.approx(expected * (2 if dtype == torch.float64 else 1), rel=0.02)
    assert large == pytest.approx(16 * small, rel=0.02)
    assert of((1, 3, 32_000, 32_000)) > 2**34  # nothing of the kind is allocated
    assert all(type(p) is torch.nn.Parameter and p.device.type == "cpu" for p in model.parameters())


def test_large_images_cost_no_time_and_no_memory():
    costs = count_costs({**SMALL, "embed_dim": 384, "num_heads": 8}, (16_000, 16_000), "covariance")
    assert costs.training_bytes > 2**33


def test_an_image_below_one_patch():
    with pytest.raises(ShapeError, match="less than one patch"):
        count_costs(SMALL, (8, 8), "tokens")


def test_time_forward_stops_in_time():
    calls = []

    class Slow(torch.nn.Module):
        def forward(self, x):
            calls.append(x)
            return x

    assert time_forward(Slow(), torch.zeros(1), max_runs=5) >= 0
    assert len(calls) == 6
    calls.clear()
    time_forward(Slow(), torch.zeros(1), seconds=0)
    assert len(calls) == 2
