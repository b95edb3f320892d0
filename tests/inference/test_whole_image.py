"""At what size a model looks at a whole image."""

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError
from xcit.inference.whole_image import MAX_PICTURE, MAX_PIXELS, WholeImage

MODELS = Preprocessing((224, 224), crop_pct=0.9)


@pytest.mark.parametrize(
    ("size", "image", "seen"),
    [
        (None, (480, 640), (480, 640)),
        (None, (485, 633), (480, 640)),  # to the nearest patches
        (None, (112, 200), (224, 400)),  # enlarged to what the model expects
        ("original", (112, 204), (112, 208)),
        ("original", (3, 5), (16, 16)),  # at least a patch
        (448, (480, 960), (448, 896)),
        ((64, 320), (500, 500), (64, 320)),
    ],
)
def test_sizes(size, image, seen):
    assert WholeImage(MODELS, 16, size).seen_size(*image) == seen


@pytest.mark.parametrize("image", [(9000, 12000), (20, 100_000), (1, 5000)])
def test_large_images_are_limited_unless_asked(image):
    rows, columns = WholeImage(MODELS, 16).seen_size(*image)
    assert rows * columns <= 1.6 * MAX_PIXELS  # one patch at least
    shown = WholeImage(MODELS, 16).shown_size(*image)
    assert shown[0] * shown[1] <= 1.01 * MAX_PICTURE
    assert WholeImage(MODELS, 16, "original").seen_size(9000, 12000) == (8992, 12000)


def test_nothing_is_cropped():
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:, :30], pixels[:, -30:] = 255, 128
    tensor = WholeImage(Preprocessing((224, 224), mean=(0,) * 3, std=(1,) * 3, crop_pct=0.5), 8, (32, 96))(
        Image.fromarray(pixels)
    )
    assert tensor.shape == (3, 32, 96)
    torch.testing.assert_close(tensor[:, :, :5], torch.ones(3, 32, 5))
    torch.testing.assert_close(tensor[:, :, -5:], torch.full((3, 32, 5), 128 / 255))


@pytest.mark.parametrize("size", [8, (8, 64)])
def test_less_than_a_patch_is_refused(size):
    with pytest.raises(ConfigError, match="at least one patch"):
        WholeImage(MODELS, 16, size)
