"""Masks between squares and images, against plain loops and against the released code's definition (grid_sample)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xcit.ops.instance_masks import crop_masks, mask_window, paste_mask, paste_masks


def released_paste(square, box, height, width):
    """The definition: sample the square where each pixel's centre lies in the box, from -1 to 1, zeros outside."""
    x0, y0, x1, y1 = box.double()
    y = ((torch.arange(height).double() + 0.5 - y0) / (y1 - y0)) * 2 - 1
    x = ((torch.arange(width).double() + 0.5 - x0) / (x1 - x0)) * 2 - 1
    grid = torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), -1)[None]
    return F.grid_sample(square.double()[None, None], grid, align_corners=False)[0, 0]


def random_boxes(n, height, width, seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-0.2, 0.9, (n, 2)) * (width, height)
    sides = np.exp(rng.uniform(math.log(0.3), math.log(1.2 * max(height, width)), (n, 2)))
    return torch.from_numpy(np.concatenate((corner, corner + sides), 1))


@pytest.mark.parametrize("seed", range(4))
def test_pasting_is_the_released_definition(seed):
    H, W = 97, 83
    boxes = random_boxes(20, H, W, seed)
    squares = torch.rand(20, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pasted = paste_masks(squares, boxes, (H, W))
    for square, box, found in zip(squares, boxes, pasted, strict=True):
        torch.testing.assert_close(found, released_paste(square, box, H, W), atol=1e-12, rtol=0)


def test_nothing_is_set_outside_the_window():
    H, W = 40, 40
    for box in random_boxes(50, H, W, 9):
        whole = released_paste(torch.ones(7, 7), box, H, W)
        top, bottom, left, right = mask_window(box, (H, W), 7)
        whole[top:bottom, left:right] = 0
        assert not whole.any()


def test_a_window_outside_the_image_is_empty():
    for box in ([-50.0, 3, -20, 9], [100.0, 3, 130, 9], [3.0, -50, 9, -20], [3.0, 90, 9, 120]):
        top, bottom, left, right = mask_window(torch.tensor(box), (30, 30), 28)
        assert bottom == top or right == left
        assert paste_mask(torch.ones(4, 4), torch.tensor(box), (top, bottom, left, right)).numel() == 0


def test_a_large_image_costs_its_box_alone():
    box = torch.tensor([11_000.0, 8_000, 11_040, 8_050])
    window = mask_window(box, (9_000, 12_000), 28)
    assert paste_mask(torch.ones(28, 28), box, window).shape == (52, 42)


def naive_crop(mask, box, side):
    """Mean of bilinear samples, ceil(extent / side) of them each way a cell, in pixels whose centres are at 0.5."""
    H, W = mask.shape
    x0, y0, x1, y1 = box.tolist()
    h, w = (y1 - y0) / side, (x1 - x0) / side
    ny, nx = math.ceil(h), math.ceil(w)

    def at(y, x):
        if y < -1 or y > H or x < -1 or x > W:
            return 0.0
        y, x = max(y, 0.0), max(x, 0.0)
        i, j = min(int(y), H - 1), min(int(x), W - 1)
        k, m = min(i + 1, H - 1), min(j + 1, W - 1)
        a, b = (0.0 if i == H - 1 else y - i), (0.0 if j == W - 1 else x - j)
        return mask[i, j] * (1 - a) * (1 - b) + mask[k, j] * a * (1 - b) + mask[i, m] * (1 - a) * b + mask[k, m] * a * b

    cells = np.zeros((side, side))
    for r in range(side):
        for c in range(side):
            samples = [
                at(y0 - 0.5 + h * (r + (s + 0.5) / ny), x0 - 0.5 + w * (c + (t + 0.5) / nx))
                for s in range(ny)
                for t in range(nx)
            ]
            cells[r, c] = np.mean(samples)
    return cells


def test_cropping_is_the_plain_loop():
    rng = np.random.default_rng(0)
    masks = (rng.random((6, 30, 40)) < 0.5).astype(np.float64)
    masks[3:] = np.add.outer(np.arange(30), np.arange(40)) % 17 < 9
    boxes = torch.tensor(
        [
            [3.3, 2.1, 20.7, 25.0],
            [0, 0, 40, 30],
            [10, 10, 11, 11],
            [5.5, 4, 33, 9.25],
            [30, 20, 39.9, 29.9],
            [1, 1, 9, 28],
        ],
        dtype=torch.float64,
    )
    cropped = crop_masks(torch.from_numpy(masks), boxes, 7)
    for mask, box, found in zip(masks, boxes, cropped, strict=True):
        cells = naive_crop(mask, box, 7)
        clear = np.abs(cells - 0.5) > 1e-9  # a cell that is half covered may round either way
        np.testing.assert_array_equal(found.numpy()[clear], (cells >= 0.5)[clear])
        assert clear.mean() > 0.7


def test_no_instances():
    assert crop_masks(torch.zeros(0, 5, 5), torch.zeros(0, 4), 28).shape == (0, 28, 28)
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 6)).shape == (0, 5, 6)


def test_there_and_back():
    """A mask that fills its box comes back as that box, to a pixel's rim."""
    masks = torch.zeros(1, 60, 80)
    masks[0, 10:50, 20:70] = 1
    box = torch.tensor([[20.0, 10, 70, 50]])
    back = paste_masks(crop_masks(masks, box, 28), box, (60, 80))[0] >= 0.5
    assert (back != masks[0].bool()).sum() == 0
