"""Attention maps, masks and overlays: against hand-made attention, and exact against a plain recomputation."""

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.errors import CheckpointError, ConfigError, ShapeError
from xcit.inference.attention_maps import (
    HEAT,
    attention_maps,
    channel_attention,
    class_attention,
    mass_mask,
    multiples_of_even,
    overlay,
)
from xcit.models.xcit import XCiT


@pytest.fixture
def model():
    return XCiT(patch_size=8, in_chans=1, num_classes=3, embed_dim=32, depth=1, num_heads=4, drop_path_rate=0.5)


class Spotlight(torch.nn.Module):
    """Attends to the patch in row 1, column 2 with nine tenths of what it has; the second head evenly."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def class_attention(self, images, layer=-1):
        assert images.dtype == self.weight.dtype
        attention = torch.full((len(images), 2, 4, 4), 0.5 * 0.1 / 15)
        attention[:, 0, 1, 2] = 0.5 * 0.9
        attention[:, 1] = 1 / 16
        return attention


def test_multiples_of_even_attention():
    maps = attention_maps(Spotlight(), torch.zeros(3, 1, 32, 32), size=(4, 4))
    assert maps.shape == (3, 2, 4, 4)
    # 0.9 of what the head pays to patches, over the 1/16 of even attention; what goes to the class token plays no part
    torch.testing.assert_close(maps[0, 0, 1, 2], torch.tensor(0.9 * 16))
    torch.testing.assert_close(maps[0, 0].mean(), torch.tensor(1.0))
    torch.testing.assert_close(maps[:, 1], torch.ones(3, 4, 4))


def test_enlarged_maps_peak_where_the_patch_is():
    maps = attention_maps(Spotlight(), torch.zeros(1, 1, 32, 32))
    assert maps.shape == (1, 2, 32, 32)
    assert maps.min() >= 0
    row, column = divmod(int(maps[0, 0].argmax()), 32)
    assert 8 <= row < 16
    assert 16 <= column < 24
    torch.testing.assert_close(maps[:, 1], torch.ones(1, 32, 32))


def test_a_models_maps_are_its_class_attention(model):
    images = torch.randn(2, 1, 24, 40)
    model.train()
    maps = attention_maps(model, images, size=(3, 5))
    assert model.training
    with torch.no_grad():
        attention = model.eval().class_attention(images)
    torch.testing.assert_close(maps, attention / attention.mean(dim=(2, 3), keepdim=True))


def test_overlay_is_heat_here_and_image_there():
    image = Image.new("L", (4, 2), 100)
    attention = torch.tensor([[0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 2.0]])
    pixels = np.asarray(overlay(image, attention, opacity=0.5))
    assert pixels.shape == (2, 4, 3)
    assert (pixels[:, :3] == 100).all()
    assert pixels[0, 3] == pytest.approx((100 + HEAT[-1]) / 2, abs=0.5)  # the most: the last colour, half of it
    assert pixels[1, 3] == pytest.approx(0.75 * 100 + 0.25 * HEAT[1], abs=0.5)  # a quarter of it: half as opaque


def test_overlay_keeps_the_images_size_and_stands_no_attention():
    assert overlay(Image.new("RGB", (50, 30)), torch.rand(4, 4)).size == (50, 30)
    black = np.asarray(overlay(Image.new("RGB", (50, 30)), torch.zeros(4, 4)))
    assert (black == 0).all()


def test_overlay_wants_one_map():
    with pytest.raises(ShapeError, match="Choose one image and head"):
        overlay(Image.new("L", (4, 4)), torch.zeros(1, 4, 4))


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(randomize):
    """A model in float64 whose every weight counts, of two class-attention layers."""

    def build(**options):
        torch.manual_seed(0)
        settings = {"patch_size": 8, "num_classes": 3, "embed_dim": 32, "depth": 2, "num_heads": 4}
        return randomize(XCiT(**settings | options)).double().eval()

    return build


def layer_norm(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_class_attention(model, images, layer):
    """The attention of the class token over all tokens (B, heads, 1 + N), and the class token that follows from it.

    Token by token in NumPy, from the tokens that enter the class-attention block; what comes before is the model's own.
    """
    entered = []
    hook = model.cls_attn_blocks[layer].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    block = model.cls_attn_blocks[layer]
    weight, bias = block.attn.qkv.weight.detach().numpy(), block.attn.qkv.bias.detach().numpy()
    B, num, C = entered[0].shape
    d = C // model.config["num_heads"]
    attention, tokens = np.zeros((B, C // d, num)), np.zeros((B, C))
    for b in range(B):
        normed = layer_norm(entered[0][b].numpy(), block.norm1)
        q, k, v = np.split(normed @ weight.T + bias, 3, axis=1)
        for head in range(C // d):
            part = slice(head * d, (head + 1) * d)
            attention[b, head] = softmax(np.array([q[0, part] @ k[n, part] / np.sqrt(d) for n in range(num)]))
            tokens[b, part] = sum(attention[b, head, n] * v[n, part] for n in range(num))
    projected = tokens @ block.attn.proj.weight.detach().numpy().T + block.attn.proj.bias.detach().numpy()
    return attention, projected


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@pytest.mark.parametrize("size", [(24, 40), (30, 45)])
def test_maps_are_the_exact_attention_of_the_forward_pass(busy, layer, size):
    model = busy()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = class_attention(model, images, layer)
    expected, token = naive_class_attention(model, images, layer)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert found.patches.shape == (2, 4, rows, columns)
    whole = found.patches.reshape(2, 4, -1) * (1 - found.own[..., None])
    np.testing.assert_allclose(whole, expected[..., 1:], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.own, expected[..., 0], rtol=1e-10)
    np.testing.assert_allclose(found.patches.sum(axis=(2, 3)), 1, rtol=1e-12)
    np.testing.assert_allclose(found.mean.sum(axis=(1, 2)), 1, rtol=1e-12)
    np.testing.assert_allclose(multiples_of_even(found.patches).mean(axis=(2, 3)), 1, rtol=1e-12)
    # attention times values is what the forward pass makes the class token of
    made = []
    hook = model.cls_attn_blocks[layer].attn.register_forward_hook(lambda module, args, output: made.append(output))
    with torch.no_grad():
        model(images)
    hook.remove()
    np.testing.assert_allclose(made[0][:, 0].numpy(), token, rtol=1e-10, atol=1e-12)


def test_in_float32_to_its_tolerance(busy):
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = class_attention(busy(), images).patches
    single = class_attention(busy().float(), images)
    np.testing.assert_allclose(single.patches, exact, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(single.patches.sum(axis=(2, 3)), 1, rtol=1e-12)


@pytest.mark.parametrize("form", ["tokens", "covariance"])
@pytest.mark.parametrize("variant", ["none", "no_temperature"])
def test_channel_attention_is_the_exact_one_of_every_block(busy, form, variant):
    model = busy(attn_form=form, variant=variant)
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    entered, made = [], []
    for each in model.blocks:
        each.attn.register_forward_hook(lambda m, a, out: entered.append(a[0]))
        each.attn.register_forward_hook(lambda m, a, out: made.append(out))
    with torch.no_grad():
        model(images)
    matrices = channel_attention(model, images)
    assert [matrix.shape for matrix in matrices] == [(2, 4, 8, 8)] * 2
    for block, x, out, matrix in zip(model.blocks, entered[:2], made[:2], matrices, strict=True):
        weight, bias = block.attn.qkv.weight.detach().numpy(), block.attn.qkv.bias.detach().numpy()
        t = np.ones((4, 1, 1)) if variant == "no_temperature" else block.attn.temperature.detach().numpy()
        for b in range(2):
            q, k, v = np.split(x[b].numpy() @ weight.T + bias, 3, axis=1)
            y = np.zeros_like(v)
            for head in range(4):
                part = slice(8 * head, 8 * head + 8)
                unit_q, unit_k = (a[:, part] / np.linalg.norm(a[:, part], axis=0) for a in (q, k))
                # the paper's softmax(K^T Q): a column is a distribution over key channels; ours is its transpose
                papers = np.stack([softmax(t[head, 0, 0] * (unit_k.T @ unit_q)[:, i]) for i in range(8)], axis=1)
                np.testing.assert_allclose(matrix[b, head], papers.T, rtol=1e-10)
                np.testing.assert_allclose(matrix[b, head].sum(axis=-1), 1, rtol=1e-12)
                y[:, part] = v[:, part] @ papers
            projected = y @ block.attn.proj.weight.detach().numpy().T + block.attn.proj.bias.detach().numpy()
            np.testing.assert_allclose(out[b].numpy(), projected, rtol=1e-8, atol=1e-10)


def test_channel_attention_without_normalised_queries(busy):
    model = busy(variant="no_qk_norm")
    images = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    entered = []
    hook = model.blocks[0].attn.register_forward_hook(lambda m, a, out: entered.append(a[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    matrix = channel_attention(model, images)[0]
    block = model.blocks[0]
    q, k, _ = np.split((entered[0][0] @ block.attn.qkv.weight.T + block.attn.qkv.bias).detach().numpy(), 3, axis=1)
    t = block.attn.temperature.detach().numpy()[2, 0, 0]
    expected = np.stack([softmax(t * (q[:, 16 + i] @ k[:, 16:24])) for i in range(8)])
    np.testing.assert_allclose(matrix[0, 2], expected, rtol=1e-9)


def test_what_cannot_be_looked_at(busy):
    images = torch.zeros(1, 3, 24, 40, dtype=torch.float64)
    with pytest.raises(ConfigError, match="class-attention layers are 0 to 1"):
        class_attention(busy(), images, 2)
    with pytest.raises(ConfigError, match="no class attention"):
        class_attention(busy(variant="avg_pool"), images)
    broken = busy()
    with torch.no_grad():
        broken.cls_attn_blocks[1].attn.qkv.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        class_attention(broken, images)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_is_the_smallest_that_holds_enough():
    rng = np.random.default_rng(0)
    for keep in (0.1, 0.6, 0.95, 1.0):
        maps = rng.exponential(size=(3, 2, 4, 5))
        masks = mass_mask(maps, keep)
        for each, mask in zip(maps.reshape(-1, 20), masks.reshape(-1, 20), strict=True):
            total = each.sum()
            assert each[mask].sum() >= keep * total * (1 - 1e-9)
            assert each[mask].sum() - each[mask].min() < keep * total  # without its least patch it is too small
            assert mask.sum() == 20 or each[mask].min() > each[~mask].max()


def test_masks_of_special_maps():
    even = mass_mask(np.full((5, 4), 1 / 20), 0.6)
    assert even.sum() == 12
    spot = np.zeros((4, 4))
    spot[2, 1] = 1
    assert (mass_mask(spot, 0.6) == (spot > 0)).all()
    assert mass_mask(np.zeros((3, 3))).sum() == 1
    with pytest.raises(ConfigError, match="keep is 0"):
        mass_mask(spot, 0)
