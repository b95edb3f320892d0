"""Attention follows the object: a classifier is trained on scenes of one digit on a photograph, and then watched.

It never sees where the digit is, apart from a start at which the photograph fades in from its mean colour, without
which so small a model does not begin to learn in minutes.
"""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xcit.data.scenes import Scene, compose_scene, scene_seed
from xcit.inference.attention_maps import class_attention
from xcit.models.xcit import XCiT

DIGIT = {"num_digits": (1, 1), "height": (20, 26), "max_degrees": 15.0}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
FADE = (1.2, 3.5)
"""Epochs between which the photograph comes."""
STAGES = ((40, 8000, 5, 1e-3, 0.1), (64, 3000, 4, 8e-4, 0.2))
"""Side in pixels, scenes, epochs, learning rate, share of the steps to warm up."""
BATCH, PATCH, NUM_TEST = 32, 8, 200


def scenes(part, num, seed, side) -> list[Scene]:
    return [compose_scene(scene_seed(seed, i), part, size=(side, side), label=i % 10, **DIGIT) for i in range(num)]


def tensors(found):
    images = torch.from_numpy(np.stack([scene.image for scene in found])).permute(0, 3, 1, 2)
    return images, torch.tensor([scene.labels[0] for scene in found])


def faded(images, masks, photo):
    """The photograph around the ink, of which only this share has come: 0 is its mean colour, 1 all of it."""
    if photo >= 1:
        return images
    ground = (images * ~masks).sum((2, 3), keepdim=True) / (~masks).sum((2, 3), keepdim=True)
    return torch.where(masks, images, ground + photo * (images - ground))


def train_on_scenes(stages=STAGES) -> XCiT:
    """Train a small XCiT to name the digit, a few minutes on one thread."""
    torch.manual_seed(0)
    model = XCiT(patch_size=PATCH, num_classes=10, embed_dim=64, depth=4, num_heads=4)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    for stage, (side, num, epochs, lr, warmup) in enumerate(stages):
        found = scenes("train", num, 1, side)
        images, labels = tensors(found)
        masks = torch.from_numpy(np.stack([scene.masks[0] for scene in found]))[:, None]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        steps = num // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=warmup)
        model.train()
        for epoch in range(epochs):
            order = torch.randperm(num)
            for step in range(steps):
                chosen = order[step * BATCH : (step + 1) * BATCH]
                photo = (epoch + step / steps - FADE[0]) / (FADE[1] - FADE[0]) if stage == 0 else 1.0
                x = faded(images[chosen].float(), masks[chosen], max(0.0, photo))
                x = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, 255 - x, x)  # bright ink and dark ink alike
                x = ((x - MEAN) / STD)[:, torch.randperm(3)]
                loss = F.cross_entropy(model(x), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_mean_map_lies_on_the_digit(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = train_on_scenes()
    finally:
        torch.set_num_threads(threads)
    test = scenes("test", NUM_TEST, 2, 64)
    images, labels = tensors(test)
    images = (images.float() - MEAN) / STD
    ink = np.stack([scene.masks[0] for scene in test])
    boxes = np.zeros_like(ink)
    for box, scene in zip(boxes, test, strict=True):
        x0, y0, x1, y1 = scene.boxes[0]
        box[y0:y1, x0:x1] = True
    assert ink.mean(axis=(1, 2)).max() <= 0.15
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    lines = [f"accuracy {accuracy:.3f}, ink {ink.mean():.3f} and box {boxes.mean():.3f} of the area"]
    for layer in (0, 1):
        mean = class_attention(model, images, layer).mean
        np.testing.assert_allclose(mean.sum(axis=(1, 2)), 1, rtol=1e-9)
        mass = np.repeat(np.repeat(mean, PATCH, axis=1), PATCH, axis=2) / PATCH**2  # a patch's share, spread over it
        gain = {}
        for name, inside in (("ink", ink), ("box", boxes)):
            held = (mass * inside).sum(axis=(1, 2))
            gain[name] = (held / inside.mean(axis=(1, 2))).mean()
            lines.append(f"layer {layer + 1}, {name}: holds {held.mean():.3f}, {gain[name]:.2f} times its area share")
        assert gain["ink"] >= 3
        assert gain["box"] >= 3
    with capsys.disabled():  # the figures of docs/attention.md
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert accuracy >= 0.3  # three times chance: it looks there for a reason
