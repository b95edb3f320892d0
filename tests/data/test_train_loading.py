"""Sampling and loaders: what is drawn depends on seed, epoch and position alone, and a broken file costs one image."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from xcit.data.datasets import EvalImages, TrainImages
from xcit.data.image_set import ImageSet
from xcit.data.loading import TrainLoader, default_workers, eval_loader
from xcit.data.preprocess import Preprocessing
from xcit.data.sampling import Draw, EpochSampler, ShareSampler, derive_seed, seeded
from xcit.errors import ConfigError, DataError

PREPROCESSING = Preprocessing((8, 8), mean=(0.5,), std=(0.5,), in_chans=1)


class Reader:
    """Grey images whose value is their number; some are broken."""

    def __init__(self, broken=()):
        self.broken = frozenset(broken)

    def __call__(self, number):
        if number in self.broken:
            raise DataError(f"image {number} is broken.")
        return Image.new("L", (8, 8), number)


def image_set(count=40, broken=(), classes=4):
    return ImageSet(
        class_names=tuple("abcd"[:classes]),
        names=[f"{i}.png" for i in range(count)],
        labels=np.arange(count) % classes,
        read=Reader(broken),
        numbers=np.arange(count),
    )


def noisy(image):
    """A transform that draws from all three global generators."""
    noise = random.random() + np.random.rand() + torch.rand(())
    return torch.full((1, 8, 8), float(image.getpixel((0, 0)))) + noise


def loader(num_workers=0, *, broken=(), batch_size=10, rank=0, world_size=1, repeats=1, share=0.1, count=40):
    sampler = EpochSampler(count, batch_size, seed=5, repeats=repeats, rank=rank, world_size=world_size)
    dataset = TrainImages(image_set(count, broken), noisy)
    return TrainLoader(dataset, sampler, batch_size // world_size, num_workers=num_workers, max_bad_fraction=share)


def test_an_epoch_draws_every_image_once_in_an_order_of_its_own():
    sampler = EpochSampler(40, 10, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([draw.index for draw in sampler])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] == orders[2] != orders[1]
    assert [draw.index for draw in EpochSampler(40, 10, seed=1)] != orders[0]


def test_every_draw_has_its_own_seed():
    sampler = EpochSampler(40, 10, seed=0, repeats=3)
    seeds = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seeds |= {draw.seed for draw in sampler}
    assert len(seeds) == 3 * 40


def test_images_left_over_differ_from_epoch_to_epoch():
    sampler = EpochSampler(43, 10, seed=0)
    assert len(sampler) == 40
    left = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        left.append(frozenset(range(43)) - {draw.index for draw in sampler})
    assert all(len(each) == 3 for each in left)
    assert len(set(left)) == 4


def test_repeated_augmentation_keeps_the_length_of_an_epoch():
    draws = list(EpochSampler(42, 6, seed=0, repeats=3))
    assert len(draws) == 42
    assert set(Counter(draw.index for draw in draws).values()) == {3}
    assert [draw.index for draw in draws[:3]] == [draws[0].index] * 3
    assert len({draw.seed for draw in draws[:3]}) == 3


@pytest.mark.parametrize("repeats", [1, 3])
def test_several_processes_draw_in_each_step_what_one_does(repeats):
    alone = list(EpochSampler(48, 12, seed=2, repeats=repeats))
    shares = [list(EpochSampler(48, 12, seed=2, repeats=repeats, rank=r, world_size=4)) for r in range(4)]
    for step in range(4):
        together = [draw for share in shares for draw in share[3 * step : 3 * step + 3]]
        assert sorted(together) == sorted(alone[12 * step : 12 * step + 12])


def test_a_set_smaller_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="There are 5 images to train on, fewer than the 6"):
        EpochSampler(5, 6, seed=0)


def test_each_image_is_judged_once_over_ragged_processes():
    shares = [list(ShareSampler(11, rank=r, world_size=4)) for r in range(4)]
    assert sorted(i for share in shares for i in share) == list(range(11))
    assert sorted(map(len, shares)) == [2, 3, 3, 3]
    assert len(ShareSampler(11, rank=3, world_size=4)) == 2


def test_seeds_are_spread_and_fixed():
    assert derive_seed(0, 1, 2) == 4450782424123420391
    assert len({derive_seed(a, b) for a in range(50) for b in range(50)}) == 2500
    assert 0 <= derive_seed(2**31 - 1, 0) < 2**63


def test_seeding_leaves_the_generators_as_they_were():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with seeded(7):
        within = draws()
    assert draws() == expected != within
    with seeded(7):
        assert draws() == within


def test_the_outcome_does_not_depend_on_the_workers():
    alone, helped = list(loader(0)), list(loader(2))
    assert len(alone) == len(helped) == 4
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_loader_goes_on_where_it_stopped(done, num_workers):
    def epochs(train_loader, first):
        batches = []
        for epoch in range(first, 2):
            train_loader.sampler.set_epoch(epoch)
            batches += list(train_loader)
        return batches

    whole = epochs(loader(), 0)
    stopped = loader(num_workers)
    iterator = iter(stopped)
    for _ in range(done):
        next(iterator)
    state = stopped.state_dict()
    assert state == {"epoch": done // 4, "batches": done % 4, "bad": []}

    resumed = loader(num_workers)
    resumed.load_state_dict(state)
    assert len(resumed) == 4
    rest = epochs(resumed, done // 4)
    assert len(rest) == 8 - done
    for one, other in zip(whole[done:], rest, strict=True):
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_are_replaced_noted_and_remembered(num_workers):
    train_loader = loader(num_workers, broken=(3, 17))
    batches = list(train_loader)
    assert train_loader.bad == {3, 17}
    indices, decoded = (torch.cat([getattr(b, name) for b in batches]) for name in ("indices", "decoded"))
    assert sorted(indices.tolist()) == list(range(40))
    assert set(indices[~decoded].tolist()) == {3, 17}
    again = loader(broken=(3, 17))
    again.load_state_dict(train_loader.state_dict())
    assert again.bad == {3, 17}
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, loader(broken=(3, 17)), strict=True))


def test_a_stand_in_brings_its_own_label():
    dataset = TrainImages(image_set(broken=(0, 1, 2)), lambda image: torch.tensor([[[float(image.getpixel((0, 0)))]]]))
    for seed in range(20):
        item = dataset[Draw(1, seed)]
        number = int(item.images.item())
        assert number not in (0, 1, 2)
        assert (item.labels.item(), item.indices.item(), item.decoded.item()) == (number % 4, 1, False)


def test_too_many_broken_images_stop_the_run():
    with pytest.raises(DataError, match=r"\d of 40 training images cannot be used .* data\.max_bad_fraction=0\.1"):
        list(loader(broken=range(8), share=0.1))
    assert len(list(loader(broken=range(8), share=0.25))) == 4


def test_nothing_but_broken_images():
    dataset = TrainImages(image_set(broken=range(40)), noisy)
    with pytest.raises(DataError, match=r"20 images in a row could not be decoded\. The first: image 7 is broken"):
        dataset[Draw(7, 1)]


def test_judging_marks_what_cannot_be_decoded():
    batches = list(eval_loader(EvalImages(image_set(11, broken=(4,)), PREPROCESSING), 4))
    assert [len(batch.images) for batch in batches] == [4, 4, 3]
    decoded, images = torch.cat([b.decoded for b in batches]), torch.cat([b.images for b in batches])
    assert decoded.tolist() == [i != 4 for i in range(11)]
    assert torch.all(images[4] == 0)
    assert torch.allclose(images[6], torch.tensor((6 / 255 - 0.5) / 0.5))


def test_waiting_is_measured():
    train_loader = loader()
    list(train_loader)
    assert train_loader.wait_seconds > 0


def test_workers_leave_a_core_to_the_model(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_workers() == 7
    assert default_workers(2) == 3
    assert default_workers(8) == 0


@pytest.mark.parametrize(("num_images", "steps"), [(7, 5), (40, 3), (3, 9)])
def test_epochs_of_a_given_length_follow_one_pass_with_the_other(num_images, steps):
    """Every ``num_images`` draws are each image once, wherever epochs begin; several processes draw the same."""
    epochs = []
    for epoch in range(6):
        alone = EpochSampler(num_images, 4, seed=3, steps=steps)
        shares = [EpochSampler(num_images, 4, seed=3, steps=steps, rank=r, world_size=2) for r in range(2)]
        for sampler in (alone, *shares):
            sampler.set_epoch(epoch)
        draws = list(alone)
        assert len(draws) == len(alone) == 4 * steps
        assert draws == [draw for pair in zip(*shares, strict=True) for draw in pair]
        alone.skip = 8
        assert list(alone) == draws[8:]
        epochs += draws
    for begin in range(0, len(epochs) - num_images + 1, num_images):
        assert sorted(draw.index for draw in epochs[begin : begin + num_images]) == list(range(num_images))
    assert len({draw.seed for draw in epochs}) == len(epochs)
