"""Search finds copies of indexed images: rotated, cropped, compressed again.

The index holds scenes of one to eight digits, crops of photographs and digits. No released weights are needed: a small
XCiT learns in a few minutes, from other scenes, other halves of the photographs and other digits, that changed copies
of an image are one image, by a contrast of each batch's pairs.
"""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images

from xcit.data.digits import digit_splits
from xcit.data.preprocess import Preprocessing
from xcit.data.scenes import compose_scene, scene_seed
from xcit.errors import ConfigError
from xcit.inference.feature_file import FeatureTable, Origin
from xcit.inference.features import FeatureExtractor, pooled_features
from xcit.inference.index import TARGET_RECALL, build_index
from xcit.models.xcit import XCiT

pytestmark = pytest.mark.slow

SIDE, POOL = 64, "avg"
STEPS, PAIRS, TEMPERATURE = 700, 64, 0.1
NUM_SCENES, NUM_CROPS, NUM_DIGITS = 400, 30, 200
FOUND = 0.95


def scenes(part, num, seed):
    return [Image.fromarray(compose_scene(scene_seed(seed, i), part).image) for i in range(num)]


def photo_crops(half, num, seed, most_shared):
    """Crops of one half of both photographs; of the smaller of two, the other covers at most a share."""
    rng, photos = np.random.default_rng(seed), [Image.fromarray(x) for x in load_sample_images().images]
    taken, crops = [], []
    while len(crops) < num:
        which = int(rng.integers(2))
        photo = photos[which]
        w = int(rng.integers(56, 96))
        h = int(w * rng.uniform(0.8, 1.25))
        x = int(rng.integers(half * photo.width // 2, (half + 1) * photo.width // 2 - w))
        y = int(rng.integers(0, photo.height - h))
        shared = [
            max(0, min(x + w, X + W) - max(x, X)) * max(0, min(y + h, Y + H) - max(y, Y)) / min(w * h, W * H)
            for other, X, Y, W, H in taken
            if other == which
        ]
        if max(shared, default=0) <= most_shared:
            taken.append((which, x, y, w, h))
            crops.append(photo.crop((x, y, x + w, y + h)))
    return crops


def digits(part, num):
    enlarge = Preprocessing((64, 64), mean=(0.0,), std=(1.0,), in_chans=1)
    return [enlarge.resize_and_crop(part.picture(i)).convert("RGB") for i in range(num)]


def rotated(image, rng):
    return image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)


def cropped(image, rng):
    w, h = (round(side * 0.8**0.5) for side in image.size)
    x, y = int(rng.integers(0, image.width - w + 1)), int(rng.integers(0, image.height - h + 1))
    return image.crop((x, y, x + w, y + h))


def compressed(image, rng, quality=30):
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    with Image.open(file) as copy:
        return copy.convert("RGB")


COPIES = {"rotated by up to 15 degrees": rotated, "cropped to 80 % of the area": cropped, "JPEG at 30": compressed}


def view(image, rng, prepare):
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    side = rng.uniform(0.65, 1) ** 0.5
    w, h = int(image.width * side), int(image.height * side)
    x, y = int(rng.integers(0, image.width - w + 1)), int(rng.integers(0, image.height - h + 1))
    image = image.crop((x, y, x + w, y + h))
    if rng.random() < 0.3:
        image = compressed(image, rng, int(rng.integers(15, 80)))
    return prepare(image)


@pytest.fixture(scope="module")
def trained():
    """A small model after a few minutes on images none of which is in the index."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order wherever it runs
    try:
        return contrasted()
    finally:
        torch.set_num_threads(threads)


def contrasted():
    torch.manual_seed(0)
    rng = np.random.default_rng(5)
    pool = [scene.resize((213, 160)) for scene in scenes("train", 1200, 2)]
    pool += photo_crops(0, 150, 3, 1.0) + digits(digit_splits().train, 300)
    model = XCiT(embed_dim=64, depth=1, num_heads=4, patch_size=8, num_classes=0)
    prepare = Preprocessing((SIDE, SIDE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / STEPS))
    )
    same = torch.cat([torch.arange(PAIRS, 2 * PAIRS), torch.arange(PAIRS)])
    for _ in range(STEPS):
        chosen = rng.choice(len(pool), PAIRS, replace=False)
        batch = torch.stack([view(pool[i], rng, prepare) for _ in range(2) for i in chosen])
        z = F.normalize(pooled_features(model, batch, POOL), dim=1)
        cosines = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        optimizer.zero_grad()
        F.cross_entropy(cosines, same).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return FeatureExtractor(model.eval(), pool=POOL, preprocessing=prepare)


@pytest.fixture(scope="module")
def images():
    return scenes("test", NUM_SCENES, 1) + photo_crops(1, NUM_CROPS, 0, 0.4) + digits(digit_splits().test, NUM_DIGITS)


@pytest.fixture(scope="module")
def table(trained, images):
    features = trained(images)
    none = np.zeros(len(features), np.int64)
    return FeatureTable(Origin(trained.fingerprint, trained.settings, "."), list(map(str, none)), features, none, none)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_a_copy_finds_its_original_first(trained, images, table, change):
    queries = trained([change(image, np.random.default_rng([3, i])) for i, image in enumerate(images)])
    originals = np.arange(len(images))
    for kind in ("exact", "hnsw", "ivf"):
        index = build_index(table, kind)
        assert index.recall is None or index.recall.value >= TARGET_RECALL
        first = index.search(queries, 1).positions[:, 0]
        assert (first == originals).mean() >= FOUND, kind


def test_an_index_of_another_model_is_refused(table):
    torch.manual_seed(1)
    model = XCiT(embed_dim=64, depth=1, num_heads=4, patch_size=8, num_classes=0).eval()
    other = FeatureExtractor(model, pool=POOL, preprocessing=Preprocessing((SIDE, SIDE)))
    with pytest.raises(ConfigError, match=r"was made with XCiT .* not with XCiT"):
        build_index(table).check_origin(Origin(other.fingerprint, other.settings, "."), "a.index")
