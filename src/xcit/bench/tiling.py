"""What tiles get wrong: a small XCiT looks for one digit in images that grow, whole and tile by tile.

It learns on images of 64 to 256 px, black but for one handwritten digit of 32 px at a random place, whose class is
theirs. Then it is tested on larger ones: as a single image (``GiantImages``), and by tiles of 128 px whose logits are
averaged (``TiledImages``). All but one to four of the tiles show nothing, and a digit may lie across an edge.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xcit.bench import results
from xcit.data.digits import Digits, digit_splits
from xcit.inference.giant import GiantImages
from xcit.inference.giant_tiles import TiledImages
from xcit.models.xcit import XCiT

COLUMNS = ("date", "side", "tile", "images", "steps", "whole", "tiled", *results.ENVIRONMENT)
DIGIT, TILE = 32, 128
TRAINED_ON = (64, 128, 192, 256)
TESTED_ON = (128, 256, 512, 1024)
MEAN, STD = 0.02, 0.15


def run(*, steps: int, images: int, results_dir: Path | None, say: Callable[[str], None] = print) -> None:
    """Train, test, print, and add a row for each size to ``tiling.csv``.

    Args:
        steps: of training, of 32 images each.
        images: that are tested of each size.
        results_dir: folder of the CSV file; None to print only.
        say: takes a line on what is going on.
    """
    torch.manual_seed(0)
    splits = digit_splits()
    model = train(splits.train, steps, say)
    giant = GiantImages(model, device="cpu", mean=(MEAN,), std=(STD,))
    tiles = TiledImages(giant, TILE)
    date = results.now()
    for side in TESTED_ON:
        draw = np.random.default_rng(side)
        right = {"whole": 0, "tiled": 0}
        for _ in range(images):
            index = int(draw.integers(len(splits.test)))
            canvas = canvas_of(splits.test, index, side, draw)
            label = int(splits.test.labels[index])
            right["whole"] += int(_class_of(giant.classify(canvas).logits) == label)
            right["tiled"] += int(_class_of(tiles.classify(canvas).logits) == label)
        shares = {name: f"{count / images:.3f}" for name, count in right.items()}
        say(f"{side} px: whole {shares['whole']}, tiled {shares['tiled']}")
        facts = {"date": date, "side": str(side), "tile": str(TILE), "images": str(images), "steps": str(steps)}
        if results_dir is not None:
            results.append(results_dir / "tiling.csv", [facts | shares | results.environment("cpu")], COLUMNS)


def train(digits: Digits, steps: int, say: Callable[[str], None]) -> XCiT:
    """Return a small model that has learned to find the digit."""
    model = XCiT(patch_size=8, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, eta=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw, started = np.random.default_rng(0), time.perf_counter()
    for step in range(steps):
        side = int(draw.choice(TRAINED_ON))
        chosen = draw.integers(len(digits), size=32)
        batch = torch.stack([_prepared(canvas_of(digits, int(i), side, draw)) for i in chosen])
        loss = F.cross_entropy(model(batch), torch.as_tensor(digits.labels[chosen]).long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            say(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.0f} s")
    return model.eval()


def canvas_of(digits: Digits, index: int, side: int, draw: np.random.Generator) -> np.ndarray:
    """Return a black image (side, side) uint8 with a digit of 32 px at a random place."""
    canvas = np.zeros((side, side), np.uint8)
    top, left = draw.integers(side - DIGIT + 1, size=2)
    canvas[top : top + DIGIT, left : left + DIGIT] = np.asarray(
        digits.picture(index).convert("L").resize((DIGIT, DIGIT))
    )
    return canvas


def table(results_dir: Path) -> str:
    """The shares of images that were classified rightly."""
    rows = results.read(results_dir / "tiling.csv", COLUMNS)
    if not rows:
        return "Not measured yet: `python -m xcit.bench tiling` measures it."
    last = [row for row in rows if row["date"] == rows[-1]["date"]]
    lines = ["| image | right, as one image | right, by tiles of 128 px |", "|--:|--:|--:|"]
    lines += [
        f"| {row['side']} px | {100 * float(row['whole']):.1f} % | {100 * float(row['tiled']):.1f} % |" for row in last
    ]
    found = last[0]
    lines += ["", f"{found['images']} images of each size, {found['steps']} steps of training; torch {found['torch']}, "
                  f"xcit {found['xcit']}; {found['date'][:10]}."]  # fmt: skip
    return "\n".join(lines)


def _prepared(canvas: np.ndarray) -> Tensor:
    return (torch.from_numpy(canvas).float().div(255).sub(MEAN).div(STD)).unsqueeze(0)


def _class_of(logits: np.ndarray | None) -> int:
    assert logits is not None
    return int(logits.argmax())
