"""Composed scenes: what is said to be in them is in them, and the parts share nothing."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from xcit.data import scenes
from xcit.data.digits import digit_splits
from xcit.data.scenes import Scene, compose_scene, scene_folder, scene_seed
from xcit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def some() -> list[Scene]:
    return [compose_scene(scene_seed(7, i), "train" if i % 2 else "test") for i in range(40)]


def test_a_scene_is_as_large_and_as_full_as_asked(some):
    for scene in some:
        n = len(scene.labels)
        assert scene.image.shape == (240, 320, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= n <= 8
        assert scene.boxes.shape == (n, 4)
        assert scene.masks.shape == (n, 240, 320)
        assert scene.masks.dtype == bool
        assert scene.visible.shape == (n,)
    assert {len(scene.labels) for scene in some} == set(range(1, 9))
    assert {label for scene in some for label in scene.labels} == set(range(10))


def test_boxes_are_the_masks_own_and_masks_do_not_meet(some):
    for scene in some:
        assert scene.masks.sum(axis=0).max() == 1
        for (x0, y0, x1, y1), mask in zip(scene.boxes, scene.masks, strict=True):
            ys, xs = np.nonzero(mask)
            assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_masks_are_exactly_where_ink_is(monkeypatch):
    """Over a black photograph, in white ink, unblurred: the mask is where the picture is more than half white."""
    monkeypatch.setattr(scenes, "_background", lambda rng, part, size: np.zeros((*size, 3), dtype=np.float32))
    monkeypatch.setattr(scenes, "_ink_colour", lambda rng, under: np.full(3, 255.0))
    for seed in range(10):
        scene = compose_scene(seed, "train", num_digits=(1, 1))
        covered = scene.image[..., 0] / scene.image.max()
        mask = scene.masks[0]
        # the ink's opacity is at least 0.8, and 8 bits round
        assert covered[mask].min() >= 0.49
        assert covered[~mask].max() <= 0.51
        assert scene.visible == [1.0]


def test_ink_is_seen_on_the_photograph(some):
    """What surrounds a digit differs from it: no digit is drawn in the colour of its ground."""
    for scene in some:
        photo = ~scene.masks.any(axis=0)
        for (x0, y0, x1, y1), mask in zip(scene.boxes, scene.masks, strict=True):
            around = photo[y0:y1, x0:x1]
            if scene.masks[:, y0:y1, x0:x1].any(axis=(1, 2)).sum() == 1:  # no other digit in its box
                luma = scene.image[y0:y1, x0:x1] @ scenes.LUMA
                assert abs(luma[mask[y0:y1, x0:x1]].mean() - luma[around].mean()) > 15


def test_overlaps_stay_below_their_bound(some):
    for scene in some:
        assert scene.visible.min() >= 0.5
        assert scene.visible.max() == 1.0
    crowded = [
        compose_scene(i, "train", size=(160, 160), num_digits=(6, 8), height=(40, 60), max_overlap=0.3)
        for i in range(10)
    ]
    assert any(scene.visible.min() < 1 for scene in crowded)
    for scene in crowded:
        assert len(scene.labels) >= 6
        assert scene.visible.min() >= 0.7
    for i in range(10):
        scene = compose_scene(i, "test", max_overlap=0.0)
        assert scene.visible.min() == 1.0
        for a in range(len(scene.boxes)):
            for b in range(a):
                x0, y0 = np.maximum(scene.boxes[a][:2], scene.boxes[b][:2])
                x1, y1 = np.minimum(scene.boxes[a][2:], scene.boxes[b][2:])
                assert x1 <= x0 or y1 <= y0


def test_heights_and_angles_are_as_asked():
    tall = []
    for i in range(60):
        scene = compose_scene(i, "train", num_digits=(1, 1), height=(60, 60), max_degrees=0.0)
        tall.append(scene.boxes[0][3] - scene.boxes[0][1])
    # a thin stroke at the border of the 8 x 8 cells is a little shorter than its cells
    assert min(tall) >= 50
    assert max(tall) <= 64
    assert 56 <= np.median(tall) <= 62
    wide = [
        compose_scene(i, "train", num_digits=(1, 1), height=(60, 60), max_degrees=90, label=1).boxes[0]
        for i in range(20)
    ]
    assert max(x1 - x0 for x0, y0, x1, y1 in wide) > 50  # a one that lies


def test_the_same_seed_gives_the_same_bytes():
    def digest(seed, part, **options):
        scene = compose_scene(seed, part, **options)
        arrays = (scene.image, scene.boxes, scene.masks, scene.visible)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest(), scene.labels

    assert digest(5, "train") == digest(5, "train")
    assert len({digest(s, p)[0] for s in range(5) for p in ("train", "test")}) == 10
    assert len({scene_seed(s, i) for s in range(30) for i in range(30)}) == 900


def test_parts_share_no_digit():
    train, test = (set(scenes._digits(part).indices) for part in scenes.PARTS)
    splits = digit_splits()
    assert not train & test
    assert test == set(splits.test.indices)
    assert train == set(splits.train.indices) | set(splits.val.indices)


def test_parts_share_no_pixel_of_the_photographs(monkeypatch):
    """With every pixel its own number, the numbers that reach the parts' backgrounds are disjoint."""
    # 640 columns do not fit into 8 bits: paint the halves instead, and look for a foreign shade
    photo = np.full((427, 640, 3), 10, dtype=np.uint8)
    photo[:, 320:] = 200
    monkeypatch.setattr(scenes, "_photos", lambda: [photo])
    for part, shade in (("train", 10), ("test", 200)):
        assert scenes._half(photo, part).shape == (427, 320, 3)
        seen = []
        for i in range(50):
            ground = scenes._background(np.random.default_rng(i), part, (240, 320))
            assert np.ptp(ground) == 0  # one shade alone
            seen.append(ground.mean())
        assert abs(np.median(seen) - shade) < 15


def test_both_photographs_come_up():
    flat = [compose_scene(i, "train", num_digits=(1, 1), height=(20, 20)).image for i in range(30)]
    blue = [image[..., 2].mean() - image[..., 0].mean() for image in flat]  # sky and lake against petals
    assert min(blue) < max(blue) - 20


def test_a_folder_of_scenes_is_one_of_classes(tmp_path):
    scene_folder(tmp_path / "train", 24, 3, "train", size=(64, 80), height=(20, 40))
    files = sorted((tmp_path / "train").rglob("*.png"))
    assert [p.parent.name for p in files] == sorted(str(i % 10) for i in range(24))
    again = compose_scene(scene_seed(3, 17), "train", size=(64, 80), height=(20, 40), num_digits=(1, 1), label=7)
    assert again.labels == (7,)
    with Image.open(tmp_path / "train" / "7" / "00017.png") as image:
        assert (np.asarray(image) == again.image).all()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="name a new or an empty folder"):
        scene_folder(tmp_path, 10, 0, "train")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"part": "val"}, "part is 'val'"),
        ({"num_digits": (0, 3)}, "num_digits"),
        ({"num_digits": (4, 3)}, "num_digits"),
        ({"height": (4, 20)}, "height"),
        ({"size": (100, 320)}, "135 px each way"),
        ({"max_degrees": 181.0}, "max_degrees"),
        ({"max_overlap": 1.5}, "max_overlap"),
        ({"label": 10}, "label is 10"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        compose_scene(**{"seed": 0, "part": "train"} | options)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError, match=r"seed.*max_degrees.*label"):
        compose_scene(-1, "train", max_degrees=-1, label=11)


def test_too_many_digits_for_the_room_are_refused():
    with pytest.raises(ConfigError, match="found no place"):
        compose_scene(0, "train", size=(96, 96), num_digits=(8, 8), height=(60, 64), max_overlap=0.0)


def test_a_folder_needs_all_classes(tmp_path):
    with pytest.raises(ConfigError, match="10 or more"):
        scene_folder(tmp_path / "x", 9, 0, "train")
