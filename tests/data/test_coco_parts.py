"""Parts of a COCO-format set: found where people put them, refused where they do not fit together."""

import json

import numpy as np
import pytest
from PIL import Image

from xcit.data.coco_parts import open_coco_parts
from xcit.errors import DataError


def write(file, num=4, categories=("cat", "dog"), annotated=True, seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = file.parent / "images"
    folder.mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(num):
        name = f"{file.stem}_{i}.png"
        Image.fromarray(np.full((40, 50, 3), 10 * i + seed, np.uint8)).save(folder / name)
        images.append({"id": i, "file_name": name, "height": 40, "width": 50})
        if annotated and i % 2 == 0:
            annotations.append({
                "id": i + 1, "image_id": i, "category_id": 10, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0,
                "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]],
            })  # fmt: skip
    entries = [{"id": 10 + i, "name": name} for i, name in enumerate(categories)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": entries}))


@pytest.mark.parametrize(
    "places",
    [
        ("train/annotations.json", "val/annotations.json", "test/annotations.json"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"),
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json", None),
        ("train.json", "validation.json", "test.json"),
    ],
)
def test_layouts(tmp_path, places):
    for number, place in enumerate(places):
        if place:
            write(tmp_path / place, num=4 + number)
    splits = open_coco_parts(tmp_path)
    assert (len(splits.train), len(splits.val)) == (4, 5)
    assert (len(splits.test) if splits.test else None) == (6 if places[2] else None)


def test_images_are_set_aside_where_there_is_no_part(tmp_path):
    write(tmp_path / "train" / "annotations.json", num=20)
    a, b, c = (open_coco_parts(tmp_path, val_fraction=0.25, split_seed=seed) for seed in (0, 0, 1))
    assert (len(a.train), len(a.val)) == (15, 5)
    assert not set(a.train.image_ids) & set(a.val.image_ids)
    assert list(a.val.image_ids) == list(b.val.image_ids) != list(c.val.image_ids)
    assert "5 training images were set aside" in " ".join(a.notes)
    for images in (a.train, a.val):  # annotations go with their images
        for i in range(len(images)):
            assert len(images.instances(i).boxes) == (images.image_ids[i] % 2 == 0)
            assert np.asarray(images.open(i))[0, 0, 0] == 10 * images.image_ids[i] % 256
    alone = open_coco_parts(tmp_path / "train" / "annotations.json")
    assert len(alone.train) + len(alone.val) == 20


def test_a_category_without_instances_is_told(tmp_path):
    write(tmp_path / "train.json", num=20)
    assert "never found: dog" in " ".join(open_coco_parts(tmp_path).notes)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        open_coco_parts(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no annotations to train on; looked for train/annotations\.json"):
        open_coco_parts(tmp_path)
    write(tmp_path / "train.json")
    write(tmp_path / "val.json", categories=("cat", "cow"))
    with pytest.raises(DataError, match="id 11 is 'cow', there it is 'dog'"):
        open_coco_parts(tmp_path)
    write(tmp_path / "val.json", annotated=False)
    with pytest.raises(DataError, match="none of its 0 annotations can be used"):
        open_coco_parts(tmp_path)
    (tmp_path / "val.json").unlink()
    write(tmp_path / "train.json", num=1)
    with pytest.raises(DataError, match="none would be left to train on"):
        open_coco_parts(tmp_path)
