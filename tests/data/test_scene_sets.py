"""Scenes as files: COCO's own tools read what was composed, bytes are always the same, no other file is replaced."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from xcit.data import scene_sets
from xcit.data.coco import open_coco
from xcit.data.scene_sets import MANIFEST, MAX_SCENES, SEMANTIC_CLASSES, scene_annotations, semantic_mask, write_scenes
from xcit.data.scenes import compose_scene, scene_seed
from xcit.errors import BackendError, ConfigError, DataError, ExportError

# pycocotools' own, of NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SEED, NUM_TRAIN, NUM_TEST = 5, 12, 8
SMALL = {"size": (64, 80), "height": (12, 40), "num_digits": (1, 5)}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "s", NUM_TRAIN, NUM_TEST, SEED, **SMALL)


@pytest.fixture(scope="module")
def composed():
    return {
        part: [compose_scene(scene_seed(SEED, i), part, **SMALL) for i in range(num)]
        for part, num in (("train", NUM_TRAIN), ("test", NUM_TEST))
    }


def test_layout_and_counts(written, composed):
    expected = {MANIFEST, "classes.txt"}
    for part, scenes in composed.items():
        expected.add(f"{part}/annotations.json")
        expected |= {f"{part}/{kind}/{i:06d}.png" for kind in ("images", "masks") for i in range(len(scenes))}
    assert set(files(written.root)) == expected
    assert (written.root / "classes.txt").read_text().split("\n") == ["background", *"0123456789", ""]
    assert written.num_images == {"train": NUM_TRAIN, "test": NUM_TEST}
    assert written.num_digits == {part: sum(len(s.labels) for s in scenes) for part, scenes in composed.items()}


@pytest.mark.parametrize("part", ["train", "test"])
def test_pycocotools_reads_the_scenes(written, composed, part):
    coco = COCO(written.root / part / "annotations.json")
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [(d + 1, str(d)) for d in range(10)]
    images = coco.loadImgs(sorted(coco.getImgIds()))
    assert [image["id"] for image in images] == list(range(1, len(composed[part]) + 1))
    assert sorted(coco.getAnnIds()) == list(range(1, written.num_digits[part] + 1))
    for image, scene in zip(images, composed[part], strict=True):
        with Image.open(written.root / part / "images" / image["file_name"]) as file:
            assert file.mode == "RGB"
            assert np.array_equal(np.asarray(file), scene.image)
        assert (image["height"], image["width"]) == scene.image.shape[:2]
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert [a["category_id"] - 1 for a in annotations] == list(scene.labels)
        assert [a["visible"] for a in annotations] == scene.visible.tolist()
        for annotation, expected in zip(annotations, scene.masks, strict=True):
            assert isinstance(annotation["segmentation"]["counts"], str)
            mask = coco.annToMask(annotation)
            assert np.array_equal(mask, expected)
            ys, xs = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert annotation["area"] == mask.sum() > 0
            assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("part", ["train", "test"])
def test_semantic_masks_agree_with_the_annotations(written, part):
    coco = COCO(written.root / part / "annotations.json")
    seen = set()
    for image in coco.dataset["images"]:
        expected = np.zeros((image["height"], image["width"]), dtype=np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            digit = int(coco.cats[annotation["category_id"]]["name"])
            expected[coco.annToMask(annotation).astype(bool)] = SEMANTIC_CLASSES.index(str(digit))
        with Image.open(written.root / part / "masks" / image["file_name"]) as file:
            assert file.mode == "P"
            values = np.asarray(file)
            palette = np.array(file.getpalette()).reshape(-1, 3)
            shown = np.asarray(file.convert("RGB"))
        assert np.array_equal(values, expected)
        assert (palette[0] == 0).all()
        assert len({tuple(colour) for colour in palette[:11]}) == 11
        assert np.array_equal(shown, palette[values])
        seen |= set(np.unique(values).tolist())
    assert len(seen) > 5


def test_our_reader_finds_the_images(written, composed):
    coco = open_coco(written.root / "test" / "annotations.json")
    assert coco.notes == tuple(note for note in coco.notes if "without an instance" in note)
    assert not coco.missing_images()
    for i, scene in enumerate(composed["test"]):
        assert np.array_equal(np.asarray(coco.open(i)), scene.image)
        assert np.array_equal(coco.instances(i).boxes, scene.boxes)
        assert np.array_equal(coco.instances(i).masks, scene.masks)


def test_the_same_bytes_in_another_process_and_other_ones_for_another_seed(written, tmp_path):
    code = "import sys; from xcit.data.scene_sets import write_scenes as w; "
    code += f"w(sys.argv[1], {NUM_TRAIN}, {NUM_TEST}, {SEED}, **{SMALL})"
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], check=True)
    first = files(written.root)
    assert files(tmp_path / "again") == first
    write_scenes(tmp_path / "other", 3, 2, SEED + 1, **SMALL)
    for name, content in files(tmp_path / "other").items():
        assert name == "classes.txt" or content != first[name]


def test_more_scenes_of_a_seed_begin_alike_and_no_test_part_if_none_is_asked_for(written, tmp_path):
    few = write_scenes(tmp_path / "few", 3, 0, SEED, **SMALL)
    assert few.num_images == {"train": 3}
    assert sorted(path.name for path in few.root.iterdir()) == [MANIFEST, "classes.txt", "train"]
    pictures = {name: content for name, content in files(few.root).items() if name.endswith(".png")}
    assert len(pictures) == 6
    assert pictures.items() <= files(written.root).items()


def test_what_is_there_stays(tmp_path):
    folder = tmp_path / "s"
    write_scenes(folder, 2, 1, 0, **SMALL)
    with pytest.raises(DataError, match="is not empty; name a new folder, or overwrite the scenes in it"):
        write_scenes(folder, 2, 1, 0, **SMALL)
    mine = folder / "train" / "images" / "mine.png"
    mine.write_bytes(b"mine")
    before = files(folder)
    with pytest.raises(DataError, match=r"did not write, such as 'train/images/mine\.png', and will not be"):
        write_scenes(folder, 2, 1, 0, overwrite=True, **SMALL)
    assert files(folder) == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match=r"was not written by xcit data scenes; name another folder"):
        write_scenes(other, 2, 1, 0, overwrite=True, **SMALL)
    assert (other / "thesis.txt").read_text() == "years"


def test_overwriting_leaves_nothing_of_the_earlier_scenes(tmp_path):
    folder = tmp_path / "s"
    write_scenes(folder, 4, 2, 0, **SMALL)
    write_scenes(folder, 2, 0, 1, overwrite=True, **SMALL)
    write_scenes(tmp_path / "new", 2, 0, 1, **SMALL)
    assert files(folder) == files(tmp_path / "new")
    assert not (folder / "test").exists()


def test_nothing_is_overwritten_by_a_call_that_is_refused(tmp_path):
    folder = tmp_path / "s"
    write_scenes(folder, 2, 1, 0, **SMALL)
    before = files(folder)
    with pytest.raises(ConfigError):
        write_scenes(folder, 2, 1, 0, overwrite=True, size=(20, 20))
    assert files(folder) == before


def test_a_manifest_that_points_elsewhere_removes_nothing(tmp_path):
    outside = tmp_path / "precious.png"
    outside.write_bytes(b"x")
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({"files": ["../precious.png", str(outside)]}))
    write_scenes(folder, 1, 0, 0, overwrite=True, **SMALL)
    assert outside.exists()
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(DataError, match="in it is damaged; remove the folder"):
        write_scenes(folder, 1, 0, 0, overwrite=True, **SMALL)


def test_ctrl_c_leaves_whole_files_that_can_be_overwritten(tmp_path, monkeypatch):
    """Interrupted after a scene, and within the writing of a file; killed, which leaves a partial file."""
    whole = files(write_scenes(tmp_path / "whole", 4, 1, 0, **SMALL).root)
    folder = tmp_path / "s"
    done = []

    def interrupt():
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(folder, 4, 1, 0, on_scene=interrupt, **SMALL)
    left = files(folder)
    assert len(left) == 2 + 4
    assert left.items() <= whole.items()

    with monkeypatch.context() as patched:
        patched.setattr("xcit.files.os.fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_scenes(folder, 4, 1, 0, overwrite=True, **SMALL)
    assert files(folder).items() <= whole.items()

    (folder / "train" / "images").mkdir(parents=True, exist_ok=True)
    (folder / "train" / "images" / ".000002.0123abcd.partial.png").write_bytes(b"half")
    write_scenes(folder, 4, 1, 0, overwrite=True, **SMALL)
    assert files(folder) == whole


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as refused:
        write_scenes(tmp_path / "s", 0, MAX_SCENES + 1, -1, max_degrees=200.0)
    assert str(refused.value) == (
        "there must be 1 to 1,000,000 scenes to train on, not 0; there must be 0 to 1,000,000 test scenes, not "
        "1,000,001; seed is -1; it must be 0 or more; max_degrees is 200.0; it must be between 0 and 180."
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; name a folder"):
        write_scenes(tmp_path / "file", 1, 0, 0, **SMALL)
    with pytest.raises(ExportError, match="could not be written: Not a directory"):
        write_scenes(tmp_path / "file" / "s", 1, 0, 0, **SMALL)

    def missing(mask):
        raise BackendError("Masks need faster-coco-eval")

    monkeypatch.setattr(scene_sets, "encode_mask", missing)
    with pytest.raises(BackendError, match="faster-coco-eval"):
        write_scenes(tmp_path / "s", 1, 0, 0, **SMALL)
    assert not (tmp_path / "s").exists()


def test_annotations_and_masks_of_one_scene():
    scene = compose_scene(0, "train", **SMALL)
    annotations = list(scene_annotations(scene))
    assert len(annotations) == len(scene.labels)
    values = semantic_mask(scene)
    assert (values > 0).sum() == sum(a["area"] for a in annotations) == scene.masks.sum()
