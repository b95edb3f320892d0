"""Attention maps and their overlays, against hand-made attention."""

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.errors import ShapeError
from xcit.inference.attention_maps import HEAT, attention_maps, overlay
from xcit.models.xcit import XCiT


@pytest.fixture
def model():
    return XCiT(patch_size=8, in_chans=1, num_classes=3, embed_dim=32, depth=1, num_heads=4, drop_path_rate=0.5)


class Spotlight(torch.nn.Module):
    """Attends to the patch in row 1, column 2 with nine tenths of what it has; the second head evenly."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def class_attention(self, images):
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
