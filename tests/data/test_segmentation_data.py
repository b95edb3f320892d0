"""Images with masks as a loader gives them: the right mask for each image, the same bytes for the same draw."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from xcit.data.loading import TrainLoader, eval_loader
from xcit.data.mask_parts import open_mask_parts
from xcit.data.mask_set import IGNORE
from xcit.data.sampling import Draw, EpochSampler
from xcit.data.segmentation import EvalSegmentation, MaskedImages, TrainSegmentation, collate_masked
from xcit.data.segmentation_augment import SegmentationAugment
from xcit.errors import DataError

NUM = 12


@pytest.fixture
def images(tmp_path):
    """Image i is of the grey 20 i; so are its mask's right half (class i) and its left (class 0)."""
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(NUM)))
    for folder in ("images", "masks"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        (tmp_path / "val" / folder).mkdir(parents=True)
    for i in range(NUM):
        size = (30 + i, 24)
        mask = np.zeros(size[::-1], dtype=np.uint8)
        mask[:, size[0] // 2 :] = i
        for part in ("train", "val"):
            Image.new("RGB", size, (20 * i,) * 3).save(tmp_path / part / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / part / "masks" / f"{i}.png")
    return open_mask_parts(tmp_path).train


def augment(**options):
    plain = {"distort": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return SegmentationAugment((16, 20), 24, 96, **(plain | options))


def test_training_images_go_with_their_masks(images):
    data = TrainSegmentation(images, augment())
    assert len(data) == NUM
    batch = collate_masked([data[Draw(i, 7 * i)] for i in range(NUM)])
    assert (batch.images.shape, batch.images.dtype) == ((NUM, 3, 16, 20), torch.float32)
    assert (batch.masks.shape, batch.masks.dtype) == ((NUM, 16, 20), torch.int64)
    assert batch.indices.tolist() == list(range(NUM))
    assert batch.decoded.all()
    for i, (image, mask) in enumerate(zip(batch.images, batch.masks, strict=True)):
        inside = mask != IGNORE
        assert inside.any()
        assert set(mask[inside].tolist()) <= {0, i}
        assert ((image[:, inside] * 255).round() == 20 * i).all()
        assert (image[:, ~inside] == 0).all()
    assert {i for i in range(NUM) if (batch.masks[i] == i).any()} == set(range(NUM))


def test_the_same_draw_gives_the_same_bytes(images):
    data = TrainSegmentation(images, SegmentationAugment((16, 20), 24, 96))
    copy = pickle.loads(pickle.dumps(data))
    torch.rand(5)
    a, b, c = data[Draw(5, 1)], copy[Draw(5, 1)], data[Draw(5, 2)]
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.masks, b.masks)
    assert not torch.equal(a.images, c.images)


def test_processes_that_share_the_work_see_what_one_sees(images):
    def steps(rank, world_size, workers=0):
        sampler = EpochSampler(NUM, 4, seed=3, rank=rank, world_size=world_size)
        data = TrainSegmentation(images, SegmentationAugment((16, 20), 24, 96))
        return list(
            DataLoader(data, 4 // world_size, sampler=sampler, collate_fn=collate_masked, num_workers=workers)
        )  # fmt: skip

    alone, first, second, worker = steps(0, 1), steps(0, 2), steps(1, 2), steps(0, 1, workers=1)
    assert len(alone) == 3
    for whole, even, odd, same in zip(alone, first, second, worker, strict=True):
        for i in range(4):
            assert torch.equal(whole[i], same[i])
        assert torch.equal(whole.images[::2], even.images)
        assert torch.equal(whole.images[1::2], odd.images)
        assert torch.equal(whole.masks[1::2], odd.masks)
        assert torch.equal(whole.indices[::2], even.indices)


@pytest.mark.parametrize("broken", ["image", "mask", "size", "values"])
def test_what_cannot_be_used_is_replaced(images, broken):
    if broken == "image":
        images.path(3).write_bytes(b"")
    elif broken == "mask":
        images.mask_path(3).write_bytes(b"")
    elif broken == "size":
        Image.new("L", (9, 9)).save(images.mask_path(3))
    else:
        Image.new("L", images.open(3).size, 99).save(images.mask_path(3))
    data = TrainSegmentation(images, augment(hflip=0.0))
    items = [data[Draw(3, seed)] for seed in range(6)]
    assert not any(item.decoded.any() for item in items)
    assert all(item.indices.tolist() == [3] for item in items)
    stand_ins = {int((item.images[0, 0, 0, 0] * 255).round()) // 20 for item in items}
    assert 3 not in stand_ins
    assert len(stand_ins) > 1
    for item in items:  # the stand-in comes with its own mask
        shown = int((item.images[0, 0, 0, 0] * 255).round()) // 20
        assert set(item.masks.unique().tolist()) <= {IGNORE, 0, shown}
    again = data[Draw(3, 2)]
    assert torch.equal(again.images, items[2].images)
    assert data[Draw(4, 0)].decoded.all()

    judged = EvalSegmentation(images)[3]
    assert not judged.decoded
    assert judged.indices.tolist() == [3]
    assert (judged.images[0].shape, judged.images[0].dtype) == ((3, 32, 32), torch.uint8)
    assert (judged.masks[0] == IGNORE).all()


def test_nothing_that_can_be_used(images):
    for i in range(NUM):
        images.mask_path(i).write_bytes(b"x")
    with pytest.raises(DataError, match=r"20 images in a row could not be decoded. The first: .*masks/5\.png: is not"):
        TrainSegmentation(images, augment())[Draw(5, 0)]


def test_the_loaders_of_training(images):
    """They batch masked images without being told how, and stop where too many masks are broken."""
    data = TrainSegmentation(images, augment())
    batches = list(TrainLoader(data, EpochSampler(NUM, 4, seed=0), 4, max_bad_fraction=0.1))
    assert [batch.images.shape for batch in batches] == [(4, 3, 16, 20)] * 3
    assert sorted(i for batch in batches for i in batch.indices.tolist()) == list(range(NUM))
    for i in (2, 3):
        images.mask_path(i).write_bytes(b"x")
    with pytest.raises(DataError, match=r"2 of 12 training images cannot be used .*xcit data check-masks, or allow"):
        list(TrainLoader(data, EpochSampler(NUM, 4, seed=0), 4, max_bad_fraction=0.1))


def test_evaluation_at_full_size(images):
    loader = eval_loader(EvalSegmentation(images), 3)
    seen = []
    for batch in loader:
        assert isinstance(batch, MaskedImages)
        assert (len(batch.images), len(batch.masks), batch.indices.shape) == (3, 3, (3,))
        for image, mask, index in zip(batch.images, batch.masks, batch.indices.tolist(), strict=True):
            assert (image.shape, image.dtype) == ((3, 24, 30 + index), torch.uint8)
            assert (image == 20 * index).all()
            assert (mask.shape, mask.dtype) == ((24, 30 + index), torch.int64)
            assert mask[:, -1].unique().tolist() == [index]
            seen.append(index)
        assert batch.decoded.all()
    assert seen == list(range(NUM))
