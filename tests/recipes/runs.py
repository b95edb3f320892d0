"""A small run that several test files use, and how runs are compared."""

import csv
import json
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

from xcit.data.digits import digit_splits
from xcit.recipes.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from xcit.recipes.settings import ComputeConfig

COUNTS = {"train": 19, "val": 5, "test": 6}
"""Images of each digit."""


@contextmanager
def one_thread():
    """Small tensors gain nothing from more, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def digits_folder():
    """Some of the digits as an image folder, 8 px a side, written once."""
    root = Path(tempfile.mkdtemp(prefix="xcit-test-")) / "digits"
    for part, digits in zip(COUNTS, digit_splits(), strict=True):
        for digit in range(10):
            folder = root / part / str(digit)
            folder.mkdir(parents=True)
            for index in (digits.labels == digit).nonzero()[0][: COUNTS[part]]:
                digits.picture(int(index)).save(folder / f"{index}.png")
    return root


TINY = TrainConfig(
    recipe="tiny",
    seed=3,
    epochs=3,
    model=ModelConfig(
        name="xcit_nano_12_p8",
        options={"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2},
        drop_path_rate=0.1,
    ),
    data=DataConfig(root=str(digits_folder()), image_size=16, in_chans=1, normalize="data", num_workers=0),
    augment=AugmentConfig(
        crop="none", hflip=0, rand_augment="", color_jitter=0, degrees=10, erase=0.1, mixup=0.2, cutmix=1.0, repeats=1
    ),
    optim=OptimConfig(lr=1e-2, lr_batch=0, batch_size=20, warmup_epochs=0.5, ema_decay=0.9),
    compute=ComputeConfig(device="cpu", checkpoint_minutes=0),
)
STEPS = 190 // 20
"""Steps an epoch."""


def history(run):
    with run.history.open() as file:
        return list(csv.DictReader(file))


def weights(path):
    return safetensors.torch.load_file(path)


def log_lines(run):
    """The log without what the machine's speed decides."""
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def assert_same_run(ours, theirs):
    """Weights, averages, optimiser, figures and log are bitwise those of another run."""
    for name in ("model", "last_model", "ema_model"):
        mine, other = weights(getattr(ours, name)), weights(getattr(theirs, name))
        assert mine.keys() == other.keys()
        assert [key for key in mine if not torch.equal(mine[key], other[key])] == []
    assert_same_state(*(torch.load(run.last, weights_only=True) for run in (ours, theirs)))
    assert log_lines(ours) == log_lines(theirs)
    assert json.loads(ours.metrics.read_text())["test"] == json.loads(theirs.metrics.read_text())["test"]


TIMES = ("seconds", "images_per_second", "data_wait", "log", "compute")


def assert_same_state(ours, theirs, place="state"):
    """Every tensor and number of two saved states is the same, times and lengths of files aside."""
    assert type(ours) is type(theirs), place
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            if key not in TIMES:
                assert_same_state(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), place
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_state(mine, other, f"{place}[{i}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place
